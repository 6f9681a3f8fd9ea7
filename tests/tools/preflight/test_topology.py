import importlib.util
import sys

import pytest

from gfl_jax.tools.preflight.topology import topology_devices

with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:4", "2x2", "v5e:4x4x"])
def test_a_topology_that_is_none_is_named_beside_right_ones(topology):
    with pytest.raises(ValueError, match=rf"--topology is '{topology}'.*v5e:4x4"):
        topology_devices(topology)


def test_a_missing_compiler_is_said_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(RuntimeError, match=r"pip install '\.\[tpu-preflight\]'"):
        topology_devices("v5e:2x2")


@with_libtpu
def test_a_slice_that_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="'v5e:3x3' is not valid"):
        topology_devices("v5e:3x3")


@with_libtpu
@pytest.mark.parametrize(("topology", "chips"), [("v5e:1x1", 1), ("v5e:4x4", 16), ("v4:2x2x1", 4)])
def test_every_chip_is_one_device(topology, chips):
    assert len(topology_devices(topology)) == chips

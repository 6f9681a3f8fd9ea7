"""What preflight answers; with libtpu installed and --slow, small networks are compiled."""

import dataclasses
import importlib.util
import json
import sys

import pytest
from test_hlo import TEXT, V5E

from gfl_jax.config import load_experiment
from gfl_jax.data.loader import Data
from gfl_jax.tools.preflight.hlo import GIB, Collective, Part, breakdown, parse
from gfl_jax.tools.preflight.preflight import (
    Job,
    Memory,
    PreflightCommand,
    Program,
    Refused,
    comparison,
    largest_canvas,
    main,
    markdown,
    out_of_memory,
    preflight,
    to_json,
    topology_devices,
    verdict,
)


@pytest.fixture(scope="module")
def module():
    return parse(TEXT)


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (46.5G) exceeds available HBM (15.75G).",
            (46.5 * GIB, 15.75 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.",
            (20.25 * GIB, 15.75 * GIB),
        ),
        ("RESOURCE_EXHAUSTED: hbm", None),
    ],
)
def test_a_refusal_says_what_is_needed_and_what_there_is(message, sizes):
    assert out_of_memory(message) == sizes
    refused = Refused(Job("train step", 64, V5E, 4), 1.0, message)
    assert "does not fit" in verdict(refused)
    assert message in markdown(refused)
    if sizes:
        assert f"{sizes[0] / GIB:.2f} GiB" in verdict(refused)
    assert to_json(refused)["fits"] is False
    assert "No train step fits" in comparison([refused])


def program(module, images, *, temporaries=2 * GIB, chips=4):
    return Program(
        Job("train step", images, V5E, chips),
        compile_seconds=60.0,
        memory=Memory(3 * GIB, 3 * GIB, 3 * GIB, temporaries, 0),
        flops=1e12,
        bytes_accessed=1e10,
        collectives=[Collective("all-reduce", "f32", 1, 1000, chips, 0.001)],
        breakdown=breakdown(module, V5E),
    )


def test_donated_arguments_are_counted_once(module):
    assert program(module, 2).memory.total == 5 * GIB
    assert program(module, 2).free == 11 * GIB


def test_the_answer_says_whether_it_fits_how_fast_and_why(module):
    found = program(module, 2)
    assert found.seconds == pytest.approx(found.breakdown.seconds + 0.001)
    text = verdict(found)
    assert "fits: 5.00 GiB of 16.00 GiB, 69% free" in text
    assert f"{2 / found.seconds:.1f} images/s a chip, {8 / found.seconds:.0f} on 4" in text
    assert "neck forward" in text
    assert "does not fit: 23.00 GiB" in verdict(program(module, 2, temporaries=20 * GIB))


def test_memory_is_the_bound_where_copies_move_more_than_instructions(module):
    found = program(module, 2)
    slow = dataclasses.replace(found.breakdown, copies=Part("copies", 1, 1.0, int(819e9)))
    assert dataclasses.replace(found, breakdown=slow).seconds == pytest.approx(1.001, rel=1e-2)


def test_the_comparison_names_the_fastest_batch_that_fits(module):
    table = comparison(
        [program(module, 2), program(module, 8), program(module, 16, temporaries=20 * GIB)]
    )
    assert "The fastest train step that fits: 8 images a chip" in table
    assert table.count("\n| train step |") == 3


def test_the_report_shows_all_and_json_keeps_it(module):
    found = program(module, 2)
    text = markdown(found)
    for part in ("all-reduce", "neck forward", "sort (detections)", "matrix units: 1000 GFLOP"):
        assert part in text
    values = json.loads(json.dumps(to_json(found)))
    assert values["fits"] is True
    assert values["images_per_second"] == pytest.approx(4 * 2 / found.seconds)
    assert values["breakdown"]["parts"][0]["name"] == "neck forward"


# ---------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", "v5e:4", "2x2", "v5e:4x4x"])
def test_a_topology_that_is_none_is_named_beside_right_ones(topology):
    with pytest.raises(ValueError, match=rf"--topology is '{topology}'.*v5e:4x4"):
        topology_devices(topology)


def test_a_missing_compiler_is_said_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(RuntimeError, match=r"pip install 'gfl-jax\[tpu-preflight\]'"):
        topology_devices("v5e:2x2")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"per_device_batch": (2, 0)}, r"--per-device-batch is \(2, 0\)"),
        ({"per_device_batch": ()}, "--per-device-batch"),
        ({"canvas": (800, 1333)}, r"--canvas is \(800, 1333\).*multiples of 32"),
        ({"gts": 0}, "--gts is 0"),
        ({"num_classes": -1}, "--num-classes is -1"),
    ],
)
def test_impossible_requests_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PreflightCommand(**fields)


def test_the_canvas_is_the_largest_of_the_data_in_landscape():
    assert largest_canvas(Data()) == (800, 1344)
    assert largest_canvas(Data(scale=(512, 512), keep_ratio=False)) == (512, 512)
    assert largest_canvas(Data(canvases=((512, 800), (800, 1344)))) == (800, 1344)


def test_without_a_config_the_usage_is_shown():
    with pytest.raises(FileNotFoundError, match="first argument is a config file"):
        main(["--topology", "v5e:2x2"])


# ---------------------------------------------------------------------- the compiler itself

CONFIG = """
from gfl_jax.config import Experiment, Train
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model

experiment = Experiment(
    model=Model(
        backbone=Backbone(depth=18, width=8),
        neck=Neck(width=32),
        head=Head(width=32, stacked_convs=1),
        dtype="bfloat16",
    ),
    train=Train(eval_batch=2),
)
"""
SMALL = ["--canvas", "64", "64", "--gts", "8", "--num-classes", "3"]
with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


@with_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("mapping", ["pmap", "shard_map"])
def test_a_small_network_is_compiled_for_four_chips(config, mapping, tmp_path, capsys):
    out = tmp_path / "report.md"
    main([config, "--topology", "v5e:2x2", "--mapping", mapping, "--out", str(out), *SMALL])
    step, predict = json.loads(out.with_suffix(".json").read_text())["jobs"]
    assert step["fits"] and predict["fits"]
    assert mapping in out.read_text()
    # Parameters and momenta are updated in place.
    assert step["memory"]["aliased"] > 0.9 * step["memory"]["outputs"]
    assert predict["memory"]["aliased"] == 0
    assert predict["memory"]["beside"] > 0
    # One sum of gradients and terms, and those of the two counts that losses are divided by.
    sums = [c for c in step["collectives"] if c["kind"] == "all-reduce"]
    assert sum(c["count"] for c in sums) <= 4
    assert sums[0]["chips"] == 4
    assert predict["collectives"] == []
    assert step["flops"] > predict["flops"] > 0
    assert step["breakdown"]["unknown_loops"] == predict["breakdown"]["unknown_loops"] == 0
    assert any("sort" in part["name"] for part in predict["breakdown"]["unknown"])
    assert "images/s" in capsys.readouterr().out


@with_libtpu
@pytest.mark.slow
def test_a_batch_that_is_too_large_is_refused(config):
    results = preflight(load_experiment(config), "v5e:1x1", [64], (4096, 4096), 8, 80)
    refused = next(results)
    assert isinstance(refused, Refused)
    needed, available = out_of_memory(refused.message)
    assert needed > available > 15 * GIB


@with_libtpu
def test_a_slice_that_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="'v5e:3x3' is refused"):
        topology_devices("v5e:3x3")


@with_libtpu
@pytest.mark.parametrize(("topology", "chips"), [("v5e:1x1", 1), ("v5e:4x4", 16), ("v4:2x2x1", 4)])
def test_every_chip_is_one_device(topology, chips):
    assert len(topology_devices(topology)) == chips

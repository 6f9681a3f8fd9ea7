"""The command; with libtpu installed and --slow, small networks are compiled."""

import importlib.util
import json

import jax
import pytest

from gfl_jax.cli import load_experiment
from gfl_jax.config import Experiment, Train
from gfl_jax.data.sources import Data
from gfl_jax.tools.preflight import compile as compile_module
from gfl_jax.tools.preflight.command import PreflightCommand, largest_canvas, main
from gfl_jax.tools.preflight.compile import OutOfMemory, needed_and_available, preflight
from gfl_jax.tools.preflight.topology import GIB

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
def test_a_batch_that_is_too_large_does_not_fit(config):
    results = preflight(load_experiment(config), "v5e:1x1", [64], (4096, 4096), 8, 80)
    result = next(results)
    assert isinstance(result, OutOfMemory)
    needed, available = needed_and_available(result.message)
    assert needed > available > 15 * GIB


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
        PreflightCommand("gfl_r50_fpn_1x_coco", **fields)


def test_the_canvas_is_the_largest_of_the_data_in_landscape():
    assert largest_canvas(Data()) == (800, 1344)
    assert largest_canvas(Data(scale=(512, 512), keep_ratio=False)) == (512, 512)
    assert largest_canvas(Data(canvases=((512, 800), (800, 1344)))) == (800, 1344)


def test_without_a_config_it_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--topology", "v5e:2x2"])
    assert stop.value.code == 2
    assert "CONFIG" in capsys.readouterr().err


@pytest.mark.parametrize("mapping", ["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_step_and_predictions_are_compiled_for_the_devices_of_a_slice(
    mapping, linear_network, monkeypatch
):
    """A stand-in without libtpu: CPU devices, whose compiler gives no estimates."""
    monkeypatch.setattr(compile_module, "topology_devices", lambda _: jax.devices()[:4])
    monkeypatch.setattr(compile_module, "Network", linear_network)
    experiment = Experiment(train=Train(eval_batch=2, mapping=mapping))
    step, predict = preflight(experiment, "v5e:2x2", [2], (64, 64), 8, 3)
    assert (str(step.job), str(predict.job)) == (
        "train step of 2 images per chip",
        "predict of 2 images per chip",
    )
    assert step.job.chips == predict.job.chips == 4
    assert step.memory.aliased > 0, "the state is updated in place"
    assert predict.memory.aliased == 0
    assert predict.memory.beside > 0, "momenta stay on the chip while it evaluates"
    images = 2 * 64 * 64 * 3
    assert min(step.memory.arguments, predict.memory.arguments) > images

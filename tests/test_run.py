"""Opening a trained detector, and what earlier versions stored."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gfl_jax
from gfl_jax.config import Data, Experiment, Train, to_dict
from gfl_jax.data.sources import CocoFolder, Shapes, Tfds
from gfl_jax.detectors.box import CustomBoxLoss
from gfl_jax.detectors.dense import Detector
from gfl_jax.errors import InputError
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.run import changes_since, describe, experiment_of
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import TrainState, abstract_state, init_state, sgd

EXPERIMENT = Experiment(
    model=Model(Backbone(depth=18, width=8), Neck(32), Head(width=32, stacked_convs=1)),
    train=Train(ema_decay=0.5, clip_norm=1.0),
)
OF_ALL_SOURCES = {
    "root": "R",
    "train_annotations": "t.json",
    "train_images": "t",
    "val_annotations": "v.json",
    "val_images": "v",
    "shapes": {
        "kind": "Shapes",
        "num_train": 9,
        "num_val": 3,
        "image_size": [64, 96],
        "seed": 2,
        "blurred": 0.5,
    },
    "cache_dir": "C",
    "on_error": "skip",
}


@pytest.fixture(scope="module")
def state():
    """A state in which no two arrays are alike, on the host."""
    network = Network(EXPERIMENT.model, EXPERIMENT.detector.predicts(2))
    optimizer = sgd(EXPERIMENT.train, optax.constant_schedule(0.1))
    rng = np.random.default_rng(0)
    zeros = jax.eval_shape(lambda: init_state(network.init(0), optimizer, EXPERIMENT.train))
    return jax.tree.map(lambda x: (100 * rng.normal(size=x.shape)).astype(x.dtype), zeros)


def saved(folder, state, experiment=EXPERIMENT, **changes):
    with Checkpoints(folder) as checkpoints:
        about = describe(experiment, [1, 3], ["cat", "dog"]) | changes
        checkpoints.save(7, state.items(), about)
    return folder


def assert_equal(weights, expected):
    for ours, theirs in zip(weights, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[name])


def test_a_work_directory_is_a_detector(tmp_path, state):
    saved(tmp_path / "checkpoints", state)
    run = gfl_jax.load(tmp_path)
    assert (run.step, run.experiment) == (7, EXPERIMENT)
    assert (run.category_ids, run.category_names) == ([1, 3], ["cat", "dog"])
    # Averaged parameters are what was evaluated.
    assert_equal(run.variables, state.variables._replace(params=state.ema))
    images = jnp.zeros((1, 64, 64, 3), jnp.uint8)
    outputs, _ = run.network.apply(run.variables, images, jnp.array([[64, 64]]), train=False)
    assert outputs.cls_logits[0].shape == (1, 8, 8, 2)


def test_only_the_weights_are_read(tmp_path, state):
    """The rest may as well be gone: the data set is nowhere here, the optimiser's state is not."""
    saved(tmp_path / "checkpoints", state)
    shutil.rmtree(tmp_path / "checkpoints" / "7" / "training")
    assert_equal(gfl_jax.load(tmp_path).variables, state.evaluated())
    like = abstract_state(Network(EXPERIMENT.model, EXPERIMENT.detector.predicts(2)), Train())
    with pytest.raises(ValueError, match=r"does not hold training.*not resumed"):
        Checkpoints(tmp_path / "checkpoints").restore(like.items())


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_called_damaged(
    tmp_path, state, monkeypatch
):
    saved(tmp_path / "checkpoints", state)
    about, reads = Checkpoints.about, []

    def overtaken(self):
        reads.append(self.step)
        if len(reads) == 1:  # the run that goes on saves the next one and deletes this
            (tmp_path / "checkpoints" / "7").rename(tmp_path / "checkpoints" / "8")
            raise InputError("the checkpoint 7 is damaged")
        return about(self)

    monkeypatch.setattr(Checkpoints, "about", overtaken)
    assert gfl_jax.load(tmp_path).step == 8
    assert reads == [7, 8]


def test_opening_runs_no_file_of_the_user(tmp_path, state):
    """Nor does it need the file that a custom loss was in."""
    file = tmp_path / "losses.py"
    file.write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\ndef loss(pred, target): ...\n")
    custom = Detector(box_loss=CustomBoxLoss(f"{file}:loss"))
    experiment = dataclasses.replace(EXPERIMENT, detector=custom)
    saved(tmp_path / "checkpoints", state, experiment)
    assert gfl_jax.load(tmp_path).experiment == experiment
    assert changes_since(tmp_path, experiment) == []
    assert not (tmp_path / "was run").exists()
    file.unlink()
    assert gfl_jax.load(tmp_path).experiment == experiment


def test_a_newer_format_is_named(tmp_path, state):
    saved(tmp_path / "checkpoints", state, format=99)
    with pytest.raises(ValueError, match=r"format 99.*update gfl_jax"):
        gfl_jax.load(tmp_path)


# ---------------------------------------------------------------------------- format 0


@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_weights_of_format_0_are_found_in_the_whole_state(tmp_path, state, ema_decay):
    state = state if ema_decay else state._replace(ema={})
    # Constants of frozen BatchNorm were among the statistics.
    variables = state.variables
    stats = {**variables.stats, **variables.frozen}
    old = state._replace(variables=variables._replace(frozen={}, stats=stats))
    as_stored = dict(old._asdict(), variables=old.variables._asdict())
    stored = to_dict(EXPERIMENT)
    stored["data"] = of_format_0(stored["data"], "coco")
    about = {"experiment": stored, "category_ids": [1, 3], "category_names": ["cat", "dog"]}
    manager = ocp.CheckpointManager(tmp_path / "checkpoints")
    args = {"state": ocp.args.StandardSave(as_stored), "about": ocp.args.JsonSave(about)}
    manager.save(7, args=ocp.args.Composite(**args))
    manager.close()

    run = gfl_jax.load(tmp_path)
    assert run.step == 7
    assert_equal(run.variables, TrainState.evaluated(state))
    with pytest.raises(ValueError, match=r"older version.*name another --workdir"):
        Checkpoints(tmp_path / "checkpoints").restore(state.items())


def test_custom_losses_of_format_0_have_another_name():
    stored = to_dict(Experiment(detector=Detector(box_loss=CustomBoxLoss("a.b:loss"))))
    stored["detector"]["box_loss"]["kind"] = "OwnBoxLoss"
    stored["data"] = of_format_0(stored["data"], "coco")
    assert experiment_of({"experiment": stored}).detector.box_loss == CustomBoxLoss("a.b:loss")


def of_format_0(data, name):
    """The JSON of data as it was stored: the source a name beside the fields of all sources."""
    new = {"worker_threads", "worker_batches", "shared_batches"}
    data = {field: value for field, value in data.items() if field not in new}
    return data | {"source": name} | OF_ALL_SOURCES


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("coco", CocoFolder("R", "t.json", "t", "v.json", "v", "C", "skip")),
        ("shapes", Shapes(9, 3, (64, 96), 2, 0.5, root="R", cache_dir="C")),
        ("coco/2017", Tfds("coco/2017", root="R", val_annotations="v.json", cache_dir="C")),
    ],
)
def test_a_source_that_was_a_name_becomes_a_value(name, source):
    data = Data(source, scale=(640, 480), flip=0.25)
    stored = to_dict(Experiment(data=data))
    stored["data"] = of_format_0(stored["data"], name)
    assert experiment_of({"experiment": stored}) == Experiment(data=data)
    assert experiment_of({"format": 1, "experiment": to_dict(Experiment(data=data))}).data == data

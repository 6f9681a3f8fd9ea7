"""Data as a value: what flags make of it, and which values cannot be."""

import dataclasses

import pytest

from gfl_jax.cli import load_experiment, parse_command
from gfl_jax.config import from_dict, to_dict
from gfl_jax.data.sources import CocoFolder, Data, Prepared, Shapes, Tfds
from gfl_jax.errors import InputError
from gfl_jax.train import TrainCommand


def changed(config, *flags):
    default = TrainCommand(config, load_experiment(config))
    return parse_command(default, [config, *flags], "gfl-jax train", None).experiment.data.source


@pytest.mark.parametrize(
    ("config", "flags", "source"),
    [
        ("gfl_r50_fpn_1x_coco", ["--data.root=R"], CocoFolder("R", on_error="skip")),
        ("gfl_r50_fpn_1x_coco", ["--data.on-error", "raise"], CocoFolder()),
        ("gfl_r50_fpn_1x_coco", ["--data.prepared", "gs://b/c"], Prepared("gs://b/c")),
        ("gfl_r18_fpn_shapes", ["--data.prepared=P"], Prepared("P")),
        ("gfl_r18_fpn_shapes", ["--data.num-train", "5"], Shapes(num_train=5)),
        (
            "gfl_r18_fpn_shapes",
            ["--data.source=CocoFolder", "--data.root=R", "--data.train-images=photos"],
            CocoFolder("R", train_images="photos"),
        ),
        ("gfl_r50_fpn_1x_coco", ["--data.source", "Tfds", "--data.root=T"], Tfds(root="T")),
    ],
)
def test_flags_choose_the_source(config, flags, source):
    assert changed(config, *flags) == source


@pytest.mark.parametrize("source", [CocoFolder("R"), Shapes(5), Tfds("voc/2012"), Prepared("P")])
def test_a_source_is_stored_and_read_again(source):
    data = Data(source, scale=(320, 240))
    assert from_dict(Data, to_dict(data)) == data


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (100, 200)),
        ("scale", (64, 16)),
        ("multi_scale", (64, 2000)),
        ("canvases", ((64, 100),)),
        ("flip", 1.5),
        ("repeats", 0),
        ("worker_threads", 0),
        ("worker_batches", 0),
        ("shared_batches", 0),
        ("augmentation", "ssd"),
    ],
)
def test_a_value_that_cannot_be_is_named(field, value):
    with pytest.raises(InputError, match=f"data.{field}"):
        dataclasses.replace(Data(), **{field: value})

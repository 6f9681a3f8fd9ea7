"""What earlier versions stored beside a checkpoint is read as what it meant."""

import pytest

from gfl_jax.config import Data, Experiment, to_dict
from gfl_jax.data.sources import CocoFolder, Shapes, Tfds
from gfl_jax.run import experiment_of

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
    stored["data"] |= {"source": name} | OF_ALL_SOURCES
    for field in ("worker_threads", "worker_batches", "shared_batches"):
        del stored["data"][field]
    assert experiment_of({"experiment": stored}) == Experiment(data=data)
    assert experiment_of({"format": 1, "experiment": to_dict(Experiment(data=data))}).data == data

"""Data sets of tfds, prepared by a builder with the features of tfds's `coco/2017`."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_prepare import entry, make

from gfl_jax.data import tfds_source
from gfl_jax.data.coco_format import DataError


class Coco(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The features of tfds's `coco/2017`, from a folder of `make`."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2017")]  # noqa: RUF012
    folder = Path()

    def _info(self):
        objects = {
            "id": np.int64,
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "is_crowd": np.bool_,
        }
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        bbox = tfds.features.BBox(ymin=0.25, xmin=0.5, ymax=0.75, xmax=1.0)
        whole = {"id": 1, "area": 0, "bbox": bbox, "label": 1, "is_crowd": False}
        thin = tfds.features.BBox(ymin=0.25, xmin=0.5, ymax=0.75, xmax=0.51)
        for i in range(1, 5):
            yield (
                f"{i}.jpg",
                {
                    "image": self.folder / "images" / f"{i}.jpg",
                    "image/filename": f"{i}.jpg",
                    "image/id": 10 * i,
                    "objects": [whole, whole | {"is_crowd": True}, whole | {"bbox": thin}][: 4 - i],
                },
            )


@pytest.mark.parametrize("given", [True, False])
def test_a_dataset_of_tfds_reads_the_same(tmp_path, monkeypatch, given):
    folder = make(tmp_path)
    monkeypatch.setattr(Coco, "folder", tmp_path)
    # The two classes here stand for COCO's 80.
    monkeypatch.setattr(tfds_source, "_COCO_IDS", [3, 7])
    Coco(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    arguments = ("coco/2017", "train", tmp_path / "tfds", tmp_path / "cache")
    annotations = folder.annotations if given else None
    split = tfds_source.open_tfds(*arguments, annotations)
    order = np.argsort(split.image_ids)
    assert split.image_ids[order].tolist() == [10, 20, 30, 40]
    # The json, where there is one, is what is judged against, and so what is trained on.
    assert split.num_boxes[order].tolist() == ([1, 1, 1, 1] if given else [1, 1, 1, 0])
    assert split.sizes.tolist() == [[32, 48]] * 4
    assert (split.category_ids, split.category_names) == ([3, 7], ["cat", "dog"])
    if given:
        stated = json.loads(folder.annotations.read_text())
        kept = json.loads(split.annotations.read_text())
        assert [image["id"] for image in kept["images"]] == split.image_ids.tolist()
        assert [a["id"] for a in kept["annotations"]] == [1, 2, 3, 4]
        boxes = {a["image_id"]: a["bbox"] for a in stated["annotations"]}
        assert {a["image_id"]: a["bbox"] for a in kept["annotations"]} == boxes
    else:
        assert split.annotations is None
    sample = split.source[int(order[0])]
    assert sample["image"] == (folder.images / "1.jpg").read_bytes()
    assert (sample["image_id"], sample["filename"]) == (10, "1.jpg")
    if not given:
        np.testing.assert_array_equal(sample["boxes"][0], [24, 8, 48, 24])
        assert sample["labels"].tolist() == [1, 1, 1]
        assert sample["crowd"].tolist() == [False, True, False]
        assert sample["ignore"].tolist() == [False, False, True]

    made = next((tmp_path / "cache").glob("tfds-*/read/table.npz"))
    made.write_bytes(made.read_bytes()[:-9] + bytes(9))
    repaired = tfds_source.open_tfds(*arguments, annotations)
    np.testing.assert_array_equal(repaired.num_boxes, split.num_boxes)

    monkeypatch.setattr(tfds_source, "_write", None)  # not built again
    again = tfds_source.open_tfds(*arguments, annotations)
    np.testing.assert_array_equal(again.num_boxes, split.num_boxes)
    assert len(tfds_source.open_tfds("coco/2017:1.1.0", *arguments[1:], annotations).source) == 4
    with pytest.raises(DataError, match="tfds build coco/2014 --file_format=array_record"):
        tfds_source.open_tfds("coco/2014", *arguments[1:])
    with pytest.raises(DataError, match="Unknown split 'test'"):
        tfds_source.open_tfds("coco/2017", "test", *arguments[2:])


def test_a_json_of_another_dataset_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Coco, "folder", tmp_path)
    arguments = ("coco/2017", "train", tmp_path / "tfds", tmp_path / "cache")
    folder = make(tmp_path, images=[entry(1)])
    Coco(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    with pytest.raises(DataError, match="lists no image"):
        tfds_source.open_tfds(*arguments, folder.annotations)
    with pytest.raises(DataError, match=r"\['cat', 'dog'\], but the annotations have 80"):
        tfds_source.open_tfds(*arguments)

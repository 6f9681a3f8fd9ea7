import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from gfl_jax.data import images, tfds_source
from gfl_jax.data import prepare as preparing
from gfl_jax.data.coco_format import CocoFolder, DataError, check

BOX = [4.5, 5.25, 10.5, 8.0]


def annotation(**changes):
    box = changes.get("bbox", BOX)
    area = box[2] * box[3] if len(box) == 4 and all(isinstance(x, float) for x in box) else 1.0
    whole = {"id": 1, "image_id": 10, "category_id": 3, "bbox": BOX, "area": area, "iscrowd": 0}
    return whole | changes


def image_file(file, height=32, width=48, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), cv2.resize(noise, (width, height)))


def make(root, annotations=None, images=None, categories=None, **content):
    """A folder of four images, ids 10 to 40, unless said otherwise with a good annotation each."""
    for i in range(1, 5):
        image_file(root / "images" / f"{i}.jpg", seed=i)
    content = {
        "images": images
        or [
            {"id": 10 * i, "file_name": f"{i}.jpg", "height": 32, "width": 48} for i in (3, 1, 2, 4)
        ],
        "annotations": annotations
        or [annotation(id=i, image_id=10 * i, category_id=3) for i in range(1, 5)],
        "categories": categories or [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        **content,
    }
    (root / "a.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return CocoFolder(root / "a.json", root / "images")


def report_of(split):
    return json.loads((split.source.directory / "report.json").read_text())


def test_prepared_images_and_boxes_are_those_of_the_json(tmp_path, capsys):
    rle = {"counts": [3, 4, 1529], "size": [32, 48]}
    annotations = [
        annotation(id=5, category_id=7, bbox=[-3.25, 20.0, 100.0, 50.0]),  # sticks out
        annotation(id=6, iscrowd=1, segmentation=rle),
        annotation(id=7, ignore=1),
        annotation(id=8, bbox=[1.0, 1.0, 0.5, 9.0]),
        annotation(id=9, area=0),
        annotation(id=2, image_id=20, bbox=[1.01, 2.02, 1.0, 1.0]),
    ]
    folder = make(tmp_path, annotations)
    split = preparing.prepare(folder, tmp_path / "cache")
    assert split.image_ids.tolist() == [10, 20, 30, 40]
    assert split.image_ids.dtype == np.int64
    assert split.sizes.tolist() == [[32, 48]] * 4
    assert split.sizes.dtype == np.int32
    assert split.num_boxes.tolist() == [1, 1, 0, 0]
    assert split.category_ids == [3, 7]
    assert split.category_names == ["cat", "dog"]
    assert split.annotations == folder.annotations

    first = split.source[0]
    assert first["image"] == (tmp_path / "images" / "1.jpg").read_bytes()
    assert (first["image_id"], first["filename"]) == (10, "1.jpg")
    assert (first["height"], first["width"]) == (32, 48)
    x, y, w, h = BOX
    expected = [[-3.25, 20, 96.75, 70], *[[x, y, x + w, y + h]] * 2, [1, 1, 1.5, 10]]
    np.testing.assert_allclose(first["boxes"][:4], expected, atol=1e-5)
    assert first["boxes"].dtype == np.float32
    assert first["labels"].tolist() == [1, 0, 0, 0, 0]
    assert first["labels"].dtype == np.int32
    assert first["crowd"].tolist() == [False, True, False, False, False]
    assert first["ignore"].tolist() == [False, False, True, True, True]
    assert split.source[1]["ignore"].tolist() == [False]  # exactly one pixel
    empty = split.source[3]
    assert [empty[k].shape for k in ("boxes", "labels", "crowd")] == [(0, 4), (0,), (0,)]
    assert len(list(split.source)) == len(split.source) == 4

    report, printed = report_of(split), capsys.readouterr().out
    assert (report["annotations_found"], report["annotations_kept"]) == (6, 6)
    assert (report["crowd"], report["dropped_by_rule"]) == (1, 3)
    assert any(line.split()[-3:] == ["by", "rule", "3"] for line in printed.splitlines())


NAN, INF = float("nan"), float("inf")
BAD_ANNOTATIONS = {
    "absent image": [annotation(image_id=99)],
    "unknown category": [annotation(category_id=4)],
    "bad box": [annotation(bbox=[x, 1.0, 2.0, 3.0]) for x in (NAN, INF, "1", None, True)]
    + [annotation(bbox=[1.0, 2.0, 3.0])],
    "empty box": [annotation(bbox=[1.0, 2.0, *size]) for size in ((-3.0, 3.0), (3.0, 0.0))],
    "box outside image": [
        annotation(bbox=box)
        for box in ([48.0, 1.0, 5.0, 5.0], [1.0, 32.5, 5.0, 5.0], [-9.0, 1.0, 9.0, 5.0])
    ],
    "malformed annotation": [
        annotation(area="large"),
        annotation(area=NAN),
        annotation(bbox="box"),
        annotation(category_id="cat"),
        *({k: v for k, v in annotation().items() if k != key} for key in ("bbox", "category_id")),
    ],
}


@pytest.mark.parametrize(
    ("kind", "bad"), [(kind, bad) for kind, found in BAD_ANNOTATIONS.items() for bad in found]
)
def test_a_bad_annotation_is_named_or_left_out(tmp_path, kind, bad):
    good = annotation(id=1, image_id=20)
    folder = make(tmp_path, [good, bad | {"id": 77}])
    with pytest.raises(DataError) as error:
        check(folder, "raise")
    (problem,) = error.value.problems
    assert (problem.kind, problem.annotation_id) == (kind, 77)
    assert (problem.image_id, problem.file) == (
        (99, str(folder.annotations)) if kind == "absent image" else (10, "1.jpg")
    )
    assert "annotation 77" in str(error.value)
    assert "--data.on-error=skip" in str(error.value)
    records, report = check(folder, "skip")
    assert [len(record["objects"]) for record in records] == [0, 1, 0, 0]
    assert (report.annotations_found, report.annotations_kept) == (2, 1)
    assert report.problems == [problem]
    assert kind in report.summary()


def entry(i, **changes):
    return {"id": 10 * i, "file_name": f"{i}.jpg", "height": 32, "width": 48} | changes


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("duplicate image id", entry(1)),
        ("missing image file", entry(5)),
        ("malformed image", {"id": 50, "file_name": "5.jpg", "height": 32}),
        ("malformed image", entry(5, height=0)),
        ("malformed image", entry(5, width="48")),
        ("broken image file", entry(5, file_name="truncated.jpg")),
        ("broken image file", entry(5, file_name="text.jpg")),
        ("wrong image size", entry(5, file_name="4.jpg", height=31)),
    ],
)
def test_a_bad_image_is_named_or_left_out(tmp_path, kind, bad):
    annotations = [annotation(id=1, image_id=20), annotation(id=2, image_id=50)]
    annotations = annotations[:1] if bad["id"] == 10 else annotations
    folder = make(tmp_path, annotations, [*map(entry, (1, 2, 3, 4)), bad])
    whole = (folder.images / "1.jpg").read_bytes()
    (folder.images / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder.images / "text.jpg").write_text("no image")
    with pytest.raises(DataError) as error:
        preparing.prepare(folder, tmp_path / "cache")
    (problem,) = error.value.problems
    assert (problem.kind, problem.image_id, problem.file) == (kind, bad["id"], bad["file_name"])
    assert f"{bad['file_name']}, image {bad['id']}" in str(error.value)
    assert not list((tmp_path / "cache").glob("**/*.array_record*"))

    split = preparing.prepare(folder, tmp_path / "cache", "skip")
    assert split.image_ids.tolist() == [10, 20, 30, 40]
    assert [split.source[i]["image_id"] for i in range(4)] == [10, 20, 30, 40]
    report = report_of(split)
    assert [found["kind"] for found in report["problems"]] == [kind]
    assert (report["images_found"], report["images_kept"]) == (5, 4)
    assert report["annotations_found"] - report["annotations_kept"] == len(annotations) - 1


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("duplicate annotation id", {"annotations": [annotation(), annotation(bbox=[1.0] * 4)]}),
        (
            "duplicate category id",
            {"categories": [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]},
        ),
        ("malformed category", {"categories": [{"id": 3, "name": "cat"}, {"id": 4}]}),
        ("malformed annotation", {"annotations": [annotation(), 5]}),
    ],
)
def test_of_duplicates_the_first_stays(tmp_path, kind, content):
    folder = make(tmp_path, **content)
    with pytest.raises(DataError, match=kind):
        check(folder, "raise")
    records, report = check(folder, "skip")
    assert [problem.kind for problem in report.problems] == [kind]
    assert report.category_names[0] == "cat"
    assert records[0]["objects"][0]["area"] == BOX[2] * BOX[3]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("missing annotation file", None),
        ("invalid json", '{"images": ['),
        ("invalid json", b"\xff\xfe\x00"),
        ("missing list", "[]"),
        ("missing list", '{"images": [], "annotations": []}'),
        ("missing list", '{"images": [], "annotations": {}, "categories": []}'),
        ("nothing left", '{"images": [], "annotations": [], "categories": []}'),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_an_unreadable_json_always_raises(tmp_path, kind, text, on_error):
    folder = make(tmp_path)
    folder.annotations.unlink()
    if text is not None:
        folder.annotations.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=kind) as error:
        preparing.prepare(folder, tmp_path / "cache", on_error)
    assert str(folder.annotations) in str(error.value)


def test_a_missing_image_folder_is_named(tmp_path):
    folder = CocoFolder(make(tmp_path).annotations, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"missing image folder[^$]*nowhere"):
        preparing.prepare(folder, tmp_path / "cache")


def test_all_kinds_of_problems_are_listed_at_once(tmp_path):
    annotations = [annotation(id=i, category_id=50) for i in range(100, 200)]
    annotations += [annotation(id=300, bbox=[NAN] * 4, area=1), annotation(id=301, image_id=5)]
    with pytest.raises(DataError) as error:
        check(make(tmp_path, annotations), "raise")
    text = str(error.value)
    assert text.startswith("102 problems")
    assert len(error.value.problems) == 102
    for expected in ("unknown category (100)", "bad box (1)", "absent image (1)", "more"):
        assert expected in text
    assert len(text.splitlines()) < 30


def test_formats_and_rotation_keep_their_bytes(tmp_path):
    wide = np.arange(32 * 48, dtype=np.uint16).reshape(32, 48) * 40
    folder = make(tmp_path, images=[entry(1, file_name="sub/wide.png")])
    (folder.images / "sub").mkdir()
    cv2.imwrite(str(folder.images / "sub" / "wide.png"), wide)
    sample = preparing.prepare(folder, tmp_path / "cache", "skip").source[0]
    assert sample["image"] == (folder.images / "sub" / "wide.png").read_bytes()
    np.testing.assert_array_equal(images.decode(sample["image"])[..., 0], wide >> 8)


def test_the_cache_may_lie_beside_the_images(tmp_path):
    folder = make(tmp_path)
    (folder.images / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    first, again = (preparing.prepare(folder, folder.images / "cache") for _ in range(2))
    assert first.source.directory == again.source.directory


def test_a_prepared_folder_is_found_again_until_it_changes(tmp_path, monkeypatch):
    folder = make(tmp_path)
    first = preparing.prepare(folder, tmp_path / "cache")

    def no_reading(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "check", no_reading)
        patch.setattr(images, "decode", no_reading)
        again = preparing.prepare(folder, tmp_path / "cache")
        assert again.source.directory == first.source.directory
        np.testing.assert_array_equal(again.num_boxes, first.num_boxes)
        with pytest.raises(AssertionError):
            preparing.prepare(folder, tmp_path / "cache", "skip")
    image_file(folder.images / "1.jpg", seed=99)
    changed = preparing.prepare(folder, tmp_path / "cache")
    assert changed.source.directory != first.source.directory
    assert changed.source[0]["image"] == (folder.images / "1.jpg").read_bytes()
    make(tmp_path, [annotation()])
    assert preparing.prepare(folder, tmp_path / "cache").num_boxes.tolist() == [1, 0, 0, 0]


def test_preparing_is_deterministic_whatever_the_shards(tmp_path, monkeypatch):
    folder = make(tmp_path)
    (folder.images / "2.jpg").write_bytes(b"broken")
    one = preparing.prepare(folder, tmp_path / "one", "skip")
    same = preparing.prepare(folder, tmp_path / "same", "skip")
    monkeypatch.setattr(preparing, "_SHARD_BYTES", 1)  # a shard for each image, one without any
    many = preparing.prepare(folder, tmp_path / "many", "skip")
    assert len(list(many.source.directory.glob("*.array_record*"))) == 4
    for split in (one, same, many):
        assert [sample["image_id"] for sample in split.source] == [10, 30, 40]
        assert split.image_ids.tolist() == [10, 30, 40]
    (a,), (b,) = (list(s.source.directory.glob("*.array_record*")) for s in (one, same))
    assert a.read_bytes() == b.read_bytes()


def test_a_killed_preparation_does_not_count(tmp_path):
    folder = make(tmp_path)
    paths = (str(folder.annotations), str(folder.images))
    script = f"""
        import pathlib, time
        from gfl_jax.data import images, prepare as preparing, tfds_source
        from gfl_jax.data.coco_format import CocoFolder
        decode = images.decode
        def slow(data, size, name):
            if name == "3.jpg":
                pathlib.Path({str(tmp_path / "reached")!r}).touch()
                time.sleep(60)
            return decode(data, size, name)
        images.decode = slow
        folder = CocoFolder(*map(pathlib.Path, {paths!r}))
        preparing.prepare(folder, {str(tmp_path / "cache")!r})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(preparing.__file__).parents[2])},
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "reached").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cache").glob("**/report.json"))
    split = preparing.prepare(folder, tmp_path / "cache")
    assert [sample["image_id"] for sample in split.source] == [10, 20, 30, 40]
    assert not list((tmp_path / "cache").glob("**/incomplete*"))


def read_second(source):
    return source[1]["image_id"], repr(source)


def test_another_process_can_read(tmp_path):
    split = preparing.prepare(make(tmp_path), tmp_path / "cache")
    assert split.source[0]["image_id"] == 10  # has open files
    copy = pickle.loads(pickle.dumps(split))
    assert copy.source[2]["filename"] == "3.jpg"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_second, [split.source]) == (20, repr(split.source))
    with pytest.raises(IndexError):
        split.source[4]


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
    monkeypatch.setattr(
        tfds_source, "_COCO_IDS", [3, 7]
    )  # the two classes here stand for COCO's 80
    Coco(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    arguments = ("coco/2017", "train", tmp_path / "tfds", tmp_path / "cache")
    annotations = folder.annotations if given else None
    split = tfds_source.open_tfds(*arguments, annotations)
    order = np.argsort(split.image_ids)
    assert split.image_ids[order].tolist() == [10, 20, 30, 40]
    assert split.num_boxes[order].tolist() == [1, 1, 1, 0]
    assert split.sizes.tolist() == [[32, 48]] * 4
    assert (split.category_ids, split.category_names) == ([3, 7], ["cat", "dog"])
    assert split.annotations == annotations
    sample = split.source[int(order[0])]
    assert sample["image"] == (folder.images / "1.jpg").read_bytes()
    assert (sample["image_id"], sample["filename"]) == (10, "1.jpg")
    np.testing.assert_array_equal(sample["boxes"][0], [24, 8, 48, 24])
    assert sample["labels"].tolist() == [1, 1, 1]
    assert sample["crowd"].tolist() == [False, True, False]
    assert sample["ignore"].tolist() == [False, False, True]

    monkeypatch.setattr(tfds_source, "_tfds_table", None)  # not built again
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
    with pytest.raises(DataError, match="2 classes, where the annotations have 80"):
        tfds_source.open_tfds(*arguments)

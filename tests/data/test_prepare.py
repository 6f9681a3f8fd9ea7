import dataclasses
import functools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from tiny_experiment import prepare

from gfl_jax.data import images
from gfl_jax.data import prepare as preparing
from gfl_jax.data.coco_format import DataError, check, read_json
from gfl_jax.data.prepare import RawSplit, make_table
from gfl_jax.data.sixteen_bits import dark_images, nearly_largest
from gfl_jax.data.sources import CocoFolder, Prepared, Shapes, Tfds
from gfl_jax.errors import InputError, WriteError
from gfl_jax.tools import prepare as prepare_command
from gfl_jax.training.start import key_of

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
    return RawSplit(root / "a.json", root / "images")


def report_of(split):
    return json.loads((split.annotations.parent / "report.json").read_text())


def checked(raw, on_error):
    return check(read_json(raw.annotations)[0], raw.annotations, raw.images, on_error)


def test_prepared_images_and_boxes_are_those_of_the_json(tmp_path):
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
    split = prepare(folder, tmp_path / "cache")
    assert split.image_ids.tolist() == [10, 20, 30, 40]
    assert split.image_ids.dtype == np.int64
    assert split.sizes.tolist() == [[32, 48]] * 4
    assert split.sizes.dtype == np.int32
    assert split.num_boxes.tolist() == [1, 1, 0, 0]
    assert split.category_ids == [3, 7]
    assert split.category_names == ["cat", "dog"]
    written = json.loads(split.annotations.read_text())["annotations"]
    assert [entry["id"] for entry in written] == [1, 2, 3, 4, 5, 6]
    for entry, stated in zip(written, annotations, strict=True):
        assert {k: entry[k] for k in ("image_id", "category_id", "bbox", "area")} == {
            k: stated[k] for k in ("image_id", "category_id", "bbox", "area")
        }
    # What is flagged `ignore` is not demanded; what is small is, as COCO does it.
    assert [entry["iscrowd"] for entry in written] == [0, 1, 1, 0, 0, 0]

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

    report = report_of(split)
    assert (report["annotations_found"], report["annotations_kept"]) == (6, 6)
    assert report["crowd"] == 1
    dropped = {"flagged `ignore`": 1, "area 0": 1, "under 1 pixel wide or high": 1}
    assert report["dropped"] == dropped
    printed = preparing.report_of(split.annotations.parents[1], "val")
    assert all(f"{rule}" in printed for rule in dropped)


NAN, INF = float("nan"), float("inf")
BAD_ANNOTATIONS = {
    "absent image": [annotation(image_id=99)],
    "unknown category": [annotation(category_id=4)],
    "bad box": [annotation(bbox=[x, 1.0, 2.0, 3.0]) for x in (NAN, INF, "1", None, True)]
    + [annotation(bbox=[1.0, 2.0, 3.0])],
    "empty box": [
        annotation(bbox=[1.0, 2.0, *size]) for size in ((-3.0, 3.0), (3.0, 0.0), (1e-300, 3.0))
    ],
    "box outside image": [
        annotation(bbox=box)
        for box in ([48.0, 1.0, 5.0, 5.0], [1.0, 32.5, 5.0, 5.0], [-9.0, 1.0, 9.0, 5.0])
    ],
    "malformed annotation": [
        annotation(area="large"),
        annotation(area=NAN),
        annotation(bbox="box"),
        annotation(category_id="cat"),
        *(annotation(iscrowd=flag) for flag in ("0", "false", 2, [], -1, 0.5)),
        annotation(ignore="no"),
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
        checked(folder, "raise")
    (problem,) = error.value.problems
    assert (problem.kind, problem.annotation_id) == (kind, 77)
    assert (problem.image_id, problem.file) == (
        (99, str(folder.annotations)) if kind == "absent image" else (10, "1.jpg")
    )
    assert "annotation 77" in str(error.value)
    assert "--data.on-error=skip" in str(error.value)
    entries, report = checked(folder, "skip")
    assert [len(entry.objects) for entry in entries] == [0, 1, 0, 0]
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
        prepare(folder, tmp_path / "cache")
    (problem,) = error.value.problems
    assert (problem.kind, problem.image_id, problem.file) == (kind, bad["id"], bad["file_name"])
    assert f"{bad['file_name']}, image {bad['id']}" in str(error.value)
    assert not list((tmp_path / "cache").glob("**/*.array_record*"))

    split = prepare(folder, tmp_path / "cache", "skip")
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
        checked(folder, "raise")
    entries, report = checked(folder, "skip")
    assert [problem.kind for problem in report.problems] == [kind]
    assert report.category_names[0] == "cat"
    assert entries[0].annotations[0]["area"] == BOX[2] * BOX[3]


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
        prepare(folder, tmp_path / "cache", on_error)
    assert str(folder.annotations) in str(error.value)


def test_a_missing_image_folder_is_named(tmp_path):
    folder = RawSplit(make(tmp_path).annotations, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"missing image folder[^$]*nowhere"):
        prepare(folder, tmp_path / "cache")


def test_all_kinds_of_problems_are_listed_at_once(tmp_path):
    annotations = [annotation(id=i, category_id=50) for i in range(100, 200)]
    annotations += [annotation(id=300, bbox=[NAN] * 4, area=1), annotation(id=301, image_id=5)]
    with pytest.raises(DataError) as error:
        checked(make(tmp_path, annotations), "raise")
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
    sample = prepare(folder, tmp_path / "cache", "skip").source[0]
    assert sample["image"] == (folder.images / "sub" / "wide.png").read_bytes()
    np.testing.assert_array_equal(images.decode(sample["image"])[..., 0], wide >> 8)


def test_the_cache_may_lie_beside_the_images(tmp_path):
    folder = make(tmp_path)
    (folder.images / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    first, again = (prepare(folder, folder.images / "cache") for _ in range(2))
    assert first.annotations == again.annotations


def test_a_prepared_folder_is_found_again_until_it_changes(tmp_path, monkeypatch):
    folder = make(tmp_path)
    first = prepare(folder, tmp_path / "cache")

    def no_reading(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "read_json", no_reading)
        patch.setattr(images, "decode", no_reading)
        again = prepare(folder, tmp_path / "cache")
        assert again.annotations == first.annotations
        np.testing.assert_array_equal(again.num_boxes, first.num_boxes)
        with pytest.raises(AssertionError):
            prepare(folder, tmp_path / "cache", "skip")
    image_file(folder.images / "1.jpg", seed=99)
    changed = prepare(folder, tmp_path / "cache")
    assert changed.annotations != first.annotations
    assert changed.source[0]["image"] == (folder.images / "1.jpg").read_bytes()
    make(tmp_path, [annotation()])
    assert prepare(folder, tmp_path / "cache").num_boxes.tolist() == [1, 0, 0, 0]


def test_preparing_is_deterministic_whatever_the_shards(tmp_path, monkeypatch):
    folder = make(tmp_path)
    (folder.images / "2.jpg").write_bytes(b"broken")
    one = prepare(folder, tmp_path / "one", "skip")
    same = prepare(folder, tmp_path / "same", "skip")
    monkeypatch.setattr(preparing, "_SHARD_BYTES", 1)  # a shard for each image, one without any
    many = prepare(folder, tmp_path / "many", "skip")
    assert len(list(many.annotations.parent.glob("*.array_record"))) == 4
    for split in (one, same, many):
        assert [sample["image_id"] for sample in split.source] == [10, 30, 40]
        assert split.image_ids.tolist() == [10, 30, 40]
        assert key_of(split) == key_of(one)
    (a,), (b,) = (list(s.annotations.parent.glob("*.array_record")) for s in (one, same))
    assert a.read_bytes() == b.read_bytes()


def test_other_pixels_under_the_same_names_are_other_data(tmp_path):
    folder = make(tmp_path)
    first = prepare(folder, tmp_path / "cache")
    image_file(folder.images / "4.jpg", seed=99)
    other = prepare(folder, tmp_path / "cache")
    assert key_of(other) != key_of(first)
    image_file(folder.images / "4.jpg", seed=4)
    assert key_of(prepare(folder, tmp_path / "cache")) == key_of(first)


def test_a_killed_preparation_does_not_count(tmp_path):
    folder = make(tmp_path)
    paths = (str(folder.annotations), str(folder.images))
    script = f"""
        import pathlib, time
        from gfl_jax.data import images
        from gfl_jax.data.cache import open_in_cache
        from gfl_jax.data.prepare import RawSplit
        decode = images.decode
        def slow(data, size, name):
            if name == "3.jpg":
                pathlib.Path({str(tmp_path / "reached")!r}).touch()
                time.sleep(60)
            return decode(data, size, name)
        images.decode = slow
        raw = RawSplit(*map(pathlib.Path, {paths!r}))
        open_in_cache("val", raw, pathlib.Path({str(tmp_path / "cache")!r}), "raise")
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
    assert not list((tmp_path / "cache").glob("**/manifest.json"))
    split = prepare(folder, tmp_path / "cache")
    assert [sample["image_id"] for sample in split.source] == [10, 20, 30, 40]
    assert not list((tmp_path / "cache").glob("**/*.partial"))


def read_second(source):
    return source[1]["image_id"], repr(source)


def test_another_process_can_read(tmp_path):
    split = prepare(make(tmp_path), tmp_path / "cache")
    assert split.source[0]["image_id"] == 10  # has open files
    copy = pickle.loads(pickle.dumps(split))
    assert copy.source[2]["filename"] == "3.jpg"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_second, [split.source]) == (20, repr(split.source))
    with pytest.raises(IndexError):
        split.source[4]


# ---------------------------------------------------------------------------- when it is made again


def test_files_that_the_json_does_not_name_do_not_matter(tmp_path):
    """The work directory may lie in the image folder."""
    folder = make(tmp_path)
    first = prepare(folder, folder.images / "cache")
    (folder.images / "notes.txt").write_text("new")
    image_file(folder.images / "run" / "picture.jpg")
    assert prepare(folder, folder.images / "cache").annotations == first.annotations


@pytest.mark.parametrize("where", ["symlinked folder", "absolute name", "symlink"])
def test_a_change_is_seen_wherever_the_image_lies(tmp_path, where):
    outside = tmp_path / "elsewhere" / "a.jpg"
    image_file(outside, seed=1)
    name = str(outside) if where == "absolute name" else "sub/a.jpg"
    folder = make(tmp_path, [annotation()], [entry(1, file_name=name)])
    if where == "symlinked folder":
        (folder.images / "sub").symlink_to(outside.parent, target_is_directory=True)
    if where == "symlink":
        (folder.images / "sub").mkdir()
        (folder.images / "sub" / "a.jpg").symlink_to(outside)
    first = prepare(folder, tmp_path / "cache")
    assert first.source[0]["image"] == outside.read_bytes()
    image_file(outside, seed=2)
    os.utime(outside, ns=(0, outside.stat().st_mtime_ns + 1))
    changed = prepare(folder, tmp_path / "cache")
    assert changed.annotations != first.annotations
    assert changed.source[0]["image"] == outside.read_bytes()


def test_a_json_that_was_only_touched_is_the_same(tmp_path):
    folder = make(tmp_path)
    first = prepare(folder, tmp_path / "cache")
    os.utime(folder.annotations, ns=(0, 0))
    assert prepare(folder, tmp_path / "cache").annotations == first.annotations


def test_a_missing_image_that_comes_back_is_seen(tmp_path):
    folder = make(tmp_path)
    (folder.images / "2.jpg").unlink()
    assert prepare(folder, tmp_path / "cache", "skip").image_ids.tolist() == [10, 30, 40]
    image_file(folder.images / "2.jpg", seed=2)
    assert prepare(folder, tmp_path / "cache", "skip").image_ids.tolist() == [10, 20, 30, 40]


def test_what_is_no_longer_valid_is_reported(tmp_path, capsys):
    folder = make(tmp_path)
    first = prepare(folder, tmp_path / "cache")
    assert "delete" not in capsys.readouterr().out
    image_file(folder.images / "1.jpg", seed=99)
    prepare(folder, tmp_path / "cache")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "delete" in x)
    assert line.startswith(f"prepared from earlier states of {folder.annotations} or its images: ")
    assert str(first.annotations.parents[1]) in line


# ---------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("ending", ["png", "tiff"])
@pytest.mark.parametrize("grey", [False, True])
def test_16_bits_that_would_be_black_are_refused_until_it_is_said_what_is_white(
    tmp_path, ending, grey
):
    names = [f"{i}.{ending}" for i in range(1, 5)]
    folder = make(tmp_path, images=[entry(i + 1, file_name=n) for i, n in enumerate(names)])
    eight = {n: cv2.imread(str(folder.images / f"{i}.jpg")) for i, n in enumerate(names, start=1)}
    for name, image in eight.items():
        deep = image.astype(np.uint16) * 16
        cv2.imwrite(str(folder.images / name), deep[..., 1] if grey else deep)
    for on_error in ("raise", "skip"):
        with pytest.raises(
            DataError, match=r"(?s)dark images .*4 of 4 images .*above \d{4}, .* --data.white 4095"
        ):
            prepare(folder, tmp_path / "cache", on_error)

    split = prepare(dataclasses.replace(folder, white=16 * 255), tmp_path / "cache")
    for record in split.source:
        seen = images.decode(record["image"])[..., ::-1].astype(int)
        expected = eight[record["filename"]]
        expected = expected[..., 1:2] if grey else expected
        assert (seen == expected).all()
    as_they_are = prepare(dataclasses.replace(folder, white=65535), tmp_path / "cache")
    assert images.decode(as_they_are.source[0]["image"]).max() <= 16


def test_hot_pixels_and_few_brighter_images_do_not_hide_that_the_others_are_dark():
    dark = np.full((32, 48, 3), 300, np.uint16)
    dark[0, 0, 0] = 65535
    brightest = {"a": nearly_largest(dark), "b": 900, "c": 60000, "black": 0}
    file, white, said = dark_images(brightest)
    assert (file, white) == ("b", 1023)
    assert said.startswith("2 of 3 images")
    assert dark_images({"a": 300, "b": 300, "c": 60000, "d": 60000}) is not None
    assert dark_images({"a": 300, "c": 60000, "d": 60000}) is None
    assert dark_images({"black": 0}) is None
    assert dark_images({}) is None


def test_16_bits_that_are_used_are_taken_as_they_are(tmp_path):
    folder = make(tmp_path, images=[entry(1, file_name="1.png"), entry(2)])
    deep = cv2.imread(str(folder.images / "1.jpg")).astype(np.uint16) * 257
    cv2.imwrite(str(folder.images / "1.png"), deep)
    split = prepare(folder, tmp_path / "cache", "skip")
    assert split.source[0]["image"] == (folder.images / "1.png").read_bytes()


# ---------------------------------------------------------------------------- damage, full disks


def overwritten(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x55
    file.write_bytes(content)


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [Path.unlink, overwritten, halved, lambda f: f.write_text("")])
@pytest.mark.parametrize(
    "what", ["manifest.json", "val/table.npz", "val/annotations.json", "val/report.json", "*.json"]
)
def test_a_damaged_cache_is_prepared_again(tmp_path, damage, what, capsys):
    folder = make(tmp_path)
    first = prepare(folder, tmp_path / "cache")
    root = first.annotations.parents[1]
    (file,) = (root.parent if what == "*.json" else root).glob(what)
    before = (root / what).read_bytes() if what != "*.json" else None
    damage(Path(file))
    again = prepare(folder, tmp_path / "cache")
    assert again.annotations == first.annotations
    assert [record["image_id"] for record in again.source] == [10, 20, 30, 40]
    assert ("preparing it again" in capsys.readouterr().out) == (what != "*.json")
    if before:
        assert (root / what).read_bytes() == before


@pytest.mark.parametrize("damage", [Path.unlink, halved])
def test_images_that_were_purged_from_the_cache_are_prepared_again(tmp_path, damage):
    folder = make(tmp_path)
    first = prepare(folder, tmp_path / "cache")
    (file,) = first.annotations.parent.glob("*.array_record")
    damage(Path(file))
    assert len(list(prepare(folder, tmp_path / "cache").source)) == 4
    shutil.rmtree(tmp_path / "cache")
    assert len(list(prepare(folder, tmp_path / "cache").source)) == 4


def test_file_names_may_be_of_any_encoding_and_length(tmp_path):
    latin_1 = os.fsdecode(b"caf\xe9.jpg")
    image_file(tmp_path / "images" / "a.jpg")
    try:
        (tmp_path / "images" / "a.jpg").rename(tmp_path / "images" / latin_1)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    images = [entry(1, file_name=latin_1), entry(2, file_name="x" * 5000), entry(3)]
    split = prepare(make(tmp_path, images=images), tmp_path / "cache", "skip")
    assert [record["filename"] for record in split.source] == [latin_1, "3.jpg"]


def test_a_damaged_image_of_the_cache_is_named_when_it_is_read(tmp_path):
    split = prepare(make(tmp_path), tmp_path / "cache")
    overwritten(Path(next(iter(split.annotations.parent.glob("*.array_record")))))
    with pytest.raises(InputError, match=r"cache/a-.*:val is damaged .*delete"):
        list(split.source)


@pytest.mark.parametrize("limit", [10, 800, 2000, 6000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, limit):
    resource = pytest.importorskip("resource")
    folder = make(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot prepare data in .*cache.*--data\.cache-dir"):
            prepare(folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"] * 2
    assert len(list(prepare(folder, tmp_path / "cache").source)) == 4


def test_a_cache_that_is_no_folder_is_named(tmp_path):
    folder = make(tmp_path)
    (tmp_path / "cache").write_text("")
    with pytest.raises(InputError, match=r"cannot prepare data in .*cache: it is not a folder"):
        prepare(folder, tmp_path / "cache")


# ---------------------------------------------------------------------------- gfl-jax prepare


# The command, with suggestions for a config of small images.
prepare_folder = functools.partial(prepare_command.main, config="gfl_r18_fpn_shapes")


def coco_layout(root):
    """A folder as COCO 2017 is published; its validation split has another box."""
    for year, box in (("train2017", BOX), ("val2017", [1.0, 2.0, 30.0, 20.5])):
        raw = make(root / "made", [annotation(bbox=box)])
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        raw.annotations.rename(root / "annotations" / f"instances_{year}.json")
        raw.images.rename(root / year)
    return root


def test_the_command_makes_a_folder_that_can_be_moved(tmp_path, capsys):
    source = coco_layout(tmp_path / "coco")
    prepare_folder(str(source), str(tmp_path / "made"))
    printed = capsys.readouterr().out
    assert "instances_train2017.json" in printed
    assert "--data.prepared" in printed
    moved = tmp_path / "other" / "place"
    moved.parent.mkdir()
    (tmp_path / "made").rename(moved)
    shutil.rmtree(source)
    for name, size in (("train", BOX[2:]), ("val", [30.0, 20.5])):
        split = Prepared(str(moved)).open(name)
        assert split.num_boxes.tolist() == [1, 0, 0, 0]
        boxes = split.source[0]["boxes"]
        assert (boxes[:, 2:] - boxes[:, :2]).tolist() == [size]
        assert images.decode(split.source[3]["image"]).shape == (32, 48, 3)
        assert COCO(split.annotations).getAnnIds() == [1]
    for file in moved.rglob("*"):
        if file.suffix == ".json":
            assert str(tmp_path) not in file.read_text()


def test_a_second_call_does_nothing_unless_told(tmp_path, capsys):
    source, made = coco_layout(tmp_path / "coco"), tmp_path / "made"
    prepare_folder(str(source), str(made))
    before = (made / "manifest.json").stat().st_mtime_ns
    image_file(source / "val2017" / "1.jpg", seed=50)
    prepare_folder(str(source), str(made))
    assert "nothing to do" in capsys.readouterr().out
    assert (made / "manifest.json").stat().st_mtime_ns == before
    prepare_folder(str(source), str(made), overwrite=True)
    split = Prepared(str(made)).open("val")
    assert split.source[0]["image"] == (source / "val2017" / "1.jpg").read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"coco", "made", ".made.lock"}


def test_a_split_without_annotations_is_left_out(tmp_path, capsys):
    source = coco_layout(tmp_path / "coco")
    (source / "annotations" / "instances_train2017.json").unlink()
    prepare_folder(str(source), str(tmp_path / "made"))
    assert "train: left out, there is no" in capsys.readouterr().out
    assert len(Prepared(str(tmp_path / "made")).open("val").source) == 4
    with pytest.raises(InputError, match="no split 'train', only val"):
        Prepared(str(tmp_path / "made")).open("train")


def test_faulty_data_leaves_an_earlier_folder_as_it_was(tmp_path):
    source, made = coco_layout(tmp_path / "coco"), tmp_path / "made"
    prepare_folder(str(source), str(made))
    (source / "val2017" / "2.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match="--on-error skip"):
        prepare_folder(str(source), str(made), overwrite=True)
    assert len(Prepared(str(made)).open("val").source) == 4
    prepare_folder(str(source), str(made), on_error="skip", overwrite=True)
    assert len(Prepared(str(made)).open("val").source) == 3


def test_nothing_else_is_overwritten(tmp_path):
    source = coco_layout(tmp_path / "coco")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="in the way"):
        prepare_folder(str(source), str(tmp_path / "mine"), overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(InputError, match="has none of: a COCO json; "):
        prepare_folder(str(tmp_path / "mine"), str(tmp_path / "made"))
    with pytest.raises(DataError, match="missing annotation file"):
        prepare_folder(
            str(source), str(tmp_path / "made"), train_annotations="t", val_annotations="v"
        )


@pytest.mark.parametrize(
    "use",
    [
        lambda here: prepare_folder("gs://bucket/coco", here),
        lambda here: prepare_folder(here, "gs://bucket/made"),
        lambda here: CocoFolder(root="gs://bucket/coco").open("val"),
        lambda here: CocoFolder(root=here, cache_dir="s3://bucket/cache").open("val"),
        lambda here: Shapes(cache_dir="gs://bucket/cache").open("val"),
        lambda here: Tfds(root="gs://bucket/tfds").open("val"),
    ],
)
def test_where_only_a_local_folder_will_do_a_url_is_refused(tmp_path, use, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"://bucket/.*must be on a local disk"):
        use(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_copied_in_part_is_named(tmp_path):
    prepare_folder(str(coco_layout(tmp_path / "coco")), str(tmp_path / "made"))
    (file,) = (tmp_path / "made" / "val").glob("*.array_record")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"array_record has .* bytes, not .*copy"):
        Prepared(str(tmp_path / "made")).open("val")
    file.unlink()
    with pytest.raises(InputError, match="array_record is missing"):
        Prepared(str(tmp_path / "made")).open("val")
    (tmp_path / "made" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no prepared data set"):
        Prepared(str(tmp_path / "made")).open("val")


def test_a_folder_of_another_format_is_refused(tmp_path):
    prepare_folder(str(coco_layout(tmp_path / "coco")), str(tmp_path / "made"))
    manifest = tmp_path / "made" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match="has format 99"):
        Prepared(str(tmp_path / "made")).open("val")


@given(
    st.lists(
        st.tuples(*[st.integers(0, 63900)] * 2, *[st.integers(100, 60000)] * 2),
        min_size=1,
        max_size=30,
    )
)
def test_boxes_are_the_corners_rounded_once_to_float32(hundredths):
    """Not to twice: what is stored is what the reference computes from the json."""
    boxes = [tuple(x / 100 for x in box) for box in hundredths]
    size = {"height": 640, "width": 640}
    content = {
        "images": [{"id": 1, "file_name": __file__, **size}],
        "annotations": [annotation(id=i, image_id=1, bbox=list(b)) for i, b in enumerate(boxes)],
        "categories": [{"id": 3, "name": "cat"}],
    }
    (entry,), _ = check(content, Path("a.json"), Path(__file__).parent, "raise")
    table = make_table([1], ["a"], [(640, 640)], [entry.objects])
    expected = np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]).astype(np.float32)
    np.testing.assert_array_equal(table.boxes, expected)
    # What earlier versions stored: shares of the image in float32.
    shares = (np.array([[x, y, x + w, y + h] for x, y, w, h in boxes]) / 640).astype(np.float32)
    np.testing.assert_allclose(table.boxes, shares * 640.0, rtol=2**-23)

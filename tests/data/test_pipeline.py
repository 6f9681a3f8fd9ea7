"""Batches of a small COCO folder: pixels and boxes agree, and any step can be had alone."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from tiny_experiment import prepare

from gfl_jax.config import Data
from gfl_jax.data.pipeline import ImageCache, batches, load_batch, max_boxes_of
from gfl_jax.data.plan import eval_plan, train_plan
from gfl_jax.data.prepare import RawSplit

BACKGROUND = (30, 60, 90)
COLOURS = ((250, 20, 10), (10, 240, 40))  # RGB of the objects of each class
SIZES = [(90, 120), (120, 90), (64, 200), (100, 100), (48, 64), (80, 60), (96, 128), (20, 100)]
FULLEST = 3
NO_OBJECT, TOO_SMALL = 6, 7
DATA = Data(scale=(128, 96), multi_scale=(64, 96), flip=0.5, workers=0, cache_megabytes=0)
STRETCHED = Data(scale=(128, 96), keep_ratio=False, workers=0)
SSD = dataclasses.replace(STRETCHED, augmentation="ssd", repeats=2)


def objects_of(image):
    """(label, x, y, w, h) of the objects of an image, each painted in its colour."""
    height, width = SIZES[image]
    if image == NO_OBJECT:
        return []
    if image == FULLEST:
        return [(k % 2, 6 + 32 * (k % 3), 6 + 32 * (k // 3), 20, 18) for k in range(9)]
    return [
        (0, width // 8, height // 4, width // 4, height // 2),
        (1, width // 2, height // 8, width // 3, height // 2),
    ]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    annotations = []

    def annotate(image, label, box, **others):
        entry = {"id": len(annotations) + 1, "image_id": image + 1, "category_id": 10 + label}
        annotations.append(entry | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0} | others)

    for image, (height, width) in enumerate(SIZES):
        pixels = np.full((height, width, 3), BACKGROUND[::-1], np.uint8)
        annotate(image, 0, [1, 1, 9, 9], iscrowd=1)
        annotate(image, 1, [2, 2, 9, 9], ignore=1)
        for label, x, y, w, h in objects_of(image):
            pixels[y : y + h, x : x + w] = COLOURS[label][::-1]
            annotate(image, label, [x, y, w, h])
        assert cv2.imwrite(str(root / "images" / f"{image}.png"), pixels)
    content = {
        "images": [
            {"id": image + 1, "file_name": f"{image}.png", "height": height, "width": width}
            for image, (height, width) in enumerate(SIZES)
        ],
        "annotations": annotations,
        "categories": [{"id": 10, "name": "red"}, {"id": 11, "name": "green"}],
    }
    (root / "annotations.json").write_text(json.dumps(content))
    return prepare(RawSplit(root / "annotations.json", root / "images"), root / "cache")


@pytest.fixture(scope="module")
def plan(split):
    return train_plan(DATA, split, batch_size=3, seed=3)


def load(step, plan, split, cache=None):
    return load_batch(step, plan=plan, split=split, max_boxes=16, cache=cache or ImageCache(0))


def within(box, margin, shape):
    """Pixels of an image inside a box grown by a margin (shrunk, if that is negative)."""
    x1, y1, x2, y2 = map(float, box)
    rows, columns = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    inside_y = (rows > y1 - margin) & (rows < y2 + margin)
    inside_x = (columns > x1 - margin) & (columns < x2 + margin)
    return inside_y[:, None] & inside_x[None]


@pytest.mark.parametrize("data", [DATA, STRETCHED], ids=["kept ratio", "stretched"])
def test_boxes_lie_on_their_objects_after_resizing_and_flipping(split, data):
    plan = train_plan(data, split, batch_size=3, seed=3)
    seen = set()
    for step in range(6 * plan.steps_per_epoch):
        slots = plan(step)
        batch, image_ids, _ = load(step, plan, split)
        for i in np.flatnonzero(slots.real):
            pixels, (height, width) = batch.images[i], batch.sizes[i]
            boxes = batch.boxes[i][batch.box_mask[i]]
            labels = batch.labels[i][batch.box_mask[i]]
            image = int(image_ids[i]) - 1
            # Neither the crowd nor the ignored box are among them.
            assert labels.tolist() == [entry[0] for entry in objects_of(image)]
            old = np.array(SIZES[image])
            assert np.allclose(batch.scales[i], ((height, width) / old)[::-1])
            margin = 1 + max(batch.scales[i])  # as far as bilinear interpolation mixes
            around = np.zeros(pixels.shape[:2], bool)
            for box, label, (_, _, _, w, h) in zip(boxes, labels, objects_of(image), strict=True):
                inner = within(box, -margin, pixels.shape)
                assert inner.any()
                assert (pixels[inner] == COLOURS[label]).all()
                around |= within(box, margin, pixels.shape)
                np.testing.assert_allclose(box[2:] - box[:2], (w, h) * batch.scales[i], rtol=1e-5)
            assert (pixels[:height, :width][~around[:height, :width]] == BACKGROUND).all()
            seen.add((image, bool(slots.flip[i])))
    assert len(seen) >= 10  # most images were seen both ways
    assert {flip for _, flip in seen} == {False, True}


@pytest.mark.parametrize("data", [Data(scale=(128, 96)), SSD], ids=["flipped", "augmented"])
def test_flipping_mirrors_the_image_without_its_padding(split, data):
    """The same step with and without flipping: columns of the image are reversed in place."""
    plain, mirrored = (
        train_plan(dataclasses.replace(data, flip=flip), split, batch_size=2, seed=3)
        for flip in (0.0, 1.0)
    )
    for step in range(plain.steps_per_epoch):
        (a, *_), (b, *_) = (load(step, plan, split) for plan in (plain, mirrored))
        for i in range(2):
            width = a.sizes[i, 1]
            np.testing.assert_array_equal(b.images[i][:, :width], a.images[i][:, :width][:, ::-1])
            np.testing.assert_array_equal(b.images[i][:, width:], a.images[i][:, width:])
            mask = a.box_mask[i]
            x1, y1, x2, y2 = a.boxes[i][mask].T
            expected = np.stack([width - x2, y1, width - x1, y2], 1)
            np.testing.assert_allclose(b.boxes[i][mask], expected, atol=1e-4)


def test_batches_are_padded_with_zeros(split, plan):
    for step in range(plan.steps_per_epoch):
        slots = plan(step)
        batch, image_ids, _ = load(step, plan, split)
        assert batch.images.shape == (3, *slots.canvas, 3)
        assert batch.images.dtype == np.uint8
        assert batch.boxes.dtype == batch.scales.dtype == np.float32
        assert batch.boxes.shape == (3, 16, 4)
        np.testing.assert_array_equal(batch.image_mask, slots.real)
        np.testing.assert_array_equal(image_ids, slots.images + 1)
        assert not batch.boxes[~batch.box_mask].any()
        assert not batch.labels[~batch.box_mask].any()
        for i, (height, width) in enumerate(batch.sizes):
            assert not batch.images[i, height:].any()
            assert not batch.images[i, :, width:].any()
            assert batch.images[i, :height, :width].any((0, 1, 2))
            assert batch.box_mask[i].any() == slots.real[i]  # a filler has no objects


def test_sizes_and_canvas_follow_the_limits(split, plan):
    for step in range(2 * plan.steps_per_epoch):
        slots = plan(step)
        batch, image_ids, _ = load(step, plan, split)
        for (height, width), image_id in zip(batch.sizes, image_ids, strict=True):
            old = SIZES[image_id - 1]
            scale = min(128 / max(old), slots.short_side / min(old))
            assert (height, width) == tuple(math.floor(side * scale + 0.5) for side in old)
            assert height <= slots.canvas[0]
            assert width <= slots.canvas[1]


@pytest.mark.parametrize("data", [STRETCHED, SSD], ids=["stretched", "augmented"])
def test_without_the_ratio_every_image_fills_the_canvas(split, data):
    for plan in (train_plan(data, split, batch_size=3, seed=3), eval_plan(data, split, 3)):
        seen = []
        for step in range(plan.steps_per_epoch):
            batch, image_ids, _ = load(step, plan, split)
            assert batch.images.shape == (3, 96, 128, 3)
            assert (batch.sizes == (96, 128)).all()
            assert batch.images.any(-1).mean() > 0.99
            seen.extend(image_ids[batch.image_mask])
            if not plan.shuffle:  # evaluation maps detections back by these, and never augments
                old = np.array([SIZES[i - 1] for i in image_ids])
                np.testing.assert_allclose(batch.scales, ((96, 128) / old)[:, ::-1], rtol=1e-6)
        times = plan.data.repeats
        assert sorted(seen) == np.repeat(plan.indices + 1, times).tolist()


def test_augmented_objects_keep_their_boxes(split):
    """Colours vary, so an object is told by being of one colour and its surroundings of another."""
    plan = train_plan(SSD, split, batch_size=3, seed=3)
    dropped = kept = 0
    scales = set()
    for step in range(3 * plan.steps_per_epoch):
        batch, image_ids, _ = load(step, plan, split)
        assert batch.boxes.dtype == batch.scales.dtype == np.float32
        for i in np.flatnonzero(batch.image_mask):
            boxes = batch.boxes[i][batch.box_mask[i]]
            objects = objects_of(image_ids[i] - 1)
            assert 1 <= len(boxes) <= len(objects)
            dropped += len(objects) - len(boxes)
            labels = [entry[0] for entry in objects]
            assert np.isin(batch.labels[i][batch.box_mask[i]], labels).all()
            assert (boxes >= 0).all()
            assert (boxes <= (128, 96, 128, 96)).all()
            scales.add(tuple(batch.scales[i]))
            margin, pixels = 1 + max(batch.scales[i]), batch.images[i]
            for box in boxes:
                inner, outer, further = (within(box, m * margin, (96, 128)) for m in (-1, 1, 2))
                if inner.any():
                    kept += 1
                    colour, around = pixels[inner][0], pixels[further & ~outer]
                    assert (pixels[inner] == colour).all()
                    assert not len(around) or (around != colour).any()
    assert kept > 50
    assert dropped > 5
    assert len(scales) > 20


def test_augmentation_is_a_function_of_seed_step_and_slot(split):
    plan, other = (train_plan(SSD, split, batch_size=3, seed=seed) for seed in (3, 4))
    first, again = (load(5, plan, split) for _ in range(2))
    assert_equal([first], [again])
    # The same image in every slot, at another step and with another seed: never twice the same.
    data = dataclasses.replace(SSD, repeats=6, flip=0.0)
    fixed = dict(data=data, indices=np.array([0]), batch_size=6)
    found = [
        load(step, dataclasses.replace(made, **fixed), split).batch.images
        for made, step in ((plan, 0), (plan, 1), (other, 0))
    ]
    assert len({image.tobytes() for images in found for image in images}) == 18


def test_training_leaves_out_images_without_objects_and_tiny_ones(split, plan):
    seen = {int(i) for step in range(plan.steps_per_epoch) for i in plan(step).images}
    assert seen == set(range(len(SIZES))) - {NO_OBJECT, TOO_SMALL}


@pytest.mark.parametrize("data", [DATA, SSD], ids=["flipped", "augmented"])
@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_hosts_load_together_what_one_would(split, data, hosts):
    plan = train_plan(data, split, batch_size=6, seed=3)
    for step in range(plan.steps_per_epoch):
        whole = load(step, plan, split)
        parts = [
            load_batch(
                step,
                plan=plan,
                split=split,
                max_boxes=16,
                cache=ImageCache(0),
                share=(index, hosts),
            )
            for index in range(hosts)
        ]
        for part in parts:
            assert len(part.batch.images) == 6 // hosts
            np.testing.assert_array_equal(part.image_ids, whole.image_ids)
            np.testing.assert_array_equal(part.image_mask, whole.image_mask)
        for name in whole.batch._fields:
            together = np.concatenate([getattr(part.batch, name) for part in parts])
            np.testing.assert_array_equal(together, getattr(whole.batch, name))


def test_evaluation_sees_every_image_once_unflipped(split):
    plan = eval_plan(DATA, split, batch_size=3)
    found = list(batches(plan, split, range(plan.steps_per_epoch), DATA))
    ids = np.concatenate([host.image_ids[host.image_mask] for host in found])
    assert sorted(ids.tolist()) == list(range(1, len(SIZES) + 1))
    assert not any(plan(step).flip.any() for step in range(plan.steps_per_epoch))
    limited = eval_plan(DATA, split, batch_size=3, limit=4)
    assert limited.indices.tolist() == [0, 1, 2, 3]


def test_there_is_room_for_the_boxes_of_the_fullest_image(split, plan):
    room = max_boxes_of(split)
    assert room >= split.num_boxes.max() == len(objects_of(FULLEST)) == 9
    assert room % 8 == 0
    assert room <= 16
    most = 0
    for batch, *_ in batches(plan, split, range(plan.steps_per_epoch), DATA):
        assert batch.boxes.shape[1] == room
        most = max(most, batch.box_mask.sum(1).max())
    assert most == 9


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for ours, other in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, other)


@pytest.mark.parametrize("data", [DATA, SSD], ids=["flipped", "augmented"])
def test_batches_from_a_step_on_are_those_of_the_whole_run(split, data):
    plan = train_plan(data, split, batch_size=3, seed=3)
    steps = 2 * plan.steps_per_epoch + 1
    whole = list(batches(plan, split, range(steps), data))
    assert len(whole) == steps
    for k in (1, plan.steps_per_epoch, steps - 1):
        assert_equal(list(batches(plan, split, range(k, steps), data)), whole[k:])
    assert_equal(list(itertools.islice(batches(plan, split, range(steps), data), 2)), whole[:2])
    direct = load(2, plan, split)
    assert_equal([direct], [whole[2]])


@pytest.mark.parametrize("data", [DATA, SSD], ids=["flipped", "augmented"])
def test_images_kept_in_memory_change_nothing(split, data):
    """Three epochs, so that images come back, also flipped; the cache holds about half of them."""
    plan = train_plan(data, split, batch_size=3, seed=3)
    steps = range(3 * plan.steps_per_epoch)
    for limit in (100_000, 10**9):
        cache = ImageCache(limit)
        assert_equal(
            [load(step, plan, split, cache) for step in steps],
            [load(step, plan, split) for step in steps],
        )
        assert 0 < cache.taken <= limit
        assert cache.taken == sum(image.nbytes for image, _ in cache.images.values())
        if data.augmentation == "ssd":  # what is kept are the originals
            for (index, _), (image, _) in cache.images.items():
                assert image.shape[:2] == SIZES[index]


@pytest.mark.parametrize(
    ("data", "of_training", "of_evaluation"),
    [
        (DATA, "3656aeace6a9556d", "c1b55355d7c0d07f"),
        (STRETCHED, "ef92fad88b6c23d9", "85db3da1dd6f5c4f"),
        (SSD, "af6c419302767ced", "85db3da1dd6f5c4f"),
    ],
    ids=["kept ratio", "stretched", "augmented"],
)
def test_batches_are_those_of_earlier_versions(split, data, of_training, of_evaluation):
    """Digests from before BatchPlan and Data were taken apart; boxes to a tenth of a pixel."""
    plans = train_plan(data, split, batch_size=3, seed=3), eval_plan(data, split, batch_size=3)
    for plan, expected in zip(plans, (of_training, of_evaluation), strict=True):
        digest = hashlib.sha256()
        for step in range(2 * plan.steps_per_epoch + 1):
            for value in plan(step):
                digest.update(np.asarray(value, np.int64).tobytes())
            batch, image_ids, image_mask = load(step, plan, split)
            boxes = np.rint(batch.boxes * 10).astype(np.int32)
            for array in (
                *(batch.images, batch.sizes, batch.scales, batch.labels, batch.box_mask),
                *(batch.image_mask, image_ids, image_mask, boxes),
            ):
                digest.update(np.ascontiguousarray(array).tobytes())
        assert digest.hexdigest()[:16] == expected


def test_an_image_in_memory_is_not_decoded_again():
    cache, calls = ImageCache(100), []

    def decode():
        calls.append(None)
        return np.zeros(60, np.uint8), (1.0, 1.0)

    for key in ("a", "a", "b", "a", "b"):
        assert cache.get(key, decode)[0].nbytes == 60
    assert len(calls) == 3  # "b" does not fit


def test_no_steps_are_no_batches(split, plan):
    assert list(batches(plan, split, range(5, 5), DATA)) == []


@pytest.mark.parametrize("data", [DATA, SSD], ids=["flipped", "augmented"])
def test_a_worker_process_makes_the_same_batches_as_threads(split, data):
    plan = train_plan(data, split, batch_size=3, seed=3)
    steps = range(1, plan.steps_per_epoch + 2)
    expected = list(batches(plan, split, steps, data))
    assert_equal(list(batches(plan, split, steps, dataclasses.replace(data, workers=1))), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scale=(128, 100)), "multiples of 32"),
        (dict(scale=(120, 96)), "multiples of 32"),
        (dict(multi_scale=(64, 96)), "need data.keep_ratio"),
        (dict(canvases=((96, 128),)), "need data.keep_ratio"),
        (dict(keep_ratio=True), "'ssd' stretches"),
        (dict(repeats=0), "data.repeats is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_clear_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SSD, **changes)


CONSUMER = """
import multiprocessing, pickle, sys, time
from gfl_jax.data.pipeline import batches

if __name__ == "__main__":
    plan, split, data = pickle.load(open(sys.argv[1], "rb"))
    loaded = batches(plan, split, range(1000), data)
    next(loaded)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
def test_workers_end_when_the_training_process_is_killed(split, tmp_path):
    data = dataclasses.replace(DATA, workers=1)
    plan = train_plan(data, split, batch_size=3, seed=3)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "plan").write_bytes(pickle.dumps((plan, split, data)))
    with subprocess.Popen(
        [sys.executable, tmp_path / "consumer.py", tmp_path / "plan"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        (worker,) = process.stdout.readline().split()
        process.kill()
    status = Path(f"/proc/{worker}/status")
    deadline = time.monotonic() + 30
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)

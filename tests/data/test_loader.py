"""Batches of a small COCO folder: pixels and boxes agree, and any step can be had alone."""

import dataclasses
import itertools
import json
import math

import cv2
import jax
import numpy as np
import pytest

from gfl_jax.config import Data
from gfl_jax.data import coco
from gfl_jax.data.loader import (
    ImageCache,
    batches,
    eval_plan,
    load_batch,
    max_boxes_of,
    train_plan,
)

BACKGROUND = (30, 60, 90)
COLOURS = ((250, 20, 10), (10, 240, 40))  # RGB of the objects of each class
SIZES = [(90, 120), (120, 90), (64, 200), (100, 100), (48, 64), (80, 60), (96, 128), (20, 100)]
FULLEST = 3
NO_OBJECT, TOO_SMALL = 6, 7
DATA = Data(scale=(128, 96), multi_scale=(64, 96), flip=0.5, workers=0, cache_megabytes=0)


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
    return coco.prepare(coco.CocoFolder(root / "annotations.json", root / "images"), root / "cache")


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


def test_boxes_lie_on_their_objects_after_resizing_and_flipping(split, plan):
    seen = set()
    for step in range(6 * plan.steps_per_epoch):
        slots = plan(step)
        (batch, image_ids) = load(step, plan, split)
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


def test_flipping_mirrors_the_image_without_its_padding(split):
    """The same step with and without flipping: columns of the image are reversed in place."""
    plain, mirrored = (
        train_plan(Data(scale=(128, 96), flip=flip), split, batch_size=2, seed=3)
        for flip in (0.0, 1.0)
    )
    for step in range(plain.steps_per_epoch):
        (a, _), (b, _) = (load(step, plan, split) for plan in (plain, mirrored))
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
        batch, image_ids = load(step, plan, split)
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
        batch, image_ids = load(step, plan, split)
        for (height, width), image_id in zip(batch.sizes, image_ids, strict=True):
            old = SIZES[image_id - 1]
            scale = min(128 / max(old), slots.short_side / min(old))
            assert (height, width) == tuple(math.floor(side * scale + 0.5) for side in old)
            assert height <= slots.canvas[0]
            assert width <= slots.canvas[1]


def test_training_leaves_out_images_without_objects_and_tiny_ones(split, plan):
    seen = {int(i) for step in range(plan.steps_per_epoch) for i in plan(step).images}
    assert seen == set(range(len(SIZES))) - {NO_OBJECT, TOO_SMALL}


def test_evaluation_sees_every_image_once_unflipped(split):
    plan = eval_plan(DATA, split, batch_size=3)
    found = [batch for batch in batches(plan, split, range(plan.steps_per_epoch), DATA)]
    ids = np.concatenate([ids[batch.image_mask] for batch, ids in found])
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
    for batch, _ in batches(plan, split, range(plan.steps_per_epoch), DATA):
        assert batch.boxes.shape[1] == room
        most = max(most, batch.box_mask.sum(1).max())
    assert most == 9


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for ours, other in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, other)


def test_batches_from_a_step_on_are_those_of_the_whole_run(split, plan):
    steps = 2 * plan.steps_per_epoch + 1
    whole = list(batches(plan, split, range(steps), DATA))
    assert len(whole) == steps
    for k in (1, plan.steps_per_epoch, steps - 1):
        assert_equal(list(batches(plan, split, range(k, steps), DATA)), whole[k:])
    assert_equal(list(itertools.islice(batches(plan, split, range(steps), DATA), 2)), whole[:2])
    direct = load(2, plan, split)
    assert_equal([direct], [whole[2]])


def test_images_kept_in_memory_change_nothing(split, plan):
    """Three epochs, so that images come back, also flipped; the cache holds about half of them."""
    steps = range(3 * plan.steps_per_epoch)
    for limit in (100_000, 10**9):
        cache = ImageCache(limit)
        assert_equal(
            [load(step, plan, split, cache) for step in steps],
            [load(step, plan, split) for step in steps],
        )
        assert 0 < cache.taken <= limit
        assert cache.taken == sum(image.nbytes for image, _ in cache.images.values())


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


def test_a_worker_process_makes_the_same_batches_as_threads(split, plan):
    steps = range(1, plan.steps_per_epoch + 2)
    expected = list(batches(plan, split, steps, DATA))
    assert_equal(list(batches(plan, split, steps, dataclasses.replace(DATA, workers=1))), expected)

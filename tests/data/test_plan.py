"""What every plan of batches has in common, whatever the images and the settings."""

import dataclasses
import hashlib
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gfl_jax.cli import load_experiment
from gfl_jax.data.images import canvases_of
from gfl_jax.data.plan import BatchPlan, eval_plan, train_plan
from gfl_jax.data.sources import Data

side = st.integers(32, 700)


def up_to_32(x):
    return (x + 31) // 32 * 32


@st.composite
def settings_of_plans(draw):
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=30))
    taking_part = draw(
        st.lists(st.sampled_from(range(len(sizes))), min_size=1, max_size=len(sizes), unique=True)
    )
    short = draw(st.integers(32, 200))
    long = draw(st.integers(short, 400))
    limits = sorted(draw(st.tuples(st.integers(32, short), st.integers(32, short))))
    smaller = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), max_size=3))
    smaller = [tuple(32 * k for k in sorted(canvas)) for canvas in smaller]
    landscape = draw(st.sampled_from([(), (*smaller, (up_to_32(short), up_to_32(long)))]))
    keep_ratio = draw(st.booleans())
    if not keep_ratio:
        long, short, limits, landscape = up_to_32(long), up_to_32(short), None, ()
    return dict(
        data=Data(
            scale=(long, short),
            canvases=landscape,
            multi_scale=draw(st.sampled_from([None, limits and tuple(limits)])),
            flip=draw(st.sampled_from([0.0, 0.5, 1.0])),
            keep_ratio=keep_ratio,
            repeats=draw(st.integers(1, 3)),
        ),
        sizes=np.array(sizes),
        indices=np.array(sorted(taking_part)),
        batch_size=draw(st.integers(1, 7)),
        shuffle=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


def epoch_of(plan, epoch=0):
    first = epoch * plan.steps_per_epoch
    return [plan(step) for step in range(first, first + plan.steps_per_epoch)]


def resized(size, long_side, short_side):
    height, width = map(int, size)
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def equal(a, b):
    """Whether two batches, or lists of them, are the same."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def make(sizes, batch_size=4, indices=None, shuffle=True, seed=0, **of_data):
    data = Data(**{"scale": (256, 128), "flip": 0.0, **of_data})
    indices = np.arange(len(sizes)) if indices is None else indices
    return BatchPlan(data, np.array(sizes), indices, batch_size, shuffle, seed)


@given(settings_of_plans(), st.integers(0, 3))
def test_an_epoch_has_every_image_equally_often(settings, epoch):
    plan = BatchPlan(**settings)
    batches = epoch_of(plan, epoch)
    real = np.concatenate([batch.images[batch.real] for batch in batches])
    assert sorted(real) == np.repeat(settings["indices"], settings["data"].repeats).tolist()
    height, width = settings["sizes"][settings["indices"]].T
    portrait = int((height > width).sum()) if settings["data"].keep_ratio else 0
    groups = [settings["data"].repeats * count for count in (portrait, len(height) - portrait)]
    assert plan.steps_per_epoch == sum(math.ceil(n / settings["batch_size"]) for n in groups)


@given(settings_of_plans())
def test_batches_are_full_and_fit_their_canvas(settings):
    """With the ratio kept, they are of one orientation, too."""
    data = settings["data"]
    long_side = data.scale[0]
    low, high = data.multi_scale or (data.scale[1],) * 2
    for batch in epoch_of(BatchPlan(**settings), 1):
        size = settings["batch_size"]
        assert batch.images.shape == batch.real.shape == batch.flip.shape == (size,)
        assert batch.real[0]
        assert set(batch.images) == set(batch.images[batch.real])  # fillers repeat their batch
        if not data.keep_ratio:
            assert batch.canvas == data.scale[::-1]
            assert batch.short_side == low
            continue
        height, width = settings["sizes"][batch.images].T
        assert len(set(height > width)) == 1
        assert low <= batch.short_side <= high
        needed = [resized(s, long_side, batch.short_side) for s in settings["sizes"][batch.images]]
        needed = np.max(needed, axis=0)
        fitting = [c for c in canvases_of(data.scale, data.canvases) if (needed <= c).all()]
        assert batch.canvas in fitting
        assert np.prod(batch.canvas) == min(map(np.prod, fitting))


@given(settings_of_plans(), st.data())
def test_a_batch_is_a_function_of_settings_and_step(settings, data):
    plan = BatchPlan(**settings)
    sequence = [batch for epoch in range(3) for batch in epoch_of(plan, epoch)]
    step = data.draw(st.integers(0, len(sequence) - 1))
    assert equal(BatchPlan(**settings)(step), sequence[step])  # alone
    assert equal(plan(step), sequence[step])  # again, going back
    assert equal(epoch_of(BatchPlan(**settings), 0), sequence[: plan.steps_per_epoch])


@given(settings_of_plans())
def test_flips_follow_their_probability(settings):
    flips = np.concatenate([batch.flip for batch in epoch_of(BatchPlan(**settings))])
    if settings["data"].flip in (0.0, 1.0):
        assert (flips == settings["data"].flip).all()


def test_half_of_the_images_are_flipped():
    batches = epoch_of(make([(100, 200)] * 1000, flip=0.5))
    assert 0.4 < np.mean([batch.flip for batch in batches]) < 0.6


def random_sizes(count=40):
    return np.random.default_rng(0).integers(32, 300, (count, 2))


def test_epochs_and_seeds_differ():
    plan, other = make(random_sizes(), flip=0.5), make(random_sizes(), flip=0.5, seed=1)
    epochs = [epoch_of(plan, 0), epoch_of(plan, 1), epoch_of(other, 0), epoch_of(other, 1)]
    for i in range(4):
        for j in range(i):
            assert not equal(epochs[i], epochs[j])
            orders = [np.concatenate([batch.images for batch in epochs[k]]) for k in (i, j)]
            assert not np.array_equal(*orders)


def test_every_repetition_is_shuffled_anew():
    plan = make(random_sizes(), batch_size=40, keep_ratio=False, repeats=3)
    orders = [batch.images for batch in epoch_of(plan)]
    assert [sorted(order) for order in orders] == [list(range(40))] * 3
    assert len({tuple(order) for order in orders}) == 3


def test_stretched_images_of_both_orientations_share_batches():
    plan = make([(200, 100)] * 40 + [(100, 200)] * 40, batch_size=10, keep_ratio=False)
    portrait = [(batch.images < 40).sum() for batch in epoch_of(plan)]
    assert sum(portrait) == 40
    assert all(0 < count < 10 for count in portrait)


def test_orientations_are_mixed_within_an_epoch():
    """Not all portrait batches first."""
    plan = make([(200, 100)] * 60 + [(100, 200)] * 60)
    portrait = [batch.canvas[0] > batch.canvas[1] for batch in epoch_of(plan)]
    assert sum(portrait) == 15
    assert portrait != sorted(portrait)
    assert portrait != sorted(portrait, reverse=True)


def test_without_shuffling_images_come_in_order_the_same_in_every_epoch():
    sizes = random_sizes(30)
    plan = make(sizes, shuffle=False)
    batches = epoch_of(plan)
    assert equal(batches, epoch_of(plan, 3))
    real = np.concatenate([batch.images[batch.real] for batch in batches])
    portrait = sizes[:, 0] > sizes[:, 1]
    for group in (portrait, ~portrait):  # each orientation for itself
        assert real[group[real]].tolist() == np.flatnonzero(group).tolist()


def test_short_sides_cover_their_range():
    plan = make([(100, 200)] * 400, batch_size=1, multi_scale=(96, 99))
    assert {batch.short_side for batch in epoch_of(plan)} == {96, 97, 98, 99}


@pytest.mark.parametrize(
    ("sizes", "short_side", "canvas"),
    [
        ([(96, 128)], 96, (96, 128)),
        ([(128, 96)], 96, (128, 96)),
        ([(128, 160)], 128, (128, 160)),
        ([(64, 80)], 128, (128, 160)),
        ([(128, 161)], 128, (128, 256)),
        ([(160, 128)], 128, (160, 128)),
        ([(100, 1000)], 128, (128, 256)),
        ([(128, 128), (64, 160)], 128, (128, 256)),  # the second is 102 x 256
    ],
)
def test_the_smallest_canvas_that_holds_all_images_is_taken(sizes, short_side, canvas):
    canvases = ((96, 128), (128, 160), (128, 256))
    plan = make(sizes, batch_size=2, canvases=canvases, multi_scale=(short_side, short_side))
    assert plan(0).canvas == canvas


def test_canvases_are_mirrored_and_sorted_by_area():
    assert canvases_of((1333, 800)) == ((800, 1344), (1344, 800))
    assert canvases_of((320, 320)) == ((320, 320),)
    assert canvases_of((256, 128), ((128, 256), (128, 160))) == (
        (128, 160),
        (160, 128),
        (128, 256),
        (256, 128),
    )


def test_a_canvas_too_small_is_a_clear_error():
    plan = make([(100, 200), (100, 250)], canvases=((128, 256),), scale=(320, 128))
    with pytest.raises(ValueError, match=r"holds an image of 128 x 320 .*extend data\.canvases"):
        plan(0)


def test_a_plan_without_images_is_a_clear_error():
    with pytest.raises(ValueError, match="no image can be used"):
        make([(100, 200)], indices=np.arange(0))


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make([(100, 200)]).seed = 1


@pytest.mark.parametrize(
    ("config", "of_training", "of_evaluation"),
    [
        ("gfl_r50_fpn_1x_coco", "0803b9d56cfa16a7", "7c659858c00c9e88"),
        ("gfl_r50_fpn_ms2x_coco", "c0db6319d48cef34", "7c659858c00c9e88"),
        ("ssd512_vgg16_coco", "0825ea7a731c8e14", "f51fd5b2406a9500"),
        ("gfl_r18_fpn_bccd", "edbc747e8cbaa96b", "ac64eb3cf46d8cd9"),
        ("gfl_r18_fpn_shapes", "ea5746cb0e16fdf8", "a460dbaed1051519"),
    ],
)
def test_plans_of_the_configs_are_those_of_earlier_versions(config, of_training, of_evaluation):
    rng = np.random.default_rng(0)
    split = SimpleNamespace(
        sizes=rng.integers(200, 640, (1000, 2)).astype(np.int32), num_boxes=rng.integers(0, 4, 1000)
    )
    data = load_experiment(Path(__file__).parents[2] / f"configs/{config}.py").data
    for plan, expected in (
        (train_plan(data, split, 16, 0), of_training),
        (eval_plan(data, split, 16), of_evaluation),
    ):
        digest = hashlib.sha256()
        for step in range(2 * plan.steps_per_epoch + 1):
            for value in plan(step):
                digest.update(np.asarray(value, np.int64).tobytes())
        assert digest.hexdigest()[:16] == expected

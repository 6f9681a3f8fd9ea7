"""What is in a data set, and what follows from it for a config."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gfl_jax.assign import Objects
from gfl_jax.config import Experiment
from gfl_jax.data.images import canvases_of, resized_size, scale_boxes, smallest_canvas
from gfl_jax.data.pipeline import max_boxes_of
from gfl_jax.data.plan import train_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data

LISTED = 30
"""Classes that are listed one by one; of more, the most frequent and the rarest."""

SMALL, LARGE = 32**2, 96**2
"""COCO's limits of small and large objects, in square pixels."""

LONGEST = 2048
"""Longest side that is suggested, in pixels."""

PLAIN = 32
"""Side in pixels from which objects are not small to COCO: images need not be enlarged for them."""

FEW_STEPS = 800

SAMPLE = 64
"""Images on which anchors are matched."""


class Suggestion(NamedTuple):
    """A flag and why.

    Attributes:
        flag: to add to the command line; empty: nothing to add.
        reason: one line.
    """

    flag: str
    reason: str


class Trained(NamedTuple):
    """The objects of a split that are trained on.

    Attributes:
        image: int [n], index of the image of each.
        boxes: float32 [n, 4], x1, y1, x2, y2 in pixels, inside the image.
        labels: int [n].
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray

    @property
    def area(self) -> np.ndarray:
        """Of each box, in square pixels."""
        return np.prod(self.boxes[:, 2:] - self.boxes[:, :2], 1)


def trained_objects(split: PreparedSplit) -> Trained:
    """The objects of a split that are trained on: no crowds, none ignored."""
    table = split.table
    keep = ~table.crowd & (table.rule == 0)
    image = np.repeat(np.arange(len(table.image_ids)), np.diff(table.starts))[keep]
    limits = np.tile(table.sizes[image][:, ::-1], 2)
    return Trained(image, np.clip(table.boxes[keep], 0, limits), table.labels[keep])


def description(split: PreparedSplit) -> str:
    """Images, objects, classes and sizes of a split, a few lines."""
    objects = trained_objects(split)
    sizes, per_image = split.sizes, split.num_boxes
    heights, widths = np.median(sizes, axis=0).astype(int)
    odd = len(np.unique(sizes, axis=0))
    lines = [
        f"  images of {widths} x {heights} pixels"
        + (f" (median; {odd} sizes, the longest side {sizes.max()})" if odd > 1 else ""),
        f"  objects per image: {per_image.mean():.1f} on average, {per_image.max()} at most; "
        f"{(per_image == 0).sum():,} images have none",
    ]
    if len(objects.image):
        area, image = objects.area, sizes[objects.image].astype(float)
        shares = [(area < SMALL).mean(), ((area >= SMALL) & (area < LARGE)).mean()]
        low, middle, high = np.percentile(np.sqrt(area), [5, 50, 95])
        cover = np.median(area / image.prod(1))
        lines += [
            f"  sizes: {shares[0]:.0%} small (under 32 x 32 pixels), {shares[1]:.0%} medium, "
            f"{1 - sum(shares):.0%} large (96 x 96 or more)",
            f"  sides (roots of areas): {middle:.0f} pixels in the middle, {low:.0f} to {high:.0f} "
            f"without the outer 5%; an object covers {cover:.1%} of its image (median)",
        ]
    table = split.table
    limits = np.repeat(sizes[:, ::-1], np.diff(table.starts), axis=0)
    beyond = ((table.boxes[:, :2] < -0.5) | (table.boxes[:, 2:] > limits + 0.5)).any(1).sum()
    if beyond:
        lines.append(f"  {beyond:,} boxes reach beyond their image: what lies outside is cut off")
    return "\n".join([*lines, *_classes(split, objects)])


def _classes(split: PreparedSplit, objects: Trained) -> list[str]:
    """A line for each class, the most frequent first, and those without objects."""
    names = split.category_names
    counts = np.bincount(objects.labels, minlength=len(names))
    pairs = np.unique(np.stack([objects.labels, objects.image], 1), axis=0)
    images = np.bincount(pairs[:, 0], minlength=len(names))
    width = max([8, *map(len, names)])
    lines = [f"  {'class':<{width}}  objects   images"]
    order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
    lines += [f"  {names[i]:<{width}}{counts[i]:>9,}{images[i]:>9,}" for i in order]
    if len(order) > LISTED:
        lines[1 + LISTED // 2 : -LISTED // 2] = [f"  ... {len(order) - LISTED} more"]
    if missing := [names[i] for i in np.flatnonzero(counts == 0)]:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        lines.append(f"  no objects of: {', '.join(missing[:LISTED])}{more}")
    return lines


def suggestions(experiment: Experiment, split: PreparedSplit) -> list[Suggestion]:
    """What follows from training images for a config, each with its reason.

    Args:
        experiment: the config's.
        split: the training images.

    Raises:
        InputError: none of them can be trained on.
    """
    data, train = experiment.data, experiment.train
    steps = train_plan(data, split, train.batch_size, 0).steps_per_epoch
    scale = _scale(experiment, split)
    scaled = dataclasses.replace(data, scale=scale.scale) if scale.suggestion.flag else data
    return [
        scale.suggestion,
        _matched(experiment, split, scaled),
        _most(experiment, split),
        *_schedule(experiment, steps),
    ]


class _Scale(NamedTuple):
    """A scale of images, and what is said about it."""

    scale: tuple[int, int]
    suggestion: Suggestion


def _scale(experiment: Experiment, split: PreparedSplit) -> _Scale:
    """A scale at which the smallest objects are as large as two cells of the finest level.

    A smaller one than the config's if that enlarges images whose objects are not small.
    """
    data, objects = experiment.data, trained_objects(split)
    least = 2 * min(experiment.detector.priors.strides)
    sizes = split.sizes[objects.image].astype(float)
    long_side, short_side = sizes.max(1), sizes.min(1)
    sides = np.sqrt(objects.area)

    def smallest(scale: tuple[int, int]) -> float:
        factor = np.minimum(scale[0] / long_side, scale[1] / short_side)
        return float(np.percentile(sides * factor, 5))

    now = smallest(data.scale)
    said = f"at {data.scale[0]} x {data.scale[1]} the smallest 5% of objects are up to {now:.0f} "
    said += f"pixels; two cells of the finest level are {least}"
    longest, shortest = np.median(long_side), np.median(short_side)
    enlarged = min(data.scale[0] / longest, data.scale[1] / shortest)
    wanted = least if now < least else PLAIN
    factor = max(1.0, wanted / max(float(np.percentile(sides, 5)), 1e-6))
    factor = min(factor, 2.0, max(LONGEST / longest, enlarged)) if now < least else factor
    useful = factor > 1.1 * enlarged if now < least else factor < 0.9 * enlarged
    if not useful or not data.keep_ratio or data.multi_scale or data.canvases:
        return _Scale(data.scale, Suggestion("", said))
    new = _up_to_32(longest * factor), _up_to_32(shortest * factor)
    flag = f"--data.scale {new[0]} {new[1]}"
    change = new[0] * new[1] / (data.scale[0] * data.scale[1])
    cost = f"{change:.1f} times the" if change > 1 else f"{change:.0%} of the"
    said += f"; so they are up to {smallest(new):.0f}, with {cost} pixels in a step"
    if change < 1:
        said += f" (enlarging images {enlarged:.1f} times adds no detail)"
    return _Scale(new, Suggestion(flag, said))


def _up_to_32(side: float) -> int:
    return int(-(-side // 32) * 32)


def _matched(experiment: Experiment, split: PreparedSplit, data: Data) -> Suggestion:
    """How many objects the assigner finds priors for, on some images."""
    if experiment.detector.assigner.sees_predictions:
        return Suggestion("", "which priors answer for an object depends on what is predicted")
    counts = positives(experiment, split, data)
    share, middle = (counts > 0).mean(), np.median(counts)
    name = type(experiment.detector.assigner).__name__
    said = (
        f"{name} finds positives for {share:.1%} of {len(counts):,} objects at {data.scale[0]} x "
    )
    said += f"{data.scale[1]}, {middle:.0f} each (median)"
    if share < 0.99:
        said += "; the others are not learned: they are too small, or others cover them"
    return Suggestion("", said)


def positives(experiment: Experiment, split: PreparedSplit, data: Data) -> np.ndarray:
    """The number of priors that the assigner gives each object, on evenly spaced images."""
    detector, objects = experiment.detector, trained_objects(split)
    usable = np.flatnonzero(split.num_boxes)
    chosen = usable[np.linspace(0, len(usable) - 1, min(SAMPLE, len(usable))).astype(int)]
    room = max_boxes_of(split)
    programs, counts = {}, []
    new: tuple[int, int]
    for index in chosen:
        height, width = map(int, split.sizes[index])
        if data.keep_ratio:
            tall, wide = resized_size(height, width, *data.scale)
            new = int(tall), int(wide)
            canvas = smallest_canvas(canvases_of(data.scale, data.canvases), new) or new
        else:
            new = canvas = (data.scale[1], data.scale[0])
        if canvas not in programs:
            strides = detector.priors.strides
            priors = detector.priors([(-(-canvas[0] // s), -(-canvas[1] // s)) for s in strides])

            @jax.jit
            def match(size, boxes, mask, priors=priors):
                valid = priors.valid(size[None])[0]
                labels = jnp.zeros(mask.shape, int)
                matched = detector.assigner(priors, valid, Objects(boxes, mask, labels)).matched
                return (matched == jnp.arange(len(mask))[:, None]).sum(1)

            programs[canvas] = match
        boxes = objects.boxes[objects.image == index]
        boxes = scale_boxes(boxes, (new[1] / width, new[0] / height), new)
        padded = np.zeros((room, 4), np.float32)
        padded[: len(boxes)] = boxes
        found = programs[canvas](np.array(new), padded, np.arange(room) < len(boxes))
        counts.append(np.asarray(found)[: len(boxes)])
    return np.concatenate(counts)


def _most(experiment: Experiment, split: PreparedSplit) -> Suggestion:
    """Whether as many detections are kept as there are objects."""
    most, kept = int(split.num_boxes.max()), experiment.detector.inference.max_per_image
    said = f"the fullest image has {most} objects, and {kept} detections are kept of each"
    if most <= kept:
        return Suggestion("", said)
    return Suggestion(f"--detector.inference.max-per-image {-(-most // 50) * 50}", said)


def _schedule(experiment: Experiment, steps: int) -> Sequence[Suggestion]:
    """Epochs and warm-up, by the number of steps in an epoch."""
    train = experiment.train
    epochs, milestones, found = train.epochs, train.milestones, []
    total = epochs * steps
    said = f"{epochs} epochs are {total:,} steps of {train.batch_size} images"
    if total < FEW_STEPS:
        epochs = -(-FEW_STEPS // steps)
        milestones = (round(epochs * 2 / 3), round(epochs * 11 / 12))
        flag = f"--train.epochs {epochs} --train.milestones {milestones[0]} {milestones[1]}"
        why = f"{said}; on BCCD's 292 photos 888 steps gave 7 points of AP more than 444"
        found.append(Suggestion(flag, why))
    else:
        found.append(Suggestion("", said))
    before_drop = min([epochs, *milestones]) * steps
    said = f"the warm-up takes {train.warmup_steps} of the {before_drop:,} steps before the "
    said += "learning rate drops"
    if train.warmup_steps > before_drop / 4:
        flag = f"--train.warmup-steps {max(before_drop // 10, 1)}"
        found.append(Suggestion(flag, f"{said}; a tenth is enough"))
    else:
        found.append(Suggestion("", said))
    return found

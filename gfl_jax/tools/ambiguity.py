"""Figure 3 of the paper: are distributions flat at unclear sides and sharp at clear ones?

gfl-jax ambiguity RUN --out ambiguity.png
"""

import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.stats
import tyro
from etils import epath

from gfl_jax.data import images
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import open_split
from gfl_jax.detectors.box import Gaussian, GeneralDistribution
from gfl_jax.errors import InputError
from gfl_jax.paths import as_path
from gfl_jax.run import Run, load
from gfl_jax.tools.candidates import (
    Candidates,
    Objects,
    best_candidates,
    objects_of,
    rank_correlation,
)
from gfl_jax.visualize import new_figure, save_figure


class Sides(NamedTuple):
    """Sides (left, top, right, bottom) of the objects that were detected, [n, 4] each, in pixels.

    Attributes:
        ambiguity: the true one.
        spread: predicted standard deviation.
        excess: the part of the spread beyond that of two neighbouring bins with the same mean, to
            which DFL drives the distribution of a clear side.
        ideal_spread: spread of the distribution that minimises DFL for the same prior: the mean of
            its targets over all labels that the side could have had; for a Gaussian, the ambiguity.
        ideal_excess: excess of that distribution.
        error: distance between the predicted side and its label.
    """

    ambiguity: np.ndarray
    spread: np.ndarray
    excess: np.ndarray
    ideal_spread: np.ndarray
    ideal_excess: np.ndarray
    error: np.ndarray


class Match(NamedTuple):
    """An object of known ambiguity and the candidate that detects it.

    Attributes:
        image_id: of its image.
        box: [4], as annotated, in pixels.
        ambiguity: [4], see `Objects`.
        nominal: [4], see `Objects`.
        candidate: a single one, without the leading axis.
    """

    image_id: int
    box: np.ndarray
    ambiguity: np.ndarray
    nominal: np.ndarray
    candidate: Candidates


def matches(
    run: Run, split: PreparedSplit, objects_by_id: dict[int, Objects], iou: float
) -> Iterator[Match]:
    """Objects of known ambiguity, each with a candidate of its class that overlaps it by `iou`.

    If there are several, the one with the highest score counts.
    """
    for image_id, candidates in best_candidates(run, split, 100):
        objects = objects_by_id[image_id]
        good = images.box_iou(objects.boxes[:, None], candidates.boxes) >= iou
        good &= objects.labels[:, None] == candidates.labels
        for i in np.flatnonzero(good.any(1) & ~np.isnan(objects.ambiguity).any(1)):
            best = int(np.argmax(good[i]))
            candidate = Candidates(*(array[best] for array in candidates))
            yield Match(
                image_id, objects.boxes[i], objects.ambiguity[i], objects.nominal[i], candidate
            )


def sides_of(run: Run, split: PreparedSplit, iou: float = 0.6) -> Sides:
    """The sides of every object that a candidate of its class overlaps by at least `iou`.

    Args:
        run: a detector that predicts distributions.
        split: images and objects with known ambiguities.
        iou: minimum overlap; of several candidates, the one with the highest score counts.

    Raises:
        InputError: the box representation has no spread, the data has no ambiguities, or no object
            is detected.
    """
    box = run.experiment.detector.box
    if not isinstance(box, GeneralDistribution | Gaussian):
        raise InputError(
            f"detector.box is {box}, which predicts no uncertainty; use a detector with "
            "GeneralDistribution or Gaussian"
        )
    objects_by_id = objects_of(split)
    if all(np.isnan(objects.ambiguity).all() for objects in objects_by_id.values()):
        raise InputError("the annotations have no field 'ambiguity': use the `shapes` data set")
    rows = []
    for _, target, ambiguity, nominal, candidate in matches(run, split, objects_by_id, iou):
        raw, strides = candidate.raw, candidate.strides
        distance = np.abs(nominal - candidate.centers)
        ideal = _ideal(box, distance / strides, ambiguity / strides)
        in_strides = (np.asarray(box.spread(raw)), _excess(box, raw), *ideal)
        error = np.abs(candidate.boxes - target)
        rows.append((ambiguity, *(x * strides for x in in_strides), error))
    if not rows:
        raise InputError(
            f"no detection reaches IoU {iou} with an object: train longer, or on more data"
        )
    return Sides(*(np.stack(column) for column in zip(*rows, strict=True)))


def opposites(ambiguity: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each blurred side opposite a sharp one: its ambiguity, and whether its value is larger.

    Both belong to the same object, so size and level are the same: only the blur differs.

    Args:
        ambiguity: [n, 4], of the sides (left, top, right, bottom) of n objects.
        values: [n, 4], what is compared.

    Returns:
        [m] each, one entry per axis of an object with one blurred and one sharp side.
    """
    first, second = (x.reshape(-1, 2, 2) for x in (ambiguity, values))  # objects, ends, axes
    one = (first > 0).sum(1) == 1
    difference = np.where(first[:, 0] > 0, 1, -1) * (second[:, 0] - second[:, 1])
    return first.max(1)[one], difference[one] > 0


def statistics(by_object: Sides) -> dict[str, float]:
    """Rank correlations, shares and medians, each under a name that says what it is."""
    sides = Sides(*(column.reshape(-1) for column in by_object))
    blurred = sides.ambiguity > 0
    numbers: dict[str, float] = {"sides": len(blurred), "blurred sides": int(blurred.sum())}
    for name in ("spread", "excess", "ideal_spread", "ideal_excess"):
        values = getattr(sides, name)
        paired, larger = opposites(by_object.ambiguity, getattr(by_object, name))
        numbers |= {
            f"{name}: rank correlation, all sides": rank_correlation(sides.ambiguity, values),
            f"{name}: rank correlation, blurred sides": rank_correlation(
                sides.ambiguity[blurred], values[blurred]
            ),
            f"{name}: the blurred one of two opposite sides has more": float(
                larger.mean() if len(paired) else np.nan
            ),
            f"{name}: median of sharp sides, px": float(np.median(values[~blurred])),
            f"{name}: median of blurred sides, px": float(np.median(values[blurred])),
        }
    numbers["pairs of a blurred and a sharp side"] = len(paired)
    for name, chosen in (("sharp", ~blurred), ("blurred", blurred)):
        numbers |= {
            f"spread: rank correlation with the error, {name} sides": rank_correlation(
                sides.spread[chosen], sides.error[chosen]
            ),
            f"error: median of {name} sides, px": float(np.median(sides.error[chosen])),
        }
    return numbers


def _plot(by_object: Sides, file: epath.Path) -> None:
    """Plots spread by quartiles of ambiguity, and blurred sides against the sharp ones opposite."""
    sides = Sides(*(column.reshape(-1) for column in by_object))
    blurred = sides.ambiguity > 0
    edges = np.quantile(sides.ambiguity[blurred], [0, 0.25, 0.5, 0.75, 1])
    ranges = [f"{a:.1f} to {b:.1f}" for a, b in itertools.pairwise(edges)]
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)

    quarter = np.digitize(sides.ambiguity, edges[1:-1])
    groups = [~blurred, *(blurred & (quarter == i) for i in range(4))]
    labels = [
        f"{name}\n({group.sum()})" for name, group in zip(["sharp", *ranges], groups, strict=True)
    ]
    left.boxplot([sides.spread[group] for group in groups], tick_labels=labels, showfliers=False)
    ideal = [np.median(sides.ideal_spread[group]) for group in groups]
    left.plot(range(1, 6), ideal, "x", label="median of the best possible")
    left.set(ylabel="predicted standard deviation, px")
    left.set_title(f"rank correlation {rank_correlation(sides.ambiguity, sides.spread):.3f}")

    for name, style in (("spread", "o-"), ("excess", "s--"), ("ideal_spread", "x:")):
        paired, larger = opposites(by_object.ambiguity, getattr(by_object, name))
        quarter = np.digitize(paired, edges[1:-1])
        share = [larger[quarter == i].mean() for i in range(4) if (quarter == i).any()]
        right.plot(share, style, label=name.replace("_", " "))
    labels = [f"{name}\n({(quarter == i).sum()})" for i, name in enumerate(ranges) if i in quarter]
    right.set_xticks(range(len(labels)), labels)
    right.axhline(0.5, color="grey", lw=1)
    right.set(ylim=(0, 1.05), ylabel="share in which the blurred side has more")
    right.set_title("a blurred side and the sharp one opposite")
    for panel, of in ((left, "sides"), (right, "pairs")):
        panel.legend()
        panel.set(xlabel=f"true ambiguity of the side, px ({of})")
        panel.grid(alpha=0.3)
    save_figure(figure, file)


def _draw_examples(run: Run, split: PreparedSplit, file: epath.Path, count: int = 8) -> None:
    """Draws the objects with the most ambiguous sides, and the distribution along each side."""

    def ambiguity_per_size(match: Match) -> float:
        return float(match.ambiguity.max() / (match.box[2:] - match.box[:2]).max())

    chosen = sorted(
        matches(run, split, objects_of(split), 0.7), key=ambiguity_per_size, reverse=True
    )[:count]
    index_of = {image_id: i for i, image_id in enumerate(split.image_ids.tolist())}
    figure = new_figure(16, 8.6)
    panels = list(figure.subplots(2, -(-count // 2)).flat)
    for panel in panels:
        panel.axis("off")
    for panel, match in zip(panels, chosen, strict=False):
        record = split.source[index_of[match.image_id]]
        panel.imshow(images.decode(record["image"], (record["height"], record["width"])))
        for box, color in ((match.box, "white"), (match.candidate.boxes, "yellow")):
            x1, y1, x2, y2 = box
            panel.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=color, lw=1)
        _draw_distributions(panel, run.experiment.detector.box, match.candidate)
        panel.set_xlim(-0.5, record["width"] + 24)
        panel.set_ylim(record["height"] + 24, -0.5)
        sigmas = ", ".join(f"{sigma:.1f}" for sigma in match.ambiguity)
        panel.set_title(f"ambiguity (l, t, r, b): {sigmas} px", fontsize=9)
    figure.suptitle(
        "truth white, prediction yellow; beside the box the distributions of left/top (cyan) and "
        "right/bottom (magenta)"
    )
    save_figure(figure, file, dpi=90)


def _draw_distributions(panel: Any, box: Any, candidate: Candidates) -> None:
    """Draws the distribution of each side below or right of a predicted box."""
    x1, y1, x2, y2 = candidate.boxes
    mean = np.asarray(box.parameters(candidate.raw))
    for side, position in enumerate(candidate.boxes):
        distance, density = _density(box, candidate.raw, side)
        shown = density > 0.02 * density.max()
        distance, density = distance[shown], density[shown]
        outwards = -1 if side < 2 else 1
        along = position + outwards * (distance - mean[side]) * candidate.strides[side]
        height = 0.25 * max(x2 - x1, y2 - y1) * density / density.max()
        color = "cyan" if side < 2 else "magenta"
        at = (along, y2 + height) if side % 2 == 0 else (x2 + height, along)
        panel.plot(*at, color=color, lw=1.5, marker=".")


def _excess(box: GeneralDistribution | Gaussian, raw: Any) -> np.ndarray:
    """Standard deviation beyond that of the two bins around the mean, in strides."""
    spread = np.asarray(box.spread(raw))
    if isinstance(box, Gaussian):
        return spread
    bins = np.asarray(box.parameters(raw)) / box.delta
    between = (bins - np.floor(bins)) * (np.floor(bins) + 1 - bins) * box.delta**2
    return np.sqrt(np.maximum(spread**2 - between, 0))


def _ideal(
    box: GeneralDistribution | Gaussian, distance: np.ndarray, ambiguity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Spread and excess of the best prediction for labels around these distances, in strides."""
    if isinstance(box, Gaussian):
        return ambiguity, ambiguity
    normal = scipy.stats.norm.ppf((np.arange(99) + 0.5) / 99)
    labels = (distance[..., None] + ambiguity[..., None] * normal / normal.std()) / box.delta

    def between(bins):
        return (bins - np.floor(bins)) * (np.floor(bins) + 1 - bins)

    variance = labels.var(-1) + between(labels).mean(-1)
    excess = np.maximum(variance - between(labels.mean(-1)), 0)
    return box.delta * np.sqrt(variance), box.delta * np.sqrt(excess)


def _density(
    box: GeneralDistribution | Gaussian, raw: Any, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in strides and their probability, up to a factor."""
    if isinstance(box, GeneralDistribution):
        logits = np.asarray(box.logits(raw))[side]
        return box.delta * np.arange(box.n + 1), np.exp(logits - logits.max())
    mean, spread = np.asarray(box.parameters(raw))[side], np.asarray(box.spread(raw))[side]
    at = mean + spread * np.linspace(-3, 3, 61)
    return at, np.exp(-0.5 * ((at - mean) / spread) ** 2)


def main(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    out: str = "ambiguity.png",
) -> None:
    """Plots predicted spread against the true ambiguity of every side, and examples.

    Args:
        run: work directory of a run on `shapes` whose boxes are distributions.
        out: picture to write; examples go beside it as -examples.png, numbers as .json.

    Raises:
        InputError: boxes without spread, data without ambiguities, or too few detections.
    """
    detector = load(run)
    split = open_split(detector.experiment.data, "val")
    by_object = sides_of(detector, split)
    sides = Sides(*(column.reshape(-1) for column in by_object))
    blurred = sides.ambiguity > 0
    if not blurred.any() or blurred.all():
        missing = "sharp" if blurred.all() else "blurred"
        raise InputError(f"no {missing} side among the {len(by_object.error)} detected objects")
    numbers = statistics(by_object)
    file = as_path(out)
    _plot(by_object, file)
    examples = file.with_name(f"{file.stem}-examples.png")
    _draw_examples(detector, split, examples)
    file.with_suffix(".json").write_text(json.dumps(numbers, indent=1))
    print(json.dumps(numbers, indent=1))
    print(f"{file}, {examples}, {file.with_suffix('.json')}")


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax ambiguity, or python -m gfl_jax ambiguity")

"""The two claims behind the paper's tables, measured on finished runs.

    python -m gfl_jax.tools.analysis consistency RUN... --out consistency.png
    python -m gfl_jax.tools.analysis ambiguity RUN --out ambiguity.png

`consistency`: does a detection's score rank it by how well it is placed? (figures 1 and 2 of the
paper.) `ambiguity`: are predicted distributions flat where a side is unclear and sharp where it is
clear? (figure 3.) Both write a picture and the numbers beside it.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    from gfl_jax.cli import plain_errors, use_huge_pages

    use_huge_pages()

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import scipy.stats
import tyro
from tqdm import tqdm

from gfl_jax.coco_eval import ground_truth
from gfl_jax.data import images
from gfl_jax.data.batch import Batch
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import eval_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import open_split
from gfl_jax.detectors.box import Gaussian, GeneralDistribution
from gfl_jax.detectors.dense import Detector, flatten
from gfl_jax.models.network import Network, Variables
from gfl_jax.run import Run, load

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Predictions(NamedTuple):
    """The best candidates of an image before NMS, by descending score.

    Arrays on devices or the host, with a leading axis for the images of a batch.

    boxes: [n, 4], pixels of the original image.  scores, labels: [n].
    raw: [n, channels], regression outputs of their priors.
    strides: [n, 4], of their levels, in pixels of the original image, along (x, y, x, y).
    centers: [n, 4], of their priors, in pixels of the original image, (x, y, x, y).
    """

    boxes: Any
    scores: Any
    labels: Any
    raw: Any
    strides: Any
    centers: Any


def predictions(
    run: Run, split: PreparedSplit, count: int, limit: int = 0
) -> Iterator[tuple[int, Predictions]]:
    """Image ids and the `count` best candidates of each, whatever their score."""
    detector = dataclasses.replace(
        run.experiment.detector,
        inference=dataclasses.replace(
            run.experiment.detector.inference, score_threshold=0.0, nms_pre=count
        ),
    )
    predict = jax.jit(functools.partial(_predict, run.network, detector, count))
    batch_size = run.experiment.train.batch_size
    plan = eval_plan(run.experiment.data, split, batch_size, limit)
    loaded = batches(plan, split, range(plan.steps_per_epoch), run.experiment.data)
    for host in tqdm(loaded, total=plan.steps_per_epoch, unit=" batches", leave=False):
        found = jax.tree.map(np.asarray, predict(run.variables, host.batch))
        for slot in np.flatnonzero(host.batch.image_mask):
            image = jax.tree.map(lambda x, slot=slot: x[slot], found)
            yield int(host.image_ids[slot]), image


def _predict(
    network: Network, detector: Detector, count: int, variables: Variables, batch: Batch
) -> Predictions:
    outputs, _ = network.apply(variables, batch.images, batch.sizes, train=False)
    priors = detector.priors_of(outputs)
    raw = flatten(outputs.box_logits, priors.per_cell)
    boxes, scores, labels, index = detector.candidates(outputs, batch.sizes)
    scores, best = jax.lax.top_k(scores, min(count, scores.shape[1]))
    scale = jnp.tile(batch.scales, 2)[:, None]

    def chosen(x):
        return jnp.take_along_axis(x, best.reshape(*best.shape, *(1,) * (x.ndim - 2)), axis=1)

    index = chosen(index)
    return Predictions(
        boxes=chosen(boxes) / scale,
        scores=scores,
        labels=chosen(labels),
        raw=jnp.take_along_axis(raw, index[..., None], axis=1),
        strides=jnp.asarray(priors.strides)[index][..., None] / scale,
        centers=jnp.tile(jnp.asarray(priors.centers)[index], 2) / scale,
    )


class Truth(NamedTuple):
    """The objects of an image.

    ambiguity: of each side, the standard deviation of the labels around `nominal`, in pixels. NaN
        where the data set does not know it, or where another object hides a part: that makes a side
        unclear, too, but how much is not known.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ambiguity: np.ndarray
    nominal: np.ndarray


def truth_of(split: PreparedSplit) -> dict[int, Truth]:
    """The objects of every image, crowds left out."""
    label_of = {category_id: label for label, category_id in enumerate(split.category_ids)}
    found: dict[int, list[Any]] = {image_id: [] for image_id in split.image_ids.tolist()}
    for annotation in ground_truth(split).dataset["annotations"]:
        if not annotation["iscrowd"]:
            x, y, w, h = annotation["bbox"]
            known = annotation.get("visible", 1) == 1
            ambiguity = annotation.get("ambiguity", [np.nan] * 4) if known else [np.nan] * 4
            left, top, width, height = annotation.get("nominal_bbox", [np.nan] * 4)
            nominal = [left, top, left + width, top + height]
            label = label_of[annotation["category_id"]]
            entry = [x, y, x + w, y + h, label, *ambiguity, *nominal]
            found[annotation["image_id"]].append(entry)
    arrays = {image_id: np.array(rows).reshape(-1, 13) for image_id, rows in found.items()}
    return {
        image_id: Truth(a[:, :4], a[:, 4].astype(int), a[:, 5:9], a[:, 9:])
        for image_id, a in arrays.items()
    }


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of every box of a [n, 4] with every box of b [m, 4]."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    common = np.maximum(high - low, 0).prod(-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(-1) for boxes in (a, b)]
    return common / np.maximum(areas[0][:, None] + areas[1] - common, 1e-9)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing their mean rank."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(scipy.stats.spearmanr(a, b).statistic)


def scores_and_ious(
    run: Run, split: PreparedSplit, count: int, limit: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Of the `count` best candidates of every image: score, and IoU with an object of its class."""
    truth = truth_of(split)
    scores, ious = [], []
    for image_id, found in predictions(run, split, count, limit):
        objects = truth[image_id]
        iou = overlaps(found.boxes, objects.boxes)
        iou = np.where(found.labels[:, None] == objects.labels, iou, 0).max(1, initial=0)
        scores.append(found.scores)
        ious.append(iou)
    return np.concatenate(scores), np.concatenate(ious)


def consistency(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    titles: tuple[str, ...] = (),
    count: int = 100,
    out: Path = Path("consistency.png"),
) -> None:
    """Draws score against true IoU of the best candidates of every run, with rank correlations.

    Of all candidates (a background box must not outrank an object) and of those that are on an
    object (IoU of at least 0.5), on the evaluation images and on as many training images.

    Args:
        runs: work directories.
        titles: of the runs; without them the names of the folders.
        count: candidates of each image before NMS, the best by score.
        out: picture to write, with the numbers beside it as .json.
    """
    if not runs:
        raise ValueError("name at least one work directory")
    columns = min(len(runs), 3)
    shape = (-(-len(runs) // columns), columns)
    figure, axes = plt.subplots(
        *shape, figsize=(4.2 * shape[1], 3.8 * shape[0]), squeeze=False, layout="constrained"
    )
    numbers: dict[str, dict[str, float]] = {}
    for i, workdir in enumerate(runs):
        title = titles[i] if i < len(titles) else f"{workdir.parent.name}/{workdir.name}"
        numbers[title] = {}
        images = 0
        for split in ("val", "train"):
            run = load(workdir)
            opened = open_split(run.experiment.data, split)
            images = images or len(opened.image_ids)
            score, iou = scores_and_ious(run, opened, count, images)
            placed = iou >= 0.5
            numbers[title] |= {
                f"{split}, all": rank_correlation(score, iou),
                f"{split}, on an object": rank_correlation(score[placed], iou[placed]),
                f"{split}, share on an object": float(placed.mean()),
            }
            if split == "val":
                ax = axes.flat[i]
                ax.scatter(iou, score, s=2, alpha=0.15, edgecolors="none")
                ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="true IoU", ylabel="score")
                ax.grid(alpha=0.3)
        all_, on_object = numbers[title]["val, all"], numbers[title]["val, on an object"]
        ax.set_title(f"{title}\n{all_:.3f} all, {on_object:.3f} on an object", fontsize=10)
        print(title, {name: round(value, 3) for name, value in numbers[title].items()}, flush=True)
        jax.clear_caches()
    for ax in axes.flat[len(runs) :]:
        ax.axis("off")
    figure.suptitle("score and true IoU of the best candidates before NMS; rank correlations")
    figure.savefig(out, dpi=100)
    plt.close(figure)
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=1))
    print(f"{out}, {out.with_suffix('.json')}")


class Sides(NamedTuple):
    """Sides (left, top, right, bottom) of the objects that were found, [n, 4] each, in pixels.

    ambiguity: the true one.  spread: predicted standard deviation.

    excess: the part of the spread that a distribution of two neighbouring bins with the same mean
    does not have, which is what DFL makes of a side that is clear.

    ideal_spread, ideal_excess: of the distribution with the least DFL from the same prior, the mean
    of its targets over all labels that the side could have had. (Of a Gaussian: the ambiguity.)

    error: distance of the predicted side from its label.
    """

    ambiguity: np.ndarray
    spread: np.ndarray
    excess: np.ndarray
    ideal_spread: np.ndarray
    ideal_excess: np.ndarray
    error: np.ndarray


def sides_of(run: Run, split: PreparedSplit, iou: float = 0.6) -> Sides:
    """Every side of every object whose best-scored candidate overlaps it by `iou`.

    Raises:
        ValueError: the box representation has no spread, the data no ambiguities, or no object is
            found.
    """
    box = run.experiment.detector.box
    if not isinstance(box, GeneralDistribution | Gaussian):
        raise ValueError(f"{box} says nothing about its certainty; use a General distribution")
    truth = truth_of(split)
    if all(np.isnan(objects.ambiguity).all() for objects in truth.values()):
        raise ValueError("the annotations have no field 'ambiguity': use the `shapes` data set")
    parts = []
    for image_id, found in predictions(run, split, 100):
        objects = truth[image_id]
        good = overlaps(objects.boxes, found.boxes) >= iou
        good &= objects.labels[:, None] == found.labels
        for i in np.flatnonzero(good.any(1) & ~np.isnan(objects.ambiguity).any(1)):
            best = int(np.argmax(good[i]))  # candidates come by descending score
            spread = np.asarray(box.spread(found.raw[best])) * found.strides[best]
            excess = _excess(box, found.raw[best]) * found.strides[best]
            distance = np.abs(objects.nominal[i] - found.centers[best])
            ideal = [
                x * found.strides[best]
                for x in _ideal(
                    box, *(x / found.strides[best] for x in (distance, objects.ambiguity[i]))
                )
            ]
            error = np.abs(found.boxes[best] - objects.boxes[i])
            parts.append((objects.ambiguity[i], spread, excess, *ideal, error))
    if not parts:
        raise ValueError(f"no object is overlapped by {iou}: train longer, or on more data")
    return Sides(*(np.stack(column) for column in zip(*parts, strict=True)))


def opposites(ambiguity: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each blurred side opposite to a sharp one: its ambiguity, and whether its value is larger.

    Both are of the same object, so of the same size and level: nothing but the blur differs.

    Args:
        ambiguity: [n, 4], of the sides (left, top, right, bottom) of n objects.
        values: likewise; what is compared.
    """
    first, second = (x.reshape(-1, 2, 2) for x in (ambiguity, values))  # objects, ends, axes
    one = (first > 0).sum(1) == 1
    difference = np.where(first[:, 0] > 0, 1, -1) * (second[:, 0] - second[:, 1])
    return first.max(1)[one], difference[one] > 0


def _excess(box: GeneralDistribution | Gaussian, raw: Any) -> np.ndarray:
    """Standard deviation beyond that of the two bins next to the mean, in strides."""
    spread = np.asarray(box.spread(raw))
    if isinstance(box, Gaussian):
        return spread
    bins = np.asarray(box.parameters(raw)) / box.delta
    between = (bins - np.floor(bins)) * (np.floor(bins) + 1 - bins) * box.delta**2
    return np.sqrt(np.maximum(spread**2 - between, 0))


def _ideal(
    box: GeneralDistribution | Gaussian, distance: np.ndarray, ambiguity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Spread and excess of the best answer for labels around these distances, all in strides."""
    if isinstance(box, Gaussian):
        return ambiguity, ambiguity
    normal = scipy.stats.norm.ppf((np.arange(99) + 0.5) / 99)
    labels = (distance[..., None] + ambiguity[..., None] * normal / normal.std()) / box.delta

    def between(bins):
        return (bins - np.floor(bins)) * (np.floor(bins) + 1 - bins)

    variance = labels.var(-1) + between(labels).mean(-1)
    excess = np.maximum(variance - between(labels.mean(-1)), 0)
    return box.delta * np.sqrt(variance), box.delta * np.sqrt(excess)


def ambiguity(run: tyro.conf.Positional[Path], out: Path = Path("ambiguity.png")) -> None:
    """Draws predicted spread against true ambiguity of every side, and examples.

    Args:
        run: work directory of a run on `shapes` whose boxes are distributions.
        out: picture to write; examples go beside it as -examples.png, numbers as .json.
    """
    opened = load(run)
    split = open_split(opened.experiment.data, "val")
    by_object = sides_of(opened, split)
    sides = Sides(*(column.reshape(-1) for column in by_object))
    blurred = sides.ambiguity > 0
    if not blurred.any() or blurred.all():
        kind = "sharp" if blurred.all() else "blurred"
        raise ValueError(f"no {kind} side among the {len(by_object.error)} objects that were found")
    numbers: dict[str, float] = {"sides": len(blurred), "blurred sides": int(blurred.sum())}
    larger: dict[str, np.ndarray] = {}
    for name in ("spread", "excess", "ideal_spread", "ideal_excess"):
        values = getattr(sides, name)
        paired, larger[name] = opposites(by_object.ambiguity, getattr(by_object, name))
        numbers |= {
            f"{name}: rank correlation, all sides": rank_correlation(sides.ambiguity, values),
            f"{name}: rank correlation, blurred sides": rank_correlation(
                sides.ambiguity[blurred], values[blurred]
            ),
            f"{name}: the blurred one of two opposite sides has more": float(
                larger[name].mean() if len(paired) else np.nan
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

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    edges = np.quantile(sides.ambiguity[blurred], [0, 0.25, 0.5, 0.75, 1])
    quarter = np.digitize(sides.ambiguity, edges[1:-1])
    groups = [~blurred, *(blurred & (quarter == i) for i in range(4))]
    names = ["sharp"] + [f"{a:.1f} to {b:.1f}" for a, b in itertools.pairwise(edges)]
    labels = [f"{name}\n({group.sum()})" for name, group in zip(names, groups, strict=True)]
    panels[0].boxplot(
        [sides.spread[group] for group in groups], tick_labels=labels, showfliers=False
    )
    ideal = [np.median(sides.ideal_spread[group]) for group in groups]
    panels[0].plot(range(1, 6), ideal, "x", label="median of the best possible")
    panels[0].set(ylabel="predicted standard deviation, px")
    panels[0].set_title(f"rank correlation {rank_correlation(sides.ambiguity, sides.spread):.3f}")
    panels[0].legend()
    quarter = np.digitize(paired, edges[1:-1])
    for name, style in (("spread", "o-"), ("excess", "s--"), ("ideal_spread", "x:")):
        share = [larger[name][quarter == i].mean() for i in range(4) if (quarter == i).any()]
        panels[1].plot(share, style, label=name.replace("_", " "))
    labels = [
        f"{name}\n({(quarter == i).sum()})" for i, name in enumerate(names[1:]) if i in quarter
    ]
    panels[1].set_xticks(range(len(labels)), labels)
    panels[1].axhline(0.5, color="grey", lw=1)
    panels[1].set(ylim=(0, 1.05), ylabel="share in which the blurred side has more")
    panels[1].set_title("a blurred and a sharp side, opposite to each other")
    panels[1].legend()
    for ax, of in zip(panels, ("sides", "pairs"), strict=True):
        ax.set(xlabel=f"true ambiguity of the side, px ({of})")
        ax.grid(alpha=0.3)
    figure.savefig(out, dpi=100)
    plt.close(figure)
    examples = out.with_name(f"{out.stem}-examples.png")
    _draw_examples(opened, split, examples)
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=1))
    print(json.dumps(numbers, indent=1))
    print(f"{out}, {examples}, {out.with_suffix('.json')}")


def _draw_examples(run: Run, split: PreparedSplit, out: Path, count: int = 8) -> None:
    """Objects with a clear and an unclear side: the predicted distribution along each side."""
    box: Any = run.experiment.detector.box
    truth = truth_of(split)
    where = {image_id: i for i, image_id in enumerate(split.image_ids.tolist())}
    chosen = []
    for image_id, found in predictions(run, split, 100):
        objects = truth[image_id]
        good = (overlaps(objects.boxes, found.boxes) >= 0.7) & (
            objects.labels[:, None] == found.labels
        )
        for i in np.flatnonzero(good.any(1) & ~np.isnan(objects.ambiguity).any(1)):
            unclear = (
                objects.ambiguity[i].max() / (objects.boxes[i, 2:] - objects.boxes[i, :2]).max()
            )
            best = int(np.argmax(good[i]))
            chosen.append(
                (unclear, image_id, i, found.boxes[best], found.raw[best], found.strides[best])
            )
    chosen = sorted(chosen, key=lambda entry: -entry[0])[:count]
    figure, axes = plt.subplots(2, -(-count // 2), figsize=(16, 8.6), layout="constrained")
    for ax in axes.flat:
        ax.axis("off")
    for ax, (_, image_id, i, predicted, raw, strides) in zip(axes.flat, chosen, strict=False):
        record = split.source[where[image_id]]
        picture = images.decode(record["image"], (record["height"], record["width"]))
        ax.imshow(picture)
        target, sigma = truth[image_id].boxes[i], truth[image_id].ambiguity[i]
        ax.add_patch(
            plt.Rectangle(target[:2], *(target[2:] - target[:2]), fill=False, color="white", lw=1)
        )
        ax.add_patch(
            plt.Rectangle(
                predicted[:2], *(predicted[2:] - predicted[:2]), fill=False, color="yellow", lw=1
            )
        )
        mean = np.asarray(box.parameters(raw))
        for side in range(4):
            at, density = _density(box, raw, side)
            sign = -1 if side < 2 else 1
            # The prior's centre along the axis, from the side and its expected distance.
            seen = density > 0.02 * density.max()
            at, density = at[seen], density[seen]
            along = predicted[side] + sign * (at - mean[side]) * strides[side]
            height = 0.25 * (predicted[2:] - predicted[:2]).max() * density / density.max()
            style: dict[str, Any] = {
                "color": "cyan" if side < 2 else "magenta",
                "lw": 1.5,
                "marker": ".",
            }
            if side % 2 == 0:
                ax.plot(along, predicted[3] + height, **style)
            else:
                ax.plot(predicted[2] + height, along, **style)
        ax.set_xlim(-0.5, record["width"] + 24)
        ax.set_ylim(record["height"] + 24, -0.5)
        ax.set_title(
            "ambiguity (l, t, r, b): " + ", ".join(f"{s:.1f}" for s in sigma) + " px", fontsize=9
        )
    figure.suptitle(
        "truth white, prediction yellow; beside the box the distributions of left/top (cyan) and "
        "right/bottom (magenta)"
    )
    figure.savefig(out, dpi=90)
    plt.close(figure)


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


if __name__ == "__main__":
    with plain_errors():
        tyro.extras.subcommand_cli_from_dict(
            {"consistency": consistency, "ambiguity": ambiguity},
            prog="python -m gfl_jax.tools.analysis",
            description=__doc__,
        )

"""Pictures of a run: a contact sheet of its detections and its curves, in a folder or a bucket."""

import io
import json
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from etils import epath
from PIL import Image, ImageDraw

from gfl_jax.data import images
from gfl_jax.data.records import PreparedSplit
from gfl_jax.drawing import draw_boxes, font_for
from gfl_jax.errors import MissingExtraError, needs
from gfl_jax.results import Result
from gfl_jax.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def contact_sheet(
    file: epath.PathLike,
    split: PreparedSplit,
    results: list[dict[str, Any]],
    *,
    count: int = 12,
    score_threshold: float = 0.3,
    tile: int = 320,
) -> None:
    """Writes a PNG of evenly spaced images with ground truth (left) and detections (right).

    Args:
        file: to write, local or in a bucket.
        split: images and ground truth.
        results: detections as COCO results.
        count: number of images; those with objects and results are preferred.
        score_threshold: least score of the detections drawn.
        tile: longer side of an image on the sheet, in pixels.
    """
    evaluated = {result["image_id"] for result in results}
    candidates = np.flatnonzero(np.isin(split.image_ids, list(evaluated)) & (split.num_boxes > 0))
    if not len(candidates):
        candidates = np.arange(len(split.image_ids))
    chosen = candidates[
        np.linspace(0, len(candidates) - 1, min(count, len(candidates))).astype(int)
    ]
    label_of = {category_id: label for label, category_id in enumerate(split.category_ids)}
    tiles = []
    for index in chosen:
        record = split.source[int(index)]
        image = images.decode(
            record["image"], (record["height"], record["width"]), record["filename"]
        )
        scale = tile / max(image.shape[:2])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        truth, detections = image.copy(), image
        for box, label, crowd, ignore in zip(
            record["boxes"], record["labels"], record["crowd"], record["ignore"], strict=True
        ):
            note = " (crowd)" if crowd else " (ignored)" if ignore else ""
            name = split.category_names[label] + note
            _draw(truth, box * scale, int(label), name)
        drawn = [
            result
            for result in results
            if result["image_id"] == record["image_id"] and result["score"] >= score_threshold
        ]
        for result in sorted(drawn, key=lambda result: result["score"]):
            x, y, w, h = result["bbox"]
            label = label_of[result["category_id"]]
            text = f"{split.category_names[label]} {result['score']:.2f}"
            _draw(detections, np.array([x, y, x + w, y + h]) * scale, label, text)
        gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
        pair = np.concatenate([truth, gap, detections], axis=1)
        caption = np.full((22, pair.shape[1], 3), 255, np.uint8)
        _write(caption, f"{record['image_id']}: truth", (4, 16))
        _write(caption, f"detections >= {score_threshold}", (image.shape[1] + 8, 16))
        tiles.append(np.concatenate([caption, pair]))
    _write_sheet(file, tiles)


def ground_truth_sheet(
    file: epath.PathLike, split: PreparedSplit, *, count: int = 12, tile: int = 480
) -> None:
    """Writes a PNG of images with their ground truth; every class is shown, as far as they go.

    Args:
        file: to write, local or in a bucket.
        split: images and ground truth.
        count: number of images.
        tile: longer side of an image on the sheet, in pixels.
    """
    tiles = []
    for index in _showing_all_classes(split, count):
        record = split.source[index]
        size = record["height"], record["width"]
        image = images.decode(record["image"], size, record["filename"])
        scale = tile / max(size)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=how)
        notes = np.where(record["crowd"], " (crowd)", np.where(record["ignore"], " (ignored)", ""))
        texts = [
            split.category_names[label] + note
            for label, note in zip(record["labels"], notes, strict=True)
        ]
        drawn = draw_boxes(image, record["boxes"] * scale, record["labels"].tolist(), texts)
        caption = Image.new("RGB", (image.shape[1], 22), "white")
        font, name = font_for(record["filename"], 13)
        ImageDraw.Draw(caption).text((4, 3), name, font=font, fill="black")
        tiles.append(np.concatenate([np.asarray(caption), drawn]))
    _write_sheet(file, tiles)


def _showing_all_classes(split: PreparedSplit, count: int) -> list[int]:
    """Indices of images: one of each class, the rarest class first; then evenly spaced ones."""
    table = split.table
    image_of = np.repeat(np.arange(len(table.image_ids)), np.diff(table.starts))
    chosen: list[int] = []
    for label in np.argsort(np.bincount(table.labels, minlength=len(split.category_ids))):
        with_it = np.unique(image_of[table.labels == label])
        if len(chosen) < count and len(with_it) and not np.isin(with_it, chosen).any():
            chosen.append(int(with_it[len(with_it) // 2]))
    with_any = np.flatnonzero(np.diff(table.starts))
    rest = np.setdiff1d(with_any if len(with_any) else np.arange(len(table.image_ids)), chosen)
    spaced = np.linspace(0, len(rest) - 1, min(count - len(chosen), len(rest))).astype(int)
    return sorted([*chosen, *rest[spaced].tolist()])


def _write_sheet(file: epath.PathLike, tiles: list[np.ndarray]) -> None:
    """Writes pictures as one PNG, three in a row."""
    height, width = (max(t.shape[axis] for t in tiles) for axis in (0, 1))
    columns = 1 if len(tiles) < 3 else 3
    sheet = np.full(
        (-(-len(tiles) // columns) * (height + 8), columns * (width + 12), 3), 255, np.uint8
    )
    for i, t in enumerate(tiles):
        y, x = i // columns * (height + 8), i % columns * (width + 12)
        sheet[y : y + t.shape[0], x : x + t.shape[1]] = t
    _, png = cv2.imencode(".png", cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    epath.Path(file).write_bytes(png.tobytes())


def _color(label: int) -> tuple[int, int, int]:
    """A colour per class: hues a golden angle apart."""
    hue = np.array([[[int(label * 111.25) % 180, 200, 255]]], np.uint8)
    red, green, blue = cv2.cvtColor(hue, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def _draw(image: np.ndarray, box: np.ndarray, label: int, text: str) -> None:
    x1, y1, x2, y2 = (round(float(side)) for side in box)
    cv2.rectangle(image, (x1, y1), (x2, y2), _color(label), 2)
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.35, 1)
    x, y = max(min(x1, image.shape[1] - width - 2), 0), max(y1 - 2, height + 2)
    cv2.rectangle(image, (x, y - height - 2), (x + width + 2, y + 2), _color(label), -1)
    _write(image, text, (x + 1, y))


def _write(image: np.ndarray, text: str, position: tuple[int, int]) -> None:
    cv2.putText(image, text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.35, (0, 0, 0), 1, cv2.LINE_AA)


def new_figure(width: float, height: float) -> "Figure":
    """An empty matplotlib figure, which needs no display.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with needs("plotting"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", file: epath.PathLike, dpi: int = 100) -> None:
    """Writes a figure, local or in a bucket; the file's ending names the format."""
    content = io.BytesIO()
    figure.savefig(content, format=epath.Path(file).suffix.lstrip(".") or "png", dpi=dpi)
    epath.Path(file).write_bytes(content.getvalue())


def plot_sides(result: Result, score_threshold: float = 0.3, most: int = 6) -> "Figure":
    """Draws how probable each position of each side is: figure 3 of the paper for one's own image.

    For each of the best detections the image around it, and along its edges the distributions of
    the sides: left and right above, top and bottom at the right. The bands on the image hold 90% of
    a side's probability; the numbers are standard deviations.

    Args:
        result: detections with distributions.
        score_threshold: least score of the detections that are drawn.
        most: detections that are drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    shown = result.above(score_threshold)
    count = min(len(shown), most)
    columns = max(min(count, 3), 1)
    rows = max(-(-count // columns), 1)
    figure = new_figure(5 * columns, 4.6 * rows)
    if not count:
        figure.text(0.5, 0.5, f"no detection of at least {score_threshold}", ha="center")
        return figure
    spread, (low, high) = shown.spread(), shown.interval(0.9)
    assert shown.sides is not None
    panels = figure.subfigures(rows, columns, squeeze=False).flat
    for i, panel in zip(range(count), panels, strict=False):
        axes = panel.subplots(2, 2, width_ratios=(4, 1), height_ratios=(1, 4))
        (above, corner), (image, beside) = axes
        x1, y1, x2, y2 = shown.boxes[i]
        margin = 0.35 * max(x2 - x1, y2 - y1, 8)
        height, width = result.image.shape[:2]
        image.imshow(result.image, extent=(0, width, height, 0))
        for color, thickness in (("black", 2.4), ("white", 1.2)):
            image.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=color, lw=thickness)
        image.set_xlim(x1 - margin, x2 + margin)
        image.set_ylim(y2 + margin, y1 - margin)
        image.set_aspect("auto")
        for side, name in enumerate(("left", "top", "right", "bottom")):
            order = np.argsort(shown.sides.positions[i, side])
            at = shown.sides.positions[i, side][order]
            probability = shown.sides.probabilities[i, side][order]
            color = "tab:blue" if side < 2 else "tab:orange"
            curve = (above, beside)[side % 2]
            band = (image.axvspan, image.axhspan)[side % 2]
            points = (at, probability) if side % 2 == 0 else (probability, at)
            curve.plot(*points, color=color, marker=".", lw=1.2, ms=4)
            band(low[i, side], high[i, side], color=color, alpha=0.14, lw=0)
            text = f"{name} ±{spread[i, side]:.1f}"
            place = ((0, 1.02), (0, 1.02), (0.6, 1.02), (0, -0.07))[side]
            curve.text(*place, text, color=color, fontsize=8, transform=curve.transAxes)
        above.set_xlim(image.get_xlim())
        beside.set_ylim(image.get_ylim())
        above.tick_params(labelsize=6, labelbottom=False)
        beside.tick_params(labelsize=6, labelleft=False, labelbottom=False)
        corner.axis("off")
        panel.suptitle(f"{shown.names[i]} {shown.scores[i]:.2f}   (sides in pixels)", fontsize=10)
    return figure


def plot_run(workdir: epath.PathLike) -> None:
    """Writes `curves.png`: loss terms, learning rate and AP of a run over its steps."""
    workdir = epath.Path(workdir)
    entries = read_metrics(workdir)
    train = [entry for entry in entries if entry["kind"] == "train"]
    val = [entry for entry in entries if entry["kind"] == "val"]
    figure = new_figure(15, 4)
    losses, rate, ap = figure.subplots(1, 3)
    steps = [entry["step"] for entry in train]
    for name in [key for key in (train[0] if train else {}) if key.startswith("loss")]:
        losses.plot(steps, [entry[name] for entry in train], label=name, linewidth=1)
    losses.set(title="training losses", xlabel="step", yscale="log")
    rate.plot(steps, [entry["lr"] for entry in train])
    rate.set(title="learning rate", xlabel="step")
    for name in ("AP", "AP50", "AP75"):
        ap.plot([e["step"] for e in val], [e[name] for e in val], marker=".", label=name)
    ap.set(title="evaluation", xlabel="step", ylim=(0, 1))
    for axes, drawn in ((losses, train), (ap, val)):
        if drawn:
            axes.legend()
        axes.grid(alpha=0.3)
    save_figure(figure, workdir / "curves.png")


def finish(workdir: epath.PathLike, split: PreparedSplit, seconds: float) -> None:
    """Draws the contact sheet and the curves of a finished run and prints where everything is.

    Args:
        workdir: of the run.
        split: its evaluation images.
        seconds: that the command took.
    """
    workdir = epath.Path(workdir)
    results = json.loads((workdir / "results.json").read_text())
    contact_sheet(workdir / "detections.png", split, results)
    curves = f"{workdir / 'curves.png'}   (or: tensorboard --logdir {workdir})"
    try:
        plot_run(workdir)
    except MissingExtraError as error:
        curves = f"not drawn: {error}"
    last = [entry for entry in read_metrics(workdir) if entry["kind"] == "val"][-1]
    print(
        f"\nAP {last['AP']:.3f}  AP50 {last['AP50']:.3f}  AP75 {last['AP75']:.3f} after step "
        f"{last['step']}; this command took {seconds / 60:.1f} minutes\n"
        f"  picture     {workdir / 'detections.png'}\n"
        f"  curves      {curves}\n"
        f"  checkpoint  {workdir / 'checkpoints'}, best in {workdir / 'best'}\n"
        f"  results     {workdir / 'results.json'}, {workdir / 'metrics.jsonl'}\n"
        f"next: python -m gfl_jax eval {workdir}   for all twelve numbers, every class and images/s"
    )

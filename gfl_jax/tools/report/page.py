"""The page: numbers, charts and pictures as HTML that needs nothing else."""

import importlib.resources
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from gfl_jax.tools.report import charts
from gfl_jax.tools.report.costs import Cost, Detected
from gfl_jax.tools.report.errors import IGNORED, KINDS
from gfl_jax.tools.report.gallery import DIGITS, STATES
from gfl_jax.tools.report.numbers import IOUS, ClassNumbers, Numbers, Slice

CONFUSED = 12
"""Most classes in the confusion matrix."""

MEANING = {
    "class": "right place, wrong class: IoU of at least 0.5 with an object of another class",
    "localization": "right class, wrong place: IoU from 0.1 to 0.5",
    "both": "wrong class, and IoU from 0.1 to 0.5",
    "duplicate": "the object has been found by a detection with a higher score",
    "background": "no object: IoU of at most 0.1 with any",
    "missed": "objects that nothing found, not even with an error of class or localization",
}


def page(
    title: str,
    about: dict[str, str],
    sections: Sequence[tuple[str, str]],
    names: Sequence[str],
    images: Sequence[dict[str, Any]],
    score_threshold: float,
    versions: Sequence[str] = ("",),
) -> str:
    """The whole page.

    Args:
        title: of the page.
        about: what was evaluated, by what it is called.
        sections: headings and what stands below them, as HTML; the pictures follow.
        names: of the class labels.
        images: of each the `name`, the `size` (width, height), the address of the `picture` and
            in `versions` what `gallery.entry_of` says of each detector.
        score_threshold: least score of the detections in `images`.
        versions: names of the detectors.
    """
    files = importlib.resources.files(__package__)
    style, script = (files.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    data = {
        "names": list(names),
        "kinds": KINDS,
        "states": STATES,
        "digits": DIGITS,
        "threshold": score_threshold,
        "versions": list(versions),
        "images": images,
    }
    # "<" could end the script.
    written = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    facts = "".join(
        f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in about.items()
    )
    sections = [*sections, ("Pictures", files.joinpath("gallery.html").read_text("utf-8"))]
    ids = [heading.split()[0].lower() for heading, _ in sections]
    links = "".join(
        f'<a href="#{i}">{heading}</a>' for i, (heading, _) in zip(ids, sections, strict=True)
    )
    body = "".join(
        f'<section id="{i}"><h2>{heading}</h2>{content}</section>'
        for i, (heading, content) in zip(ids, sections, strict=True)
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{style}</style>
<header><h1>{escape(title)}</h1><dl>{facts}</dl><nav>{links}</nav></header>
<main>{body}</main>
<script type="application/json" id="data">{written}</script>
<script>{script}</script>
</html>
"""


def report_sections(
    numbers: Numbers,
    errors: dict[str, Cost],
    detected: Sequence[Detected],
    confused: np.ndarray,
    names: Sequence[str],
    score_threshold: float,
) -> list[tuple[str, str]]:
    """What is said about one detector: headings and HTML.

    Args:
        numbers: of all images together.
        errors: what each kind costs.
        detected: the detections on each image.
        confused: see `numbers.confusion`.
        names: of the class labels.
        score_threshold: least score of the detections in the confusion matrix.
    """
    counted = [image.judged.kind != IGNORED for image in detected]
    scores = np.concatenate([i.scores[c] for i, c in zip(detected, counted, strict=True)])
    ious = [i.judged.iou_of_class[c] for i, c in zip(detected, counted, strict=True)]
    return [
        ("Summary", _summary(numbers)),
        ("What goes wrong", _errors(errors)),
        ("Scores", _scores(numbers, scores, np.concatenate(ious))),
        ("Classes", _classes(numbers.classes)),
        ("Size and aspect ratio", _slices(numbers)),
        ("Confusion", _confusion(confused, names, score_threshold)),
    ]


def _summary(numbers: Numbers) -> str:
    large, small = {"AP", "AP50", "AP75"}, []
    for name, value in numbers.metrics.items():
        size = ' class="large"' if name in large else ""
        small.append(f"<div{size}><dt>{name}</dt><dd>{number(value)}</dd></div>")
    return f'<dl class="numbers">{"".join(small)}</dl>'


def _errors(errors: dict[str, Cost]) -> str:
    most = max([cost.ap for cost in errors.values()] + [1e-9])
    rows = [
        f'<tr><th scope="row"><button class="kind {name}" data-kind="{name}">{name}</button></th>'
        f"<td>{cost.number}</td>{_bar(cost.ap / most, f'{100 * cost.ap:.1f}')}"
        f'<td class="text">{MEANING[name]}</td></tr>'
        for name, cost in errors.items()
    ]
    head = (
        '<th>error</th><th>how many</th><th class="bar">costs, points of AP50</th>'
        '<th class="text">what it is</th>'
    )
    return (
        "<p>How many errors of each kind there are, and by how many points AP50 would rise without "
        "them (TIDE, Bolya et al. 2020); the costs do not add up. The name of a kind shows its "
        f"pictures.</p>{table(head, rows, 'errors')}"
    )


def _scores(numbers: Numbers, scores: np.ndarray, ious: np.ndarray) -> str:
    recalls = np.linspace(0, 1, 101)
    styles = ("line one", "line two", "line three")
    curves = "".join(
        charts.line(zip(recalls, curve, strict=True), style)
        for curve, style in zip(numbers.precision, styles, strict=True)
    )
    keys = zip([f"IoU {iou}" for iou in IOUS], styles, strict=True)
    precision = charts.chart(curves, "recall", "precision", "precision against recall")

    counts = np.histogram2d(scores, ious, 20, ((0, 1), (0, 1)))[0]
    strength = np.log1p(counts) / max(np.log1p(counts).max(), 1e-9)
    cells = "".join(
        charts.cell(i / 20, j / 20, 0.05, strength[i, j], f"{counts[i, j]:.0f} detections")
        for i, j in np.argwhere(counts)
    )
    diagonal = charts.line([(0, 0), (1, 1)], "ideal")
    heat = charts.chart(cells + diagonal, "score", "IoU", "score against IoU")

    points = [(score, share) for score, share, _ in numbers.calibration]
    dots = "".join(
        charts.dot(score, share, "one", f"score {score:.2f}: {share:.2f} of {count} correct")
        for score, share, count in numbers.calibration
    )
    places = np.clip((scores * 10).astype(int), 0, 9)
    means = [(scores[places == i].mean(), ious[places == i].mean()) for i in np.unique(places)]
    calibration = charts.chart(
        diagonal + charts.line(points, "line one") + dots + charts.line(means, "line two"),
        "mean score",
        "share correct, mean IoU",
        "calibration of the scores",
    )
    both = (("correct at IoU 0.5", "line one"), ("mean IoU", "line two"))
    return (
        '<div class="charts">'
        + _figure("Precision and recall", precision, keys, "Means over the classes.")
        + _figure(
            "Score against IoU",
            heat,
            (),
            "Detections by score and by IoU with the closest object of their class; the stronger "
            "the colour the more, on a logarithmic scale.",
        )
        + _figure(
            "Calibration",
            calibration,
            both,
            "Of the detections with a score, how many are correct? On the dashed diagonal as many "
            f"as it says. Expected calibration error {numbers.calibration_error:.3f}. A score "
            "that is trained to be the IoU, as GFL's, follows the mean IoU instead.",
        )
        + "</div>"
    )


def _figure(title: str, chart: str, keys: Iterable[tuple[str, str]], text: str) -> str:
    legend = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="{style}" d="M0 4H24"/></svg>'
        f"{escape(key)}</li>"
        for key, style in keys
    )
    return (
        f"<figure><h3>{title}</h3>{chart}"
        f'<figcaption><ul class="legend">{legend}</ul>{text}</figcaption></figure>'
    )


def _classes(classes: Sequence[ClassNumbers]) -> str:
    rows = [
        f'<tr><th scope="row">{escape(entry.name)}</th><td>{entry.objects}</td>'
        f"{_bar(max(entry.ap, 0), number(entry.ap))}<td>{number(entry.ap50)}</td>"
        f"<td>{number(entry.ap75)}</td>"
        f"<td>{charts.spark(entry.precision) if entry.ap >= 0 else ''}</td></tr>"
        for entry in sorted(classes, key=lambda entry: -entry.ap)
    ]
    head = (
        '<th>class</th><th>objects</th><th class="bar">AP</th><th>AP50</th><th>AP75</th>'
        "<th>precision over recall, IoU 0.5</th>"
    )
    return table(head, rows)


def _slices(numbers: Numbers) -> str:
    def size(part: Slice) -> str:
        if not np.isfinite(part.high):
            return f"{part.low:g} px and more"
        return f"{part.low:g} to {part.high:g} px"

    def ratio(value: float) -> str:
        return f"{value:g}:1" if value >= 1 else f"1:{1 / value:g}"

    def aspect(part: Slice) -> str:
        if not part.low:
            return f"narrower than {ratio(part.high)}"
        if not np.isfinite(part.high):
            return f"{ratio(part.low)} and wider"
        return f"{ratio(part.low)} to {ratio(part.high)}"

    def one(title: str, parts: Sequence[Slice], named: Any) -> str:
        rows = [
            f'<tr><th scope="row">{named(part)}</th><td>{part.objects}</td>'
            f"{_bar(max(part.ap, 0), number(part.ap))}<td>{number(part.ap50)}</td></tr>"
            for part in parts
        ]
        head = f'<th>{title}</th><th>objects</th><th class="bar">AP</th><th>AP50</th>'
        return table(head, rows)

    return (
        "<p>AP of the objects in each range alone, as COCO's APS, APM and APL.</p>"
        f'<div class="charts">{one("square root of the area", numbers.sizes, size)}'
        f"{one('width : height', numbers.aspects, aspect)}</div>"
    )


def _confusion(matrix: np.ndarray, names: Sequence[str], score_threshold: float) -> str:
    count = len(names)
    between = matrix[:count, :count] * (1 - np.eye(count, dtype=int))
    shown = np.arange(count)
    if count > CONFUSED:
        most = np.argsort(-(between.sum(0) + between.sum(1)), kind="stable")
        shown = np.sort(most[:CONFUSED])
    columns, labels = np.append(shown, count), [*names, "background"]
    total = np.maximum(matrix.sum(1), 1)
    rows = []
    for i in columns:
        cells = "".join(
            f'<td class="heat" style="--share:{100 * matrix[i, j] / total[i]:.0f}%">'
            f"{matrix[i, j] if i < count or j < count else ''}</td>"
            for j in columns
        )
        rows.append(f'<tr><th scope="row">{escape(labels[i])}</th>{cells}</tr>')
    head = "<th>annotated as</th>" + "".join(f"<th>{escape(labels[j])}</th>" for j in columns)
    some = f" The {CONFUSED} classes that are confused most." if count > CONFUSED else ""
    pairs = sorted(zip(*np.nonzero(between), strict=True), key=lambda pair: -between[pair])[:8]
    said = "".join(
        f"<li>{escape(names[i])} taken for {escape(names[j])}: {between[i, j]}</li>"
        for i, j in pairs
    )
    return (
        f"<p>Objects (rows) by what detections of at least {score_threshold:g} take them for "
        f"(columns), at IoU 0.5. Last column: nothing found; last row: no object, or one that had "
        f"been found.{some}</p>"
        f'{table(head, rows)}<ol class="confused">{said}</ol>'
    )


def table(head: str, rows: Sequence[str], style: str = "") -> str:
    """A table of header cells and rows; wide ones can be scrolled, also by keyboard."""
    return (
        f'<div class="wide {style}" tabindex="0" role="group" aria-label="table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(share: float, text: str) -> str:
    return f'<td class="bar"><span style="--share:{100 * max(share, 0):.1f}%">{text}</span></td>'


def number(value: float) -> str:
    """An AP, or a dash where there is nothing to measure."""
    return f"{value:.3f}" if value >= 0 else "-"

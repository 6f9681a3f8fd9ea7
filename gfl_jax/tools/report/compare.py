"""Two detectors on the same images: is the difference more than chance, and where do they differ?

OTHER is another run, or the COCO results of any program on the validation images of RUN. The
difference of AP comes with an interval by bootstrap: how it varies if the images are drawn again.
Fields of RUN's data are flags.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from html import escape
from typing import Annotated

import tyro

from gfl_jax.cli import parse_command, positional
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.errors import InputError, needs
from gfl_jax.paths import local_path, write
from gfl_jax.results import Result
from gfl_jax.run import Run, load
from gfl_jax.tools.report.bootstrap import Difference, differences, matched
from gfl_jax.tools.report.costs import Cost, costs
from gfl_jax.tools.report.detections import (
    annotations_of,
    names_of,
    open_images,
    predicted,
    see,
    stored,
)
from gfl_jax.tools.report.gallery import Pictures
from gfl_jax.tools.report.numbers import Numbers, numbers_of
from gfl_jax.tools.report.page import page, table


@dataclasses.dataclass(frozen=True)
class CompareCommand:
    """What `compare` takes.

    Attributes:
        folder: a work directory, or anything else that `gfl_jax.load` opens.
        other: a second one; or a json of COCO results on the same images.
        data: where the validation images are; by default where they were in the training of the
            first.
        out: the page to write; of more than 300 images the pictures lie in a folder beside it.
        results: COCO results of the first, such as those of `eval`; without them the images are
            predicted on.
        limit: only the first so many images; 0: all.
        score_threshold: least score of the detections in the pictures.
        picture_size: longest side of the pictures, in pixels.
        batch_size: images computed together; 0: one on a CPU, eight elsewhere.
        resamples: how often the images are drawn again.
        seed: of these draws.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    other: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OTHER")]
    data: Data = Data()
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "comparison.html"
    results: str = ""
    limit: int = 0
    score_threshold: float = 0.3
    picture_size: int = 640
    batch_size: int = 0
    resamples: int = 1000
    seed: int = 0


def main(arguments: list[str]) -> None:
    """Two detectors to a page."""
    default = CompareCommand(tyro.MISSING, tyro.MISSING)
    if named := positional(arguments):
        run = load(named)
        default = dataclasses.replace(default, folder=named, data=run.experiment.data)
    command = parse_command(default, arguments, "gfl-jax compare", __doc__)
    if command.resamples < 2:
        raise InputError(f"--resamples is {command.resamples}; it must be at least 2")
    with needs("report"):  # before minutes of computing
        import hotcoco  # noqa: F401
    out = local_path(command.out, "--out")
    experiment = dataclasses.replace(run.experiment, data=command.data)
    split = open_images(dataclasses.replace(run, experiment=experiment))
    indices = range(len(split.image_ids))[: command.limit or None]

    # ------------------------------------------------------------------ detections, judged
    image_ids = split.image_ids[: len(indices)].tolist()
    truth, objects = annotations_of(split, image_ids)
    pictures = Pictures(out, names_of(split, indices), command.picture_size)
    least = command.score_threshold
    of_first = command.results or run
    of_second = command.other if command.other.endswith(".json") else load(command.other)
    found = _found(of_first, command, split, indices)
    first = see(found, image_ids, objects, least, pictures.keep)
    second = see(_found(of_second, command, split, indices), image_ids, objects, least)

    # ------------------------------------------------------------------ numbers and page
    matches = [matched(truth, seen.results) for seen in (first, second)]
    by = differences(matches[0], matches[1], len(indices), command.resamples, command.seed)
    names, versions = split.category_names, (command.folder, command.other)
    both = [numbers_of(truth, seen.results) for seen in (first, second)]
    errors = [costs(seen.detected, len(names)) for seen in (first, second)]
    sections = [
        ("Summary", _summary(both, by, versions)),
        ("What goes wrong", _errors(errors, versions)),
        ("Classes", _classes(both, versions)),
    ]
    about = {"first": versions[0], "second": versions[1], "images": str(len(indices))}
    images = pictures.beside(first.entries, second.entries)
    title = "Two detectors on the same images"
    write(out, page(title, about, sections, names, images, least, versions))
    ap = [numbers.metrics["AP"] for numbers in both]
    print(
        f"AP {ap[0]:.3f} and {ap[1]:.3f} on {len(indices)} images: {by['AP']}, "
        f"{'more than chance' if by['AP'].real else 'may be chance'}\ncomparison {out}"
    )


def _found(
    what: Run | str, command: CompareCommand, split: PreparedSplit, indices: range
) -> Iterator[Result]:
    """The detections of a run, or those in a file."""
    if not callable(what):
        return stored(what, split, indices)
    if what.category_names != split.category_names:
        raise InputError(f"{what.folder} detects other classes than {command.folder}")
    what.predictor.batch_size = command.batch_size or what.predictor.batch_size
    return predicted(what, split, indices)


def _summary(both: Sequence[Numbers], by: dict[str, Difference], versions: Sequence[str]) -> str:
    rows = []
    for name, one in both[0].metrics.items():
        other, interval, said = both[1].metrics[name], "", ""
        if name in by:
            interval = f"{by[name].low:+.3f} to {by[name].high:+.3f}"
            said = "more than chance" if by[name].real else "may be chance"
        if one >= 0:
            rows.append(
                f'<tr><th scope="row">{name}</th><td>{one:.3f}</td><td>{other:.3f}</td>'
                f'<td>{other - one:+.3f}</td><td>{interval}</td><td class="text">{said}</td></tr>'
            )
    head = _head("metric", versions) + "<th>95% interval</th><th></th>"
    return (
        "<p>The interval is of the difference, by bootstrap over the images: it says how much "
        "other images like these would change it, not how much another training would.</p>"
        + table(head, rows)
    )


def _errors(both: Sequence[dict[str, Cost]], versions: Sequence[str]) -> str:
    rows = [
        f'<tr><th scope="row"><button class="kind {name}" data-kind="{name}">{name}</button></th>'
        f"<td>{100 * one.ap:.1f}</td><td>{100 * other.ap:.1f}</td>"
        f"<td>{100 * (other.ap - one.ap):+.1f}</td></tr>"
        for (name, one), other in zip(both[0].items(), both[1].values(), strict=True)
    ]
    text = "<p>What each kind of error costs, in points of AP50 (TIDE, Bolya et al. 2020).</p>"
    return text + table(_head("error", versions), rows)


def _classes(both: Sequence[Numbers], versions: Sequence[str]) -> str:
    pairs = [(a, b) for a, b in zip(both[0].classes, both[1].classes, strict=True) if a.ap >= 0]
    rows = [
        f'<tr><th scope="row">{escape(one.name)}</th><td>{one.ap:.3f}</td><td>{other.ap:.3f}</td>'
        f"<td>{other.ap - one.ap:+.3f}</td></tr>"
        for one, other in sorted(pairs, key=lambda pair: pair[0].ap - pair[1].ap)
    ]
    return table(_head("class, AP", versions), rows)


def _head(what: str, versions: Sequence[str]) -> str:
    columns = "".join(f"<th>{escape(version)}</th>" for version in versions)
    return f"<th>{what}</th>{columns}<th>difference</th>"


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax compare, or python -m gfl_jax compare")

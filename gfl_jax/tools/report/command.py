"""What a trained detector gets wrong on its validation images, as a page for a browser.

COCO's numbers, the six kinds of error of TIDE and what each costs, precision and recall,
calibration of the scores, confusion of the classes, AP by size and aspect ratio, and the pictures,
worst first. Fields of the run's data are flags.
"""

import dataclasses
from typing import Annotated

import tyro

from gfl_jax.cli import parse_command, positional
from gfl_jax.data.sources import Data
from gfl_jax.errors import needs
from gfl_jax.paths import local_path, write
from gfl_jax.run import load
from gfl_jax.tools.report.costs import costs
from gfl_jax.tools.report.detections import (
    annotations_of,
    names_of,
    open_images,
    predicted,
    see,
    stored,
)
from gfl_jax.tools.report.gallery import Pictures
from gfl_jax.tools.report.numbers import confusion, numbers_of
from gfl_jax.tools.report.page import page, report_sections


@dataclasses.dataclass(frozen=True)
class ReportCommand:
    """What `report` takes.

    Attributes:
        folder: a work directory of `train`, whose best checkpoint is used, or anything else that
            `gfl_jax.load` opens.
        data: where the validation images are; by default where they were in training.
        out: the page to write; of more than 300 images the pictures lie in a folder beside it.
        results: COCO results to report on, such as those of `eval`; without them the images are
            predicted on, and the page shows the distributions of sides too.
        limit: only the first so many images; 0: all.
        score_threshold: least score of the detections in the pictures and the confusion matrix.
        picture_size: longest side of the pictures, in pixels.
        batch_size: images computed together; 0: one on a CPU, eight elsewhere.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    data: Data = Data()
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.html"
    results: str = ""
    limit: int = 0
    score_threshold: float = 0.3
    picture_size: int = 640
    batch_size: int = 0


def main(arguments: list[str]) -> None:
    """Checkpoint to a page."""
    default = ReportCommand(tyro.MISSING)
    if named := positional(arguments):
        run = load(named)
        default = ReportCommand(named, run.experiment.data)
    command = parse_command(default, arguments, "gfl-jax report", __doc__)
    with needs("report"):  # before minutes of computing
        import hotcoco  # noqa: F401
    out = local_path(command.out, "--out")
    experiment = dataclasses.replace(run.experiment, data=command.data)
    run = dataclasses.replace(run, experiment=experiment)
    run.predictor.batch_size = command.batch_size or run.predictor.batch_size

    # ------------------------------------------------------------------ detections, judged
    split = open_images(run)
    indices = range(len(split.image_ids))[: command.limit or None]
    if command.results:
        found = stored(command.results, split, indices)
    else:
        found = predicted(run, split, indices)
    image_ids = split.image_ids[: len(indices)].tolist()
    truth, objects = annotations_of(split, image_ids)
    pictures = Pictures(out, names_of(split, indices), command.picture_size)
    seen = see(found, image_ids, objects, command.score_threshold, pictures.keep)

    # ------------------------------------------------------------------ numbers and page
    numbers = numbers_of(truth, seen.results)
    confused = confusion(truth, seen.counted(), command.score_threshold)
    errors = costs(seen.detected, len(split.category_ids))
    names, least = split.category_names, command.score_threshold
    about = {"step": str(run.step), "images": str(len(indices)), "classes": str(len(names))}
    about |= {"detections": command.results} if command.results else {}
    sections = report_sections(numbers, errors, seen.detected, confused, names, least)
    images = pictures.beside(seen.entries)
    write(out, page(f"Detections of {command.folder}", about, sections, names, images, least))
    print(f"AP {numbers.metrics['AP']:.3f} on {len(indices)} images\nreport {out}")


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax report, or python -m gfl_jax report")

"""Do intervals of a side hold as many true sides as they promise? A temperature corrects them.

gfl-jax calibrate RUN

The logits of all distributions are divided by a temperature (Guo et al., arXiv 1706.04599), fitted
on every other image of the validation split and judged on the rest. It is kept beside the
checkpoints; `gfl_jax.load` and `predict` use it from then on. Every field of the experiment that
was trained is a flag.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from gfl_jax.cli import parse_command, positional
from gfl_jax.config import Experiment
from gfl_jax.data import images
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import open_split
from gfl_jax.detectors.sides import Sides, interval, sharpened
from gfl_jax.errors import InputError, UsageError
from gfl_jax.paths import as_path, write
from gfl_jax.run import CALIBRATION, Run, load

SHARES = (0.5, 0.8, 0.9, 0.95)
"""Shares of probability whose intervals are measured."""

TEMPERATURES = (0.05, 20.0)
"""Least and largest."""

STEPS = 40


class Matched(NamedTuple):
    """Objects and the detections that found them.

    Attributes:
        image: [n], number of the image.
        truth: [n, 4], the annotated sides, in pixels.
        sides: of the detections; [n, 4, bins] each.
    """

    image: np.ndarray
    truth: np.ndarray
    sides: Sides


def matched_sides(run: Run, split: PreparedSplit, iou: float = 0.5, limit: int = 0) -> Matched:
    """Each object with the best-scoring detection of its class that overlaps it by `iou`.

    Raises:
        InputError: no object is detected, or boxes have no distributions.
    """
    count = min(limit or len(split.image_ids), len(split.image_ids))
    records = [split.source[i] for i in range(count)]

    def decoded():
        for record in records:
            size = record["height"], record["width"]
            yield images.decode(record["image"], size, record["filename"])

    rows: list[Any] = []
    stream = run.predictor.stream(decoded(), distributions=True)
    for number, (record, found) in enumerate(
        zip(records, tqdm(stream, total=count, unit=" images"), strict=True)
    ):
        keep = ~(record["crowd"] | record["ignore"])
        truth, labels = record["boxes"][keep], record["labels"][keep]
        good = images.box_iou(truth[:, None], found.boxes) >= iou
        good &= labels[:, None] == found.labels
        for i in np.flatnonzero(good.any(1)):
            best = int(np.argmax(good[i]))  # detections are sorted by score
            rows.append((number, truth[i], *(array[best] for array in found.sides)))
    if not rows:
        raise InputError(f"no detection reaches IoU {iou} with an object: train longer")
    columns: Any = map(np.array, zip(*rows, strict=True))
    images_of, truths, positions, probabilities = columns
    if positions.shape[-1] == 1:
        raise InputError(
            f"detector.box {run.experiment.detector.box} describes a box by four numbers: it has "
            "no distributions to calibrate"
        )
    return Matched(images_of, truths, Sides(positions, probabilities))


def coverage(matched: Matched, share: float, temperature: float = 1.0) -> float:
    """The share of true sides that lie in the central interval of a share of probability."""
    low, high = interval(sharpened(matched.sides, temperature), share)
    return float(((low <= matched.truth) & (matched.truth <= high)).mean())


def fitted_temperature(matched: Matched, share: float = 0.9) -> float:
    """The temperature with which the interval of a share holds this share of the true sides.

    Raises:
        InputError: there is none.
    """
    low, high = np.log(TEMPERATURES)
    if (
        not coverage(matched, share, TEMPERATURES[0])
        <= share
        <= coverage(matched, share, TEMPERATURES[1])
    ):
        raise InputError(
            f"no temperature makes the intervals of {share:.0%} hold as many of the true sides; as "
            f"stated they hold {coverage(matched, share):.0%}: train longer"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        enough = coverage(matched, share, float(np.exp(middle))) >= share
        low, high = (low, middle) if enough else (middle, high)
    return float(np.exp((low + high) / 2))


def _part(matched: Matched, chosen: np.ndarray) -> Matched:
    sides = Sides(*(array[chosen] for array in matched.sides))
    return Matched(matched.image[chosen], matched.truth[chosen], sides)


def report(matched: Matched, temperature: float, shares: Sequence[float] = SHARES) -> str:
    """A line for each share: how many true sides its interval holds, before and after."""
    lines = ["  interval   true sides inside   with the temperature"]
    for share in shares:
        before, after = coverage(matched, share), coverage(matched, share, temperature)
        lines.append(f"  {share:8.0%}   {before:17.1%}   {after:20.1%}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class CalibrateCommand:
    """What `calibrate` takes.

    Attributes:
        folder: work directory of a detector whose boxes are distributions.
        experiment: what was trained.
        share: of the true sides that the interval of this probability shall hold.
        iou: least overlap of a detection with the object that it is compared with.
        limit: number of images; 0: all.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
    share: float = 0.9
    iou: float = 0.5
    limit: int = 0

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UsageError(f"share is {self.share}; it must be between 0 and 1")


def main(arguments: list[str]) -> None:
    """Measures the intervals of the validation split, fits a temperature and keeps it."""
    default = CalibrateCommand(tyro.MISSING)
    if named := positional(arguments):
        default = CalibrateCommand(named, load(named).experiment)
    command = parse_command(default, arguments, "gfl-jax calibrate", __doc__)
    stored = load(command.folder)
    run = dataclasses.replace(stored, experiment=command.experiment, temperature=1.0)
    split = open_split(run.experiment.data, "val")
    matched = matched_sides(run, split, command.iou, command.limit)
    even = matched.image % 2 == 0
    if even.all() or not even.any():
        raise InputError("too few objects are detected: two images with one each are needed")
    temperature = fitted_temperature(_part(matched, even), command.share)
    judged = _part(matched, ~even)
    print(
        f"temperature {temperature:.3f}, fitted on {int(even.sum())} objects; on the other "
        f"{len(judged.image)}:\n{report(judged, temperature)}"
    )
    file = as_path(command.folder) / CALIBRATION
    write(file, json.dumps({"temperature": temperature, "share": command.share, "step": run.step}))
    print(f"kept in {file}; without it, distributions are as the network states them")


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax calibrate, or python -m gfl_jax calibrate")

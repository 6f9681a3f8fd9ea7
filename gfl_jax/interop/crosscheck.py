"""Compares this project with mmdetection on the same images.

    gfl-jax crosscheck IMAGE... --checkpoint X.pth

Goes stage by stage, from the network's input to the detections, prints a table and exits with
status 1 if they differ. If mmdetection is not installed, it compares a GFL with the plain PyTorch
model in `torch_gfl.py`, and says so.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from gfl_jax.cli import load_experiment
from gfl_jax.config import Experiment, to_dict
from gfl_jax.data import images as pixels
from gfl_jax.data.batch import Sample, pad
from gfl_jax.detectors.inference import Inference
from gfl_jax.errors import InputError, SetupError, UsageError
from gfl_jax.interop import mmdet_config, mmdet_stages
from gfl_jax.interop.detector_file import read_detector, state_dict
from gfl_jax.interop.stages import Stages, stages
from gfl_jax.models.network import Network
from gfl_jax.paths import local_path

TORCH_GFL = Path(__file__).with_name("torch_gfl.py")
TORCH_GFL_FIXED = {
    field: allowed
    for field, allowed in mmdet_config.FIXED["GFLHead"].items()
    if field != "detector.box.delta"
} | {
    "model.backbone.caffe": (False,),
    "model.neck.extra_from": ("output",),
    "model.neck.extra_relu": (False,),
    "model.head.names": ("gfl",),
    "model.head.norm": ("gn",),
    "model.channel_order": ("rgb",),
    "detector.box_loss.loss": ("giou",),
    "detector.inference.drop_empty": (True,),
}
"""The only values of these fields that the plain model supports."""

TOLERANCE = {"input": 1e-6, "backbone": 1e-4, "feature": 1e-4, "head": 1e-4, "loss": 1e-4}
"""Relative to the largest value of the reference, float32."""
PIXELS, SCORES, MARGIN = 0.05, 1e-4, 1e-5
"""Tolerances of detections: boxes in pixels, scores, and how close to a threshold or cut-off a
score may be on either side of it."""

Boxes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes [n, 4], scores [n] and labels [n]."""


@dataclasses.dataclass(frozen=True)
class StageDifference:
    """One line of the table.

    Attributes:
        stage: named as by `title`.
        absolute: the largest difference.
        relative: the same, relative to the largest value of the reference.
        tolerance: for the relative difference; for detections, for their boxes in pixels.
        where: the first element out of tolerance; empty if there is none.
    """

    stage: str
    absolute: float
    relative: float
    tolerance: float
    where: str = ""


def settings(experiment: Experiment, num_classes: int) -> dict[str, Any]:
    """What the other program needs to know, as JSON."""
    return {**to_dict(experiment), "num_classes": num_classes}


def run_reference(job: dict[str, Any], python: str) -> tuple[str, Stages]:
    """The name of the other program and the stages that it computes.

    Args:
        job: arrays of the job, see `mmdet_stages`.
        python: interpreter of the environment where mmdetection is installed.

    Raises:
        InputError: it has no such detector; the message names the choices that it lacks.
        SetupError: it fails; the message is its output.
    """
    config = json.loads(job["config"])
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("job.npz", "out.npz")]
        np.savez(files[0], **job)

        def run(program: Path, interpreter: str) -> int:
            command = [interpreter, str(program), *files]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == mmdet_stages.REFUSED:
                raise InputError(done.stdout.strip())
            if done.returncode not in (0, mmdet_stages.MISSING):
                raise SetupError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            return done.returncode

        name = "mmdetection"
        if run(Path(mmdet_stages.__file__), python) == mmdet_stages.MISSING:
            missing = f"mmdetection is not installed for {python}"
            if unknown := mmdet_config.differences(config, TORCH_GFL_FIXED):
                raise SetupError(
                    f"{missing}; pass its interpreter as --python. The plain PyTorch model that is "
                    f"used without it does not support {'; '.join(unknown)}"
                )
            name = f"the plain PyTorch model in {TORCH_GFL.name} (mmdetection is not installed)"
            run(TORCH_GFL, sys.executable)
        with np.load(files[1]) as out:
            return name, dict(out)


def title(stage: str, ssd: bool = False) -> str:
    """The usual name of a stage: C2 for `backbone.0`, P3 for `feature.P3`, and so on."""
    kind, _, name = stage.partition(".")
    if kind == "backbone":
        return ("conv4_3", "fc7")[int(name)] if ssd else f"C{int(name) + 2}"
    if kind == "head":
        branch, level = name.split(".")
        return f"{level} {branch}_logits"
    return name or kind


def compare(ours: Stages, theirs: Stages, inference: Inference) -> list[StageDifference]:
    """The difference at each stage of the reference, in its order."""
    rows, ssd = [], "feature.S0" in theirs
    for name, expected in theirs.items():
        if name.startswith("det."):
            continue
        stage, tolerance = title(name, ssd), TOLERANCE[name.split(".")[0]]
        actual = np.asarray(ours.get(name, 0.0), np.float64)
        if actual.shape != expected.shape:
            shapes = f"shape {actual.shape}, expected {expected.shape}"
            rows.append(StageDifference(stage, np.inf, np.inf, tolerance, shapes))
            continue
        difference, largest = np.abs(actual - expected), np.abs(expected).max(initial=1e-12)
        bad = ~(difference / largest <= tolerance)
        where = ""
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            where = f"{list(index)}: {actual[index]:.6g}, expected {expected[index]:.6g}"
        absolute = float(difference.max(initial=0))
        relative = float(absolute / largest)
        rows.append(StageDifference(stage, absolute, relative, tolerance, where))
    count = sum(name.startswith("det.boxes.") for name in theirs)
    return rows + [_compare_detections(ours, theirs, i, inference) for i in range(count)]


def detections_of(stages: Stages, kind: str, i: int) -> Boxes:
    """Image i's boxes, scores and labels: detections ('det') or candidates ('raw')."""
    boxes, scores, labels = (stages[f"{kind}.{part}.{i}"] for part in ("boxes", "scores", "labels"))
    return boxes, scores, labels


def match(ours: Boxes, theirs: Boxes) -> np.ndarray:
    """For each of theirs, the index of the nearest of ours that matches it, or -1.

    A match has the same class and is within PIXELS and SCORES. Each of ours is used at most once.
    """
    boxes, scores, labels = ours
    free, matches = np.ones(len(scores), bool), np.full(len(theirs[1]), -1)
    for i, (box, score, label) in enumerate(zip(*theirs, strict=True)):
        distance = np.abs(boxes - box).max(1, initial=0)
        same = free & (labels == label) & (np.abs(scores - score) <= SCORES) & (distance <= PIXELS)
        if same.any():
            matches[i] = np.argmin(np.where(same, distance, np.inf))
            free[matches[i]] = False
    return matches


def _compare_detections(
    ours: Stages, theirs: Stages, i: int, inference: Inference
) -> StageDifference:
    """Detections of image i: one to one, except where a score is at a threshold or cut-off."""
    actual, expected = detections_of(ours, "det", i), detections_of(theirs, "det", i)
    matches = match(actual, expected)
    kept = matches >= 0
    missing, extra = ~kept, np.setdiff1d(np.arange(len(actual[1])), matches)
    texts = [f"no class {c} with score {s:.5f} at {b}" for b, s, c in _rows(expected, missing)]
    texts += [f"one too many with score {s:.5f}" for _, s, _ in _rows(actual, extra)]
    full = len(expected[1]) == inference.max_per_image
    cut = float(expected[1][-1]) if full else inference.score_threshold
    scores = np.concatenate([expected[1][missing], actual[1][extra]])
    wrong = [text for score, text in zip(scores, texts, strict=True) if abs(score - cut) > MARGIN]
    pixel = float(np.abs(actual[0][matches[kept]] - expected[0][kept]).max(initial=0))
    relative = pixel / float(np.abs(expected[0]).max(initial=1))
    return StageDifference(
        f"detections of image {i}", pixel, relative, PIXELS, "; ".join(wrong[:1])
    )


def _rows(detections: Boxes, which: np.ndarray) -> Iterator[tuple[Any, ...]]:
    return zip(*(array[which] for array in detections), strict=True)


def print_table(rows: list[StageDifference]) -> None:
    """Prints the table, and the first stage that is out of tolerance."""
    print(f"{'stage':<26}{'max abs':>12}{'relative':>12}{'tolerance':>12}")
    for row in rows:
        unit = " px" if row.stage.startswith("detections") else ""
        mark = f"  DIFFERS at {row.where}" if row.where else ""
        print(
            f"{row.stage:<26}{row.absolute:>12.2e}{row.relative:>12.2e}"
            f"{row.tolerance:>12.0e}{unit}{mark}"
        )
    first = next((row.stage for row in rows if row.where), None)
    print(f"first difference: {first}" if first else "all stages agree")


def main(
    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE...")],
    checkpoint: str,
    scale: tuple[int, int] | None = None,
    python: str = sys.executable,
    config: str = "",
) -> int:
    """Compares this project with mmdetection on the same weights and images.

    Args:
        files: images, one or more.
        checkpoint: .pth of a detector.
        scale: (long, short) sides in pixels that images are resized to fit; None: those of the
            experiment.
        python: interpreter of the environment where mmdetection is installed.
        config: config of the model, needed if the arrays do not identify it.

    Returns:
        0 if all stages agree, 1 otherwise.

    Raises:
        UsageError: no image is named.
        InputError: a file cannot be used.
        SetupError: the other program fails.
    """
    if not files:
        raise UsageError("name at least one image")
    experiment, num_classes, _, variables, *_ = read_detector(
        local_path(checkpoint, "--checkpoint"), load_experiment(config) if config else None
    )
    data, model = experiment.data, dataclasses.replace(experiment.model, dtype="float32")
    detector = dataclasses.replace(
        experiment.detector,
        inference=dataclasses.replace(experiment.detector.inference, padding_predicts=True),
    )
    network = Network(model, detector.predicts(num_classes))
    if not data.keep_ratio and scale not in (None, data.scale):
        raise InputError(
            f"--scale is {scale}, but this detector stretches images to {data.scale} (width, "
            "height): leave it out"
        )
    width, height = scale or data.scale
    rng = np.random.default_rng(0)
    samples = []
    for file in files:
        image = pixels.decode(local_path(file, "IMAGE").read_bytes(), name=str(file))
        if data.keep_ratio:
            image, _ = pixels.resize_keep_ratio(image, width, height)
        else:
            image, _ = pixels.resize(image, (height, width))
        # Losses need objects; any will do.
        corners = rng.uniform(0, 1, (6, 2, 2)) * image.shape[1::-1]
        boxes = np.concatenate([corners.min(1), corners.max(1) + 1], 1).astype(np.float32)
        labels = rng.integers(0, num_classes, 6).astype(np.int32)
        samples.append(Sample(image, (1.0, 1.0), boxes, labels))
    batch = pad(samples)
    job = {
        "images": batch.images,
        "sizes": batch.sizes,
        "config": json.dumps(settings(experiment, num_classes)),
        **{f"boxes.{i}": sample.boxes for i, sample in enumerate(samples)},
        **{f"labels.{i}": sample.labels for i, sample in enumerate(samples)},
        **{f"param.{k}": v for k, v in state_dict(network, variables, detector).items()},
    }
    name, theirs = run_reference(job, python)
    print(f"{checkpoint} on {len(files)} images, compared with {name}")
    rows = compare(stages(network, detector, variables, batch), theirs, detector.inference)
    print_table(rows)
    return int(any(row.where for row in rows))


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax crosscheck, or python -m gfl_jax crosscheck")

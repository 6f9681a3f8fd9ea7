"""Both programs on the same images.

    gfl-jax crosscheck IMAGE... --checkpoint X.pth

Compares this project with mmdetection stage by stage, from the network's input to the detections,
prints a table and exits with status 1 where they differ. Without mmdetection it compares a GFL with
the plain PyTorch model of this repository's tests, and says so.
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

from gfl_jax.config import Experiment, to_dict
from gfl_jax.data import images as pixels
from gfl_jax.data.batch import Sample, pad
from gfl_jax.detectors.inference import Inference
from gfl_jax.interop import mmdet_stages
from gfl_jax.interop.convert import read_detector, state_dict
from gfl_jax.interop.stages import Stages, stages
from gfl_jax.models.network import Network

PLAIN = Path(__file__).with_name("torch_gfl.py")
PLAIN_FIXED = {
    field: allowed
    for field, allowed in mmdet_stages.FIXED["GFLHead"].items()
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
"""What the plain model leaves no choice in."""

TOLERANCE = {"input": 1e-6, "backbone": 1e-4, "feature": 1e-4, "head": 1e-4, "loss": 1e-4}
"""Relative to the largest value of the reference, float32."""
PIXELS, SCORES, MARGIN = 0.05, 1e-4, 1e-5
"""Detections: boxes, scores, and how near a threshold or cut a score may go either way."""


Detected = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Boxes, scores and labels."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; `where` the first element out of tolerance, empty if there is none."""

    stage: str
    absolute: float
    relative: float
    tolerance: float
    where: str = ""


def settings(experiment: Experiment, num_classes: int) -> dict[str, Any]:
    """What the other program has to know, as JSON."""
    return {**to_dict(experiment), "num_classes": num_classes}


def run_reference(job: dict[str, Any], python: str) -> tuple[str, Stages]:
    """The stages of the other program, and its name.

    Args:
        job: arrays of the job, see `mmdet_stages`.
        python: interpreter of the environment that mmdetection is in.

    Raises:
        ValueError: it has no such detector; the message names the choices.
        RuntimeError: it fails; the message is its own.
    """
    config = json.loads(job["config"])
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("job.npz", "out.npz")]
        np.savez(files[0], **job)

        def run(program: Path, interpreter: str) -> int:
            command = [interpreter, str(program), *files]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == mmdet_stages.REFUSED:
                raise ValueError(done.stdout.strip())
            if done.returncode not in (0, mmdet_stages.MISSING):
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
            return done.returncode

        name = "mmdetection"
        if run(Path(mmdet_stages.__file__), python) == mmdet_stages.MISSING:
            missing = f"mmdetection is not installed for {python}"
            if not PLAIN.is_file():
                raise RuntimeError(f"{missing}, and no {PLAIN}")
            if unknown := mmdet_stages.differences(config, PLAIN_FIXED):
                raise RuntimeError(
                    f"{missing}; this detector needs it (--python), since the plain PyTorch model "
                    f"of tests/ is a GFL: it has no {'; '.join(unknown)}"
                )
            name = "the plain PyTorch model of tests/ (mmdetection is not installed)"
            run(PLAIN, sys.executable)
        with np.load(files[1]) as out:
            return name, dict(out)


def title(stage: str, ssd: bool = False) -> str:
    """What people call a stage: C2 for `backbone.0`, P3 for `feature.P3`, and so on."""
    kind, _, name = stage.partition(".")
    if kind == "backbone":
        return ("conv4_3", "fc7")[int(name)] if ssd else f"C{int(name) + 2}"
    if kind == "head":
        branch, level = name.split(".")
        return f"{level} {branch}_logits"
    return name or kind


def compare(ours: Stages, theirs: Stages, inference: Inference) -> list[Row]:
    """A row for each stage of the reference, in its order."""
    rows, ssd = [], "feature.S0" in theirs
    for name, expected in theirs.items():
        if name.startswith("det."):
            continue
        stage, tolerance = title(name, ssd), TOLERANCE[name.split(".")[0]]
        found = np.asarray(ours.get(name, 0.0), np.float64)
        if found.shape != expected.shape:
            shapes = f"shape {found.shape}, expected {expected.shape}"
            rows.append(Row(stage, np.inf, np.inf, tolerance, shapes))
            continue
        difference, largest = np.abs(found - expected), np.abs(expected).max(initial=1e-12)
        bad = ~(difference / largest <= tolerance)
        where = ""
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            where = f"{list(index)}: {found[index]:.6g}, expected {expected[index]:.6g}"
        absolute = float(difference.max(initial=0))
        rows.append(Row(stage, absolute, float(absolute / largest), tolerance, where))
    count = sum(name.startswith("det.boxes.") for name in theirs)
    return rows + [_compare_detections(ours, theirs, i, inference) for i in range(count)]


def detections_of(stages: Stages, kind: str, i: int) -> Detected:
    """Boxes, scores and labels of image i: of the detections ('det') or candidates ('raw')."""
    boxes, scores, labels = (stages[f"{kind}.{part}.{i}"] for part in ("boxes", "scores", "labels"))
    return boxes, scores, labels


def match(ours: Detected, theirs: Detected) -> np.ndarray:
    """For each of theirs the index of the nearest of ours that equals it, -1 if there is none.

    Equal: of the same class, within PIXELS and SCORES. Each of ours is used once.
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


def _compare_detections(ours: Stages, theirs: Stages, i: int, inference: Inference) -> Row:
    """Detections of image i: one to one, but for those whose score is at a threshold or cut."""
    found, expected = detections_of(ours, "det", i), detections_of(theirs, "det", i)
    matches = match(found, expected)
    kept = matches >= 0
    missing, extra = ~kept, np.setdiff1d(np.arange(len(found[1])), matches)
    texts = [f"no class {c} of score {s:.5f} at {b}" for b, s, c in _rows(expected, missing)]
    texts += [f"one more of score {s:.5f}" for _, s, _ in _rows(found, extra)]
    full = len(expected[1]) == inference.max_per_image
    cut = float(expected[1][-1]) if full else inference.score_threshold
    scores = np.concatenate([expected[1][missing], found[1][extra]])
    wrong = [text for score, text in zip(scores, texts, strict=True) if abs(score - cut) > MARGIN]
    pixel = float(np.abs(found[0][matches[kept]] - expected[0][kept]).max(initial=0))
    relative = pixel / float(np.abs(expected[0]).max(initial=1))
    return Row(f"detections of image {i}", pixel, relative, PIXELS, "; ".join(wrong[:1]))


def _rows(detected: Detected, which: np.ndarray) -> Iterator[tuple[Any, ...]]:
    return zip(*(array[which] for array in detected), strict=True)


def print_table(rows: list[Row]) -> None:
    """The table, and the first stage that is out of tolerance."""
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
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")],
    checkpoint: Path,
    scale: tuple[int, int] | None = None,
    python: str = sys.executable,
    config: str = "",
) -> int:
    """Compares this project with mmdetection on the same weights and images.

    Args:
        files: images, one or more.
        checkpoint: .pth of a detector.
        scale: (long, short) sides that images are resized to fit; None: those of the experiment.
        python: interpreter of the environment that mmdetection is in.
        config: config of the model, where the arrays alone do not tell it.

    Returns:
        0 where all stages agree, 1 otherwise.
    """
    if not files:
        raise ValueError("name at least one image")
    experiment, num_classes, _, variables = read_detector(checkpoint, config)
    data, model = experiment.data, dataclasses.replace(experiment.model, dtype="float32")
    detector = dataclasses.replace(
        experiment.detector,
        inference=dataclasses.replace(experiment.detector.inference, padding_predicts=True),
    )
    network = Network(model, detector.predicts(num_classes))
    if not data.keep_ratio and scale not in (None, data.scale):
        raise ValueError(
            f"--scale is {scale}, but this detector stretches images to {data.scale} (width, "
            "height): leave it out"
        )
    width, height = scale or data.scale
    rng = np.random.default_rng(0)
    samples = []
    for file in files:
        image = pixels.decode(file.read_bytes(), name=str(file))
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

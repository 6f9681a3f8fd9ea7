"""Figures 1 and 2 of the paper: does the score rank detections by how well they are localized?

gfl-jax consistency RUN... --out consistency.png
"""

import json
from typing import Annotated

import jax
import numpy as np
import tyro

from gfl_jax.data.images import box_iou
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import open_split
from gfl_jax.errors import UsageError
from gfl_jax.paths import as_path
from gfl_jax.run import Run, load
from gfl_jax.tools.candidates import best_candidates, objects_of, rank_correlation
from gfl_jax.visualize import new_figure, save_figure


def scores_and_ious(
    run: Run, split: PreparedSplit, count: int, limit: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The scores of candidates, and their IoU with the best overlapping object of their class.

    Args:
        run: the detector.
        split: images and objects.
        count: candidates per image, the best by score.
        limit: only the first images; 0 for all.

    Returns:
        Scores and IoUs, [candidates] each.
    """
    objects = objects_of(split)
    scores, ious = [], []
    for image_id, candidates in best_candidates(run, split, count, limit):
        boxes, labels, *_ = objects[image_id]
        iou = box_iou(candidates.boxes[:, None], boxes)
        ious.append(np.where(candidates.labels[:, None] == labels, iou, 0).max(1, initial=0))
        scores.append(candidates.scores)
    return np.concatenate(scores), np.concatenate(ious)


def main(
    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")],
    titles: tuple[str, ...] = (),
    count: int = 100,
    out: str = "consistency.png",
) -> None:
    """Plots score against true IoU of each run's best candidates, with rank correlations.

    The correlations are over all candidates (a background box must not outrank an object) and over
    those on an object (IoU of at least 0.5), on the evaluation images and on as many training
    images.

    Args:
        runs: work directories.
        titles: titles of the runs; by default the names of the folders.
        count: candidates per image before NMS, the best by score.
        out: picture to write, with the numbers beside it as .json.

    Raises:
        UsageError: no work directory is named.
    """
    if not runs:
        raise UsageError("name at least one work directory")
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure = new_figure(4.2 * columns, 3.8 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    numbers: dict[str, dict[str, float]] = {}
    for i, workdir in enumerate(map(as_path, runs)):
        title = titles[i] if i < len(titles) else f"{workdir.parent.name}/{workdir.name}"
        numbers[title] = {}
        run = load(workdir)
        images = 0
        for name in ("val", "train"):
            split = open_split(run.experiment.data, name)
            images = images or len(split.image_ids)
            score, iou = scores_and_ious(run, split, count, images)
            on_object = iou >= 0.5
            numbers[title] |= {
                f"{name}, all": rank_correlation(score, iou),
                f"{name}, on an object": rank_correlation(score[on_object], iou[on_object]),
                f"{name}, share on an object": float(on_object.mean()),
            }
            if name == "val":
                panels[i].scatter(iou, score, s=2, alpha=0.15, edgecolors="none")
        panels[i].set(xlim=(0, 1), ylim=(0, 1), xlabel="true IoU", ylabel="score")
        panels[i].grid(alpha=0.3)
        panels[i].set_title(
            f"{title}\n{numbers[title]['val, all']:.3f} all, "
            f"{numbers[title]['val, on an object']:.3f} on an object",
            fontsize=10,
        )
        print(title, {key: round(value, 3) for key, value in numbers[title].items()}, flush=True)
        jax.clear_caches()
    for panel in panels[len(runs) :]:
        panel.axis("off")
    figure.suptitle("score and true IoU of the best candidates before NMS; rank correlations")
    file = as_path(out)
    save_figure(figure, file)
    file.with_suffix(".json").write_text(json.dumps(numbers, indent=1))
    print(f"{file}, {file.with_suffix('.json')}")


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax consistency, or python -m gfl_jax consistency")

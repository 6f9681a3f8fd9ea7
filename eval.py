"""Evaluates a checkpoint: `python eval.py FOLDER [--limit N] [--out DIR] [--any.field VALUE ...]`.

FOLDER is a work directory of train.py, whose best checkpoint is taken, or a folder of checkpoints.
Prints pycocotools' twelve numbers, a table of the classes and images/s with and without
post-processing; writes COCO results, numbers and a contact sheet.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from gfl_jax.cli import plain_errors, use_huge_pages

    use_huge_pages()

from gfl_jax.config import EvalCommand, parse_fields
from gfl_jax.data.sources import open_split
from gfl_jax.distributed import is_first, join, parallel
from gfl_jax.models.network import Network
from gfl_jax.run import load
from gfl_jax.training.evaluator import Evaluator
from gfl_jax.visualize import contact_sheet


def main(arguments: list[str]) -> None:
    """Checkpoint to numbers and a picture."""
    # ------------------------------------------------------------------ checkpoint and experiment
    if not arguments or arguments[0].startswith("-"):
        raise FileNotFoundError(f"the first argument is the folder of a checkpoint\n\n{__doc__}")
    join(arguments)
    folder = Path(arguments[0])
    run = load(folder)
    experiment, command = parse_fields(EvalCommand, run.experiment, arguments[1:], __doc__)
    out = Path(command.out or folder / "eval")

    # ------------------------------------------------------------------ data
    split = open_split(experiment.data, "val")
    if split.category_names != run.category_names:
        raise ValueError(
            f"the checkpoint knows {run.category_names}, the data has {split.category_names}"
        )

    # ------------------------------------------------------------------ model
    network = run.network
    if experiment.model != run.experiment.model:
        network = Network(experiment.model, experiment.detector.predicts(len(split.category_ids)))
    devices = parallel(experiment.train.mapping)
    variables = devices.replicate(run.variables)

    # ------------------------------------------------------------------ evaluation and speed
    evaluator = Evaluator(
        network,
        experiment.detector,
        experiment.data,
        devices,
        split,
        experiment.train.eval_batch,
        command.limit,
    )
    evaluation, results = evaluator(variables)
    with_post, without_post = evaluator.images_per_second(variables)

    # ------------------------------------------------------------------ numbers and picture
    if not is_first():
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results))
    (out / "metrics.json").write_text(json.dumps({"step": run.step, **evaluation.metrics}))
    contact_sheet(out / "detections.png", split, results)
    print(
        f"\nstep {run.step} of {run.folder} on "
        f"{len(evaluator.plan.indices)} images\n"
        f"{evaluation}\n\n{evaluation.class_table()}\n\n"
        f"{with_post:.2f} images/s, {without_post:.2f} without post-processing (batches of "
        f"{evaluator.plan.batch_size} on {devices.count} x {devices.kind}, loading not counted)\n"
        f"picture {out / 'detections.png'}, results {out / 'results.json'}"
    )


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])

"""Evaluates a trained detector.

Prints pycocotools' twelve numbers, a table of the classes and images/s with and without
post-processing; writes COCO results, numbers and a contact sheet. Every field of the experiment
that was trained is a flag.
"""

import dataclasses
import json
from typing import Annotated

import tyro

from gfl_jax.cli import parse_command, positional
from gfl_jax.config import Experiment
from gfl_jax.data.classes import class_error
from gfl_jax.data.sources import open_split
from gfl_jax.distributed import parallel
from gfl_jax.hosts import Hosts, is_first, join
from gfl_jax.models.network import Network
from gfl_jax.paths import as_path, write, writing
from gfl_jax.run import load
from gfl_jax.training.evaluator import Evaluator
from gfl_jax.visualize import contact_sheet


@dataclasses.dataclass(frozen=True)
class EvalCommand:
    """What `eval` takes.

    Attributes:
        folder: a work directory of `train`, whose best checkpoint is evaluated; or a folder of
            checkpoints, whose newest is used.
        experiment: what was trained.
        limit: evaluate only the first so many images; 0: all.
        out: folder for results and pictures; empty: the folder `eval` beside the checkpoints.
        hosts: the processes that evaluate together.
    """

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = Experiment()
    limit: int = 0
    out: str = ""
    hosts: Hosts = Hosts()


@dataclasses.dataclass(frozen=True)
class _Flags:
    hosts: Hosts = Hosts()


def main(arguments: list[str]) -> None:
    """Checkpoint to numbers and a picture."""
    # ------------------------------------------------------------------ checkpoint and experiment
    flags, _ = tyro.cli(_Flags, args=arguments, return_unknown_args=True, add_help=False)
    join(flags.hosts)  # before Orbax asks jax for its devices
    default = EvalCommand(tyro.MISSING)
    if named := positional(arguments):
        run = load(named)
        default = EvalCommand(named, run.experiment)
    command = parse_command(default, arguments, "gfl-jax eval", __doc__)
    experiment = command.experiment
    out = as_path(command.out or as_path(command.folder) / "eval")

    # ------------------------------------------------------------------ data
    split = open_split(experiment.data, "val")
    if split.category_names != run.category_names:
        ours = list(zip(run.category_ids, run.category_names, strict=True))
        theirs = list(zip(split.category_ids, split.category_names, strict=True))
        raise class_error("the checkpoint", ours, "the data", theirs)

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
    evaluator.close()
    with_post, without_post = evaluator.images_per_second(variables)

    # ------------------------------------------------------------------ numbers and picture
    if not is_first():
        return
    print(
        f"\nstep {run.step} of {run.folder} on "
        f"{len(evaluator.plan.indices)} images\n"
        f"{evaluation}\n\n{evaluation.class_table()}\n\n"
        f"{with_post:.2f} images/s, {without_post:.2f} without post-processing (batches of "
        f"{evaluator.plan.batch_size} on {devices.count} x {devices.kind}, loading not counted)"
    )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write(out / "results.json", json.dumps(results))
    write(out / "metrics.json", json.dumps({"step": run.step, **evaluation.metrics}))
    contact_sheet(out / "detections.png", split, results)
    print(f"picture {out / 'detections.png'}, results {out / 'results.json'}")


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax eval, or python -m gfl_jax eval")

"""Trains a detector: `python train.py [CONFIG] [--workdir W] [--any.field VALUE ...]`.

Without a config it makes the `shapes` data set and trains a small GFL on it within minutes. The
same command again continues where the work directory left off. `--help` lists every field.
"""

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    from gfl_jax.cli import plain_errors, use_huge_pages

    use_huge_pages()

from gfl_jax.config import TrainCommand, load_experiment, parse_fields
from gfl_jax.data.sources import open_split
from gfl_jax.distributed import is_first, join, parallel
from gfl_jax.interop.pretrained import load_pretrained
from gfl_jax.models.network import Network
from gfl_jax.run import changes_since, describe
from gfl_jax.training.loop import fit
from gfl_jax.visualize import finish

DEFAULT = Path(__file__).parent / "configs" / "gfl_r18_fpn_shapes.py"


def main(arguments: list[str]) -> None:
    """Experiment to trained detector, AP and pictures."""
    started = time.perf_counter()

    # ------------------------------------------------------------------ experiment
    join(arguments)
    named = bool(arguments) and not arguments[0].startswith("-")
    config = Path(arguments[0]) if named else DEFAULT
    experiment, command = parse_fields(
        TrainCommand, load_experiment(config), arguments[named:], __doc__
    )
    name = config.name.replace(".py:", "_").removesuffix(".py")  # a row's: its table's, its own
    workdir = Path(command.workdir or f"runs/{name}")

    # ------------------------------------------------------------------ data
    train_split = open_split(experiment.data, "train")
    val_split = open_split(experiment.data, "val")

    # ------------------------------------------------------------------ model
    predicts = experiment.detector.predicts(len(train_split.category_ids))
    network = Network(experiment.model, predicts)
    devices = parallel(experiment.train.mapping)

    # ------------------------------------------------------------------ weights
    for change in changes_since(workdir, experiment):
        print(f"  changed since the checkpoint: {change}")

    def initial():
        return load_pretrained(network, network.init(experiment.train.seed))

    # ------------------------------------------------------------------ steps and evaluations
    fit(
        network,
        experiment.detector,
        experiment.data,
        experiment.train,
        train_split=train_split,
        val_split=val_split,
        devices=devices,
        workdir=workdir,
        initial=initial,
        about=describe(experiment, val_split.category_ids, val_split.category_names),
    )

    # ------------------------------------------------------------------ pictures
    if is_first():
        finish(workdir, val_split, time.perf_counter() - started)


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])

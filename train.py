"""Trains a detector: `python train.py [CONFIG] [--workdir W] [--any.field VALUE]`.

Without a config it makes the `shapes` data set and trains a small GFL on it in a few minutes. The
same command again continues where the work directory left off. `--help` lists every field.
"""

import sys
import time
from pathlib import Path

from gfl_jax.config import parse_command_line
from gfl_jax.data.loader import open_split
from gfl_jax.models.network import Network
from gfl_jax.report import finish
from gfl_jax.training.loop import fit
from gfl_jax.training.parallel import parallel

DEFAULT = "configs/gfl_r18_fpn_shapes.py"


def main(arguments: list[str]) -> None:
    started = time.perf_counter()

    # ---------------------------------------------------------------- experiment
    experiment, workdir = parse_command_line(arguments, default=DEFAULT, doc=__doc__)
    workdir.mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- data
    train_split = open_split(experiment.data, "train")
    val_split = open_split(experiment.data, "val")

    # ---------------------------------------------------------------- model
    network = Network(
        experiment.model, len(train_split.category_ids), experiment.detector.box.channels
    )
    devices = parallel(experiment.train.mapping, experiment.train.batch_size)

    # ---------------------------------------------------------------- train and evaluate
    fit(experiment, network, train_split, val_split, devices, workdir)

    # ---------------------------------------------------------------- pictures, and what to do next
    finish(workdir, val_split, time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1:])

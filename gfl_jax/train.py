"""Trains a detector.

Without a config it makes the `shapes` data set and trains a small GFL on it within minutes. The
same command again continues where the work directory left off. Every field of the config is a flag.
"""

import dataclasses
import time
from typing import Annotated

import tyro

from gfl_jax import __version__
from gfl_jax.cli import load_experiment, parse_command, positional, run_name
from gfl_jax.config import Experiment
from gfl_jax.data.sources import open_split
from gfl_jax.distributed import parallel
from gfl_jax.hosts import Hosts, is_first, join, print_once
from gfl_jax.interop.initial import initial_weights
from gfl_jax.models.network import Network
from gfl_jax.paths import as_path, path_for_checkpoints
from gfl_jax.run import changes_since, describe
from gfl_jax.training.loop import fit
from gfl_jax.visualize import finish


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """What `train` takes.

    Attributes:
        config: a config file, or the name of one that comes with gfl_jax; of a table's config, a
            row follows: table_1a:atss_joint.
        experiment: what the config says.
        workdir: folder that keeps everything of the run, local or gs://BUCKET/...; empty: runs/ and
            the name of the config.
        hosts: the processes that train together.
    """

    config: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[CONFIG]")]
    experiment: Annotated[Experiment, tyro.conf.arg(name="")]
    workdir: str = ""
    hosts: Hosts = Hosts()


def main(arguments: list[str]) -> None:
    """Experiment to trained detector, AP and pictures."""
    started = time.perf_counter()

    # ------------------------------------------------------------------ experiment
    config = positional(arguments) or "gfl_r18_fpn_shapes"
    default = TrainCommand(config, load_experiment(config))
    command = parse_command(default, arguments, "gfl-jax train", __doc__)
    experiment = command.experiment
    workdir = as_path(command.workdir or f"runs/{run_name(config)}")
    path_for_checkpoints(workdir)  # before anything is prepared
    join(command.hosts)

    # ------------------------------------------------------------------ data
    train_split = open_split(experiment.data, "train")
    val_split = open_split(experiment.data, "val")

    # ------------------------------------------------------------------ model
    predicts = experiment.detector.predicts(len(train_split.category_ids))
    network = Network(experiment.model, predicts)
    devices = parallel(experiment.train.mapping)

    # ------------------------------------------------------------------ weights
    for change in changes_since(workdir, experiment):
        print_once(f"  changed since the checkpoint: {change}")

    def initial():
        return initial_weights(experiment, network, train_split.category_names)

    # ------------------------------------------------------------------ steps and evaluations
    about = describe(experiment, val_split.category_ids, val_split.category_names)
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
        about=about | {"gfl_jax": __version__},
    )

    # ------------------------------------------------------------------ pictures
    if is_first():
        finish(workdir, val_split, time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax train, or python -m gfl_jax train")

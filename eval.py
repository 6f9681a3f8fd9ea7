"""Evaluates a checkpoint: `python eval.py FOLDER [--limit N] [--data.root DIR] [--any.field VALUE]`.

FOLDER is a work directory of train.py, whose best checkpoint is taken, or a folder of checkpoints.
Prints pycocotools' twelve numbers, a table of the classes and images/s; writes COCO results, numbers
and a contact sheet into FOLDER/eval.
"""

import sys

if __name__ == "__main__":
    from gfl_jax.host import use_huge_pages

    use_huge_pages()

import dataclasses
import itertools
import json
from pathlib import Path

from gfl_jax.config import parse_evaluation
from gfl_jax.data.loader import batches, open_split
from gfl_jax.evaluation import images_per_second
from gfl_jax.models.network import Network
from gfl_jax.report import contact_sheet
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.loop import Evaluator, abstract_state
from gfl_jax.training.parallel import parallel
from gfl_jax.training.step import make_forward


def main(arguments: list[str]) -> None:
    # ---------------------------------------------------------------- checkpoint and experiment
    folder = Path(arguments[0]) if arguments and arguments[0][0] != "-" else None
    if folder is None and "--help" not in arguments:
        raise SystemExit(f"{__doc__}\nname the folder of a checkpoint")
    checkpoints = Checkpoints.find(folder)
    experiment, options, about = ...

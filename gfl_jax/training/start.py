"""What is checked and said before the first step."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gfl_jax.data.classes import class_error
from gfl_jax.data.plan import BatchPlan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import Devices
from gfl_jax.errors import InputError
from gfl_jax.hosts import print_once
from gfl_jax.models.network import Network
from gfl_jax.training.step import Train


def check(
    train: Train, devices: Devices, train_split: PreparedSplit, val_split: PreparedSplit
) -> None:
    """Raises errors that can be found before anything starts."""
    ours, theirs = (
        list(zip(split.category_ids, split.category_names, strict=True))
        for split in (train_split, val_split)
    )
    if ours != theirs:
        raise class_error("training", ours, "evaluation", theirs)
    if train.batch_size % (devices.count * train.accumulate):
        raise InputError(
            f"train.batch_size {train.batch_size} is not a multiple of {devices.count} devices x "
            f"train.accumulate {train.accumulate}"
        )


def key_of(split: PreparedSplit) -> str:
    """Distinguishes data sets, wherever they are: by all that is known of images and objects."""
    digest = hashlib.sha256(str(split.content).encode())
    for column in split.table:
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()[:16]


def evaluation_settings(network: Network, detector: Detector, data: Data) -> str:
    """Distinguishes the settings that the AP of the same weights on the same data depends on."""
    settings = network.model, detector, data.scale, data.keep_ratio, data.canvases
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def with_warmup_that_ends(train: Train, steps_per_epoch: int) -> Train:
    """The schedule; a warm-up that leaves no step at the whole learning rate is shortened.

    It then takes a tenth of the steps before the learning rate first drops.
    """
    before_drop = min([train.epochs, *train.milestones]) * steps_per_epoch
    end = "the learning rate drops" if train.epochs > before_drop / steps_per_epoch else "the end"
    if train.warmup_steps < max(before_drop, 1):
        if train.warmup_steps > before_drop / 2:
            print_once(
                f"the warm-up takes {train.warmup_steps} of the {before_drop} steps before {end}: "
                "--train.warmup-steps sets another number"
            )
        return train
    shorter = dataclasses.replace(train, warmup_steps=before_drop // 10)
    print_once(
        f"a warm-up of {train.warmup_steps} steps would not end before {end}, after {before_drop} "
        f"steps: it takes {shorter.warmup_steps} instead; set --train.warmup-steps"
    )
    return shorter


def check_resumed(
    before: Mapping[str, Any], about: Mapping[str, Any], start: int, evaluated: bool
) -> None:
    """Checks that a checkpoint is of these classes, and says where it is of other data.

    Args:
        before: what the newest checkpoint says about itself; empty if there is none. An earlier
            version did not write down `data` and `steps_per_epoch`.
        about: what is stored in the checkpoints of this run.
        start: steps taken.
        evaluated: whether step `start` was evaluated on this data.

    Raises:
        InputError: it was trained on other classes.
    """
    if not before:
        return
    if source := about.get("experiment", {}).get("model", {}).get("init_from"):
        print_once(f"--model.init-from {source} is not read: this work directory has a checkpoint")
    then, now = (
        list(zip(said["category_ids"], said["category_names"], strict=True))
        for said in (before, about)
    )
    if then != now:
        error = class_error("the checkpoint", then, "the data", now)
        raise InputError(f"{error}; for a run of its own name another --workdir")
    changed = [n for n, key in about["data"].items() if key != before.get("data", {}).get(n, key)]
    if "train" in changed:
        print_once(
            f"WARNING: the training data is not what step {start} of this work directory was "
            "trained on: training goes on from there. For a run of its own name another --workdir"
        )
    if "val" in changed and not evaluated:
        print_once(
            "WARNING: the evaluation data is not what this work directory was evaluated on: "
            "earlier APs do not compare, and `best` starts anew"
        )
    length = about["steps_per_epoch"]
    if (earlier := before.get("steps_per_epoch", length)) != length:
        print_once(
            f"an epoch has {length} steps, it had {earlier}: step {start} was the end of epoch "
            f"{start / earlier:.4g} and is that of epoch {start / length:.4g}"
        )


def announce(
    plan: BatchPlan, train: Train, devices: Devices, start: int, folder: Any, evaluated: bool
) -> None:
    """Prints what is about to happen.

    Args:
        plan: batches of the training.
        train: the schedule.
        devices: the mapping.
        start: steps taken.
        folder: of the checkpoints.
        evaluated: whether step `start` was evaluated on this data.
    """
    total = train.epochs * plan.steps_per_epoch
    if start >= total:
        print_once(
            f"the checkpoint is at step {start}, --train.epochs {train.epochs} ends at "
            f"{total}: nothing left to train" + ("" if evaluated else "; evaluating")
        )
        return
    if start:
        print_once(
            f"resuming from step {start} of {total} (epoch {start / plan.steps_per_epoch:.4g} of "
            f"{train.epochs}) in {folder}"
        )
    unusable = len(plan.sizes) - len(plan.indices)
    print_once(
        f"training on {len(plan.indices)} images ({unusable} left out: no objects, or under 32 "
        f"pixels), {plan.steps_per_epoch} steps per epoch, {total} in all\n"
        f"learning rate {train.lr:g} for 16 images x batch {train.batch_size} / 16 = "
        f"{train.lr * train.batch_size / 16:g}, on {devices.count} x {devices.kind}"
    )

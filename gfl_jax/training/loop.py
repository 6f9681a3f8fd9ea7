"""The training loop: steps, checkpoints, evaluations; resumes where the last run stopped."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from gfl_jax.data.classes import class_error
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import BatchPlan, train_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import REPLICATED, SHARDED, Pmap, ShardMap, prefetch
from gfl_jax.errors import InputError
from gfl_jax.hosts import Preempted, print_once, stop_requests
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import PathLike, as_path
from gfl_jax.training.evaluator import Evaluator
from gfl_jax.training.instruments import Clock, Profiler, keep_compiled
from gfl_jax.training.logbook import Logbook
from gfl_jax.training.step import (
    Train,
    TrainState,
    abstract_state,
    init_state,
    learning_rate,
    make_train_step,
    sgd,
)


def fit(
    network: Network,
    detector: Detector,
    data: Data,
    train: Train,
    *,
    train_split: PreparedSplit,
    val_split: PreparedSplit,
    devices: Pmap | ShardMap,
    workdir: PathLike,
    initial: Callable[[], Variables],
    about: Mapping[str, Any],
) -> None:
    """Trains to the end, resuming from the newest checkpoint in `workdir` if there is one.

    Writes metrics, checkpoints and the COCO results of the last evaluation into it. Interruptions
    do not change the result. All processes must see the same `workdir`; the first one writes.

    Args:
        network: what to train.
        detector: its losses and detections.
        data: how images reach the network.
        train: the schedule.
        train_split: images to train on.
        val_split: images to evaluate on.
        devices: the device mapping.
        workdir: the work directory, local or `gs://...`.
        initial: makes the initial weights of a new run.
        about: stored in every checkpoint.

    Raises:
        Preempted: SIGTERM arrived; the state is saved.
        OSError: a checkpoint could not be written; earlier ones are intact.
        NonFiniteLossError: a loss is not finite; nothing of that step is saved.
        ValueError: the batch cannot be split evenly over the devices, processes see different
            checkpoints, the checkpoint is of another model, or the splits have different classes.
    """
    detector.resolve()
    _check(train, devices, train_split, val_split)
    workdir = as_path(workdir)
    plan = train_plan(data, train_split, train.batch_size, train.seed)
    per_epoch = plan.steps_per_epoch
    total = train.epochs * per_epoch
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------------ instruments
        clock = stack.enter_context(Clock())
        stack.callback(lambda: print_once(str(clock)))
        profiler = stack.enter_context(Profiler(train.profile_steps, workdir))
        keep_compiled(workdir)

        # ------------------------------------------------------------------ step and evaluation
        schedule = learning_rate(train, per_epoch)
        optimizer = sgd(train, schedule)
        step_function = make_train_step(network, detector, optimizer, schedule, train)
        train_step = devices.map(
            step_function, outputs=(REPLICATED, REPLICATED, SHARDED), donate=True
        )
        evaluate = Evaluator(network, detector, data, devices, val_split, train.eval_batch)
        stack.callback(evaluate.close)

        # ------------------------------------------------------------------ where it left off
        log = stack.enter_context(Logbook(workdir, devices, about, clock, train.log_every))
        start, last = log.start, max(log.start, total)
        restored = log.restore(abstract_state(network, train))
        state = devices.replicate(restored or init_state(initial(), optimizer, train))
        _announce(plan, train, devices, log, resumed=restored is not None)

        # ------------------------------------------------------------------ steps
        feed = batches(plan, train_split, range(start, last), data, devices.share)
        stack.callback(feed.close)
        loaded = prefetch(devices, feed, lambda host: host.batch)
        log.begin(last)
        stop = stack.enter_context(stop_requests())

        def save_and_stop_if_asked(step: int, state: TrainState) -> None:
            if stop():
                _save_and_stop(log, step, state, total)

        checkpoint_every = train.checkpoint_every or per_epoch
        eval_every = (train.eval_every or train.epochs) * per_epoch
        for step in range(start, last + 1):
            due = step > 0 and (step % eval_every == 0 or step == last)
            if due and not (step == start and log.evaluated):
                log.settle()
                with clock("evaluating"):
                    asked = functools.partial(save_and_stop_if_asked, step, state)
                    log.evaluation(step, state, *evaluate(state.evaluated(), asked))
            if step == last:
                break
            save_and_stop_if_asked(step, state)
            with clock("waiting for input"):
                host, batch = next(loaded)
            with clock("steps"), profiler.step(step, state):
                state, scalars, per_image = train_step(state, batch)
                log.add(step, host, scalars, per_image)
            if (step + 1) % checkpoint_every == 0 or step + 1 == last:
                log.save(step + 1, state)


def _save_and_stop(log: Logbook, step: int, state: TrainState, total: int) -> None:
    """Saves a checkpoint and stops the run."""
    began = time.perf_counter()
    log.save(step, state, wait=True)
    seconds = time.perf_counter() - began
    print_once(
        f"\nSIGTERM received: saved step {step} of {total} ({seconds:.1f} s). Rerun the same "
        "command to resume."
    )
    raise Preempted


def _check(
    train: Train, devices: Pmap | ShardMap, train_split: PreparedSplit, val_split: PreparedSplit
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


def _announce(
    plan: BatchPlan, train: Train, devices: Pmap | ShardMap, log: Logbook, *, resumed: bool
) -> None:
    """Prints what is about to happen."""
    total = train.epochs * plan.steps_per_epoch
    if log.start > total:
        print_once(
            f"the checkpoint is at step {log.start}, --train.epochs {train.epochs} ends at "
            f"{total}: nothing left to train" + ("" if log.evaluated else "; evaluating")
        )
    elif resumed:
        print_once(f"resuming from step {log.start} of {total} in {log.folder}")
    unusable = len(plan.sizes) - len(plan.indices)
    print_once(
        f"training on {len(plan.indices)} images ({unusable} left out: no objects, or under 32 "
        f"pixels), {plan.steps_per_epoch} steps per epoch, {total} in all\n"
        f"learning rate {train.lr:g} for 16 images x batch {train.batch_size} / 16 = "
        f"{train.lr * train.batch_size / 16:g}, on {devices.count} x {devices.kind}"
    )

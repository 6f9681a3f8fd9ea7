"""The training loop: steps, checkpoints, evaluations; resumes where the last run stopped."""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import train_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import REPLICATED, SHARDED, Pmap, ShardMap, prefetch
from gfl_jax.hosts import INTERRUPTED, Preempted, print_once, stop_requests
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import PathLike, as_path
from gfl_jax.training.evaluator import Evaluator
from gfl_jax.training.instruments import Clock, Profiler, keep_compiled
from gfl_jax.training.lock import held
from gfl_jax.training.logbook import Logbook
from gfl_jax.training.pictures import Pictures
from gfl_jax.training.provenance import made_with
from gfl_jax.training.start import (
    announce,
    check,
    check_resumed,
    evaluation_settings,
    key_of,
    with_warmup_that_ends,
)
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
        about: stored in every checkpoint, with keys of the data, the steps of an epoch and
            what the run is made with.

    Raises:
        Preempted: SIGTERM or Ctrl-C arrived; the state is saved.
        OSError: a checkpoint could not be written; earlier ones are intact.
        NonFiniteLossError: a loss is not finite; nothing of that step is saved.
        ValueError: the batch cannot be split evenly over the devices, processes see different
            checkpoints, the checkpoint is of another model or other classes, the splits have
            different classes, or another run is using the work directory.
    """
    detector.resolve()
    check(train, devices, train_split, val_split)
    workdir = as_path(workdir)
    plan = train_plan(data, train_split, train.batch_size, train.seed)
    per_epoch = plan.steps_per_epoch
    total = train.epochs * per_epoch
    train = with_warmup_that_ends(train, per_epoch)
    keys = {"train": key_of(train_split), "val": key_of(val_split)}
    evaluation = {"data": keys["val"], "settings": evaluation_settings(network, detector, data)}
    about = {**about, "data": keys, "evaluation": evaluation, "steps_per_epoch": per_epoch}
    about["made_with"] = made_with(devices, train_split, val_split)
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(workdir, devices))

        # ------------------------------------------------------------------ instruments
        clock = stack.enter_context(Clock())
        stack.callback(lambda: print_once(str(clock)) if clock.seconds["steps"] else None)
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
        shown = Pictures(network, detector, data, devices, val_split, train.log.pictures)

        # ------------------------------------------------------------------ where it left off
        log = stack.enter_context(Logbook(workdir, devices, about, clock, train))
        start, last = log.start, max(log.start, total)
        check_resumed(log.before, about, start, log.evaluated)
        restored = log.restore(abstract_state(network, train))
        state = devices.replicate(restored or init_state(initial(), optimizer, train))
        announce(plan, train, devices, start, log.folder, log.evaluated)

        # ------------------------------------------------------------------ steps
        feed = batches(plan, train_split, range(start, last), data, devices.share)
        stack.callback(feed.close)
        loaded = prefetch(devices, feed, lambda host: host.batch)
        log.begin(last)
        stop = stack.enter_context(stop_requests())

        def save_and_stop_if_asked(step: int, state: TrainState) -> None:
            if status := stop():
                _save_and_stop(log, step, state, total, status)

        checkpoint_every = train.checkpoint_every or per_epoch
        eval_every = (train.eval_every or train.epochs) * per_epoch
        for step in range(start, last + 1):
            due = step > 0 and (step % eval_every == 0 or step == last)
            if due and not (step == start and log.evaluated):
                log.settle()
                with clock("evaluating"):
                    asked = functools.partial(save_and_stop_if_asked, step, state)
                    log.evaluation(step, state, *evaluate(state.evaluated(), asked))
                    log.metrics.show(step, shown(state.evaluated()))
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


def _save_and_stop(log: Logbook, step: int, state: TrainState, total: int, status: int) -> NoReturn:
    """Saves a checkpoint and stops the run."""
    began = time.perf_counter()
    log.save(step, state, wait=True)
    seconds = time.perf_counter() - began
    reason = "stopped by Ctrl-C" if status == INTERRUPTED else "SIGTERM received"
    print_once(
        f"\n{reason}: saved step {step} of {total} ({seconds:.1f} s). Rerun the same command to "
        "resume."
    )
    raise Preempted(status)

"""The loop: steps, checkpoints and evaluations, from wherever the work directory left off."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from gfl_jax.data.batch import HostBatch
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import train_plan
from gfl_jax.data.records import PreparedSplit
from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import AXIS, Pmap, Preempted, ShardMap, ahead, is_first, stop_requests
from gfl_jax.errors import InputError
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import PathLike, as_path, write
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.evaluator import Evaluator
from gfl_jax.training.metrics import MetricsLog
from gfl_jax.training.step import (
    Train,
    TrainState,
    abstract_state,
    init_state,
    learning_rate,
    make_train_step,
    sgd,
)


class NonFiniteLossError(FloatingPointError):
    """A loss or gradient became infinite or NaN."""


def check_finite(
    step: int, scalars: dict[str, Any], per_image: dict[str, Any], image_ids: np.ndarray
) -> None:
    """Raises NonFiniteLossError, naming the terms and the images, unless all values are finite."""
    bad = [name for name, value in scalars.items() if not np.isfinite(value)]
    if not bad:
        return
    faulty = ~np.isfinite(np.stack(list(per_image.values()))).all(0)
    culprits = image_ids[faulty] if faulty.any() else image_ids
    values = ", ".join(f"{name} = {scalars[name]}" for name in bad)
    raise NonFiniteLossError(
        f"step {step}: {values}. "
        + ("Terms that are not finite come from" if faulty.any() else "The batch held")
        + f" image ids {', '.join(map(str, culprits))}. The last checkpoint is from before; a "
        "lower train.lr, a longer train.warmup_steps or train.clip_norm=35 may help."
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
    """Trains to the end, continuing from the newest checkpoint in `workdir` if there is one.

    Writes metrics.jsonl, tensorboard/, checkpoints/, best/ and results.json (COCO results of the
    last evaluation) into it. The result does not depend on interruptions. Of several processes, all
    must see the same `workdir`; the first writes.

    Args:
        network: what is trained.
        detector: its losses and detections.
        data: how images reach the network.
        train: the schedule.
        train_split: images to train on.
        val_split: images to evaluate on.
        devices: the mapping.
        workdir: the work directory, local or `gs://...`.
        initial: makes the weights that a new run begins with.
        about: stored in every checkpoint.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        OSError: a checkpoint could not be written; those before are intact.
        NonFiniteLossError: a loss is not finite; nothing of that step is saved.
        ValueError: devices cannot share a batch equally, processes see different checkpoints, the
            checkpoint is of another model, or the splits have different classes.
    """
    if train_split.category_ids != val_split.category_ids:
        raise ValueError(
            f"training has the categories {train_split.category_names}, evaluation has "
            f"{val_split.category_names}: both annotation files must list the same"
        )
    detector.resolve()
    first, workdir = is_first(), as_path(workdir)
    if train.batch_size % (devices.count * train.accumulate):
        raise ValueError(
            f"train.batch_size {train.batch_size} is not a multiple of {devices.count} devices x "
            f"train.accumulate {train.accumulate}"
        )
    plan = train_plan(data, train_split, train.batch_size, train.seed)
    per_epoch = plan.steps_per_epoch
    total = train.epochs * per_epoch
    schedule = learning_rate(train, per_epoch)
    optimizer = sgd(train, schedule)
    step_function = make_train_step(network, detector, optimizer, schedule, train)
    train_step = devices.map(
        functools.partial(step_function, axis_name=AXIS), [False, False, True], donate=True
    )
    evaluator = Evaluator(network, detector, data, devices, val_split, train.eval_batch)

    newest = Checkpoints(workdir / "checkpoints", keep=2, writes=True)
    best = Checkpoints(workdir / "best", writes=True)
    found = -1 if newest.step is None else newest.step
    if (agreed := devices.agree(found)) != found:
        raise ValueError(
            f"process {devices.share[0]} finds the checkpoint of step {found} in {newest.folder} "
            f"and process 0 that of step {agreed:.0f} (-1: none): all must see the same files; "
            "wait for the file system, then give the same command again"
        )
    if newest.step is None:
        start, state = 0, init_state(initial(), optimizer, train)
    else:
        items = newest.restore(abstract_state(network, train).items())
        start, state = newest.step, TrainState.from_items(items)
        if start > total:
            raise InputError(
                f"train.epochs {train.epochs} ends at step {total}, but {newest.folder} is already "
                f"at step {start}: raise train.epochs, or name another --workdir"
            )
        print(f"continuing from step {start} of {total} in {newest.folder}")
    state = devices.replicate(state)
    log = MetricsLog(workdir, start, writes=first)
    best_ap = devices.agree(-math.inf if best.step is None else best.about()["AP"])
    evaluated = bool(devices.agree(log.has("val", start)))  # what an interrupted run had done

    checkpoint_every = train.checkpoint_every or per_epoch
    eval_every = (train.eval_every or train.epochs) * per_epoch
    unusable = len(train_split.sizes) - len(plan.indices)
    print(
        f"training on {len(plan.indices)} images ({unusable} without objects or under 32 pixels "
        f"left out), {per_epoch} steps an epoch, {total} in all\n"
        f"learning rate {train.lr:g} for 16 images x batch {train.batch_size} / 16 = "
        f"{train.lr * train.batch_size / 16:g}, on {devices.count} x {devices.kind}"
    )

    loaded = ahead(
        devices,
        batches(plan, train_split, range(start, total), data, devices.share),
        lambda host: host.batch,
    )
    progress = tqdm(
        initial=start,
        total=total,
        desc="training",
        unit=" steps",
        smoothing=0.05,
        disable=not first,
    )
    numbers = _Numbers(devices, log, progress, train.log_every)

    def finite_copy(state: TrainState) -> TrainState:
        """The state on the host; an update may overflow where loss and gradient do not."""
        copy = devices.fetch_replicated(state)
        for name, value in copy.variables.params.items():
            if not np.isfinite(value).all():
                raise NonFiniteLossError(f"step {int(copy.step) - 1}: {name} is not finite")
        return copy

    def save(step: int, state: TrainState) -> None:
        numbers.settle()  # nothing is saved that has not been found finite
        log.flush()  # nothing that was logged before a checkpoint is lost by a kill
        newest.save(step, finite_copy(state).items(), about)

    with stop_requests() as stop, newest, best, contextlib.closing(log), progress:

        def stop_if_told(step: int, state: TrainState) -> None:
            if not stop():
                return
            began = time.perf_counter()
            save(step, state)
            newest.wait()
            progress.close()
            seconds = time.perf_counter() - began
            print(
                f"\ntold to stop: step {step} of {total} saved in {seconds:.1f} s; start it again"
            )
            raise Preempted

        for step in range(start, total + 1):
            ends = step % eval_every == 0 or step == total
            if step and ends and not (evaluated and step == start):
                numbers.settle()
                log.flush()
                evaluation, results = evaluator(
                    state.evaluated(), functools.partial(stop_if_told, step, state)
                )
                if first:
                    write(workdir / "results.json", json.dumps(results))
                progress.write(f"epoch {step / per_epoch:g}\n{evaluation}")
                ap = devices.agree(evaluation.metrics["AP"])
                if ap > best_ap:
                    best_ap = ap
                    newest.wait()  # with two saves at once processes wait for different ones
                    best.save(step, finite_copy(state).items(), {**about, "AP": ap})
                    best.wait()  # an evaluation that is logged is not done again after a kill
                log.write("val", step, evaluation.metrics)
                log.flush()
                numbers.restart_clock()
            if step == total:
                break

            stop_if_told(step, state)
            host, batch = next(loaded)
            state, scalars, per_image = train_step(state, batch)
            numbers.add(step, host, scalars, per_image)
            progress.update()
            if (step + 1) % checkpoint_every == 0 or step + 1 == total:
                save(step + 1, state)


class _Numbers:
    """Reads the numbers of each step one step late, so that devices do not wait for the host."""

    def __init__(self, devices: Pmap | ShardMap, log: MetricsLog, progress: tqdm, every: int):
        self._devices, self._log, self._progress, self._every = devices, log, progress, every
        self._waiting: tuple[int, HostBatch, Any, Any] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Starts to count images and seconds anew."""
        self._since, self._images = time.perf_counter(), 0

    def add(self, step: int, host: HostBatch, scalars: Any, per_image: Any) -> None:
        """Takes a step that has been dispatched; settles the one before."""
        self.settle()
        self._waiting = (step, host, scalars, per_image)

    def settle(self) -> None:
        """Waits for the step last added, checks its numbers and logs them if it is their turn."""
        if self._waiting is None:
            return
        step, host, scalars, per_image = self._waiting
        self._waiting = None
        values = self._devices.fetch_replicated(scalars)
        if not np.isfinite(list(values.values())).all():
            check_finite(step, values, self._devices.fetch_sharded(per_image), host.image_ids)
        self._images += int(host.image_mask.sum())
        if (step + 1) % self._every == 0:
            rate = self._images / (time.perf_counter() - self._since)
            self.restart_clock()
            self._log.write("train", step + 1, values | {"images_per_second": rate})
            self._progress.set_postfix_str(
                f"loss {values['loss']:.3f}, lr {values['lr']:.2g}, {rate:.1f} images/s"
            )

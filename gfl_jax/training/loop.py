"""The loop: steps, checkpoints and evaluations, from wherever the work directory left off."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from gfl_jax.coco_eval import Evaluation, evaluate, ground_truth, predict_all
from gfl_jax.config import Experiment, differences, to_dict
from gfl_jax.data.coco import PreparedSplit
from gfl_jax.data.loader import HostBatch, batches, eval_plan, open_split, train_plan
from gfl_jax.distributed import AXIS, Pmap, Preempted, ShardMap, ahead, is_first, stop_requests
from gfl_jax.interop.pretrained import load_pretrained
from gfl_jax.models.network import Network, Variables
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.metrics import MetricsLog
from gfl_jax.training.step import (
    Train,
    TrainState,
    init_state,
    learning_rate,
    make_forward,
    make_predict,
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


@dataclasses.dataclass
class Evaluator:
    """Evaluates variables on a split; everything compiled once."""

    experiment: Experiment
    network: Network
    devices: Pmap | ShardMap
    split: PreparedSplit
    limit: int = 0

    def __post_init__(self):
        self.predict = self.devices.map(
            make_predict(self.network, self.experiment.detector), [True]
        )
        batch_size = self.experiment.train.eval_batch * self.devices.count
        self.plan = eval_plan(self.experiment.data, self.split, batch_size, self.limit)
        self._forward = self.devices.map(make_forward(self.network), [True])
        self._truth = ground_truth(self.split)

    def _batches(self, steps: int) -> Iterator[HostBatch]:
        data, share = self.experiment.data, self.devices.share
        return batches(self.plan, self.split, range(steps), data, share)

    def __call__(
        self, variables: Any, before_each: Callable[[], None] = lambda: None
    ) -> tuple[Evaluation, list[dict[str, Any]]]:
        """The evaluation and the COCO results of replicated variables; the same on every host.

        `before_each` is called before each batch.
        """
        steps = self.plan.steps_per_epoch
        results = predict_all(
            self.predict,
            variables,
            self._batches(steps),
            self.devices,
            self.split,
            total=steps,
            before_each=before_each,
        )
        image_ids = self.split.image_ids[self.plan.indices].tolist()
        return evaluate(results, self._truth, image_ids), results

    def images_per_second(self, variables: Any, repeats: int = 5) -> tuple[float, float]:
        """Throughput on the first batch, with and without post-processing: medians, in turn."""
        host = next(self._batches(1))
        shard = self.devices.shard(host.batch)
        seconds: dict[str, list[float]] = {"all": [], "forward": []}
        for _ in range(repeats + 1):
            for name, run in (("all", self.predict), ("forward", self._forward)):
                start = time.perf_counter()
                jax.block_until_ready(run(variables, shard))
                seconds[name].append(time.perf_counter() - start)
        images = len(host.image_mask)
        # The first run of each compiles.
        with_post, without_post = (float(np.median(times[1:])) for times in seconds.values())
        return images / with_post, images / without_post


def abstract_state(network: Network, train: Train) -> TrainState:
    """Shapes and dtypes of a run's state, to restore it into."""
    optimizer = sgd(train, optax.constant_schedule(0.0))
    return jax.eval_shape(lambda: init_state(network.init(0), optimizer, train))


class Run(NamedTuple):
    """A finished run: what it was, its best weights, and images to look at it with."""

    experiment: Experiment
    network: Network
    variables: Variables
    split: PreparedSplit


def open_run(workdir: Path, split: str = "val") -> Run:
    """Opens a work directory.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
    """
    checkpoints = Checkpoints.find(workdir)
    experiment, about = checkpoints.about()
    predicts = experiment.detector.predicts(len(about["category_ids"]))
    network = Network(experiment.model, predicts)
    state = checkpoints.restore(abstract_state(network, experiment.train), experiment)
    return Run(experiment, network, state.evaluated(), open_split(experiment.data, split))


def fit(
    experiment: Experiment,
    network: Network,
    train_split: PreparedSplit,
    val_split: PreparedSplit,
    devices: Pmap | ShardMap,
    workdir: Path,
) -> None:
    """Trains to the end, continuing from the newest checkpoint in `workdir` if there is one.

    Writes metrics.jsonl, tensorboard/, checkpoints/, best/ and results.json (COCO results of the
    last evaluation) into it. The result does not depend on interruptions. Of several processes, all
    must see the same `workdir`; the first writes.

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
    first = is_first()
    train = experiment.train
    if train.batch_size % (devices.count * train.accumulate):
        raise ValueError(
            f"train.batch_size {train.batch_size} is not a multiple of {devices.count} devices x "
            f"train.accumulate {train.accumulate}"
        )
    plan = train_plan(experiment.data, train_split, train.batch_size, train.seed)
    per_epoch = plan.steps_per_epoch
    total = train.epochs * per_epoch
    schedule = learning_rate(train, per_epoch)
    optimizer = sgd(train, schedule)
    step_function = make_train_step(network, experiment.detector, optimizer, schedule, train)
    train_step = devices.map(
        functools.partial(step_function, axis_name=AXIS), [False, False, True], donate=True
    )
    evaluator = Evaluator(experiment, network, devices, val_split)

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
        variables = load_pretrained(network, network.init(train.seed))
        start, state = 0, init_state(variables, optimizer, train)
    else:
        start, state = newest.step, newest.restore(abstract_state(network, train), experiment)
        print(f"continuing from step {start} of {total} in {newest.folder}")
        for line in differences(to_dict(newest.about()[0]), to_dict(experiment)):
            print(f"  changed since that step: {line}")
    state = devices.replicate(state)
    log = MetricsLog(workdir, start, writes=first)
    best_ap = devices.agree(-math.inf if best.step is None else best.about()[1]["AP"])
    evaluated = bool(devices.agree(log.has("val", start)))  # what an interrupted run had done
    about = {"category_ids": val_split.category_ids, "category_names": val_split.category_names}

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
        batches(plan, train_split, range(start, total), experiment.data, devices.share),
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
        newest.save(step, finite_copy(state), experiment, about)

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
                evaluation, results = evaluator(
                    state.evaluated(), functools.partial(stop_if_told, step, state)
                )
                if first:
                    (workdir / "results.json").write_text(json.dumps(results))
                progress.write(f"epoch {step / per_epoch:g}\n{evaluation}")
                ap = devices.agree(evaluation.metrics["AP"])
                if ap > best_ap:
                    best_ap = ap
                    newest.wait()  # with two saves at once processes wait for different ones
                    best.save(step, finite_copy(state), experiment, about | {"AP": ap})
                    best.wait()  # an evaluation that is logged is not done again after a kill
                log.write("val", step, evaluation.metrics)
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

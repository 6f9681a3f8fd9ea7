"""What a run writes to its work directory: checkpoints, metrics and evaluation results."""

import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from gfl_jax.coco_eval import Evaluation
from gfl_jax.data.batch import HostBatch
from gfl_jax.distributed import Pmap, ShardMap
from gfl_jax.errors import UserError
from gfl_jax.hosts import is_first
from gfl_jax.paths import PathLike, as_path, write
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.instruments import Clock
from gfl_jax.training.metrics import MetricsLog
from gfl_jax.training.step import Train, TrainState


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss, a gradient or a parameter became infinite or NaN."""


class Logbook:
    """Records the steps and evaluations of a run; nothing non-finite is kept.

    Attributes:
        folder: of the newest checkpoints.
        metrics: what is logged.
        start: step of the newest checkpoint; 0 if there is none.
        before: what that checkpoint says about itself; empty if there is none.
        evaluated: whether the metrics end with an evaluation of that step as it would be now.
    """

    def __init__(
        self,
        workdir: PathLike,
        devices: Pmap | ShardMap,
        about: Mapping[str, Any],
        clock: Clock,
        train: Train,
    ):
        """Opens or creates the work directory.

        Args:
            workdir: the work directory.
            devices: the device mapping.
            about: stored in every checkpoint.
            clock: measures the run.
            train: how often to log, and to whom.

        Raises:
            InputError: processes see different checkpoints.
        """
        self._workdir, self._devices, self._about = as_path(workdir), devices, about
        self._clock, self._every = clock, train.log_every
        self._newest = Checkpoints(self._workdir / "checkpoints", keep=2, writes=True)
        self._best = Checkpoints(self._workdir / "best", writes=True)
        self.folder, step = self._newest.folder, self._newest.step
        devices.check_same(
            -1 if step is None else step,
            f"the step of the newest checkpoint in {self.folder} (-1: none)",
        )
        self.start = step or 0
        self.metrics = MetricsLog(workdir, self.start, about, train.log, writes=is_first())
        self.before = {} if step is None else self._newest.about()
        last = self.metrics.last("val")
        same = all(last.get(word) in (None, now) for word, now in about["evaluation"].items())
        self.evaluated = bool(devices.from_first(same and last.get("step") == self.start))
        best = {} if self._best.step is None else self._best.about()
        # An AP on other images does not compare.
        self._best_counts = self._same_data(best.get("data", {}).get("val"))
        best_ap = best.get("AP", -math.inf) if self._best_counts else -math.inf
        self._best_ap = devices.from_first(best_ap)
        self._progress = tqdm(disable=True)
        self._waiting: tuple[int, HostBatch, Any, Any] | None = None

    def _same_data(self, key: str | None) -> bool:
        """Whether this is the key of the images to evaluate on; earlier versions kept none."""
        return key in (None, self._about["data"]["val"])

    def restore(self, like: TrainState) -> TrainState | None:
        """The state of the newest checkpoint, on the host; None if there is none.

        Raises:
            ValueError: it belongs to another model or optimiser than `like`.
        """
        if self._newest.step is None:
            return None
        return TrainState.from_items(self._newest.restore(like.items()))

    def begin(self, last: int) -> None:
        """Starts the progress bar, which ends at step `last`."""
        self._progress = tqdm(
            initial=self.start,
            total=last,
            desc="training",
            unit=" steps",
            smoothing=0.05,
            disable=not is_first(),
            postfix="the first step compiles, which takes a while" if self.start < last else None,
        )
        self._restart()

    def _restart(self) -> None:
        """Restarts counting images and seconds."""
        self._since, self._images = time.perf_counter(), 0
        self._waited = self._clock.seconds["waiting for input"]

    def add(self, step: int, host: HostBatch, scalars: Any, per_image: Any) -> None:
        """Takes the numbers of a dispatched step, and reads those of the previous one.

        This keeps the devices busy with the next step while the host reads.

        Raises:
            NonFiniteLossError: the numbers of the previous step are not finite.
        """
        self.settle()
        self._waiting = (step, host, scalars, per_image)
        self._progress.update()

    def settle(self) -> None:
        """Waits for the last added step, checks its numbers, and logs them when due.

        Raises:
            NonFiniteLossError: they are not finite.
        """
        if self._waiting is None:
            return
        (step, host, scalars, per_image), self._waiting = self._waiting, None
        with self._clock("steps"):
            values = self._devices.fetch_replicated(scalars)
        if not np.isfinite(list(values.values())).all():
            check_finite(step, values, self._devices.fetch_sharded(per_image), host.image_ids)
        if step == self.start:
            self._progress.set_postfix_str("")
        self._images += int(host.image_mask.sum())
        if (step + 1) % self._every == 0:
            rate = self._images / (time.perf_counter() - self._since)
            waited = self._clock.seconds["waiting for input"] - self._waited
            self._restart()
            speed = {"images_per_second": rate, "seconds_waiting": waited}
            self.metrics.write("train", step + 1, values | speed)
            self._progress.set_postfix_str(
                f"loss {values['loss']:.3f}, lr {values['lr']:.2g}, {rate:.1f} images/s"
            )

    def save(self, step: int, state: TrainState, *, wait: bool = False) -> None:
        """Starts writing the checkpoint of step `step`.

        Args:
            step: number of steps taken.
            state: on the devices.
            wait: whether to wait until it is on disk.

        Raises:
            NonFiniteLossError: a number of the last step or a parameter is not finite.
            OSError: this save or the previous one failed.
        """
        self.settle()
        with self._clock("saving"):
            copy = self._finite_copy(step, state)
            self.metrics.flush()  # a kill loses no entry from before a checkpoint
            self._newest.save(step, copy.items(), self._about)
            if wait:
                self._newest.wait()

    def _finite_copy(self, step: int, state: TrainState) -> TrainState:
        """The state on the host; an update may overflow even if loss and gradient do not."""
        copy = self._devices.fetch_replicated(state)
        bad = [n for n, value in copy.variables.params.items() if not np.isfinite(value).all()]
        if bad:
            raise NonFiniteLossError(f"not finite after {step} steps: {', '.join(bad)}")
        return copy

    def evaluation(
        self, step: int, state: TrainState, evaluation: Evaluation, results: list[dict[str, Any]]
    ) -> None:
        """Records an evaluation; saves the state as the best if its AP is the highest so far.

        Args:
            step: number of steps taken.
            state: on the devices.
            evaluation: its numbers.
            results: its detections as COCO results.
        """
        if is_first():
            self._progress.write(f"step {step}\n{evaluation}")
            write(self._workdir / "results.json", json.dumps(results))
        if (ap := evaluation.metrics["AP"]) > self._best_ap:
            self._best_ap = ap
            with self._clock("saving"):
                self._newest.wait()  # with two saves at once, processes wait for different ones
                items = self._finite_copy(step, state).items()
                if not self._best_counts:
                    self._best.clear()
                    self._best_counts = True
                self._best.save(step, items, {**self._about, "AP": ap})
                self._best.wait()  # a logged evaluation is not repeated after a kill
        self.metrics.write("val", step, evaluation.metrics, **self._about["evaluation"])
        self.metrics.flush()
        self._restart()

    def close(self) -> None:
        """Waits until everything is written."""
        self._progress.close()
        with self._clock("saving"), self._newest, self._best:
            self.metrics.close()

    def __enter__(self) -> "Logbook":
        """For `with`: pending writes are finished when it ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; an error from inside the `with` takes precedence over a failed write."""
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()


def check_finite(
    step: int, scalars: dict[str, Any], per_image: dict[str, Any], image_ids: np.ndarray
) -> None:
    """Checks the numbers of a step.

    Args:
        step: counted from 0.
        scalars: of the whole batch, by the names of the terms.
        per_image: each image's share of the terms, [batch].
        image_ids: of the batch.

    Raises:
        NonFiniteLossError: some are not finite; the message names the terms and the images.
    """
    bad = [name for name, value in scalars.items() if not np.isfinite(value)]
    if not bad:
        return
    faulty = ~np.isfinite(np.stack(list(per_image.values()))).all(0)
    culprits = image_ids[faulty] if faulty.any() else image_ids
    values = ", ".join(f"{name} = {scalars[name]}" for name in bad)
    raise NonFiniteLossError(
        f"step {step}: {values}. "
        + ("The non-finite terms come from" if faulty.any() else "The batch held")
        + f" image ids {', '.join(map(str, culprits))}. The last checkpoint predates it; a "
        "lower train.lr, more train.warmup_steps or train.clip_norm=35 may help."
    )

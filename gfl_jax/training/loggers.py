"""Where people follow a run: TensorBoard, Weights & Biases, MLflow, trackio.

Each is a class of three things that it is told, `scalars`, `image` and `histogram`. A service that
fails is left out from then on, and training goes on: all numbers are in `metrics.jsonl` too.
"""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
from etils import epath

from gfl_jax.errors import InputError, WriteError, needs
from gfl_jax.paths import is_remote, writing

PROJECT = "gfl_jax"
"""Where the services keep runs, unless their own environment variables name another place."""


@dataclasses.dataclass(frozen=True)
class Log:
    """Where a run can be followed, beside `metrics.jsonl` in the work directory.

    Attributes:
        to: any of tensorboard (files in the work directory), wandb, mlflow and trackio; see
            docs/logging.md.
        pictures: validation images that are sent there after each evaluation with what is detected
            on them, and a histogram of the spread of its sides; 0: none.
    """

    to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ("tensorboard",)
    pictures: int = 0

    def __post_init__(self):
        if self.pictures < 0:
            raise InputError(f"train.log.pictures is {self.pictures}; it must be 0 or more")


class Logger(Protocol):
    """What a service is told. Steps count steps taken."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, all finite."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 RGB [height, width, 3]."""

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Some numbers, [n]."""

    def flush(self) -> None:
        """Makes sure that what it was told is kept."""

    def close(self) -> None:
        """Ends the run."""


class TensorBoard(Logger):
    """A file of events, written by this thread.

    tensorboardX's SummaryWriter has a thread, which dies on a full disk without a word to the run.
    """

    def __init__(self, workdir: epath.Path, start: int, run_id: str, about: Mapping[str, Any]):
        """Opens a new file. TensorBoard is told to forget what older ones say after `start`."""
        with needs("tensorboard"):
            from tensorboardX import summary
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.record_writer import RecordWriter
        if is_remote(workdir):
            with needs("gcs"):
                import google.cloud.storage  # noqa: F401  # what tensorboardX writes to gs:// with
        self._event, self._summary = Event, summary
        folder = workdir / "tensorboard"
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._path))
        self._write(file_version="brain.Event:2")
        self._write(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        with writing(self._path):
            self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=self._summary.scalar(name, value))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._write(step=step, summary=self._summary.image(name, image, dataformats="HWC"))

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._write(step=step, summary=self._summary.histogram(name, values, bins="auto"))

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # flush has said it
            self._file.close()


class WandB(Logger):
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and so on are its own settings."""

    def __init__(self, workdir: epath.Path, start: int, run_id: str, about: Mapping[str, Any]):
        """Begins the run, or continues the one with this id."""
        with needs("wandb"):
            import wandb
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=workdir.name,
            id=run_id,
            resume="allow",
            config=dict(about),
            dir=None if is_remote(workdir) else os.fspath(workdir),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._run.log({name: self._wandb.Histogram(values.tolist())}, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow(Logger):
    """A run of MLflow, at MLFLOW_TRACKING_URI; it has no histograms: percentiles stand for them."""

    def __init__(self, workdir: epath.Path, start: int, run_id: str, about: Mapping[str, Any]):
        """Begins the run, or continues the one with this id."""
        with needs("mlflow"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        self._client, self._metric = MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`gfl_jax.id` = '{run_id}'")
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"gfl_jax.id": run_id}
        self._id = self._client.create_run(experiment, tags=tags, run_name=workdir.name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in flat(about).items()]
        for first in range(0, len(params), 100):  # as many as it takes at once
            self._client.log_batch(self._id, params=params[first : first + 100])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = round(1000 * time.time())
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._client.log_image(self._id, image, key=name, step=step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self.scalars(step, {f"{name}/p{p}": np.percentile(values, p) for p in (10, 50, 90)})

    def close(self) -> None:
        self._client.set_terminated(self._id)


class Trackio(Logger):
    """A run of trackio: on this machine, or in the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, workdir: epath.Path, start: int, run_id: str, about: Mapping[str, Any]):
        """Begins the run, or continues the one with this id."""
        with needs("trackio"):
            import trackio
        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{workdir.name}-{run_id}",
            config=dict(about),
            resume="allow",
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(image)}, step=step)

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        self._run.log({name: self._trackio.Histogram(values)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


KINDS: dict[str, Callable[..., Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Loggers:
    """Those of a run. One that fails is left out from then on, which is said once.

    Only a work directory that cannot be written to ends the run: checkpoints could not be kept.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        workdir: epath.Path,
        start: int,
        run_id: str,
        about: Mapping[str, Any],
    ):
        """Opens them.

        Args:
            names: keys of `KINDS`.
            workdir: of the run.
            start: steps taken.
            run_id: by which a service finds the run again when it resumes.
            about: what is recorded about the run.
        """
        self._open: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            with self._guarded(name):
                self._open[name] = KINDS[name](workdir, start, run_id, about)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except WriteError:
            raise
        except Exception as error:  # whatever a library raises
            self._open.pop(name, None)
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            print(f"warning: nothing is logged to {name} from here on: {reason[:300]}")

    def tell(self, what: str, *arguments: Any) -> None:
        """Calls the method of this name of each; see `Logger`.

        Raises:
            WriteError: the work directory cannot be written to.
        """
        for name, logger in list(self._open.items()):
            with self._guarded(name):
                getattr(logger, what)(*arguments)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries: {'experiment.train.lr': 0.01, ...}."""
    if not isinstance(value, Mapping):
        return {name: value}
    items = (flat(inner, f"{name}.{key}".strip(".")) for key, inner in value.items())
    return {key: leaf for part in items for key, leaf in part.items()}

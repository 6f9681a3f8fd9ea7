"""What a run logs: JSON lines for programs, TensorBoard events for people."""

import contextlib
import json
import math
import socket
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from gfl_jax.errors import MissingExtraError, needs
from gfl_jax.paths import PathLike, as_path, is_remote, write, writing

FILE = "metrics.jsonl"

SHARE = 0.01
"""Largest share of the time to spend on writing the file."""

LONGEST = 60.0
"""Seconds after which the file is written however long that takes."""


def read_metrics(workdir: PathLike) -> list[dict[str, Any]]:
    """The entries of `workdir/metrics.jsonl` in order; invalid lines are left out."""
    file = as_path(workdir) / FILE
    entries = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # UnicodeDecodeError is one
            continue
        if isinstance(entry, dict) and "kind" in entry and type(entry.get("step")) is int:
            entries.append(entry)
    return entries


class MetricsLog:
    """Collects entries, each of a kind ('train', 'val') and a step.

    Files in a bucket cannot be appended to, so the whole file is always rewritten: by `flush` and,
    in between, as often as that takes at most 1% of the time. That is with nearly every entry on a
    local disk, every few seconds in a bucket.

    Attributes:
        entries: all those of the run, in order.
    """

    def __init__(self, workdir: PathLike, start: int, *, writes: bool = True):
        """Continues the log of a run at step `start`: entries of later steps are dropped.

        Args:
            workdir: where the file and the folder `tensorboard` are.
            start: steps taken.
            writes: False for a process that only keeps the entries in memory.
        """
        self._workdir, self._writes = as_path(workdir), writes
        self.entries = [entry for entry in read_metrics(workdir) if entry["step"] <= start]
        if writes:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._lines = [json.dumps(entry) + "\n" for entry in self.entries]
            self._events = _open_events(self._workdir / "tensorboard", start)
            self.flush()

    def write(self, kind: str, step: int, values: Mapping[str, float], **words: str) -> None:
        """Adds an entry; `step` counts steps taken, `words` stand beside the numbers.

        Raises:
            WriteError: the file could not be written.
        """
        numbers = {name: float(value) for name, value in values.items()}
        entry = {"kind": kind, "step": step, **numbers, **words}
        self.entries.append(entry)
        if not self._writes:
            return
        self._lines.append(json.dumps(entry) + "\n")
        if self._events:
            self._events.add(
                step, {f"{kind}/{k}": value for k, value in values.items() if math.isfinite(value)}
            )
        if time.perf_counter() >= self._next:
            self.flush()

    def flush(self) -> None:
        """Writes the file now: before a checkpoint, and after what must not be repeated.

        Raises:
            WriteError: it could not be written.
        """
        if not self._writes:
            return
        began = time.perf_counter()
        write(self._workdir / FILE, "".join(self._lines))
        if self._events:
            self._events.flush()
        ended = time.perf_counter()
        self._next = ended + min((ended - began) / SHARE, LONGEST)

    def last(self, kind: str) -> dict[str, Any]:
        """The newest entry of this kind; empty if there is none."""
        return next((e for e in reversed(self.entries) if e["kind"] == kind), {})

    def close(self) -> None:
        """Writes everything and closes, even if writing fails."""
        try:
            self.flush()
        finally:
            if self._writes and self._events:
                self._events.close()


class _Events:
    """A file of TensorBoard events, written by this thread.

    tensorboardX's SummaryWriter has a thread, which dies on a full disk without a word to the run.
    """

    def __init__(self, folder: epath.Path, start: int):
        """Opens a new file. TensorBoard is told to forget what older ones say after `start`."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._path = folder / name
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._path))
        self._write(file_version="brain.Event:2")
        self._write(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        with writing(self._path):
            self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._write(step=step, summary=self._scalar(name, value))

    def flush(self) -> None:
        with writing(self._path):
            self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # flush has said it
            self._file.close()


def _open_events(folder: epath.Path, start: int) -> _Events | None:
    """The TensorBoard events of a run from step `start`; None after printing why there are none."""
    try:
        with needs("tensorboard"):
            import tensorboardX  # noqa: F401
        if is_remote(folder):
            with needs("gcs"):
                import google.cloud.storage  # noqa: F401  # what tensorboardX writes to gs:// with
    except MissingExtraError as error:
        print(f"no TensorBoard events: {error}")
        return None
    return _Events(folder, start)

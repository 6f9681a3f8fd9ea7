"""What a run logs: JSON lines for programs, and what people follow it with."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any

from gfl_jax.paths import PathLike, as_path, write
from gfl_jax.training.loggers import Log, Loggers
from gfl_jax.training.pictures import Seen
from gfl_jax.training.provenance import record

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

    def __init__(
        self,
        workdir: PathLike,
        start: int,
        about: Mapping[str, Any] | None = None,
        log: Log | None = None,
        *,
        writes: bool = True,
    ):
        """Continues the log of a run at step `start`: entries of later steps are dropped.

        Args:
            workdir: where the file and the folder `tensorboard` are.
            start: steps taken.
            about: what is recorded about the run.
            log: who else is told; None: TensorBoard.
            writes: False for a process that only keeps the entries in memory.
        """
        self._workdir, self._writes = as_path(workdir), writes
        self.entries = [entry for entry in read_metrics(workdir) if entry["step"] <= start]
        if writes:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._lines = [json.dumps(entry) + "\n" for entry in self.entries]
            about = about or {}
            run_id = record(self._workdir, about)
            names = (log or Log()).to
            self._loggers = Loggers(names, self._workdir, start, run_id, about)
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
        finite = {f"{kind}/{k}": value for k, value in numbers.items() if math.isfinite(value)}
        self._loggers.tell("scalars", step, finite)
        if time.perf_counter() >= self._next:
            self.flush()

    def show(self, step: int, seen: Seen | None) -> None:
        """Shows what is seen on a few images to those who follow the run.

        Raises:
            WriteError: TensorBoard's file could not be written.
        """
        if not self._writes or seen is None:
            return
        for image_id, picture in seen.pictures.items():
            self._loggers.tell("image", step, f"predictions/{image_id}", picture)
        if len(seen.spread):
            self._loggers.tell("histogram", step, "spread of sides in pixels", seen.spread)

    def flush(self) -> None:
        """Writes the file now: before a checkpoint, and after what must not be repeated.

        Raises:
            WriteError: it could not be written.
        """
        if not self._writes:
            return
        began = time.perf_counter()
        write(self._workdir / FILE, "".join(self._lines))
        self._loggers.tell("flush")
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
            if self._writes:
                self._loggers.tell("close")

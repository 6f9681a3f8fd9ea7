"""What a run writes down: JSON lines for programs, TensorBoard events for people."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The entries of `workdir/metrics.jsonl` in order, without a last line cut short by a kill."""
    file = workdir / "metrics.jsonl"
    entries = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


class MetricsLog:
    """Appends entries of a kind ('train', 'val') and a step to both files."""

    def __init__(self, workdir: Path, start: int, *, writes: bool = True):
        """Continues the files of a run at step `start`: entries of later steps are dropped.

        Args:
            workdir: where the files are.
            start: steps taken.
            writes: False for a process that only keeps the entries to itself.
        """
        kept = [entry for entry in read_metrics(workdir) if entry["step"] <= start]
        self.entries, self._writes = kept, writes
        if not writes:
            return
        temporary = workdir / "metrics.jsonl.partial"
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        temporary.replace(workdir / "metrics.jsonl")
        self._lines = (workdir / "metrics.jsonl").open("a", buffering=1)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Adds an entry; `step` counts steps taken."""
        entry = {"kind": kind, "step": step, **{k: float(v) for k, v in values.items()}}
        self.entries.append(entry)
        if not self._writes:
            return
        try:
            self._lines.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OSError(f"{self._lines.name} could not be written: {error.strerror}") from error
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def has(self, kind: str, step: int) -> bool:
        """Whether there is an entry of this kind for this step."""
        return any(entry["kind"] == kind and entry["step"] == step for entry in self.entries)

    def close(self) -> None:
        """Flushes both files."""
        if not self._writes:
            return
        self._lines.close()
        self._events.close()

"""Where the time of a run goes (goodput, profiles), and the cache of compiled programs."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from gfl_jax.errors import InputError
from gfl_jax.paths import PathLike, is_remote

PHASES = ("steps", "waiting for input", "compiling", "evaluating", "saving", "other")


class Clock:
    """Divides the wall time of a run among its phases.

    Each second counts once: towards the innermost current phase, or as compiling. Time outside all
    phases is 'other'.

        with Clock() as clock:
            with clock("steps"):
                ...
            print(clock)
    """

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._phases, self._since = ["other"], time.perf_counter()
        self._compiled: list[tuple[float, float]] = []  # (begin, end) in this phase, disjoint

    def __enter__(self) -> "Clock":
        """Starts listening for compilations."""
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        """Stops listening."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time inside the `with` counts as this phase."""
        self._settle()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._settle()
            self._phases.pop()

    def _settle(self) -> None:
        now = time.perf_counter()
        compiling = sum(end - begin for begin, end in self._compiled)
        self.seconds["compiling"] += compiling
        self.seconds[self._phases[-1]] += now - self._since - compiling
        self._since, self._compiled = now, []

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        """Tracing, lowering, compiling; a nested one is reported first and counts once."""
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            begin = max(end - duration_secs, self._since)
            self._compiled = [part for part in self._compiled if part[1] <= begin]
            self._compiled.append((begin, end))

    def shares(self) -> dict[str, float]:
        """The share of each of PHASES of the time since the start; they add up to 1."""
        self._settle()
        whole = sum(self.seconds.values())
        return {phase: self.seconds[phase] / whole for phase in PHASES}

    def __str__(self) -> str:
        tenths = {phase: round(1000 * share) for phase, share in self.shares().items()}
        tenths["other"] += 1000 - sum(tenths.values())
        listed = ", ".join(f"{phase} {share / 10:.1f}%" for phase, share in tenths.items())
        return f"goodput: {listed} of {sum(self.seconds.values()):.1f} s"


class Profiler:
    """Writes a jax.profiler trace of some steps, each annotated."""

    def __init__(self, steps: range, workdir: PathLike):
        """Traces `steps` into the folder `profile` of a work directory.

        Raises:
            InputError: the work directory is not on a local disk.
        """
        if steps and is_remote(workdir):
            raise InputError(f"train.profile needs a local workdir, but {workdir} is a bucket")
        self._steps, self._folder, self._running = steps, Path(workdir) / "profile", False

    def __enter__(self) -> "Profiler":
        """For `with`: a trace that is still running when it ends is ended."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the trace if it is running."""
        self._trace(False)

    def step(self, step: int, state: Any) -> contextlib.AbstractContextManager:
        """The context in which to run each step.

        Args:
            step: counted from 0.
            state: what the previous steps compute; a trace ends only when it is ready.
        """
        if self._running and step not in self._steps:
            jax.block_until_ready(state)
        self._trace(step in self._steps)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def _trace(self, on: bool) -> None:
        if on and not self._running:
            jax.profiler.start_trace(str(self._folder))
        elif self._running and not on:
            jax.profiler.stop_trace()
        self._running = on


def keep_compiled(workdir: PathLike) -> None:
    """Caches compiled programs in `workdir/xla_cache`: a resumed run need not compile again.

    Only the owner can use the folder (mode 0700), since programs are executed as they are found.
    Nothing is cached in a remote work directory, in one that cannot be written to, or if a cache is
    already configured, by JAX_COMPILATION_CACHE_DIR for instance.
    """
    if jax.config.values["jax_compilation_cache_dir"] or is_remote(workdir):
        return
    folder = Path(workdir) / "xla_cache"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)  # fails if it belongs to somebody else
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        compilation_cache.reset_cache()  # JAX may have looked for one already

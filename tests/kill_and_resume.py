"""Kills a training run again and again and compares its end with that of an undisturbed one.

    python tests/kill_and_resume.py --kills 20 --seed 0
    python tests/kill_and_resume.py --kills 20 --processes 2
    python tests/kill_and_resume.py --faults 2

Each time the same command is given again. The moments are drawn at random: while it prepares its
data, loads, steps, saves or evaluates. Every third start finds the run's files with times from the
future, as if the clock had been set back. `--faults N` instead has N times each the disk full or
read-only at a random moment (needs root), the work directory removed, or a worker killed: each
must end the run with a sentence and no traceback within two minutes, or be survived.

Prints how often it was killed at what, and whether the end is the same bit by bit: every array of
the last and the best checkpoint, the metrics, and the COCO results.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from tiny_experiment import CONFIG
from tqdm import tqdm

from gfl_jax.cli import load_experiment
from gfl_jax.models.network import Network
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.metrics import read_metrics
from gfl_jax.training.step import TrainState, abstract_state

STEPS_PER_EPOCH, EVAL_EVERY = 3, 2
MOMENTS = ("preparing", "loading", "stepping", "saving", "evaluating")
FAULTS = ("disk full", "read-only", "removed", "worker killed")


class Runs:
    """The same command, given again and again.

    Attributes:
        folder: keeps the config, the cache and the work directories.
        log: what the processes of the last start printed.
    """

    def __init__(self, folder: Path, epochs: int, processes: int):
        self.folder, self._epochs, self._processes = folder, epochs, processes
        self.log = folder / "log.txt"
        (folder / "tiny.py").write_text(CONFIG)

    def start(self, workdir: Path) -> list[subprocess.Popen]:
        """Gives the command, in as many processes as the run has."""
        arguments = [
            str(self.folder / "tiny.py"),
            f"--workdir={workdir}",
            f"--data.cache-dir={self.folder / 'cache'}",
            f"--train.epochs={self._epochs}",
            f"--train.eval-every={EVAL_EVERY}",
            "--data.workers=1",
        ]
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        started = []
        with self.log.open("w") as log:
            for index in range(self._processes):
                together = [
                    f"--hosts.coordinator=localhost:{port}",
                    f"--hosts.count={self._processes}",
                    f"--hosts.index={index}",
                ]
                started.append(
                    subprocess.Popen(
                        [sys.executable, "train.py", *arguments]
                        + (together if self._processes > 1 else []),
                        cwd=Path(__file__).parents[1],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled")}
                        | os.environ,
                    )
                )
        return started

    def finish(self, workdir: Path) -> None:
        """Trains to the end."""
        if any([process.wait() for process in self.start(workdir)]):
            sys.exit(f"a run to the end failed:\n{self.log.read_text()}")

    def reached(self, moment: str, workdir: Path, entries: int, began: float, delay: float) -> bool:
        """Whether a run that began with so many entries in its log is now at this moment."""
        if moment == "preparing":
            return (self.folder / "cache").exists()
        if moment == "loading":
            return time.time() - began > 20 * delay
        found = read_metrics(workdir)
        if moment == "saving":
            partial = workdir.glob("*/*.orbax-checkpoint-tmp")  # not those that a kill before left
            with contextlib.suppress(FileNotFoundError):
                return any(began < folder.stat().st_mtime < began + 3600 for folder in partial)
            return False
        if len(found) <= entries:
            return False
        last = found[-1]
        at_evaluation = last["step"] % (EVAL_EVERY * STEPS_PER_EPOCH) == 0
        return last["kind"] == "train" and at_evaluation == (moment == "evaluating")

    def state_of(self, checkpoints: Path) -> list[np.ndarray]:
        """Every array of the newest checkpoint."""
        experiment = load_experiment(self.folder / "tiny.py")
        network = Network(experiment.model, experiment.detector.predicts(6))
        like = abstract_state(network, experiment.train).items()
        state = TrainState.from_items(Checkpoints(checkpoints).restore(like))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    def outcome(self, workdir: Path) -> dict:
        """All that a run leaves and that does not depend on the machine's speed."""
        return {
            "checkpoint": [x.tobytes() for x in self.state_of(workdir / "checkpoints")],
            "best": [x.tobytes() for x in self.state_of(workdir / "best")],
            "metrics": [
                {k: v for k, v in e.items() if k not in ("images_per_second", "seconds_waiting")}
                for e in read_metrics(workdir)
            ],
            "results": json.loads((workdir / "results.json").read_text()),
        }

    def compare(self, workdir: Path, what: str) -> int:
        """Trains to the end and compares with the undisturbed run; returns the exit status."""
        self.finish(workdir)
        expected, found = self.outcome(self.folder / "whole"), self.outcome(workdir)
        differing = [part for part in expected if expected[part] != found[part]]
        end = f"different: {', '.join(differing)}" if differing else "the same end, bit by bit"
        print(f"{what}: {end}", flush=True)
        return int(bool(differing))


def kill(runs: Runs, kills: int, rng: random.Random) -> int:
    """Kills a run so many times; returns the exit status."""
    count: Counter[str] = Counter()
    workdir = runs.folder / "killed"
    wanted = list(itertools.islice(itertools.cycle(MOMENTS), kills))
    rng.shuffle(wanted)
    for number, moment in enumerate(tqdm(wanted, desc="killing", unit=" kills")):
        if moment == "preparing":
            shutil.rmtree(runs.folder / "cache")
        if number % 3 == 2:
            for file in workdir.rglob("*"):
                os.utime(file, (time.time() + 86400,) * 2)
        entries, began, delay = len(read_metrics(workdir)), time.time(), rng.random()
        started = runs.start(workdir)
        while all(process.poll() is None for process in started):
            if runs.reached(moment, workdir, entries, began, delay):
                time.sleep(0.1 * delay)
                break
            time.sleep(0.001)
        for process in rng.sample(started, len(started)):
            process.kill()
        if any([process.wait() != -9 for process in started]):
            print(f"ended by itself, {sum(count.values())} kills before:\n{runs.log.read_text()}")
            return 1
        count[moment] += 1
    where = ", ".join(f"{moment} {count[moment]}" for moment in MOMENTS)
    return runs.compare(workdir, f"killed {sum(count.values())} times ({where})")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own in a folder."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fault(runs: Runs, kind: str, number: int, rng: random.Random) -> int:
    """Lets one thing go wrong in a run, then ends it undisturbed; returns the exit status."""
    disk = runs.folder / f"disk{number}"
    mounted = small_disk(disk) if kind == "disk full" else contextlib.nullcontext()
    with mounted:
        disk.mkdir(exist_ok=True)
        workdir, moment = disk / "run", rng.choice(("stepping", "saving", "evaluating"))
        began, after, delay = time.time(), rng.randrange(12), rng.random()
        (process,) = runs.start(workdir)
        while process.poll() is None:
            if runs.reached(moment, workdir, after, began, delay):
                break
            time.sleep(0.001)
        time.sleep(0.1 * delay)
        if kind == "disk full":
            with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as filler:
                while True:
                    filler.write(bytes(1 << 12))
        elif kind == "removed":
            workdir.rename(disk / "away")
        elif kind == "read-only":
            subprocess.run(["mount", "--bind", str(workdir), str(workdir)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(workdir)], check=True)
        else:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for task in Path(f"/proc/{process.pid}/task").iterdir():
                children += (task / "children").read_text().split()
            workers = [
                int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()
            ]
            os.kill(rng.choice(workers), 9)
        try:
            status = process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            status = "hangs"
        printed = runs.log.read_text()
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        print(f"{kind} while {moment}: status {status}, {errors or printed[-3000:]}", flush=True)
        if status not in (0, 1) or "Traceback" in printed:
            print(printed, flush=True)
            return 1
        if kind == "disk full":
            (disk / "filler").unlink()
        elif kind == "read-only":
            subprocess.run(["umount", "-l", str(workdir)], check=True)
        elif kind == "removed":
            shutil.rmtree(workdir, ignore_errors=True)
            (disk / "away").rename(workdir)
        return runs.compare(workdir, f"  after {kind}")


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name), arguments.epochs, arguments.processes)
        runs.finish(runs.folder / "whole")
        if not arguments.faults:
            return kill(runs, arguments.kills, rng)
        kinds = [kind for kind in FAULTS for _ in range(arguments.faults)]
        return max([fault(runs, kind, number, rng) for number, kind in enumerate(kinds)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(parser.parse_args()))

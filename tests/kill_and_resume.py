"""Kills a training run again and again and compares its end with that of an undisturbed one.

    python tests/kill_and_resume.py --kills 20

Each time the same command is given again. The moments are drawn at random: while it loads, steps,
saves or evaluates. Prints how often it was killed at what, and whether the end is the same bit by
bit: every array of the last and the best checkpoint, the metrics, and the COCO results.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
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

EPOCHS, STEPS_PER_EPOCH, EVAL_EVERY = 24, 3, 2
MOMENTS = ("loading", "stepping", "saving", "evaluating")


def start(folder: Path, workdir: Path) -> subprocess.Popen:
    """Gives the command."""
    command = [sys.executable, "train.py", str(folder / "tiny.py"), f"--workdir={workdir}"]
    fields = [
        f"--data.cache-dir={folder / 'cache'}",
        f"--train.epochs={EPOCHS}",
        f"--train.eval-every={EVAL_EVERY}",
        "--data.workers=1",
    ]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
    }
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            command + fields,
            cwd=Path(__file__).parents[1],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )


def reached(moment: str, workdir: Path, entries: int, began: float, delay: float) -> bool:
    """Whether a run that began with so many entries in its log is now at this moment."""
    if moment == "loading":
        return time.time() - began > 20 * delay
    found = read_metrics(workdir)
    if moment == "saving":
        partial = workdir.glob("*/*.orbax-checkpoint-tmp")  # not those that the kill before left
        with contextlib.suppress(FileNotFoundError):
            return any(folder.stat().st_mtime > began for folder in partial)
        return False
    if len(found) <= entries:
        return False
    last = found[-1]
    at_evaluation = last["step"] % (EVAL_EVERY * STEPS_PER_EPOCH) == 0
    return last["kind"] == "train" and at_evaluation == (moment == "evaluating")


def state_of(folder: Path, checkpoints: Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint."""
    experiment = load_experiment(folder / "tiny.py")
    network = Network(experiment.model, experiment.detector.predicts(6))
    stored = Checkpoints(checkpoints)
    state = TrainState.from_items(stored.restore(abstract_state(network, experiment.train).items()))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def outcome(folder: Path, workdir: Path) -> dict:
    """All that a run leaves and that does not depend on the machine's speed."""
    return {
        "checkpoint": [x.tobytes() for x in state_of(folder, workdir / "checkpoints")],
        "best": [x.tobytes() for x in state_of(folder, workdir / "best")],
        "metrics": [
            {k: v for k, v in entry.items() if k not in ("images_per_second", "seconds_waiting")}
            for entry in read_metrics(workdir)
        ],
        "results": json.loads((workdir / "results.json").read_text()),
    }


def main(kills: int, seed: int) -> int:
    """Returns the exit status."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.py").write_text(CONFIG)
        if start(folder, folder / "whole").wait() != 0:
            print((folder / "log.txt").read_text())
            return 1
        count: Counter[str] = Counter()
        workdir = folder / "killed"
        wanted = list(itertools.islice(itertools.cycle(MOMENTS), kills))
        rng.shuffle(wanted)
        for moment in tqdm(wanted, desc="killing", unit=" kills"):
            entries, began, delay = len(read_metrics(workdir)), time.time(), rng.random()
            process = start(folder, workdir)
            while process.poll() is None:
                if reached(moment, workdir, entries, began, delay):
                    time.sleep(0.1 * delay)
                    break
                time.sleep(0.001)
            process.kill()
            if process.wait() == 0:
                print(f"the run ended after {sum(count.values())} kills: raise EPOCHS")
                return 1
            count[moment] += 1
        if start(folder, workdir).wait() != 0:
            print((folder / "log.txt").read_text())
            return 1
        expected, found = outcome(folder, folder / "whole"), outcome(folder, workdir)
        differing = [part for part in expected if expected[part] != found[part]]
        where = ", ".join(f"{moment} {count[moment]}" for moment in MOMENTS)
        print(f"killed {sum(count.values())} times ({where})")
        print(
            f"different: {', '.join(differing)}" if differing else "the end is the same, bit by bit"
        )
        return int(bool(differing))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.seed))

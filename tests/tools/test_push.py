"""A run becomes files that others load, with a card that says what is known and nothing else."""

import dataclasses
import json

import fake_hub
import numpy as np
import pytest

import gfl_jax
from gfl_jax.coco_eval import evaluate, ground_truth
from gfl_jax.config import Data, Experiment, Train
from gfl_jax.data.sources import Shapes
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.errors import InputError, SetupError, UsageError
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.run import describe
from gfl_jax.tools import push
from gfl_jax.tools.card import changed, without_paths
from gfl_jax.tools.report.detections import pixels
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.start import key_of

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("hotcoco")
constants = pytest.importorskip("huggingface_hub.constants")

EXPERIMENT = Experiment(
    model=Model(
        Backbone(depth=18, width=8, norm="bn", frozen_stages=-1),
        Neck(32),
        Head(width=32, stacked_convs=1),
    ),
    detector=Detector(inference=Inference(score_threshold=0.0, nms_pre=60, max_per_image=20)),
    train=Train(batch_size=8, milestones=(3, 5), seed=11, clip_norm=35.0),
)
MADE_WITH = {
    "git": "0123abc",
    "packages": {"jax": "0.10.9"},
    "device": "TPU v5e",
    "devices": 4,
    "images": {"train": 2, "val": 12},
    "objects": {"train": 5, "val": 31},
    "date": "2026-01-02",
}


def rough_results(split, seed=0):
    """The objects with moved boxes and random scores, as COCO results."""
    rng, results = np.random.default_rng(seed), []
    for entry in ground_truth(split).dataset["annotations"]:
        x, y, w, h = entry["bbox"]
        moved = [x + rng.normal(0, 2), y + rng.normal(0, 2), w, h]
        result = {name: entry[name] for name in ("image_id", "category_id")}
        results.append({**result, "bbox": moved, "score": float(rng.uniform(0.1, 1))})
    return results


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A work directory of random weights, and its validation images and results."""
    tmp = tmp_path_factory.mktemp("push")
    source = Shapes(2, 12, (64, 64), root=str(tmp / "secret"), cache_dir=str(tmp / "cache"))
    data = Data(source=source, scale=(64, 64), workers=0)
    experiment = dataclasses.replace(EXPERIMENT, data=data)
    split = source.open("val")
    results = rough_results(split)
    ap = evaluate(results, ground_truth(split), split.image_ids.tolist()).metrics["AP"]
    network = Network(experiment.model, experiment.detector.predicts(len(split.category_ids)))
    about = describe(experiment, split.category_ids, split.category_names)
    about |= {"AP": ap, "data": {"train": "t", "val": key_of(split)}, "gfl_jax": "0.0.9"}
    about |= {"steps_per_epoch": 100, "made_with": MADE_WITH}
    with Checkpoints(tmp / "run" / "best", writes=True) as best:
        best.save(600, {"weights": network.init(0)}, about)
    (tmp / "run" / "results.json").write_text(json.dumps(results))
    return tmp / "run", split, ap


@pytest.fixture
def no_predictions(monkeypatch):
    """Predicting would compile for long: these tests must not need it."""

    def never(*_):
        raise AssertionError("predicted on the images")

    monkeypatch.setattr(push, "predicted", never)


def pushed(run, target, *flags):
    push.main([str(run), str(target), "--license", "mit", "--resamples", "100", *flags])


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    target = tmp_path_factory.mktemp("pushed") / "my-shapes"
    pushed(made[0], target, "--dataset", "Shapes of push")
    return target


def test_what_is_pushed_is_the_same_detector(made, folder):
    before, after = gfl_jax.load(made[0]), gfl_jax.load(folder)
    assert after.step == before.step == 600
    assert after.category_names == before.category_names
    for mine, theirs in zip(before.variables, after.variables, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            np.testing.assert_array_equal(mine[name], theirs[name])


def test_the_hub_reads_the_metadata_of_the_card(made, folder):
    card = hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "object-detection"
    assert card.data.library_name == "gfl-jax"
    values = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    assert values["AP"] == pytest.approx(made[2], abs=5e-5)
    assert {entry.dataset_name for entry in card.data.eval_results} == {"Shapes of push"}


def test_the_card_says_what_the_run_knows(folder):
    text = (folder / "README.md").read_text()
    for fact in (
        'gfl_jax.load("',
        "| training | 2 images, 5 objects (key `t`) |",
        "validation | 12 images, 31 objects",
        "600 (epoch 6 of 12), batches of 8 images",
        "SGD, momentum 0.9, weight decay 0.0001, gradients clipped at norm 35",
        "a tenth after epochs 3, 5",
        "| seed | 11 |",
        "gfl_jax 0.0.9, jax 0.10.9",
        "0123abc",
        "4 x TPU v5e",
        "random weights",
        "ellipse",
        "@inproceedings{li2020generalized",
        "detections of the evaluation in training",
    ):
        assert fact in text


def test_the_interval_of_ap_holds_it(made, folder):
    (row,) = (r for r in (folder / "README.md").read_text().splitlines() if r.startswith("| AP |"))
    _, _, value, interval, _ = row.split("|")
    low, high = map(float, interval.split(" to "))
    assert float(value) == pytest.approx(made[2], abs=5e-4)
    assert low < float(value) < high
    assert high - low > 0.02


def test_no_path_of_this_machine_is_pushed(made, folder):
    private = str(made[0].parent)
    assert private in json.dumps(gfl_jax.load(made[0]).about)
    for file in folder.iterdir():
        assert private.encode() not in file.read_bytes()


def test_results_of_other_weights_are_not_taken_for_these(made, tmp_path, monkeypatch):
    run, split, _ = made
    other = rough_results(split, seed=1)
    monkeypatch.setattr(push, "predicted", lambda *_: [])
    text = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(other))
    try:
        with pytest.raises(ValueError, match="argument 2"):  # the images are predicted on
            pushed(run, tmp_path / "x")
    finally:
        (run / "results.json").write_text(json.dumps(text))


def test_results_in_a_file_are_used_and_named(made, tmp_path, no_predictions):
    run, split, ap = made
    (tmp_path / "r.json").write_text(json.dumps(rough_results(split, seed=1)))
    pushed(run, tmp_path / "x", "--results", str(tmp_path / "r.json"))
    text = (tmp_path / "x" / "README.md").read_text()
    assert "detections given in a file" in text
    assert f"| AP | {ap:.3f} |" not in text
    (tmp_path / "bad.json").write_text('[{"image_id": 1}]')
    with pytest.raises(InputError, match=r"bad\.json.*not COCO results"):
        pushed(run, tmp_path / "y", "--results", str(tmp_path / "bad.json"))


def test_without_the_images_the_card_says_that_there_is_no_interval(
    made, folder, tmp_path, monkeypatch, capsys, no_predictions
):
    def gone(run):
        raise InputError("the images are gone")

    monkeypatch.setattr(push, "open_images", gone)
    pushed(folder, tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    assert f"| AP | {made[2]:.3f} |  |" in text
    assert "without an interval" in text
    assert "the images are gone" in capsys.readouterr().out
    with pytest.raises(InputError, match="gone"):  # where they were named, that is a mistake
        pushed(folder, tmp_path / "y", "--data.root", str(tmp_path))


def test_weights_of_which_nothing_is_known_get_a_card_without_numbers(
    folder, tmp_path, monkeypatch, no_predictions
):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    about = json.loads((folder / "config.json").read_text())
    keep = ("format", "experiment", "category_ids", "category_names")
    (bare / "config.json").write_text(json.dumps({key: about[key] for key in keep}))
    monkeypatch.setattr(push, "open_images", lambda run: (_ for _ in ()).throw(InputError("gone")))
    pushed(bare, tmp_path / "x")
    text = (tmp_path / "x" / "README.md").read_text()
    assert "Not measured" in text
    assert "model-index" not in text
    assert "how they were trained is not recorded" in text
    assert "SGD" not in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--license is missing.*apache-2.0, mit"),
        (["--license", "Apache License"], "not spelled as the hub does"),
        (["--license", "other"], "--license-name and --license-link"),
        (["--license", "mit", "--license-name", "x", "--license-link", "y"], "--license other"),
        (["--license", "mit", "--license-name", "x"], "--license other"),
        (["--license", "mit", "--resamples", "3"], "--resamples is 3"),
    ],
)
def test_the_licence_must_be_given(made, tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        push.main([str(made[0]), str(tmp_path / "x"), *flags])
    assert not (tmp_path / "x").exists()


def test_a_licence_of_ones_own_has_a_name_and_a_link(made, tmp_path, no_predictions):
    flags = ["--license-name", "my terms", "--license-link", "https://example.org/terms"]
    push.main([str(made[0]), str(tmp_path / "x"), "--license", "other", *flags])
    data = hub.ModelCard.load(tmp_path / "x" / "README.md").data
    assert (data.license, data.license_name) == ("other", "my terms")


def test_a_folder_that_holds_a_detector_is_replaced_only_on_request(made, folder, no_predictions):
    with pytest.raises(InputError, match="--update"):
        pushed(made[0], folder)
    pushed(made[0], folder, "--update", "--dataset", "Shapes of push")


def test_a_readme_that_is_there_is_not_overwritten(made, tmp_path, no_predictions):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"already holds README\.md: .*--update"):
        pushed(made[0], tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_of_a_folder_names_no_path_of_this_machine(folder):
    text = (folder / "README.md").read_text()
    assert f'gfl_jax.load("./{folder.name}")' in text
    assert str(folder.parent) not in text and "extra `hub`" not in text


@pytest.mark.parametrize("target", ["name", "a/b/c"])
def test_a_target_is_a_model_or_clearly_a_folder(made, target):
    with pytest.raises(UsageError, match="neither OWNER/NAME"):
        pushed(made[0], target)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub on this machine, where huggingface_hub believes the real one to be."""
    with fake_hub.running() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield running


def test_a_model_is_pushed_to_the_hub_and_loaded_from_there(made, server, capsys):
    pushed(made[0], "me/my-shapes")
    assert server.private == {"me/my-shapes": True}
    assert set(server.models["me/my-shapes"]) == {"README.md", "config.json", "model.safetensors"}
    assert server.messages == [f"Step 600, AP {made[2]:.3f}"]
    said = capsys.readouterr().out
    assert f"{server.url}/me/my-shapes (private)" in said
    assert 'gfl_jax.load("hf://me/my-shapes")' in said
    assert b'load("hf://me/my-shapes")' in server.models["me/my-shapes"]["README.md"]
    before, after = gfl_jax.load(made[0]), gfl_jax.load("hf://me/my-shapes")
    for name, array in before.variables.params.items():
        np.testing.assert_array_equal(array, after.variables.params[name])


@pytest.mark.slow
def test_what_is_loaded_from_the_hub_detects_the_same(made, server):
    pushed(made[0], "me/my-shapes")
    before, after = gfl_jax.load(made[0]), gfl_jax.load("hf://me/my-shapes")
    for index in range(3):
        image = pixels(made[1], index)
        mine, theirs = before(image), after(image)
        assert len(mine) == len(theirs) > 0
        np.testing.assert_array_equal(mine.boxes, theirs.boxes)
        np.testing.assert_array_equal(mine.scores, theirs.scores)
        np.testing.assert_array_equal(mine.labels, theirs.labels)


@pytest.mark.slow
def test_without_results_the_images_are_predicted_on(folder, tmp_path):
    pushed(folder, tmp_path / "x", "--data.root", str(tmp_path / "s"))
    text = (tmp_path / "x" / "README.md").read_text()
    assert "detections computed for this card" in text


def test_a_public_model_is_asked_for(made, server):
    pushed(made[0], "me/open", "--public")
    assert server.private == {"me/open": False}


def test_a_model_that_exists_gets_a_commit_only_on_request(made, server):
    pushed(made[0], "me/my-shapes")
    with pytest.raises(InputError, match="me/my-shapes exists on the hub already: --update"):
        pushed(made[0], "me/my-shapes")
    pushed(made[0], "me/my-shapes", "--update")
    assert len(server.messages) == 2


def test_what_the_hub_refuses_is_one_sentence(made, server, monkeypatch):
    with pytest.raises(SetupError, match=r"you/x could not be pushed.*rights to create"):
        pushed(made[0], "you/x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SetupError, match="Invalid username or password"):
        pushed(made[0], "me/x")
    with pytest.raises(UsageError, match=r"me/x\.\.y is no name for the hub"):
        pushed(made[0], "me/x..y")


def test_without_a_connection_or_a_token_nothing_is_lost(made, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    with pytest.raises(SetupError, match=r"me/x could not be pushed to http://127\.0\.0\.1:9"):
        pushed(made[0], "me/x")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(SetupError, match="hf auth login"):
        pushed(made[0], "me/x")


def test_paths_are_cut_to_their_last_part():
    said = {"a": "/home/me/data", "b": ["gs://bucket/x/y", "relative/kept", "~/.cache"], "c": 3}
    assert without_paths(said) == {"a": "data", "b": ["y", "relative/kept", "~/.cache"], "c": 3}


def test_a_value_is_written_as_what_was_changed():
    assert changed(Detector()) == "Detector()"
    model = Model(Backbone(depth=18), pretrained_free := Neck(64))
    assert changed(model) == "Model(backbone=Backbone(depth=18), neck=Neck(width=64))"
    assert eval(changed(model)) == model
    assert changed(pretrained_free) == "Neck(width=64)"

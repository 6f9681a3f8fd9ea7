"""A trained detector called with images: any kind, any size, from any thread."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

import gfl_jax
from gfl_jax.config import Data, Experiment
from gfl_jax.data.pipeline import batches
from gfl_jax.data.plan import eval_plan
from gfl_jax.data.sources import Shapes
from gfl_jax.detectors.box import Gaussian
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.distributed import SHARDED, parallel
from gfl_jax.errors import InputError
from gfl_jax.interop.detector_file import state_dict
from gfl_jax.interop.exported import write_exported
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.predict import pixels_of
from gfl_jax.run import Run, describe
from gfl_jax.training.evaluator import make_predict, predict_all

SHAPES = Shapes(num_train=2, num_val=5, image_size=(48, 80))
EXPERIMENT = Experiment(
    model=Model(
        Backbone(depth=18, width=8, norm="bn", frozen_stages=-1),
        Neck(32),
        Head(width=32, stacked_convs=1),
    ),
    detector=Detector(inference=Inference(score_threshold=0.0, nms_pre=60, max_per_image=20)),
    data=Data(source=SHAPES, scale=(96, 64), workers=0),
)
NAMES = ["cat", "Hündin", "gnu"]


def made(experiment=EXPERIMENT, seed=0):
    """A detector with random weights and lively outputs."""
    network = Network(experiment.model, experiment.detector.predicts(3))
    rng = np.random.default_rng(seed)

    def lively(name, array):
        noise = 0.3 * rng.normal(size=array.shape)
        return np.asarray(array + noise if name.startswith("bbox_head") else array, np.float32)

    variables = network.init(seed)
    params = {name: lively(name, array) for name, array in variables.params.items()}
    return Run("", 7, experiment, [4, 2, 9], NAMES, network, variables._replace(params=params))


@pytest.fixture(scope="module")
def run():
    return made()


def photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def assert_same(a, b, tolerance=1e-3):
    assert len(a) == len(b) > 0
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=tolerance)
    np.testing.assert_array_equal(a.labels, b.labels)


def test_detections_are_those_of_an_evaluation(tmp_path, run):
    source = dataclasses.replace(SHAPES, root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    data = dataclasses.replace(EXPERIMENT.data, source=source)
    split = source.open("val")
    # Six classes there, three here: only what is predicted is compared.
    split = dataclasses.replace(split, category_ids=run.category_ids)
    devices = parallel("pmap", jax.devices()[:1])
    plan = eval_plan(data, split, 2)
    expected = predict_all(
        devices.map(make_predict(run.network, EXPERIMENT.detector), outputs=SHARDED),
        devices.replicate(run.variables),
        batches(plan, split, range(plan.steps_per_epoch), data),
        devices,
        split,
        total=plan.steps_per_epoch,
    )
    files = [tmp_path / "pictures" / f"{i}.bin" for i in range(len(split.image_ids))]
    files[0].parent.mkdir()
    for i, file in enumerate(files):
        file.write_bytes(split.source[i]["image"])
    found = [
        entry
        for image_id, result in zip(split.image_ids.tolist(), run(files), strict=True)
        for entry in result.to_coco(image_id)
    ]
    assert len(found) == len(expected) > 20
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["image_id"], ours["category_id"]) == (
            theirs["image_id"],
            theirs["category_id"],
        )
        np.testing.assert_allclose(ours["score"], theirs["score"], atol=1e-5)
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], atol=1e-3)


def test_a_file_an_array_and_an_image_of_pillow_are_one(tmp_path, run):
    pixels = photo(50, 90)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    from_array = run(pixels)
    assert_same(from_array, run(tmp_path / "x.png"))
    assert_same(from_array, run(str(tmp_path / "x.png")))
    assert_same(from_array, run(Image.fromarray(pixels)))
    assert_same(from_array, run(Image.open(tmp_path / "x.png")))
    assert run(str(tmp_path / "x.png")).source == str(tmp_path / "x.png")


def test_images_of_many_sizes_share_a_few_programs(run):
    run = made()
    sizes = [(50, 90), (90, 50), (64, 64), (200, 300), (13, 40), (300, 31), (700, 900), (96, 64)]
    pictures = [photo(*size, seed=i) for i, size in enumerate(sizes)]
    together = run(pictures)
    assert len(run.predictor.programs) <= 2
    for picture, result in zip(pictures, together, strict=True):
        assert_same(result, run(picture))
        height, width = picture.shape[:2]
        beyond = np.array([width, height, width, height]) * (1 + 1e-5)
        assert (result.boxes >= 0).all() and (result.boxes <= beyond).all()


def test_batches_change_nothing_and_keep_the_order(run):
    batched = made()
    batched.predictor.batch_size = 3
    pictures = [photo(40 + 7 * i, 90 - 9 * i, seed=i) for i in range(8)]  # both orientations
    for one, of_many in zip(run(pictures), batched(pictures), strict=True):
        assert_same(one, of_many)
    assert {images for images, *_ in batched.predictor.programs} <= {1, 3}
    assert_same(batched(np.stack([pictures[0]] * 2))[1], run(pictures[0]))
    assert batched([]) == []


def test_an_image_that_is_stored_sideways_is_upright(tmp_path, run):
    pixels = photo(48, 96)
    turned = Image.fromarray(pixels).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it right to see it
    turned.save(tmp_path / "x.png", exif=exif)
    expected = run(pixels)
    assert_same(expected, run(Image.open(tmp_path / "x.png")))
    turned.save(tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0)
    assert run(tmp_path / "x.jpg").image.shape == (48, 96, 3)


@pytest.mark.parametrize("box", [Detector().box, Gaussian()], ids=["general", "gaussian"])
def test_distributions_belong_to_the_detections(box):
    detector = dataclasses.replace(EXPERIMENT.detector, box=box)
    run = made(dataclasses.replace(EXPERIMENT, detector=detector))
    picture = photo(50, 90)
    result = run(picture, distributions=True)
    assert_same(result, run(picture))
    mean = (result.sides.positions * result.sides.probabilities).sum(-1)
    inside = np.clip(mean, 0, [90, 50, 90, 50])
    np.testing.assert_allclose(inside, result.boxes, atol=1e-2)
    low, high = result.interval(0.9)
    assert (low < mean).all() and (mean < high).all()
    assert result.spread().shape == (len(result), 4)
    above = result.above(float(result.scores[2]))
    assert len(above.sides.positions) == len(above) == 3


def test_distributions_that_were_not_asked_for_are_missed(run):
    with pytest.raises(ValueError, match="distributions=True"):
        run(photo(50, 90)).spread()


def test_several_threads_may_call(run):
    pictures = [photo(40 + i, 90, seed=i) for i in range(4)]
    expected = made()(pictures)
    fresh, found = made(), {}

    def call(i):
        found[i] = fresh(pictures[i % 4])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(12):
        assert_same(found[i], expected[i % 4])


@pytest.mark.parametrize(
    "picture, message",
    [
        (np.zeros((40, 50), np.uint8), r"uint8 \[40, 50\]; it must be uint8 \[height, width, 3\]"),
        (np.zeros((40, 50, 3)), r"float64 \[40, 50, 3\]"),
        (np.zeros((40, 50, 4), np.uint8), r"\[40, 50, 4\]"),
        (np.zeros((0, 50, 3), np.uint8), r"\[0, 50, 3\]"),
        (Image.new("F", (9, 9)), "mode F"),
        (None, "an image is object"),
        (b"bytes", "an image is"),
        ("missing.jpg", "missing.jpg: there is no such file"),
        ("s3://bucket/x.jpg", "gs://BUCKET"),
        (".", "[Dd]irectory"),
        (__file__, "truncated or not an image"),
    ],
)
def test_what_is_no_image_is_named(run, picture, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(picture)
    if picture is None:
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run([photo(50, 90), picture])


def test_a_stream_goes_on_behind_what_cannot_be_read(run):
    stream = run.predictor.stream([photo(50, 90), "missing.jpg", photo(50, 90)])
    first, second, third = stream
    assert_same(first, third)
    assert second.source == "missing.jpg" and "no such file" in str(second.error)


def test_dark_images_of_16_bits_are_not_taken_for_black(tmp_path, run):
    pixels = photo(50, 90)
    Image.fromarray(pixels).save(tmp_path / "8.png")
    cv2.imwrite(str(tmp_path / "12.png"), pixels[..., ::-1].astype(np.uint16) * 16 + 15)
    with pytest.raises(ValueError, match=r"12\.png.*4095"):
        run(tmp_path / "12.png")
    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 16 + 15)
    assert grey.mode.startswith("I")
    with pytest.raises(ValueError, match=r"hardly any value above \d+"):
        run(grey)
    of_pillow = run(grey, white=4095).image
    assert np.abs(of_pillow.astype(int) - pixels[..., :1]).max() <= 1
    found = run(tmp_path / "12.png", white=4095).image
    assert np.abs(found.astype(int) - pixels).max() <= 1


def test_results_are_printed_drawn_and_handed_on(run):
    result = run(photo(50, 90)).above(0.0)
    text = repr(result)
    assert text.startswith(f"{len(result)} detections in an image of 90 x 50\n")
    assert f"  {result.names[0]} {result.scores[0]:.3f} at " in text
    assert set(result.names) <= set(NAMES)
    ids = dict(zip(NAMES, [4, 2, 9], strict=True))
    assert [ids[name] for name in result.names] == result.category_ids
    plotted = np.asarray(result.plot(0.0))
    assert plotted.shape == (350, 630, 3)
    nothing = np.asarray(result.plot(1.0))
    assert (plotted != nothing).any()
    pytest.importorskip("supervision")
    others = result.to_supervision()
    np.testing.assert_array_equal(others.xyxy, result.boxes)
    assert list(others["class_name"]) == result.names


def test_opening_a_detector_imports_no_pipeline():
    code = (
        "import sys, gfl_jax.run\n"
        "heavy = {'tensorflow_datasets', 'grain', 'array_record', 'pycocotools', 'matplotlib', "
        "'torch', 'av', 'supervision', 'tensorflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert printed == "[]\n"


# ---------------------------------------------------------------------------- where it comes from


def exported(folder, run):
    about = describe(run.experiment, run.category_ids, run.category_names) | {"step": run.step}
    write_exported(folder, about, run.network, run.variables, run.experiment.detector)
    return folder


def assert_same_run(found, run):
    assert found.experiment == run.experiment
    assert (found.category_ids, found.category_names) == (run.category_ids, run.category_names)
    for ours, theirs in zip(found.variables, run.variables, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_an_exported_folder_is_the_same_detector(tmp_path, run):
    found = gfl_jax.load(exported(tmp_path / "x", run))
    assert_same_run(found, run)
    with pytest.raises(ValueError, match="names its classes itself"):
        gfl_jax.load(tmp_path / "x", classes=NAMES)
    assert found.step == 7


def test_a_model_of_the_hub_is_downloaded(tmp_path, run, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    exported(tmp_path / "x", run)
    asked = []

    def download(repo, revision=None, allow_patterns=None):
        asked.append((repo, revision))
        if repo != "me/cats":
            raise hub.errors.RepositoryNotFoundError(
                "404", response=pytest.importorskip("httpx").Response(404, request=None)
            )
        return str(tmp_path / "x")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert_same_run(gfl_jax.load("hf://me/cats"), run)
    gfl_jax.load("hf://me/cats@v2")
    assert asked == [("me/cats", None), ("me/cats", "v2")]


def test_a_file_of_mmdetections_names_is_a_detector(tmp_path, run):
    from safetensors.numpy import save_file

    arrays = state_dict(run.network, run.variables, run.experiment.detector)
    save_file(arrays, tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="does not"):
        found = gfl_jax.load(tmp_path / "x.safetensors", classes=NAMES)
    assert found.category_names == NAMES
    with pytest.warns(UserWarning, match="does not name its 3 classes"):
        assert gfl_jax.load(tmp_path / "x.safetensors").category_names[2] == "class 2"
    assert "cat, Hündin, gnu" in repr(found) and len(repr(found)) < 300
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="3 classes, but 1 are named"):
        gfl_jax.load(tmp_path / "x.safetensors", classes=["cat"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        gfl_jax.load(tmp_path / "y.pth")


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"config.json": b"{"}, r"config\.json is not JSON"),
        ({"config.json": b'{"model_type": "bert"}'}, "describes no detector of this project"),
        ({"model.safetensors": b"\x08\0\0"}, r"model\.safetensors is damaged"),
        ({"model.safetensors": None}, r"model\.safetensors: there is no such file"),
    ],
)
def test_a_damaged_folder_says_which_file(tmp_path, run, damage, message):
    folder = exported(tmp_path / "x", run)
    for name, content in damage.items():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gfl_jax.load(folder)


def test_an_exported_onnx_folder_is_not_taken_for_checkpoints(tmp_path):
    (tmp_path / "64x96_detections.onnx").write_bytes(b"")
    for source in (tmp_path, tmp_path / "64x96_detections.onnx"):
        with pytest.raises(InputError, match="holds compiled programs"):
            gfl_jax.load(source)


@pytest.mark.parametrize("white", [-1, 65536])
def test_a_white_beyond_16_bits_is_refused(white):
    with pytest.raises(InputError, match=f"white is {white}"):
        pixels_of(np.zeros((8, 8, 3), np.uint8), white)

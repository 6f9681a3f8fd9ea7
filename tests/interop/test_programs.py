"""Detectors as programs for others: StableHLO and ONNX, opened again and compared with JAX."""

import dataclasses
import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import gfl_jax
from gfl_jax import systems
from gfl_jax.data.images import resize, resize_keep_ratio
from gfl_jax.errors import InputError, UsageError
from gfl_jax.interop import stablehlo
from gfl_jax.interop.exported import write_exported
from gfl_jax.models.network import Backbone, Network
from gfl_jax.priors import flatten
from gfl_jax.run import Run, describe
from gfl_jax.tools.export import main

SYSTEMS = ("gfl", "atss", "fcos_improved", "retinanet", "foveabox", "ssd512")
EACH = [
    pytest.param(name, marks=[] if name == "gfl" else pytest.mark.slow, id=name) for name in SYSTEMS
]


def tiny(name):
    """One of the paper's detectors with random, lively weights, on canvases of 64 x 96."""
    system = getattr(systems, name)
    data = dataclasses.replace(system.data, scale=(96, 64), workers=0)
    model, changes = system.model, {}
    if name == "ssd512":
        model, changes = system.model.small(64)
        model = dataclasses.replace(model, width=8)
        data = dataclasses.replace(data, scale=(64, 64))
    else:
        model = dataclasses.replace(
            model,
            backbone=Backbone(depth=18, width=8, norm="bn", frozen_stages=-1),
            neck=dataclasses.replace(model.neck, width=32),
            head=dataclasses.replace(model.head, width=32, stacked_convs=1),
        )
    inference = dataclasses.replace(
        system.detector.inference, score_threshold=0.0, nms_pre=60, max_per_image=20
    )
    detector = dataclasses.replace(system.detector, inference=inference, **changes)
    experiment = dataclasses.replace(system, model=model, detector=detector, data=data)
    network = Network(model, detector.predicts(3))
    rng, lively = np.random.default_rng(0), 0.02 if name == "ssd512" else 0.2  # scores below 1
    variables = network.init(0)
    params = {
        path: np.asarray(
            x + lively * rng.normal(size=x.shape) if path.startswith("bbox_head") else x, np.float32
        )
        for path, x in variables.params.items()
    }
    variables = variables._replace(params=params)
    return Run("", 7, experiment, [4, 2, 9], ["cat", "Hündin", "gnu"], network, variables)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a tiny detector that `gfl-jax export` and `load` open, by name."""
    made = {}

    def of(name):
        if name not in made:
            run, folder = tiny(name), tmp_path_factory.mktemp(name) / "run"
            about = describe(run.experiment, run.category_ids, run.category_names)
            write_exported(folder, about, run.network, run.variables, run.experiment.detector)
            made[name] = run, folder
        return made[name]

    return of


def photos(run, count=2):
    """Canvases as a program takes them, and the photos that they are made from."""
    long_side, short_side = run.experiment.data.scale
    rng = np.random.default_rng(1)
    originals, images, sizes, scales = [], [], [], []
    for i in range(count):
        original = rng.integers(0, 256, (60 + 30 * i, 120 + 15 * i, 3), np.uint8)
        if run.experiment.data.keep_ratio:
            resized, scale = resize_keep_ratio(original, long_side, short_side)
        else:
            resized, scale = resize(original, (short_side, long_side))
        canvas = np.zeros((short_side, long_side, 3), np.uint8)
        canvas[: resized.shape[0], : resized.shape[1]] = resized
        originals.append(original)
        images.append(canvas)
        sizes.append(resized.shape[:2])
        scales.append(scale)
    inputs = np.stack(images), np.array(sizes, np.int32), np.array(scales, np.float32)
    return originals, dict(zip(("images", "sizes", "scales"), inputs, strict=True))


def assert_detections(found, run, originals):
    """The same as the detector itself finds."""
    for i, expected in enumerate(run(originals)):
        n = int(found["mask"][i].sum())
        assert n == len(expected) > 5
        np.testing.assert_array_equal(found["labels"][i, :n], expected.labels)
        np.testing.assert_allclose(found["scores"][i, :n], expected.scores, atol=1e-5)
        np.testing.assert_allclose(found["boxes"][i, :n], expected.boxes, atol=0.02)
        assert not found["scores"][i, n:].any() and not found["boxes"][i, n:].any()


def session(file):
    ort = pytest.importorskip("onnxruntime")
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def answers(opened, inputs):
    names = [x.name for x in opened.get_outputs()]
    wanted = {x.name: inputs[x.name] for x in opened.get_inputs()}
    return dict(zip(names, opened.run(None, wanted), strict=True))


@pytest.mark.parametrize("name", EACH)
def test_stablehlo_finds_what_the_detector_finds(tmp_path, runs, name):
    run, folder = runs(name)
    main(str(folder), str(tmp_path / "x"), "stablehlo")
    exported = stablehlo.Exported(tmp_path / "x")
    originals, inputs = photos(run)
    assert_detections(exported(**inputs)._asdict(), run, originals)
    assert exported.about["classes"] == run.category_names
    assert exported.about["platforms"] == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("name", EACH)
def test_onnx_finds_what_the_detector_finds(tmp_path, runs, name):
    pytest.importorskip("onnx")
    run, folder = runs(name)
    main(str(folder), str(tmp_path), "onnx", canvas=run.experiment.data.scale[::-1])
    (file,) = tmp_path.glob("*_detections.onnx")
    opened = session(file)
    originals, inputs = photos(run)
    found = answers(opened, inputs)
    assert_detections(found, run, originals)
    said = opened.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == run.category_names
    assert said["jax"] == jax.__version__ and said["made"] == str(datetime.date.today())
    # Any number of images, each by itself.
    one = answers(opened, {key: array[1:] for key, array in inputs.items()})
    for key in found:
        np.testing.assert_allclose(one[key][0], found[key][1], atol=0.01)


@pytest.mark.parametrize("name", EACH)
def test_onnx_gives_the_logits_of_the_head(tmp_path, runs, name):
    pytest.importorskip("onnx")
    run, folder = runs(name)
    canvas = run.experiment.data.scale[::-1]
    main(str(folder), str(tmp_path), "onnx", canvas=canvas, onnx_output="raw")
    _, inputs = photos(run)
    found = answers(session(next(tmp_path.glob("*_raw.onnx"))), inputs)
    expected, _ = run.network.apply(run.variables, inputs["images"], inputs["sizes"], train=False)
    per_cell = run.experiment.detector.priors.per_cell
    assert found.keys() == {key for key, levels in expected._asdict().items() if levels}
    for key, array in found.items():
        levels = flatten(getattr(expected, key), per_cell)
        np.testing.assert_allclose(array, levels, atol=1e-4 * np.abs(levels).max())


@pytest.mark.parametrize("name", EACH)
def test_onnx_boxes_hold_the_candidates_of_nms(tmp_path, runs, name):
    pytest.importorskip("onnx")
    run, folder = runs(name)
    canvas = run.experiment.data.scale[::-1]
    main(str(folder), str(tmp_path), "onnx", canvas=canvas, onnx_output="boxes")
    _, inputs = photos(run)
    found = answers(session(next(tmp_path.glob("*_boxes.onnx"))), inputs)
    outputs, _ = run.network.apply(run.variables, inputs["images"], inputs["sizes"], train=False)
    chosen = run.experiment.detector.candidates(outputs, inputs["sizes"])
    for i in range(len(inputs["images"])):
        priors, labels = np.asarray(chosen.priors[i]), np.asarray(chosen.labels[i])
        boxes = np.asarray(chosen.boxes[i]) / np.tile(inputs["scales"][i], 2)
        np.testing.assert_allclose(found["boxes"][i][priors], boxes, atol=0.02)
        scores = found["scores"][i][priors, labels]
        np.testing.assert_allclose(scores, chosen.scores[i], atol=1e-4)  # SSD's logits are large
        # All others are worse than those that were chosen, level by level; here of one prior each.
        assert (found["scores"][i] > 0).sum() >= (np.asarray(chosen.scores[i]) > 0).sum() > 5


def test_a_network_of_bfloat16_is_float32_in_onnx(tmp_path, runs):
    onnx = pytest.importorskip("onnx")
    run = runs("gfl")[0]
    model = dataclasses.replace(run.experiment.model, dtype="bfloat16")
    experiment = dataclasses.replace(run.experiment, model=model)
    about = describe(experiment, run.category_ids, run.category_names)
    write_exported(tmp_path / "run", about, run.network, run.variables, experiment.detector)
    main(str(tmp_path / "run"), str(tmp_path), "onnx", canvas=(64, 96), onnx_output="raw")
    graph = onnx.load(next(tmp_path.glob("*.onnx"))).graph
    assert {x.data_type for x in graph.initializer} <= {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
        onnx.TensorProto.BOOL,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory, runs):
    folder = tmp_path_factory.mktemp("exported") / "x"
    main(str(runs("gfl")[1]), str(folder), "stablehlo", canvas=(64, 64))
    return folder


def ago(days):
    return (datetime.date.today() - datetime.timedelta(days)).isoformat()


@pytest.mark.parametrize(
    "said, message",
    [
        ({"jaxlib": "0.1.0", "made": ago(184)}, "184 days ago by jaxlib 0.1.0"),
        ({"jaxlib": "99.0.0"}, "newer than this one.*update jax"),
        ({"calling_convention": 1}, "calling convention 1, but jax"),
        ({"calling_convention": 1000}, "calling convention 1000, but jax"),
    ],
)
def test_what_jax_need_not_run_is_refused(exported, said, message):
    about = json.loads((exported / "export.json").read_text())
    with pytest.raises(InputError, match=message):
        stablehlo.refuse(about | said, exported)


@pytest.mark.parametrize(
    "said",
    [{}, {"made": ago(3000)}, {"jaxlib": "0.1.0"}, {"jaxlib": "0.1.0", "made": ago(183)}],
    ids=["new", "old, but of the same version", "another version", "just not too old"],
)
def test_what_jax_promises_to_run_is_run(exported, said):
    about = json.loads((exported / "export.json").read_text())
    stablehlo.refuse(about | said, exported)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("export.json", b"{", r"export\.json does not describe"),
        ("export.json", b'{"made": "today"}', r"export\.json does not describe"),
        ("64x64.jax_export", b"no program", r"64x64\.jax_export is damaged"),
        ("64x64.jax_export", None, r"64x64\.jax_export: there is no such file"),
        ("weights.safetensors", b"\x08\0\0", r"weights\.safetensors is damaged"),
        ("weights.safetensors", None, r"weights\.safetensors: there is no such file"),
    ],
)
def test_a_damaged_export_says_which_file(tmp_path, exported, file, content, message):
    for name in ("export.json", "64x64.jax_export", "weights.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises((InputError, FileNotFoundError), match=message):
        stablehlo.Exported(tmp_path)


def test_a_canvas_without_a_program_is_named(exported):
    images = np.zeros((1, 96, 64, 3), np.uint8)
    with pytest.raises(InputError, match=r"96 x 64.*exported for 64 x 64"):
        stablehlo.Exported(exported)(images, np.array([[96, 64]]), np.ones((1, 2)))


def test_load_says_how_programs_are_opened(exported):
    with pytest.raises(InputError, match=r"docs/export\.md"):
        gfl_jax.load(exported)


def test_nothing_is_written_over(exported, runs):
    with pytest.raises(InputError, match="already holds a detector"):
        main(str(runs("gfl")[1]), str(exported), "stablehlo")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"format": "stablehlo", "onnx_output": "raw"}, "--onnx-output raw is for --format onnx"),
        ({"format": "mmdet", "canvas": (64, 64)}, "--canvas is for --format stablehlo and onnx"),
        ({"format": "onnx", "canvas": (64, 65)}, "--canvas 64 65: sides must be multiples of 32"),
    ],
)
def test_flags_that_do_not_fit_are_mistakes(tmp_path, runs, flags, message):
    with pytest.raises(UsageError, match=message):
        main(str(runs("gfl")[1]), str(tmp_path / "x"), **flags)


@pytest.mark.slow
def test_the_programs_in_the_docs_run_without_this_package(tmp_path, runs):
    pytest.importorskip("onnxruntime")
    folder = str(tmp_path / "shapes")
    for kind in ("onnx", "stablehlo"):
        main(str(runs("gfl")[1]), folder, kind, canvas=(128, 128))
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    text = (Path(__file__).parents[2] / "docs/export.md").read_text()
    printed = []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert "gfl_jax" not in code
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        printed.append([line.split()[0] for line in ran.stdout.splitlines()])
    assert printed[0] == printed[1] and len(printed[0]) == 3

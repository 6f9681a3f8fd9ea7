"""The command `predict`: folders, odd files and videos to pictures and tables."""

import csv
import json
import signal

import cv2
import numpy as np
import pytest
from PIL import Image

from gfl_jax.__main__ import main as front_door
from gfl_jax.config import Data, Experiment
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.interop.exported import write_exported
from gfl_jax.models.fpn import Neck
from gfl_jax.models.heads import Head
from gfl_jax.models.network import Backbone, Model, Network
from gfl_jax.run import describe
from gfl_jax.tools.predict import Tables, drawn_name, sources_of
from gfl_jax.visualize import plot_sides

EXPERIMENT = Experiment(
    model=Model(
        Backbone(depth=18, width=8, norm="bn", frozen_stages=-1),
        Neck(32),
        Head(width=32, stacked_convs=1),
    ),
    detector=Detector(inference=Inference(score_threshold=0.0, nms_pre=60, max_per_image=9)),
    data=Data(scale=(96, 64)),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An exported detector of two classes with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    network = Network(EXPERIMENT.model, EXPERIMENT.detector.predicts(2))
    variables = network.init(0)
    params = dict(variables.params)
    rng = np.random.default_rng(0)
    for name, array in params.items():
        if name.startswith("bbox_head"):
            params[name] = np.asarray(array + 0.3 * rng.normal(size=array.shape), np.float32)
    about = describe(EXPERIMENT, [1, 7], ["Zelle, rund", "\u7d30\u80de"]) | {"step": 3}
    write_exported(folder, about, network, variables._replace(params=params), EXPERIMENT.detector)
    return folder


def photo(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def predict(*arguments):
    """The status of the command."""
    with pytest.raises(SystemExit) as ended:
        front_door(["predict", *map(str, arguments)])
    return ended.value.code or 0


def rows_of(out):
    with open(out / "detections.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_with_odd_files_is_done_as_far_as_it_can_be_read(tmp_path, weights, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(photo(50, 90)).save(folder / "a.jpg")
    Image.fromarray(photo(90, 50)).save(folder / "sub" / "ä b.PNG")
    Image.fromarray(photo(50, 90)).save(folder / "c.tif")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    (folder / "notes.txt").write_text("no image")
    assert predict(folder, "--weights", weights, "-o", out, "--score-threshold", 0.2) == 1
    said = capsys.readouterr()
    assert "broken.jpg" in said.err and "1 of 4 files could not be read" in said.err
    assert "3 images" in said.out and "programs compiled: 2" in said.out
    pictures = {str(f.relative_to(out / "pictures")) for f in (out / "pictures").rglob("*.*")}
    assert pictures == {"a.jpg", "sub/ä b.PNG", "c.tif.jpg"}
    assert Image.open(out / "pictures" / "a.jpg").size == (630, 350)

    described = json.loads((out / "images.json").read_text())
    assert [image["file_name"] for image in described["images"]] == [
        "a.jpg",
        "c.tif",
        "sub/ä b.PNG",
    ]
    assert described["categories"][1] == {"id": 7, "name": "\u7d30\u80de"}
    results = json.loads((out / "results.json").read_text())
    ids = {image["id"]: image for image in described["images"]}
    assert {result["image_id"] for result in results} == ids.keys()
    rows = rows_of(out)
    kept = [result for result in results if result["score"] >= 0.2]
    assert len(rows) == len(kept) > 0
    for row, result in zip(rows, kept, strict=True):
        assert row["file"] == ids[result["image_id"]]["file_name"]
        assert row["name"] == {1: "Zelle, rund", 7: "\u7d30\u80de"}[result["category_id"]]
        assert float(row["x1"]) == pytest.approx(result["bbox"][0], abs=0.01)
        assert float(row["score"]) == pytest.approx(result["score"], abs=1e-4)


def test_distributions_are_drawn_and_tabled(tmp_path, weights):
    Image.fromarray(photo(50, 90)).save(tmp_path / "a.jpg")
    arguments = "--weights", weights, "-o", tmp_path / "out", "--distributions"
    assert predict(tmp_path / "a.jpg", *arguments, "--score-threshold", 0.01) == 0
    assert Image.open(tmp_path / "out" / "distributions" / "a.jpg.png").size[0] >= 500
    assert all(float(row["spread_left"]) > 0 for row in rows_of(tmp_path / "out"))


def test_a_picture_of_no_detection_says_so(tmp_path, weights):
    import gfl_jax

    result = gfl_jax.load(weights)(photo(50, 90), distributions=True)
    figure = plot_sides(result, score_threshold=2.0)
    assert "no detection of at least 2.0" in figure.texts[0].get_text()


def test_files_of_the_same_name_do_not_replace_each_other(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").touch()
    for name in ("x-2.jpg", "y.tif", "y.tif.jpg"):
        (tmp_path / "a" / name).touch()
    named = [tmp_path / "a", tmp_path / "b", tmp_path / "b" / "x.jpg"]
    found = sources_of(map(str, named), tmp_path / "out")
    names = [source.name for source in found]
    assert len({drawn_name(name) for name in names}) == len(names) == 6
    assert names[:2] == ["x-2.jpg", "x.jpg"] and names[4:] == ["x-3.jpg", "x-4.jpg"]


def test_originals_are_never_replaced(tmp_path, weights, capsys):
    folder = tmp_path / "proj" / "pictures"
    folder.mkdir(parents=True)
    Image.fromarray(photo(50, 90)).save(folder / "a.png")
    before = (folder / "a.png").read_bytes()
    assert predict(folder, "--weights", weights, "-o", tmp_path / "proj") == 1
    assert "a.png would be replaced by a drawing of it" in capsys.readouterr().err
    assert (folder / "a.png").read_bytes() == before


def test_pictures_of_an_earlier_run_are_no_images_of_the_folder(tmp_path):
    for name in ("a.jpg", "out/pictures/a.jpg", "out/distributions/a.jpg.png", "._a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert [s.name for s in sources_of([str(tmp_path)], tmp_path / "out")] == ["a.jpg"]


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        ([], 2, "at least one image"),
        (["missing.jpg"], 1, "missing.jpg: there is no such file or folder"),
        (["{empty}"], 1, "has no images or videos"),
        (["s3://bucket/x.jpg", "-o", "{empty}/out"], 1, "gs://BUCKET"),
        (["{empty}", "-o", "gs://bucket/x"], 1, "must be on a local disk"),
        (["{empty}", "--score-treshold", "0.3"], 2, "score-threshold"),
        (["{empty}", "--score-threshold", "nan"], 2, "between 0 and 1"),
        (["{empty}", "--batch-size", "-1"], 2, "at least 0"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, weights, capsys, arguments, status, message):
    (tmp_path / "empty").mkdir()
    arguments = [a.format(empty=tmp_path / "empty") for a in arguments]
    assert predict(*arguments, "--weights", weights) == status
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


# ---------------------------------------------------------------------------- videos


def video(file, stamps, size=(64, 97), rotation=0):
    """Writes frames at these milliseconds."""
    av = pytest.importorskip("av")
    from fractions import Fraction

    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = size[0], size[1] // 2 * 2, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, stamp in enumerate(stamps):
            image = np.ascontiguousarray(photo(*size, seed=i)[:, : stream.width])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def stamps_of(file):
    import av

    with av.open(str(file)) as container:
        return [round(float(f.pts * f.time_base), 3) for f in container.decode(video=0)]


def test_a_video_keeps_its_time_stamps(tmp_path, weights):
    """Also those of frames that are not equally far apart."""
    video(tmp_path / "clip.avi", [0, 40, 80, 120])
    video(tmp_path / "clip.mp4", [0, 40, 200, 230, 900])
    out = tmp_path / "out"
    files = tmp_path / "clip.mp4", tmp_path / "clip.avi"
    assert predict(*files, "--weights", weights, "-o", out, "--score-threshold", 0.01) == 0
    assert stamps_of(out / "pictures" / "clip.mp4") == [0, 0.04, 0.2, 0.23, 0.9]
    assert stamps_of(out / "pictures" / "clip.avi.mp4") == [0, 0.04, 0.08, 0.12]
    images = json.loads((out / "images.json").read_text())["images"]
    assert [i["seconds"] for i in images[:5]] == pytest.approx([0, 0.04, 0.2, 0.23, 0.9])
    assert {row["time"] for row in rows_of(out) if row["file"] == "clip.mp4"} == {
        "0.000",
        "0.040",
        "0.200",
        "0.230",
        "0.900",
    }


def test_a_video_that_breaks_off_is_done_until_there(tmp_path, weights, capsys):
    video(tmp_path / "whole.avi", [40 * i for i in range(20)])
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    (tmp_path / "no.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    status = predict(tmp_path / "cut.avi", tmp_path / "no.mp4", "--weights", weights, "-o", out)
    assert status == 1
    assert "no.mp4 cannot be read as a video" in capsys.readouterr().err
    assert 3 <= len(stamps_of(out / "pictures" / "cut.avi.mp4")) < 20


def test_a_video_that_ends_early_without_an_error_is_named(tmp_path, weights, capsys):
    """Matroska states its length at the beginning."""
    video(tmp_path / "whole.mkv", [100 * i for i in range(60)])
    content = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    out = tmp_path / "out"
    assert predict(tmp_path / "whole.mkv", "--weights", weights, "-o", out) == 0
    assert predict(tmp_path / "cut.mkv", "--weights", weights, "-o", out) == 1
    assert "of the 5.9 seconds that it says it has" in capsys.readouterr().err
    assert 10 < len(stamps_of(out / "pictures" / "cut.mkv.mp4")) < 50


def test_sigterm_loses_no_table(tmp_path, weights, monkeypatch):
    for i in range(3):
        Image.fromarray(photo(64, 96, seed=i)).save(tmp_path / f"{i}.png")
    add, before = Tables.add, signal.getsignal(signal.SIGTERM)

    def add_and_terminate(self, name, *arguments):
        add(self, name, *arguments)
        if name == "1.png":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Tables, "add", add_and_terminate)
    out = tmp_path / "out"
    files = [tmp_path / f"{i}.png" for i in range(3)]
    assert predict(*files, "--weights", weights, "-o", out) == 128 + signal.SIGTERM
    images = json.loads((out / "images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["0.png", "1.png"]
    assert signal.getsignal(signal.SIGTERM) is before

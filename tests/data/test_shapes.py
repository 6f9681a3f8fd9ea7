import dataclasses
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gfl_jax.data.shapes import dataset, render
from gfl_jax.data.shapes.dataset import SPLITS, Shapes, make_shapes
from gfl_jax.data.shapes.render import CLASSES, FADE, OUTWARD, render_scene

SPEC = Shapes(num_train=12, num_val=5, image_size=(96, 128), seed=7)


def read(root, split):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("data") / "shapes", SPEC)


@pytest.fixture(scope="module")
def sprites():
    rng = np.random.default_rng(0)
    drawn = (render.make_sprite(rng, 160, 192, 0.4) for _ in range(1500))
    return [sprite for sprite in drawn if sprite is not None]


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(np.random.default_rng((3, i)), 128, 160) for i in range(150)]


def pixel_box(alpha, threshold):
    xs = np.flatnonzero((alpha > threshold).any(0))
    ys = np.flatnonzero((alpha > threshold).any(1))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1])


def test_folder_is_coco(made):
    height, width = SPEC.image_size
    for split, count in zip(SPLITS, (SPEC.num_train, SPEC.num_val), strict=True):
        coco = read(made, split)
        assert coco["info"]["spec"] == json.loads((made / "spec.json").read_text())
        assert [image["id"] for image in coco["images"]] == list(range(1, count + 1))
        assert [c["name"] for c in coco["categories"]] == list(CLASSES)
        assert sorted(p.name for p in (made / split).iterdir()) == [
            image["file_name"] for image in coco["images"]
        ]
        for image in coco["images"]:
            pixels = cv2.imread(str(made / split / image["file_name"]))
            assert pixels.shape == (image["height"], image["width"], 3) == (height, width, 3)
        ids = [a["id"] for a in coco["annotations"]]
        assert ids == list(range(1, len(ids) + 1)) and ids
        for a in coco["annotations"]:
            x, y, w, h = a["bbox"]
            assert 0 <= x and 0 <= y and x + w <= width + 1e-6 and y + h <= height + 1e-6
            assert a["area"] == pytest.approx(w * h, abs=0.01)
            assert 1 <= a["category_id"] <= len(CLASSES) and a["iscrowd"] == 0
            assert len(a["ambiguity"]) == len(a["nominal_bbox"]) == 4
            if not any(a["ambiguity"]):
                assert a["bbox"] == a["nominal_bbox"]


def test_labels_of_the_folder_are_those_of_the_scenes(made):
    coco = read(made, "val")
    as_rgb = as_bgr = 0.0
    for index, image in enumerate(coco["images"]):
        pixels, scene = render_scene(np.random.default_rng((SPEC.seed, 1, index)), *SPEC.image_size)
        found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert [a["category_id"] - 1 for a in found] == [shape.label for shape in scene]
        for a, shape in zip(found, scene, strict=True):
            x, y, w, h = a["bbox"]
            np.testing.assert_allclose([x, y, x + w, y + h], shape.box, atol=0.011)
            np.testing.assert_allclose(a["ambiguity"], shape.ambiguity, atol=0.001)
        stored = cv2.imread(str(made / "val" / image["file_name"]))  # as BGR
        as_rgb += np.abs(stored[..., ::-1].astype(int) - pixels).mean()
        as_bgr += np.abs(stored.astype(int) - pixels).mean()
    assert as_rgb < 8 * len(coco["images"])
    assert as_rgb < 0.5 * as_bgr


def test_pycocotools_reads_it(made):
    coco = pytest.importorskip("pycocotools.coco").COCO(
        str(made / "annotations" / "instances_train.json")
    )
    assert len(coco.getImgIds()) == SPEC.num_train
    assert coco.loadAnns(coco.getAnnIds(imgIds=coco.getImgIds()[0])) is not None


def test_deterministic_whatever_the_number_of_images(made, tmp_path):
    fewer = make_shapes(tmp_path / "fewer", dataclasses.replace(SPEC, num_train=4, num_val=1))
    for name, content in contents(fewer).items():
        if name.endswith(".jpg"):
            assert content == (made / name).read_bytes(), name
    few, many = read(fewer, "train"), read(made, "train")
    assert few["annotations"] == many["annotations"][: len(few["annotations"])]
    again = make_shapes(tmp_path / "again", SPEC)
    assert contents(again) == contents(made)


def test_seeds_and_splits_differ(made, tmp_path):
    other = make_shapes(tmp_path / "other", dataclasses.replace(SPEC, num_train=1, seed=8))
    image = "train/000000.jpg"
    assert (other / image).read_bytes() != (made / image).read_bytes()
    assert (made / "val/000000.jpg").read_bytes() != (made / image).read_bytes()


def test_finished_folder_is_found_again(made):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert make_shapes(made, SPEC) == made
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


@pytest.mark.parametrize(
    ("field", "value"), [("num_train", 13), ("image_size", (96, 96)), ("seed", 1)]
)
def test_another_spec_is_refused(made, field, value):
    with pytest.raises(ValueError, match=field) as error:
        make_shapes(made, dataclasses.replace(SPEC, **{field: value}))
    found = json.loads((made / "spec.json").read_text())[field]
    wanted = list(value) if isinstance(value, tuple) else value
    assert all(str(part) in str(error.value) for part in (made, found, wanted))


def test_another_version_is_refused(made, monkeypatch):
    monkeypatch.setattr(dataset, "VERSION", dataset.VERSION + 1)
    with pytest.raises(ValueError, match="version"):
        make_shapes(made, SPEC)


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="in the way"):
        make_shapes(tmp_path, SPEC)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_killed_run_is_cleaned_away(tmp_path, monkeypatch):
    spec = Shapes(num_train=6, num_val=0, image_size=(64, 64))
    write = dataset._write_image

    def killed(folder, spec, split, index):
        if index == 3:
            raise KeyboardInterrupt
        return write(folder, spec, split, index)

    monkeypatch.setattr(dataset, "_write_image", killed)
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "shapes", spec)
    assert not (tmp_path / "shapes").exists()
    partial = tmp_path / ".shapes.partial"  # what `kill -9` leaves
    (partial / "train").mkdir(parents=True)
    (partial / "spec.json").write_text("{}")
    (partial / "train" / "999999.jpg").write_text("junk")

    monkeypatch.undo()
    root = make_shapes(tmp_path / "shapes", spec)
    assert not list(tmp_path.glob("*.partial"))
    assert len(list((root / "train").iterdir())) == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_train", -1), ("seed", -1), ("image_size", (16, 96)), ("blurred", 1.5)],
)
def test_impossible_spec_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Shapes(**{field: value})


def test_as_many_shapes_are_blurred_as_asked_for():
    rng, share = np.random.default_rng(0), []
    for blurred in (0.0, 0.4, 1.0):
        drawn = (render.make_sprite(rng, 160, 192, blurred) for _ in range(300))
        share.append(np.mean([(s.ambiguity > 0).any() for s in drawn if s is not None]))
    assert share[0] == 0
    assert 0.2 < share[1] < 0.4
    assert share[2] > 0.55


def test_sharp_sides_match_the_pixels(sprites):
    errors = {name: [] for name in CLASSES}
    for sprite in sprites:
        sharp = sprite.ambiguity == 0
        assert np.array_equal(sprite.box[sharp], sprite.nominal[sharp])
        # A tip is less than a pixel wide near its end, and covers little of the pixels there: one
        # of 40 degrees that ends between two rows covers 0.18 of its last pixels.
        pointed = CLASSES[sprite.label] in ("triangle", "star")
        threshold = 0.2 if pointed and sharp.all() else 0.5
        error = OUTWARD * (sprite.nominal - pixel_box(sprite.alpha, threshold))
        limit = 1.1 if not pointed else 1.5 if sharp.all() else 2.5
        assert np.abs(error[sharp]).max(initial=0) < limit
        errors[CLASSES[sprite.label]].extend(error[sharp])
    for name, error in errors.items():
        assert abs(np.median(error)) < 0.35, name
        assert np.mean(np.abs(error) > 1) < 0.05, name


def test_blurred_sides_fade_around_the_nominal_side(sprites):
    blurred_sides = ramps = 0
    for sprite in sprites:
        sigma = sprite.ambiguity / render.CLIPPED_STD
        blurred = sigma > 0
        middle = OUTWARD * (sprite.nominal - pixel_box(sprite.alpha, 0.5))
        end = OUTWARD * (pixel_box(sprite.alpha, 0.02) - sprite.nominal)
        assert np.all(np.abs(middle[blurred]) < 1.5)
        assert np.all(end[blurred] < FADE * sigma[blurred] + 1)
        blurred_sides += np.count_nonzero(blurred)
        ramps += np.count_nonzero(end[blurred] > 0.6 * FADE * sigma[blurred])
    assert ramps > 0.9 * blurred_sides > 0


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((-9, -9, 9, 9), (0, 0, 4, 2)),
        ((1, -9, 9, 9), (1, 0, 4, 1.5)),
        ((-9, 0.5, 2, 9), (0, 0.5, 2, 2)),
        ((5, 5, 9, 9), None),
        ((3.5, 1.5, 9, 9), None),
    ],
)
def test_bound(window, expected):
    triangle = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0]])
    found = render.bound(triangle, np.array(window, float))
    if expected is None:
        assert found is None
    else:
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_ambiguity_is_the_standard_deviation_of_the_label(sprites):
    box, nominal, ambiguity = (
        np.array([getattr(sprite, name) for sprite in sprites])
        for name in ("box", "nominal", "ambiguity")
    )
    blurred = ambiguity > 0
    assert 0.25 < blurred.any(1).mean() < 0.45
    noise = ((box - nominal)[blurred]) / ambiguity[blurred]
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1) < 0.1
    assert np.abs(noise).max() <= FADE / render.CLIPPED_STD + 1e-6


def test_clipped_std():
    draws = np.clip(np.random.default_rng(0).standard_normal(1_000_000), -FADE, FADE)
    assert draws.std() == pytest.approx(render.CLIPPED_STD, abs=2e-3)


def test_sides_at_the_border_are_exact(sprites):
    border = np.array([0.0, 0.0, 192.0, 160.0])
    cut = np.array([sprite.nominal == border for sprite in sprites])
    assert cut.any(0).all()
    for sprite, sides in zip(sprites, cut, strict=True):
        assert not sprite.ambiguity[sides].any()
        assert np.all(sprite.box[sides] == border[sides])
        assert np.all(OUTWARD * (border - sprite.box) >= 0)


def test_scenes(scenes):
    counts = np.bincount([len(found) for _, found in scenes], minlength=1)
    assert counts[0] > 0 and len(counts) == render.MAX_SHAPES + 1
    found = [shape for _, scene in scenes for shape in scene]
    assert {shape.label for shape in found} == set(range(len(CLASSES)))
    assert min(shape.visible for shape in found) >= render.MIN_VISIBLE
    assert max(shape.visible for shape in found) == 1
    assert any(shape.visible < 0.8 for shape in found)
    sides = np.array([np.subtract(shape.nominal[2:], shape.nominal[:2]) for shape in found])
    assert sides.min() > render.MIN_SIDE - 0.3
    assert sides.max() < 1.25 * render.MAX_SIDE * 128
    for image, _ in scenes:
        assert image.dtype == np.uint8 and image.shape == (128, 160, 3)
        assert image.std() > 3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(32, 160), st.integers(32, 160))
def test_any_size_and_seed(seed, height, width):
    image, found = render_scene(np.random.default_rng(seed), height, width)
    assert image.shape == (height, width, 3)
    for shape in found:
        x0, y0, x1, y1 = shape.box
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert render.MIN_VISIBLE <= shape.visible <= 1

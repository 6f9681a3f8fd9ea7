"""The objective of GFL and its detections against loops over images, anchors and classes."""

import functools
import math

import jax
import numpy as np
import pytest
from jax import lax

from gfl_jax.data.batch import Batch
from gfl_jax.detectors.box import GeneralDistribution
from gfl_jax.detectors.classification import QualityFocal
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Inference
from gfl_jax.detectors.quality import JointQuality
from gfl_jax.models.heads import Outputs

LEVELS = ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))  # of a 64 x 96 canvas
STRIDES = (8, 16, 32, 64, 128)
CELLS = [  # x, y of the centre, stride, column, row
    (column * stride, row * stride, stride, column, row)
    for (height, width), stride in zip(LEVELS, STRIDES, strict=True)
    for row in range(height)
    for column in range(width)
]
CLASSES = 3
GFL = Detector()
# Programs compiled for one run: quickly rather than well.
QUICKLY = {"xla_backend_optimization_level": 0}


def variant(n, delta, weighting, **others):
    return Detector(
        box=GeneralDistribution(n, delta), quality=JointQuality(weighting=weighting), **others
    )


VARIANTS = {
    "gfl": GFL,
    "few-wide-bins": variant(4, 2.0, "iou", box_weight=1.5, dfl_weight=0.5),
    "few-bins": variant(4, 1.0, "none", classification=QualityFocal(beta=1.5)),
}


# The definition, in float64 and in loops.


def is_valid(cell, size):
    _, _, stride, column, row = cell
    height, width = (math.ceil(int(side) / 32) * 32 for side in size)
    return row < math.ceil(height / stride) and column < math.ceil(width / stride)


def overlap(a, b):
    """Intersection, union and area of the enclosing box."""
    width, height = (max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0.0) for k in (0, 1))
    outer = [max(a[k + 2], b[k + 2]) - min(a[k], b[k]) for k in (0, 1)]
    areas = sum(max(c[2] - c[0], 0.0) * max(c[3] - c[1], 0.0) for c in (a, b))
    inter = width * height
    return inter, max(areas - inter, 1e-6), max(outer[0] * outer[1], 1e-6)


def assign(size, boxes, mask):
    """ATSS: the object of every positive cell of an image."""
    best = {}
    for g, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, np.float64).tolist()):
        if not mask[g]:
            continue
        candidates = []
        for stride in STRIDES:
            near = sorted(
                (math.hypot(c[0] - (x1 + x2) / 2, c[1] - (y1 + y2) / 2), a)
                for a, c in enumerate(CELLS)
                if c[2] == stride and is_valid(c, size)
            )
            for _, a in near[:9]:
                x, y, side = CELLS[a][0], CELLS[a][1], 4 * stride
                inter, union, _ = overlap(
                    (x - side, y - side, x + side, y + side), (x1, y1, x2, y2)
                )
                candidates.append((a, inter / union))
        ious = [iou for _, iou in candidates]
        if len(ious) < 2:
            continue
        threshold = np.mean(ious) + np.std(ious, ddof=1)
        for a, iou in candidates:
            x, y = CELLS[a][:2]
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if iou >= threshold and inside and iou > best.get(a, (-1,))[0]:
                best[a] = (iou, g)
    return {a: g for a, (_, g) in best.items()}


def assignment(batch):
    images = zip(batch.sizes, batch.boxes, batch.box_mask, batch.image_mask, strict=True)
    return [assign(size, boxes, mask) if real else {} for size, boxes, mask, real in images]


def objective(detector, cls, box, batch, assigned, constants=None):
    """The three terms, and the (IoU, weight) of every positive.

    cls: [b, cells, classes].  box: [b, cells, 4, n + 1].  constants: (IoU, weight) of the positives
    if they are not those of these logits.
    """
    n, delta, beta = detector.box.n, detector.box.delta, detector.classification.beta
    qfl = giou = dfl = total_weight = 0.0
    n_pos, found = 0, {}
    for i in np.flatnonzero(batch.image_mask):
        n_pos += max(len(assigned[i]), 1)
        for a, cell in enumerate(CELLS):
            if not is_valid(cell, batch.sizes[i]):
                continue
            logits, y = cls[i, a], np.zeros(CLASSES)
            sigma = 1 / (1 + np.exp(-logits))
            if a in assigned[i]:
                g, (x, s) = assigned[i][a], (np.array(cell[:2]) / cell[2], cell[2])
                e = np.exp(box[i, a] - box[i, a].max(1, keepdims=True))
                p = e / e.sum(1, keepdims=True)
                left, top, right, bottom = (p * np.arange(n + 1) * delta).sum(1)
                decoded = (x[0] - left, x[1] - top, x[0] + right, x[1] + bottom)
                target = np.float64(batch.boxes[i, g]) / s
                inter, union, outer = overlap(decoded, target)
                iou = inter / union
                weight = {"predicted": sigma.max(), "iou": iou, "none": 1.0}[
                    detector.quality.weighting
                ]
                found[i, a] = (iou, weight)
                if constants:
                    iou, weight = constants[i, a]
                y[batch.labels[i, g]] = iou
                total_weight += weight
                giou += weight * (1 - inter / union + (outer - union) / outer)
                sides = (x[0] - target[0], x[1] - target[1], target[2] - x[0], target[3] - x[1])
                for side, distance in enumerate(sides):
                    t = min(max(distance / delta, 0), n - 0.1)
                    k = int(t)
                    log_p = np.log(p[side])
                    dfl -= weight * ((k + 1 - t) * log_p[k] + (t - k) * log_p[k + 1]) / 4
            bce = np.maximum(logits, 0) - logits * y + np.log1p(np.exp(-np.abs(logits)))
            qfl += (np.abs(y - sigma) ** beta * bce).sum()
    # Without weights boxes are divided by what the classification is divided by.
    total_weight = max(n_pos if detector.quality.weighting == "none" else total_weight, 1)
    terms = {
        "loss_cls": qfl / max(n_pos, 1),
        "loss_bbox": detector.box_weight * giou / total_weight,
        "loss_dfl": detector.dfl_weight * dfl / total_weight,
    }
    return terms, found


# Batches and outputs.


def make_batch(seed=0, image_mask=(True,) * 4):
    """Four images with 3, 2, 0 and 5 objects, among garbage."""
    rng = np.random.default_rng(seed)
    sizes = np.array([(64, 96), (40, 60), (50, 90), (30, 96)], np.int32)
    boxes = rng.normal(0, 300, (4, 6, 4)).astype(np.float32)
    mask = np.zeros((4, 6), bool)
    for i, objects in enumerate((3, 2, 0, 5)):
        height, width = sizes[i]
        center = rng.uniform(0.3, 0.7, (objects, 2)) * (width, height)
        half = rng.uniform(0.1, 0.6, (objects, 2)) * (width, height)
        corners = np.concatenate([center - half, center + half], 1)
        boxes[i, :objects] = np.clip(corners, 0, [width, height] * 2)
        mask[i, :objects] = True
    return Batch(
        images=np.zeros((4, 1, 1, 3), np.uint8),
        sizes=sizes,
        scales=np.ones((4, 2), np.float32),
        boxes=boxes,
        labels=rng.integers(0, CLASSES, (4, 6)).astype(np.int32),
        box_mask=mask,
        image_mask=np.array(image_mask),
    )


def without_objects(batch):
    return batch._replace(box_mask=np.zeros_like(batch.box_mask))


def random_logits(detector, seed=0, images=4):
    rng = np.random.default_rng(seed)
    cls = rng.normal(-1.0, 1.5, (images, len(CELLS), CLASSES)).astype(np.float32)
    box = rng.normal(0.0, 2.0, (images, len(CELLS), 4, detector.box.n + 1)).astype(np.float32)
    return cls, box


def constant_logits(detector, cls=0.0, box=0.0, images=4):
    return tuple(
        np.full_like(x, value)
        for x, value in zip(random_logits(detector, images=images), (cls, box), strict=True)
    )


def by_level(flat):
    """[b, cells, ...] as the levels of a head's output."""
    flat = flat.reshape(*flat.shape[:2], -1)
    ends = np.cumsum([height * width for height, width in LEVELS])
    levels = np.split(flat, ends[:-1], axis=1)
    return [x.reshape(len(x), *hw, -1) for x, hw in zip(levels, LEVELS, strict=True)]


def flat(levels):
    return np.concatenate([np.reshape(x, (len(x), -1, x.shape[-1])) for x in levels], axis=1)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def _losses_and_gradient(detector, outputs, batch):
    def total(outputs):
        losses = detector.losses(outputs, batch)
        return sum(losses.terms.values()), losses

    gradient, losses = jax.grad(total, has_aux=True)(outputs)
    return losses, gradient


def losses_and_gradient(detector, cls, box, batch):
    """Losses, and the gradients of their sum to the class and the box logits."""
    outputs = Outputs(by_level(cls), by_level(box))
    losses, gradient = _losses_and_gradient(detector, outputs, batch)
    losses = jax.tree.map(np.asarray, losses)
    to_cls, to_box = (flat(levels) for levels in gradient[:2])
    return losses, to_cls, to_box.reshape(box.shape)


def assert_terms(losses, expected, rtol=2e-5):
    assert losses.terms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(losses.terms[name], value, rtol=rtol, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(losses.per_image[name].sum(), value, rtol=rtol, atol=1e-7)


# The objective.


@pytest.mark.parametrize("detector", VARIANTS.values(), ids=VARIANTS.keys())
def test_losses_are_those_of_a_loop_over_images_and_anchors(detector):
    for seed in (0, 1):
        batch = make_batch(seed)
        assigned = assignment(batch)
        assert [len(image) > 0 for image in assigned] == [True, True, False, True]
        cls, box = random_logits(detector, seed)
        losses, *_ = losses_and_gradient(detector, cls, box, batch)
        assert_terms(
            losses, objective(detector, np.float64(cls), np.float64(box), batch, assigned)[0]
        )


@pytest.mark.parametrize("name", ["gfl", "few-wide-bins"])
def test_gradient_takes_quality_and_weights_as_constants(name):
    """Against central differences of the objective with frozen (IoU, weight)."""
    detector, batch = VARIANTS[name], make_batch()
    assigned = assignment(batch)
    cls, box = random_logits(detector, 3)
    _, to_cls, to_box = losses_and_gradient(detector, cls, box, batch)
    cls, box = np.float64(cls), np.float64(box)
    constants = objective(detector, cls, box, batch, assigned)[1]
    positive = np.zeros((4, len(CELLS)), bool)
    for i, a in constants:
        positive[i, a] = True

    def slope(in_cls, in_box, constants):
        above, below = (
            sum(
                objective(detector, cls + h * in_cls, box + h * in_box, batch, assigned, constants)[
                    0
                ].values()
            )
            for h in (1e-5, -1e-5)
        )
        return (above - below) / 2e-5

    rng = np.random.default_rng(0)
    through_quality = []
    for where in (positive, ~positive, np.ones_like(positive)):
        some_cls = rng.normal(size=cls.shape) * where[..., None]
        some_box = rng.normal(size=box.shape) * where[..., None, None]
        for in_cls, in_box in ((some_cls, 0 * box), (0 * cls, some_box)):
            expected = slope(in_cls, in_box, constants)
            found = (to_cls * in_cls).sum() + (to_box * in_box).sum()
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-5)
            through_quality.append(abs(slope(in_cls, in_box, None) - expected))
    assert max(through_quality) > 1e-2  # the test would notice


def test_negatives_and_padding_get_no_gradient_to_their_boxes():
    batch = make_batch()
    assigned = assignment(batch)
    _, to_cls, to_box = losses_and_gradient(GFL, *random_logits(GFL), batch)
    for i in range(4):
        for a, cell in enumerate(CELLS):
            assert to_box[i, a].any() == (a in assigned[i])
            assert to_cls[i, a].any() == is_valid(cell, batch.sizes[i])


def test_every_image_counts_as_at_least_one_positive():
    batch = without_objects(make_batch())
    cls, box = random_logits(GFL)
    losses, _, to_box = losses_and_gradient(GFL, cls, box, batch)
    sigma = 1 / (1 + np.exp(-np.float64(cls)))
    valid = [[is_valid(cell, size) for cell in CELLS] for size in batch.sizes]
    qfl = (-(sigma**2) * np.log(1 - sigma)).sum(2) * valid
    np.testing.assert_allclose(losses.terms["loss_cls"], qfl.sum() / 4, rtol=1e-5)
    np.testing.assert_allclose(losses.per_image["loss_cls"], qfl.sum(1) / 4, rtol=1e-5)
    assert losses.terms["loss_bbox"] == losses.terms["loss_dfl"] == 0
    assert not to_box.any()


def test_without_any_object_all_is_finite():
    batch = without_objects(make_batch())
    for logits in (random_logits(GFL), constant_logits(GFL, -100.0, 100.0)):
        losses, to_cls, to_box = losses_and_gradient(GFL, *logits, batch)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((losses, to_cls, to_box)))


def test_a_filler_image_changes_nothing():
    real = (True, False, True, True)
    batch = make_batch(image_mask=real)
    cls, box = random_logits(GFL)
    losses, to_cls, to_box = losses_and_gradient(GFL, cls, box, batch)
    assert_terms(
        losses, objective(GFL, np.float64(cls), np.float64(box), batch, assignment(batch))[0]
    )
    assert not to_cls[1].any()
    assert not to_box[1].any()
    assert not any(share[1] for share in losses.per_image.values())

    other = make_batch(seed=5, image_mask=real)
    for part in ("boxes", "labels", "box_mask", "sizes"):
        getattr(batch, part)[1] = getattr(other, part)[0]
    cls[1], box[1] = 30.0, -40.0
    again, *gradients = losses_and_gradient(GFL, cls, box, batch)
    jax.tree.map(np.testing.assert_array_equal, again, losses)
    np.testing.assert_array_equal(gradients[0], to_cls)
    np.testing.assert_array_equal(gradients[1], to_box)


def test_a_batch_of_fillers_alone_is_zero():
    batch = make_batch(image_mask=(False,) * 4)
    losses, to_cls, to_box = losses_and_gradient(GFL, *random_logits(GFL), batch)
    assert not any(losses.terms.values())
    assert not to_cls.any()
    assert not to_box.any()


def test_losses_do_not_depend_on_how_images_are_spread_over_devices():
    batch = make_batch(image_mask=(True, True, True, False))
    cls, box = random_logits(GFL)
    whole, *_ = losses_and_gradient(GFL, cls, box, batch)

    @functools.partial(jax.vmap, axis_name="devices")
    def on_devices(outputs, batch):
        return GFL.losses(outputs, batch, lambda count: lax.psum(count, "devices"))

    outputs = Outputs(by_level(cls), by_level(box))
    halves = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (outputs, batch))
    parts = jax.jit(on_devices, compiler_options=QUICKLY)(*halves)
    for name, value in whole.terms.items():
        np.testing.assert_allclose(parts.terms[name].sum(), value, rtol=1e-5)
        np.testing.assert_allclose(
            parts.per_image[name].reshape(-1), whole.per_image[name], rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("magnitude", [100.0, 1e4, 1e30])
def test_extreme_logits_have_finite_losses_and_gradients(magnitude):
    batch, rng = make_batch(), np.random.default_rng(0)
    random_signs = [magnitude * rng.choice([-1, 1], x.shape) for x in random_logits(GFL)]
    one_sign = [
        constant_logits(GFL, s * magnitude, t * magnitude) for s in (1, -1) for t in (1, -1)
    ]
    for cls, box in ([np.float32(x) for x in random_signs], *one_sign):
        losses, to_cls, to_box = losses_and_gradient(GFL, cls, box, batch)
        for value in jax.tree.leaves((losses, to_cls, to_box)):
            assert np.isfinite(value).all()


def test_objects_without_size_are_background():
    batch = make_batch()
    for i, (x1, y1, x2, y2) in enumerate(
        [(32, 32, 32, 32), (16, 8, 16, 40), (16, 16, 60, 16), (40, 16, 20, 8)]
    ):
        batch.boxes[i, 5], batch.box_mask[i, 5] = (x1, y1, x2, y2), True
    cls, box = random_logits(GFL)
    losses, *gradients = losses_and_gradient(GFL, cls, box, batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((losses, gradients)))
    assert_terms(losses, losses_and_gradient(GFL, cls, box, make_batch())[0].terms, rtol=1e-6)


def test_initial_losses_are_those_of_the_reference():
    """Flat distributions: every DFL is ln 17 and every side is decoded to 8 strides."""
    batch = make_batch()
    assigned = assignment(batch)
    positives = sum(map(len, assigned))
    flat_dfl = 0.25 * math.log(17)
    losses, *_ = losses_and_gradient(GFL, *constant_logits(GFL), batch)  # weights 0.5
    assert positives > 2
    np.testing.assert_allclose(losses.terms["loss_dfl"], flat_dfl, rtol=1e-5)
    giou = []
    for i, image in enumerate(assigned):
        for a, g in image.items():
            x, y, s, *_ = CELLS[a]
            decoded = (x - 8 * s, y - 8 * s, x + 8 * s, y + 8 * s)
            inter, union, outer = overlap(decoded, np.float64(batch.boxes[i, g]))
            giou.append(1 - inter / union + (outer - union) / outer)
    np.testing.assert_allclose(losses.terms["loss_bbox"], 2 * np.mean(giou), rtol=1e-5)

    # With the initial class bias weights are 0.01: here they do not add up to 1.
    prior = -math.log(99)
    losses, *_ = losses_and_gradient(GFL, *constant_logits(GFL, cls=prior), batch)
    assert positives < 100
    np.testing.assert_allclose(losses.terms["loss_dfl"], flat_dfl * 0.01 * positives, rtol=1e-5)
    assert 0 < losses.terms["loss_cls"] < 1


@pytest.mark.parametrize(
    "choice",
    [
        {"box": lambda: GeneralDistribution(n=0)},
        {"box": lambda: GeneralDistribution(delta=0.0)},
        {"box": lambda: GeneralDistribution(delta=-1.0)},
        {"classification": lambda: QualityFocal(beta=-0.5)},
    ],
)
def test_impossible_choices_are_named(choice):
    with pytest.raises(ValueError, match=f"detector.{next(iter(choice))}"):
        Detector(**{name: make() for name, make in choice.items()})


# Detections.

RULE = Inference(score_threshold=0.3, nms_pre=20, max_per_image=30)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def _detections(detector, outputs, sizes, scales):
    return detector.detections(outputs, sizes, scales)


def detections(inference, cls, box, sizes, scales):
    outputs = Outputs(by_level(cls), by_level(box))
    arrays = np.array(sizes, np.int32), np.array(scales, np.float32)
    found = _detections(Detector(inference=inference), outputs, *arrays)
    return jax.tree.map(np.asarray, found)


def detections_by_hand(inference, cls, box, size, scale):
    """(score, label, box) of one image, best first."""
    entries = []
    for stride in STRIDES:
        pairs = [
            (1 / (1 + math.exp(-cls[a, c])), a, c)
            for a, cell in enumerate(CELLS)
            if cell[2] == stride and (inference.padding_predicts or is_valid(cell, size))
            for c in range(CLASSES)
        ]
        pairs = sorted(pair for pair in pairs if pair[0] > inference.score_threshold)
        for score, a, c in pairs[::-1][: inference.nms_pre]:
            x, y, s, *_ = CELLS[a]
            p = np.exp(box[a]) / np.exp(box[a]).sum(1, keepdims=True)
            left, top, right, bottom = (p * np.arange(17)).sum(1) * s
            corners = np.array([x - left, y - top, x + right, y + bottom])
            limit = [size[1], size[0]] * 2
            corners = np.clip(corners, 0, limit) / [*scale, *scale]
            if corners[2] > corners[0] and corners[3] > corners[1]:
                entries.append((score, c, corners))
    kept = []
    for score, c, corners in sorted(entries, key=lambda entry: -entry[0]):
        rivals = (overlap(corners, other)[:2] for _, label, other in kept if label == c)
        if all(inter / union <= inference.nms_iou for inter, union in rivals):
            kept.append((score, c, corners))
    return kept[: inference.max_per_image]


def check_by_hand(inference, cls, box, sizes, scales):
    found = detections(inference, cls, box, sizes, scales)
    counts = []
    for i in range(2):
        expected = detections_by_hand(
            inference, np.float64(cls[i]), np.float64(box[i]), sizes[i], scales[i]
        )
        mask = found.mask[i]
        counts.append(len(expected))
        assert mask.tolist() == [k < len(expected) for k in range(len(mask))]
        assert found.labels[i][mask].tolist() == [label for _, label, _ in expected]
        np.testing.assert_allclose(found.scores[i][mask], [e[0] for e in expected], rtol=1e-5)
        np.testing.assert_allclose(found.boxes[i][mask], [e[2] for e in expected], atol=1e-3)
    return counts


SIZES, SCALES = ((64, 96), (40, 60)), ((0.75, 0.8), (2.0, 1.5))
PADDING_PREDICTS = Inference(
    score_threshold=0.3, nms_pre=20, max_per_image=30, padding_predicts=True
)


@pytest.mark.parametrize("inference", [RULE, PADDING_PREDICTS], ids=["valid", "padding"])
def test_detections_are_those_of_a_loop_over_levels_and_pairs(inference):
    for seed, shift in ((0, -1.0), (1, 1.0)):
        cls, box = random_logits(GFL, seed, images=2)
        box -= np.linspace(0, 8, 17, dtype=np.float32)  # small boxes: many survive
        counts = check_by_hand(inference, cls + np.float32(shift), box, SIZES, SCALES)
        assert all(count > 8 for count in counts), counts


def nothing(images=2):
    """Outputs without a detection."""
    return constant_logits(GFL, cls=-20.0, images=images)


def put(cls, box, image, cell, label, distances, logit=3.0):
    """Makes a cell of P3 (column, row) predict whole distances (l, t, r, b), in strides."""
    a = CELLS.index((cell[0] * 8, cell[1] * 8, 8, *cell))
    cls[image, a, label] = logit
    box[image, a] = 0
    box[image, a, range(4), distances] = 60.0


def test_a_prediction_becomes_the_right_box_in_original_pixels():
    cls, box = nothing()
    put(cls, box, 0, (5, 3), 2, (1, 2, 4, 3))  # centre (40, 24)
    found = detections(RULE, cls, box, SIZES, ((0.5, 0.8), (1.0, 1.0)))
    assert found.mask.sum(1).tolist() == [1, 0]
    assert found.labels[0, 0] == 2
    np.testing.assert_allclose(found.scores[0, 0], 1 / (1 + math.exp(-3)), rtol=1e-6)
    expected = [32 / 0.5, 8 / 0.8, 72 / 0.5, 48 / 0.8]
    np.testing.assert_allclose(found.boxes[0, 0], expected, rtol=1e-5)
    assert not found.boxes[1].any()


def test_boxes_are_clipped_to_the_image():
    cls, box = nothing()
    put(cls, box, 1, (5, 3), 1, (16, 15, 14, 16))
    found = detections(RULE, cls, box, SIZES, ((1.0, 1.0), (2.0, 1.6)))
    assert found.mask.sum(1).tolist() == [0, 1]
    np.testing.assert_allclose(found.boxes[1, 0], [0, 0, 60 / 2.0, 40 / 1.6], rtol=1e-5)


def test_padding_does_not_predict_unless_told_to():
    """The second image is 40 x 60, as if padded to 64 x 64: column 8 begins its padding."""
    cls, box = nothing()
    put(cls, box, 1, (7, 2), 0, (5, 1, 1, 1), logit=1.0)
    put(cls, box, 1, (9, 2), 0, (3, 1, 1, 1), logit=5.0)
    ones = ((1.0, 1.0),) * 2
    found = detections(RULE, cls, box, SIZES, ones)
    assert found.mask[1].sum() == 1
    np.testing.assert_allclose(found.boxes[1, 0], [16, 8, 60, 24], rtol=1e-5)
    found = detections(PADDING_PREDICTS, cls, box, SIZES, ones)
    assert found.mask[1].sum() == 2
    np.testing.assert_allclose(found.boxes[1, 0], [48, 8, 60, 24], rtol=1e-5)


def test_a_box_outside_the_image_is_dropped():
    cls, box = nothing()
    put(cls, box, 1, (10, 6), 0, (1, 1, 1, 1))
    assert not detections(PADDING_PREDICTS, cls, box, SIZES, ((1.0, 1.0),) * 2).mask.any()


def test_no_prediction_is_no_detection():
    assert not detections(RULE, *nothing(), SIZES, SCALES).mask.any()


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICKLY)
def candidates(inference, outputs):
    return Detector(inference=inference).candidates(outputs, np.array(SIZES, np.int32))


def test_candidates_at_the_threshold_do_not_enter():
    """Thresholds that are scores, and their neighbours in float32."""
    outputs = Outputs(*map(by_level, random_logits(GFL, images=2)))
    every = jax.tree.map(np.asarray, candidates(Inference(score_threshold=0.0), outputs))
    (one,) = np.unique(every.scores)[[-100]]
    assert 0.1 < one < 0.9
    for threshold in (np.nextafter(one, np.float32(0)), one, np.nextafter(one, np.float32(1))):
        found = jax.tree.map(
            np.asarray, candidates(Inference(score_threshold=float(threshold)), outputs)
        )
        enters = every.scores > threshold
        np.testing.assert_array_equal(found.scores, np.where(enters, every.scores, 0))
        for ours, theirs in zip(found, every, strict=True):
            np.testing.assert_array_equal(ours[enters], theirs[enters])
        assert enters.any()
        assert (one in found.scores) == (threshold < one)


def test_predictions_below_the_threshold_are_no_detections():
    outputs = constant_logits(GFL, cls=math.log(0.03 / 0.97), images=2)
    found = {t: detections(Inference(t), *outputs, SIZES, SCALES) for t in (0.02, 0.05)}
    assert found[0.02].mask.any(1).all()
    assert not found[0.05].mask.any()


def test_every_level_keeps_its_own_best_pairs():
    """30 pairs of P3 above the threshold, apart from each other: nms_pre of them remain."""
    cls, box = nothing()
    for k in range(30):
        put(cls, box, 0, (2 * (k % 6), 2 * (k // 6 % 4)), k // 24, (0, 0, 1, 1), logit=1 + k / 10)
    found = detections(RULE, cls, box, SIZES, ((1.0, 1.0),) * 2)
    assert found.mask[0].sum() == 20
    expected = 1 / (1 + np.exp(-(1 + np.arange(29, 9, -1) / 10)))
    np.testing.assert_allclose(found.scores[0][:20], expected, rtol=1e-5)

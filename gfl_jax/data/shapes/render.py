"""Renders the images of `shapes`: textured shapes of six classes over cluttered backgrounds.

Shapes have many scales; some are partly hidden, some cast a shadow. Some of their sides are
*blurred*: the shape fades out over a ramp and no annotator could say where it ends, so the label of
that side is drawn at random around the middle of the ramp, and the standard deviation of that draw,
the side's *ambiguity*, is part of the label.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np

CLASSES = ("ellipse", "rectangle", "triangle", "star", "ring", "cross")
TEXTURES = ("flat", "stripes", "checks", "dots", "noise", "gradient")

MIN_SIDE = 24.0  # px, of a shape's nominal box
MAX_SIDE = 0.7  # of the image's shorter side
TILT = 0.3  # rad, to either side
MAX_SHAPES = 5  # per image
MIN_VISIBLE = 0.4  # the least part of a shape that is visible
MIN_BLURRED = 28.0  # px, the least extent along which a side may be blurred
FADE = 2.0  # a blurred side fades out within +- FADE sigma, and its label stays within as well
CLIPPED_STD = 0.95940  # standard deviation of a standard normal clipped to +- FADE
OUTWARD = np.array([-1.0, -1.0, 1.0, 1.0])  # the direction of each side (left, top, right, bottom)


class Shape(NamedTuple):
    """One labelled shape. Boxes are (x0, y0, x1, y1) in pixels; the image is (0, 0, w, h).

    Attributes:
        box: The label. It bounds the part of the shape inside the image, including what later
            shapes hide. A sharp side is exact; a blurred one is drawn around `nominal`.
        nominal: The same box with each blurred side in the middle of its ramp.
        label: Index into `CLASSES`.
        ambiguity: Standard deviation of each side (left, top, right, bottom) of `box` around
            `nominal`, in pixels: 0 where the side is sharp or cut off by the border of the image.
            Only blur counts, not occlusion by later shapes.
        visible: The fraction of the shape's area inside the image that no later shape hides.
    """

    box: tuple[float, float, float, float]
    nominal: tuple[float, float, float, float]
    label: int
    ambiguity: tuple[float, float, float, float]
    visible: float


class Sprite(NamedTuple):
    """A shape before it is painted: `alpha` (h, w) in [0, 1], and the rest of its label."""

    alpha: np.ndarray
    box: np.ndarray
    nominal: np.ndarray
    label: int
    ambiguity: np.ndarray


def make_outline(rng: np.random.Generator, label: int) -> list[np.ndarray]:
    """Draws the outline of a class, with a random aspect ratio and rotation.

    Args:
        rng: Source of randomness.
        label: Index into `CLASSES`.

    Returns:
        The shape's polygons, each (points, 2) of (x, y), at a common scale around (0, 0). The
        first is the outer one; a second is a hole.
    """

    def polar(radius: Any, angle: np.ndarray) -> np.ndarray:
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)

    def regular(n: int) -> np.ndarray:
        return 2 * np.pi * np.arange(n) / n

    match CLASSES[label]:
        case "ellipse":
            polygons = [polar(1.0, regular(64))]
        case "rectangle":
            polygons = [np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])]
        case "triangle":
            polygons = [polar(1.0, regular(3) + rng.uniform(-0.3, 0.3, 3))]
        case "star":
            polygons = [polar(np.tile([1.0, rng.uniform(0.4, 0.5)], 5), regular(10))]
        case "ring":
            polygons = [polar(1.0, regular(64)), polar(rng.uniform(0.45, 0.65), regular(64))]
        case "cross":
            a = rng.uniform(0.25, 0.4)
            corner = np.array([[1.0, -a], [1.0, a], [a, a]])
            turns = [np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
            polygons = [np.concatenate([corner @ turn for turn in turns])]
    aspect = np.exp(rng.uniform(-0.45, 0.45))
    angle = rng.uniform(-TILT, TILT)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[aspect * cos, aspect * sin], [-sin, cos]])
    return [polygon @ matrix for polygon in polygons]


def bound(outline: np.ndarray, window: np.ndarray) -> np.ndarray | None:
    """Bounds the part of a filled polygon inside a window.

    Args:
        outline: (points, 2) of (x, y).
        window: (x0, y0, x1, y1).

    Returns:
        (x0, y0, x1, y1) of the outline's edges, cut off at the window; None if no edge enters it.
    """
    step = np.roll(outline, -1, axis=0) - outline
    step = np.where(step == 0.0, 1e-12, step)
    crossings = (window.reshape(2, 1, 2) - outline) / step  # as a fraction of each edge
    start = np.maximum(crossings.min(0).max(1, keepdims=True), 0.0)
    stop = np.minimum(crossings.max(0).min(1, keepdims=True), 1.0)
    inside = (start < stop)[:, 0]
    if not inside.any():
        return None
    points = np.concatenate([outline + start * step, outline + stop * step])[np.tile(inside, 2)]
    box = np.concatenate([points.min(0), points.max(0)])
    return np.where(np.abs(box - window) < 1e-6, window, box)


def make_sprite(rng: np.random.Generator, height: int, width: int, blurred: float) -> Sprite | None:
    """Draws a random shape somewhere in an image, or None if the border cuts it too small.

    Args:
        rng: Source of randomness.
        height: The image's height in pixels.
        width: The image's width in pixels.
        blurred: Probability of trying to blur some of its sides.

    Returns:
        The sprite; to within about a pixel, `nominal` is the box of its `alpha > 0.5`.
    """
    label = int(rng.integers(len(CLASSES)))
    polygons = make_outline(rng, label)
    low, high = polygons[0].min(0), polygons[0].max(0)

    # Position: some shapes extend a little beyond the image.
    side = MIN_SIDE * (MAX_SIDE * min(height, width) / MIN_SIDE) ** rng.random()
    size = np.maximum(side * (high - low) / (high - low).max(), MIN_SIDE)
    outside = size * (0.2 if rng.random() < 0.3 else 0.0)
    start = rng.uniform(-outside, np.array([width, height]) - size + outside)
    box = np.concatenate([start, start + size])
    image = np.array([0.0, 0.0, width, height])

    # Which sides are blurred: their ramps lie within the image, and are wide enough to be seen.
    sigma = np.zeros(4)
    if rng.random() < blurred:
        chosen = rng.permutation(4)[: rng.integers(1, 3)]
        sigma[chosen] = rng.uniform(0.03, 0.10, len(chosen)) * np.tile(size, 2)[chosen]
        sigma[np.tile(size, 2) < MIN_BLURRED] = 0.0
        sigma[OUTWARD * (image - box) < FADE * sigma] = 0.0

    # The outline is stretched to the far ends of the ramps; `nominal` ends at their middles. If a
    # sharp side would depend on where the ramps are cut off, all sides stay sharp.
    for sharp in (False, True):
        sigma = np.zeros(4) if sharp else sigma
        ramp = OUTWARD * FADE * sigma
        scale = (box + ramp)[2:] - (box + ramp)[:2]
        outlines = [
            (polygon - low) / (high - low) * scale + (box + ramp)[:2] for polygon in polygons
        ]
        windows = [np.where(sigma > 0.0, box + share * ramp, image) for share in (0.0, -1.0, 1.0)]
        nominal, near, far = (bound(outlines[0], window) for window in windows)
        if nominal is None or near is None or far is None:
            continue
        is_blurred = (sigma > 0.0) & (nominal == box)
        is_sharp = (sigma == 0.0) & (np.abs(near - far) <= 1.0)
        if np.all(is_blurred | is_sharp):
            break
    if nominal is None or (nominal[2:] - nominal[:2]).min() < MIN_SIDE - 1e-6:
        return None

    fine, shift = 4, 4  # drawn at 4 times the resolution, at a precision of 1/16 fine pixel
    mask: np.ndarray = np.zeros((height * fine, width * fine), np.uint8)
    points = [np.rint((polygon * fine - 0.5) * 2**shift).astype(np.int32) for polygon in outlines]
    cv2.fillPoly(mask, points, 255, cv2.LINE_8, shift)
    cv2.polylines(mask, points, True, 128, 1, cv2.LINE_8, shift)  # pixels on the edge count half
    alpha = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    alpha /= 255.0
    for i in np.flatnonzero(sigma):
        centre = np.arange(alpha.shape[1 - i % 2], dtype=np.float32) + 0.5
        ramp = np.clip(0.5 + OUTWARD[i] * (box[i] - centre) / (2 * FADE * sigma[i]), 0.0, 1.0)
        ramp = (ramp * ramp * (3.0 - 2.0 * ramp)).astype(np.float32)
        alpha *= ramp[:, None] if i % 2 else ramp

    noise = np.clip(rng.standard_normal(4), -FADE, FADE)
    return Sprite(alpha, nominal + sigma * noise, nominal, label, sigma * CLIPPED_STD)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cell: float) -> np.ndarray:
    """Returns noise (h, w) in [0, 1] that varies over `cell` pixels."""
    coarse = rng.random((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def make_texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a texture (h, w) in [0, 1] that mixes the two colours of a shape."""
    side = max(height, width)
    angle, period = rng.uniform(0.0, np.pi), max(5.0, side * rng.uniform(0.12, 0.3))
    x = np.linspace(-width, width, width, dtype=np.float32)[None] * np.float32(np.pi / period)
    y = np.linspace(-height, height, height, dtype=np.float32)[:, None] * np.float32(np.pi / period)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = x * cos + y * sin, y * cos - x * sin  # radians, 2 pi per period
    match TEXTURES[rng.integers(len(TEXTURES))]:
        case "flat":
            texture: np.ndarray = np.zeros((height, width), np.float32)
        case "stripes":
            texture = 0.5 + 2.0 * np.sin(u)
        case "checks":
            texture = 0.5 + 4.0 * np.sin(u) * np.sin(v)
        case "dots":
            texture = 0.5 + 2.0 * (np.cos(u) + np.cos(v) - 0.8)
        case "noise":
            texture = 1.5 * smooth_noise(rng, height, width, period / 3) - 0.25
        case "gradient":
            texture = 0.5 + u * np.float32(period / (2 * np.pi * side))
    return np.clip(texture, 0.0, 1.0)


def make_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns a cluttered background (3, h, w), float32 in [0, 255], without any object."""

    def tint(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (3, 1, 1)).astype(np.float32)

    grey = rng.uniform(50.0, 205.0)
    base = np.float32(grey) + tint(-35.0, 35.0)
    angle = rng.uniform(0.0, 2 * np.pi)
    x, y = np.linspace(-0.5, 0.5, width)[None], np.linspace(-0.5, 0.5, height)[:, None]
    along = (0.5 + 0.7 * (x * np.cos(angle) + y * np.sin(angle))).astype(np.float32)
    image = base + along * tint(-45.0, 45.0)
    for cell, strength in ((rng.uniform(30, 60), 40.0), (rng.uniform(4, 12), 20.0)):
        image += (smooth_noise(rng, height, width, cell) - 0.5) * tint(0.2 * strength, strength)

    # Lines, scribbles and small splinters, in colours close to the background.
    canvas = cv2.merge([*np.clip(image, 0, 255).astype(np.uint8)])
    scale = min(height, width)

    def colour(contrast: float) -> tuple[float, ...]:
        return tuple(np.clip(grey + rng.choice([-1, 1]) * contrast + rng.normal(0, 12, 3), 0, 255))

    def point() -> np.ndarray:
        return rng.integers([0, 0], [width, height])

    for _ in range(rng.integers(2, 9)):
        start, stop = point().tolist(), point().tolist()
        cv2.line(
            canvas, start, stop, colour(rng.uniform(15, 60)), int(rng.integers(1, 3)), cv2.LINE_AA
        )
    for _ in range(rng.integers(0, 4)):
        curve = point() + np.cumsum(rng.normal(0, scale / 15, (6, 2)), axis=0)
        cv2.polylines(canvas, [curve.astype(np.int32)], False, colour(40), 1, cv2.LINE_AA)
    for _ in range(rng.integers(2, 10)):
        splinter = point() + rng.normal(0, 4, (rng.integers(4, 7), 2))
        cv2.fillPoly(canvas, [splinter.astype(np.int32)], colour(rng.uniform(10, 35)), cv2.LINE_AA)
    image = np.stack(cv2.split(canvas)).astype(np.float32)
    for _ in range(rng.integers(0, 4)):  # blobs without an edge, light or dark
        (cx, cy), radius = point(), scale * rng.uniform(0.06, 0.2)
        xs = np.exp(-((np.arange(width, dtype=np.float32) - cx) ** 2) / (2 * radius**2))
        ys = np.exp(-((np.arange(height, dtype=np.float32) - cy) ** 2) / (2 * radius**2))
        image += ys[:, None] * xs * tint(-35.0, 35.0)
    return image


def paint(rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray) -> None:
    """Paints a shape, possibly with a shadow, in colours that stand out from what it covers.

    Args:
        rng: Source of randomness.
        image: (3, h, w), float32 in [0, 255], modified in place.
        alpha: The shape, (h, w) in [0, 1].
    """
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    side = max(width, height)
    if rng.random() < 0.35:
        shift = side * rng.uniform(0.04, 0.12, 2) * rng.choice([-1, 1], 2)
        move = np.array([[1.0, 0.0, shift[0]], [0.0, 1.0, shift[1]]])
        shadow = cv2.warpAffine(alpha, move, alpha.shape[::-1])
        shadow = cv2.GaussianBlur(shadow, (0, 0), 0.5 + 0.03 * side)
        image *= 1.0 - np.float32(rng.uniform(0.25, 0.5)) * shadow

    rows, columns = slice(y, y + height), slice(x, x + width)
    alpha, below = alpha[rows, columns], image[:, rows, columns]
    colours = rng.uniform(0.0, 255.0, (24, 3)).astype(np.float32)
    contrast = np.linalg.norm(colours - np.tensordot(below, alpha, 2) / alpha.sum(), axis=1)
    chosen = colours[np.argsort(contrast < 90.0, kind="stable")[:2]]  # the first that stand out
    first, second = chosen[:, :, None, None]
    texture = make_texture(rng, height, width) * np.float32(rng.uniform(0.4, 1.0))
    below += alpha * (first + texture * (second - first) - below)


def render_scene(
    rng: np.random.Generator, height: int, width: int, blurred: float = 0.4
) -> tuple[np.ndarray, list[Shape]]:
    """Renders one image and its labels.

    Args:
        rng: Source of randomness; it determines the whole scene.
        height: The image's height in pixels.
        width: The image's width in pixels.
        blurred: Probability of trying to blur sides of a shape.

    Returns:
        The image (height, width, 3), uint8 RGB, and its shapes from the rearmost to the foremost;
        about 1 image in 40 has none.
    """
    image = make_background(rng, height, width)
    sprites: list[Sprite] = []
    shown: list[np.ndarray] = []  # the visible part of each sprite's alpha
    for _ in range(0 if rng.random() < 0.025 else rng.integers(1, MAX_SHAPES + 1)):
        for _ in range(10):  # a shape that would hide too much of an earlier one is resampled
            sprite = make_sprite(rng, height, width, blurred)
            if sprite is None:
                continue
            left = [alpha * (1.0 - sprite.alpha) for alpha in shown]
            if all(
                a.sum() >= MIN_VISIBLE * s.alpha.sum() for a, s in zip(left, sprites, strict=True)
            ):
                paint(rng, image, sprite.alpha)
                sprites, shown = [*sprites, sprite], [*left, sprite.alpha]
                break

    gain, offset = rng.uniform(0.9, 1.1), rng.uniform(-8.0, 8.0)
    image = cv2.merge([*((image - 128.0) * np.float32(gain) + np.float32(128.0 + offset))])
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    noise = rng.random(image.shape, dtype=np.float32) - 0.5
    image += np.float32(rng.uniform(3.0, 20.0)) * noise
    shapes = [
        Shape(
            box=tuple(s.box.tolist()),
            nominal=tuple(s.nominal.tolist()),
            label=s.label,
            ambiguity=tuple(s.ambiguity.tolist()),
            visible=float(alpha.sum() / s.alpha.sum()),
        )
        for s, alpha in zip(sprites, shown, strict=True)
    ]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), shapes

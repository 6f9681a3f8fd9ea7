"""Boxes with names on pictures of any size."""

import colorsys
import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gfl_jax.data.images import box_iou

FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "Arial.ttf",
    "PingFang.ttc",
    "msgothic.ttc",
    "NotoSansArabic-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "wqy-microhei.ttc",
    "unifont.ttf",
)
"""Looked for where the system keeps its fonts; the first that has all characters is used."""

SMALL = 600
"""Pictures with a shorter longer side, in pixels, are enlarged: names would cover the objects."""


def color_of(label: int) -> tuple[int, int, int]:
    """The colour of a class: hues a golden angle apart, in three brightnesses."""
    brightness = (0.7, 1.0, 0.85)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.78, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """A picture large enough to write on, and how many times larger it is."""
    factor = -(-SMALL // max(image.shape[:2]))
    if factor == 1:
        return image, 1
    height, width = image.shape[:2]
    size = width * factor, height * factor
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)), factor


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], texts: Sequence[str]
) -> np.ndarray:
    """A copy of a picture with boxes and what they are.

    Lines and letters grow with the picture. A text stands above its box, or where else there is
    room and no other text; the first box is on top.

    Args:
        image: uint8 RGB [height, width, 3].
        boxes: [n, 4], x1 y1 x2 y2 in pixels.
        labels: [n], of their classes, for the colours.
        texts: [n].
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    side = 1.2 * math.sqrt(image.shape[0] * image.shape[1])
    line, letters = max(1, round(side / 450)), max(11, round(side / 62))
    placed = np.zeros((0, 4))
    for box, label in zip(boxes[::-1], labels[::-1], strict=True):
        x1, y1, x2, y2 = np.asarray(box, float).round().tolist()
        if x2 >= x1 and y2 >= y1:
            draw.rectangle((x1, y1, x2, y2), outline=color_of(label), width=line)
    for box, label, text in zip(boxes, labels, texts, strict=True):
        font, text = font_for(text, letters)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        size = np.array([right - left + 2 * line + 4, bottom - top + 2 * line + 2])
        place = _place(np.asarray(box, float), size, placed, image.shape)
        placed = np.concatenate([placed, place[None]])
        color = color_of(label)
        draw.rectangle(tuple(place.tolist()), fill=color)
        dark = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 110
        at = place[0] - left + line + 2, place[1] - top + line + 1
        draw.text(at, text, font=font, fill=(0, 0, 0) if dark else (255, 255, 255))
    return np.asarray(picture)


def _place(
    box: np.ndarray, size: np.ndarray, taken: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Where a text of a size (width, height) goes, [4]: inside the picture, alone if possible."""
    x1, y1, x2, y2 = box
    width, height = size
    corners = [(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x1, y1), (x2, y1)]
    corners += [(x2 - width, y2), (x1, y2 - height), (x1 - width, y1)]
    limit = np.maximum(np.array([shape[1], shape[0]]) - size - 1, 0)
    low = np.clip(np.array(corners), 0, limit)
    places = np.concatenate([low, low + size], 1)
    covered = box_iou(places[:, None], taken[None]).max(1, initial=0.0)
    moved = np.abs(low - np.array(corners)).sum(1) > 0
    return places[np.lexsort((np.arange(len(places)), moved, covered.round(2)))[0]]


@functools.lru_cache(maxsize=4096)
def font_for(text: str, size: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, str]:
    r"""A font of a size in pixels that can write a text, and the text as it can be written.

    Where no font of this machine can, the characters that are missing are written as \u....
    """
    fallback = ImageFont.load_default(size)
    for font in (fallback, *_system_fonts(size)):
        if _can_write(font, text):
            return font, text
    written = "".join(
        c if _can_write(fallback, c) else c.encode("ascii", "backslashreplace").decode()
        for c in text
    )
    return fallback, written


@functools.lru_cache(maxsize=16)
def _system_fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    fonts = []
    for name in FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # this machine does not have it
            continue
    return fonts


def _can_write(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> bool:
    """Whether a font has every character: none looks like one that no font has."""
    missing = _look(font, "\U0010fffe")
    return all(_look(font, c) != missing for c in set(text) if not c.isspace())


def _look(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, character: str) -> bytes:
    mask = font.getmask(character)
    return bytes(mask) + repr(mask.size).encode()

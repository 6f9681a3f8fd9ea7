"""Boxes and names on pictures."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gfl_jax import drawing


def blank(height, width, value=127):
    return np.full((height, width, 3), value, np.uint8)


def changed(before, after):
    return (before != after).any(-1)


@pytest.fixture
def written(monkeypatch):
    """The corners of each text's background, once it is drawn."""
    written = []
    rectangle = ImageDraw.ImageDraw.rectangle

    def recorded(self, xy, fill=None, **options):
        if fill:
            written.append(xy)
        return rectangle(self, xy, fill=fill, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", recorded)
    return written


@pytest.mark.parametrize("height, width", [(200, 300), (4000, 6000), (200, 2000)])
def test_boxes_and_texts_grow_with_the_picture(height, width):
    image = blank(height, width)
    box = np.array([0.3 * width, 0.4 * height, 0.7 * width, 0.9 * height])
    drawn = drawing.draw_boxes(image, box[None], [2], ["person 0.98"])
    assert drawn.shape == image.shape and (image == 127).all()
    pixels = changed(image, drawn)
    row = pixels[int(0.65 * height)]  # crosses the box and no text
    line = row.sum() / 2
    size = np.sqrt(height * width)
    assert max(1, size / 600) <= line <= max(2, size / 250)


@pytest.mark.parametrize("place", ["top left", "bottom right", "everything", "outside"])
def test_a_text_stays_inside_the_picture(written, place):
    """Wherever its box is."""
    boxes = {
        "top left": [0, 0, 30, 20],
        "bottom right": [370, 280, 400, 300],
        "everything": [0, 0, 400, 300],
        "outside": [395, -50, 500, -10],
    }
    drawing.draw_boxes(blank(300, 400), np.array([boxes[place]], float), [0], ["elephant 0.51"])
    ((x1, y1, x2, y2),) = written
    assert 0 <= x1 < x2 < 400 and 0 <= y1 < y2 < 300


def test_texts_of_boxes_close_together_do_not_cover_each_other(written):
    boxes = np.array([[100, 100, 220, 200]] * 3, float)
    drawing.draw_boxes(blank(300, 400), boxes, [0, 1, 2], ["cat 0.9", "dog 0.8", "cow 0.7"])
    places = np.array(written)
    overlap = drawing.box_iou(places[:, None], places[None])
    np.testing.assert_array_equal(overlap, np.eye(3))


def test_small_pictures_are_enlarged_and_large_ones_are_not():
    small, factor = drawing.enlarged(blank(40, 100))
    assert (small.shape, factor) == ((240, 600, 3), 6)
    large = blank(700, 500)
    assert drawing.enlarged(large)[0] is large


def test_eighty_classes_have_colours_that_differ():
    colors = np.array([drawing.color_of(label) for label in range(80)])
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 999 * np.eye(80)
    assert distances.min() > 15
    first = distances[:10, :10]
    assert first.min() > 100


@pytest.mark.parametrize("name", ["cell", "Größe", "собака"])
def test_a_name_is_written_as_it_is_where_a_font_has_it(name):
    font, text = drawing.font_for(name, 12)
    if text != name:  # a machine with Pillow's own font alone
        assert text.startswith("\\u")
    else:
        shape = Image.new("L", (200, 30))
        ImageDraw.Draw(shape).text((0, 0), name, font=font, fill=255)
        assert np.asarray(shape).any()


def test_characters_that_no_font_has_are_named(monkeypatch):
    monkeypatch.setattr(drawing, "FONTS", ())
    drawing.font_for.cache_clear()
    drawing._system_fonts.cache_clear()
    try:
        assert drawing.font_for("a\u732b", 12)[1] == "a\\u732b"
    finally:
        drawing.font_for.cache_clear()
        drawing._system_fonts.cache_clear()


def test_a_picture_without_boxes_is_the_same():
    image = blank(100, 700)
    drawn = drawing.draw_boxes(image, np.zeros((0, 4)), [], [])
    np.testing.assert_array_equal(drawn, image)

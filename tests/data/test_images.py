import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from pycocotools import mask

from gfl_jax.data import images


def picture(height=48, width=64):
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def encode(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def rgba():
    image = picture().convert("RGBA")
    image.putalpha(image.getchannel("R"))
    return image


@pytest.mark.parametrize(
    ("image", "file_format", "options", "tolerance"),
    [
        (picture(), "JPEG", {}, 0),
        (picture(), "JPEG", {"progressive": True}, 0),
        (picture().convert("L"), "JPEG", {}, 0),
        (picture().convert("CMYK"), "JPEG", {}, 1),
        (picture(), "PNG", {}, 0),
        (picture().convert("L"), "PNG", {}, 0),
        (picture().convert("LA"), "PNG", {}, 0),
        (picture().convert("1"), "PNG", {}, 0),
        (picture().quantize(32), "PNG", {}, 0),
        (picture().quantize(32), "PNG", {"transparency": 3}, 0),
        (rgba(), "PNG", {}, 0),
        (rgba(), "WEBP", {"lossless": True}, 0),
        (picture(), "BMP", {}, 0),
        (picture(), "TIFF", {}, 0),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_decode_agrees_with_pillow(image, file_format, options, tolerance):
    data = encode(image, file_format, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    found = images.decode(data, (48, 64))
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    assert images.image_size(data) == (48, 64)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_the_upper_eight(channels):
    wide = np.asarray(picture()).astype(np.uint16)[..., :channels] * 256 + 77
    data = cv2.imencode(".png", wide[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(images.decode(data), np.broadcast_to(wide >> 8, (48, 64, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    data = encode(picture(), exif=exif(orientation))
    stored = Image.open(io.BytesIO(data))
    upright = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(images.decode(data), upright)
    np.testing.assert_array_equal(images.decode(data, upright.shape[:2]), upright)
    assert images.image_size(data) == upright.shape[:2]
    if orientation > 4:  # the annotations are for the unturned image
        np.testing.assert_array_equal(images.decode(data, (48, 64)), np.asarray(stored))


def test_a_wrong_size_is_named():
    with pytest.raises(images.ImageSizeError, match=r"a\.jpg: .* state .* 99 x 48.* has 64 x 48"):
        images.decode(encode(picture()), (48, 99), "a.jpg")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0, 1, 0.1, 0.5, 0.9, -2])
def test_a_truncated_file_is_found(file_format, kept):
    data = encode(picture(), file_format)
    part = data[: int(len(data) * kept) if isinstance(kept, float) else kept]
    with pytest.raises(ValueError, match="broken_one"):
        images.decode(part, name="broken_one")


def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image():
    data = encode(picture())
    thumbnail = b"Exif\0\0" + encode(picture(12, 16))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    with_thumbnail = data[:2] + segment + data[2:]
    np.testing.assert_array_equal(images.decode(with_thumbnail), images.decode(data))
    with pytest.raises(ValueError, match="truncated"):
        images.decode(with_thumbnail[:-9])


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_bytes_after_the_end_are_legal(file_format):
    data = encode(picture(), file_format)
    np.testing.assert_array_equal(images.decode(data + b"\0" * 99), images.decode(data))


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"\xff\xd8\xff", bytes(5000)])
def test_other_files_are_no_images(data):
    for read in (images.decode, images.image_size):
        with pytest.raises(ValueError, match="some_file"):
            read(data, name="some_file")


def test_resized_size_of_many_images_is_that_of_each():
    sizes = np.random.default_rng(0).integers(1, 3000, (500, 2)).astype(np.int32)
    heights, widths = images.resized_size(sizes[:, 0], sizes[:, 1], 1333, 800)
    for size, height, width in zip(sizes.tolist(), heights, widths, strict=True):
        assert images.resized_size(*size, 1333, 800) == (height, width)
        assert max(height, width) <= 1333
        assert 1 <= min(height, width) <= 800
        assert max(height, width) == 1333 or min(height, width) == 800


def test_flip_keeps_boxes_without_objects():
    image, boxes = images.flip(np.zeros((4, 6, 3), np.uint8), np.zeros((0, 4), np.float32))
    assert image.shape == (4, 6, 3)
    assert boxes.shape == (0, 4)
    assert boxes.dtype == np.float32


def test_iou_is_that_of_pycocotools():
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 50, (2, 8, 2)), rng.uniform(5, 30, (2, 8, 2))
    a, b = np.concatenate([corner, corner + side], axis=-1)
    xywh = np.concatenate([corner, side], axis=-1)
    expected = mask.iou(xywh[0], xywh[1], [0] * 8)
    np.testing.assert_allclose(images.box_iou(a[:, None], b), expected, atol=1e-9)


def test_iou_with_an_empty_or_inverted_box_is_zero():
    a = np.array([[0, 0, 2, 2], [0, 0, 0, 5], [2, 2, 1, 0]], float)
    b = np.array([[1, 0, 3, 2], [0, 0, 2, 2], [5, 5, 6, 6]], float)
    expected = [[1 / 3, 1, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(images.box_iou(a[:, None], b), expected)
    assert images.box_iou(a[:, None], np.zeros((0, 4))).shape == (3, 0)

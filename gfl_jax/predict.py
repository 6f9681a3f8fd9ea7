"""Detections on images of one's own: `gfl_jax.load("runs/x")("street.jpg")`.

Images are resized and padded as in an evaluation, so that the detections are the same.
"""

import collections
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import ImageOps

from gfl_jax.data import images, sixteen_bits
from gfl_jax.data.batch import Batch, Sample, pad
from gfl_jax.data.sources import Data
from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Detections
from gfl_jax.detectors.sides import Sides, sharpened
from gfl_jax.detectors.with_sides import detections_with_sides
from gfl_jax.errors import InputError, MissingFileError
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import as_path
from gfl_jax.results import Result, Unreadable

Picture = "str | os.PathLike[str] | np.ndarray | PIL.Image.Image"
"""An image file, local or gs://; RGB as uint8 [height, width, 3]; or an image of Pillow."""


class _Loaded(NamedTuple):
    """An image as it was and as the network takes it."""

    source: str
    image: np.ndarray
    sample: Sample
    canvas: tuple[int, int]


class Predictor:
    """Detects objects on images of any size. May be called from several threads.

    Attributes:
        batch_size: images that are computed together.
        programs: (images, height, width, distributions?) of each program that was compiled.
    """

    def __init__(
        self,
        network: Network,
        variables: Variables,
        detector: Detector,
        data: Data,
        category_ids: Sequence[int],
        category_names: Sequence[str],
        temperature: float = 1.0,
        batch_size: int = 0,
    ):
        """Compiles nothing yet.

        Args:
            network: the network.
            variables: its weights.
            detector: turns its outputs into detections.
            data: the scale of images.
            category_ids: of the class labels.
            category_names: of the class labels.
            temperature: that the logits of distributions are divided by.
            batch_size: images computed together; 0: one on a CPU, eight elsewhere.
        """
        self.batch_size = batch_size or (1 if jax.default_backend() == "cpu" else 8)
        self.programs: set[tuple[int, int, int, bool]] = set()
        self._data = data.for_evaluation()
        self._temperature = temperature
        self._white = getattr(data.source, "white", 0)
        self._canvases = images.canvases_of(data.scale)
        self._ids, self._names = list(category_ids), list(category_names)
        self._variables = jax.device_put(variables)
        self._predict = jax.jit(functools.partial(_predict, network, detector))
        self._with_sides = jax.jit(functools.partial(_predict_with_sides, network, detector))
        self._lock = threading.Lock()

    def __call__(self, pictures: Any, *, distributions: bool = False, white: int = 0) -> Any:
        """Detections on an image, or on each of several.

        Args:
            pictures: an image: a file's name, an array or an image of Pillow, see `Picture`; or
                several of them in a list, of any sizes, or in an array [n, height, width, 3].
            distributions: whether the result says how probable each position of a side is.
            white: value of images of 16 bits that is white, such as 4095; 0: as in training.

        Returns:
            A `Result`; for several images a list of them.

        Raises:
            MissingFileError: there is no such file.
            InputError: it is not an image.
        """
        one = _is_one(pictures)
        results = []
        stream = self.stream([pictures] if one else pictures, distributions, white)
        for result in stream:
            if isinstance(result, Unreadable):
                raise result.error
            results.append(result)
        return results[0] if one else results

    def stream(
        self, pictures: Iterable[Any], distributions: bool = False, white: int = 0
    ) -> Iterator[Result | Unreadable]:
        """Detections on any number of images, in order; later images are decoded meanwhile.

        Args:
            pictures: see `Picture`.
            distributions: see `__call__`.
            white: see `__call__`.

        Yields:
            The detections on each image, or why it cannot be read.
        """
        if isinstance(pictures, str | os.PathLike):
            pictures = [pictures]
        size = self.batch_size
        together = size if size == 1 else 4 * size
        pending: Any = None
        load = functools.partial(self._load, white=white or self._white)
        for chunk in _chunks(_ahead(load, pictures, 2 * together + 2), together):
            dispatched = chunk, [self._dispatch(part, distributions) for part in self._parts(chunk)]
            if pending:
                yield from self._results(*pending)
            pending = dispatched
        if pending:
            yield from self._results(*pending)

    def _load(self, picture: Any, white: int) -> _Loaded | Unreadable:
        source = os.fspath(picture) if isinstance(picture, str | os.PathLike) else ""
        try:
            image = pixels_of(picture, white)
        except (InputError, MissingFileError) as error:
            return Unreadable(source, error)
        long_side, short_side = self._data.scale
        if self._data.keep_ratio:
            resized, scale = images.resize_keep_ratio(image, long_side, short_side)
            canvas = images.smallest_canvas(self._canvases, resized.shape[:2])
            assert canvas is not None  # the scale itself is one
        else:
            canvas = short_side, long_side
            resized, scale = images.resize(image, canvas)
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
        return _Loaded(source, image, Sample(resized, scale, *none), canvas)

    def _parts(self, chunk: list[_Loaded | Unreadable]) -> Iterator[list[tuple[int, _Loaded]]]:
        """The images of each batch, with their places in the chunk: all have the same canvas."""
        by_canvas = collections.defaultdict(list)
        for place, loaded in enumerate(chunk):
            if isinstance(loaded, _Loaded):
                by_canvas[loaded.canvas].append((place, loaded))
        for group in by_canvas.values():
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _dispatch(self, part: list[tuple[int, _Loaded]], distributions: bool) -> Any:
        """Starts the computation of a batch, filled up with its last image."""
        # A single image must not wait for seven copies of itself.
        size = 1 if len(part) == 1 else self.batch_size
        filled = [loaded for _, loaded in part]
        filled += filled[-1:] * (size - len(part))
        batch = pad([loaded.sample for loaded in filled], filled[0].canvas, max_boxes=1)
        with self._lock:
            self.programs.add((size, *filled[0].canvas, distributions))
        predict = self._with_sides if distributions else self._predict
        return [place for place, _ in part], predict(self._variables, batch)

    def _results(
        self, chunk: list[_Loaded | Unreadable], dispatched: list[Any]
    ) -> Iterator[Result | Unreadable]:
        results: dict[int, Result] = {}
        for places, computed in dispatched:
            detections, found = jax.tree.map(np.asarray, computed)
            for slot, place in enumerate(places):
                loaded = chunk[place]
                assert isinstance(loaded, _Loaded)
                n = int(detections.mask[slot].sum())
                labels = detections.labels[slot, :n]
                results[place] = Result(
                    loaded.source,
                    loaded.image,
                    detections.boxes[slot, :n],
                    detections.scores[slot, :n],
                    labels,
                    [self._names[label] for label in labels],
                    [self._ids[label] for label in labels],
                    found
                    and sharpened(Sides(*(array[slot, :n] for array in found)), self._temperature),
                )
        for place, loaded in enumerate(chunk):
            yield loaded if isinstance(loaded, Unreadable) else results[place]


def pixels_of(picture: Any, white: int = 0) -> np.ndarray:
    """The pixels of an image, upright; uint8 RGB [height, width, 3].

    Args:
        picture: see `Picture`.
        white: value of images of 16 bits that is white; 0: 65535, but one that would then be nearly
            black is an error.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is not an image.
    """
    if not 0 <= white <= sixteen_bits.WHITE:
        raise InputError(f"white is {white}; it must be a value of 16 bits, up to 65535, or 0")
    if isinstance(picture, str | os.PathLike):
        file = as_path(picture)
        try:
            data = file.read_bytes()
        except FileNotFoundError as error:
            raise MissingFileError(f"{picture}: there is no such file") from error
        except OSError as error:
            raise InputError(f"{picture}: {error.strerror or error}") from error
        deep = sixteen_bits.read_16_bits(data)
        if deep is not None:
            data = _scaled(deep, white, str(picture))
        return images.decode(data, name=str(picture))
    if hasattr(picture, "getexif"):  # an image of Pillow
        return _pixels_of_pillow(picture, white)
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise InputError(
            f"an image is {array.dtype} {list(array.shape)}; it must be uint8 [height, width, 3], "
            "RGB from 0 to 255"
        )
    return array


def _scaled(deep: np.ndarray, white: int, name: str) -> bytes:
    """A PNG of 8 bits of an image of 16 bits, uint16 [height, width, 3]."""
    value = sixteen_bits.nearly_largest(deep)
    if not white and (dark := sixteen_bits.dark_images({name: value})):
        raise InputError(f"{name}: {dark[2]}: say which value is white, {dark[1]}?")
    return sixteen_bits.as_8_bits(deep, white or sixteen_bits.WHITE)


def _pixels_of_pillow(picture: Any, white: int) -> np.ndarray:
    name = getattr(picture, "filename", "") or "an image"
    try:
        upright = ImageOps.exif_transpose(picture)
        if not upright.mode.startswith(("I", "F")):
            return np.asarray(upright.convert("RGB"))
        grey = np.asarray(upright)
    except OSError as error:
        raise InputError(f"{name}: {error}") from error
    if upright.mode == "F" or grey.min() < 0 or grey.max() > sixteen_bits.WHITE:
        raise InputError(f"{name} has values of mode {upright.mode}, not 8 or 16 bits: convert it")
    deep = np.repeat(grey.astype(np.uint16)[..., None], 3, axis=2)
    return images.decode(_scaled(deep, white, name), name=name)


def _predict(
    network: Network, detector: Detector, variables: Variables, batch: Batch
) -> tuple[Detections, None]:
    outputs, _ = network.apply(variables, batch.images, batch.sizes, train=False)
    return detector.detections(outputs, batch.sizes, batch.scales), None


def _predict_with_sides(
    network: Network, detector: Detector, variables: Variables, batch: Batch
) -> tuple[Detections, Sides]:
    outputs, _ = network.apply(variables, batch.images, batch.sizes, train=False)
    return detections_with_sides(detector, outputs, batch.sizes, batch.scales)


def _is_one(pictures: Any) -> bool:
    """Whether this is one image rather than several."""
    if isinstance(pictures, str | bytes | os.PathLike) or hasattr(pictures, "getexif"):
        return True
    if hasattr(pictures, "ndim"):
        return pictures.ndim != 4
    return not isinstance(pictures, Iterable)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ahead(function: Any, items: Iterable[Any], count: int) -> Iterator[Any]:
    """`map` by threads that are at most `count` items ahead."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    waiting: collections.deque[Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

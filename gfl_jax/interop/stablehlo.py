"""A detector as compiled-anywhere StableHLO: run by JAX alone, on CPUs, GPUs and TPUs.

A folder has a program for each canvas and, beside them, the weights that all of them are called
with: they are stored once, compilers need not fold them, and fine-tuned ones can take their place.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jaxlib
import numpy as np
import safetensors.numpy
from etils import epath

from gfl_jax.detectors.dense import Detector
from gfl_jax.detectors.inference import Detections
from gfl_jax.errors import InputError, MissingFileError, naming
from gfl_jax.interop.programs import arguments, program, weights_of
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import PathLike, as_path, write, writing

ABOUT, WEIGHTS = "export.json", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
DAYS = 183
"""JAX runs what a version of up to six months before exported:
https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees"""


def stamp() -> dict[str, str]:
    """What made an export, and when."""
    return {
        "made": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def write_stablehlo(
    folder: epath.Path,
    network: Network,
    variables: Variables,
    detector: Detector,
    canvases: Sequence[tuple[int, int]],
    about: Mapping[str, Any],
) -> None:
    """Writes a folder.

    Args:
        folder: to write into, local or gs://; made if needed.
        network: the network.
        variables: its weights.
        detector: turns its outputs into detections.
        canvases: (height, width) of images, in pixels: a program each.
        about: what `export.json` says besides how the programs were made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = weights_of(variables)
    run = jax.jit(program(network, detector, "detections"))
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}
    convention = 0
    for canvas in canvases:
        exported = jax.export.export(run, platforms=PLATFORMS)(shapes, *arguments(canvas))
        convention = exported.calling_convention_version
        write(folder / _file(canvas), bytes(exported.serialize()))
    said = {**stamp(), "calling_convention": convention, "platforms": list(PLATFORMS)}
    said |= {"canvases": [list(canvas) for canvas in canvases], **about}
    write(folder / WEIGHTS, safetensors.numpy.save(weights))
    write(folder / ABOUT, json.dumps(said, indent=1, ensure_ascii=False))


class Exported:
    """The programs of such a folder. Call it with canvases of images.

    Attributes:
        about: what `export.json` says: class names, how images are resized, who made it.
    """

    def __init__(self, folder: PathLike):
        """Reads a folder.

        Raises:
            MissingFileError: a file is missing.
            InputError: it is damaged, or this version of JAX need not run it.
        """
        place = as_path(folder)
        self.about = _read_about(place)
        refuse(self.about, place)
        try:
            with naming(place / WEIGHTS):
                self._weights = jax.device_put(safetensors.numpy.load(_read(place / WEIGHTS)))
        except safetensors.SafetensorError as error:
            raise InputError(f"{place / WEIGHTS} is damaged: {error}") from error
        self._programs = {
            tuple(canvas): _program(place / _file(canvas)) for canvas in self.about["canvases"]
        }

    def __call__(self, images: np.ndarray, sizes: np.ndarray, scales: np.ndarray) -> Detections:
        """Detections in pixels of the original images.

        Args:
            images: uint8 RGB [b, height, width, 3]: each image in the upper left corner of a
                canvas.
            sizes: int32 [b, 2], height and width of each.
            scales: float32 [b, 2], canvas pixels per original pixel in x and y.

        Raises:
            InputError: there is no program for canvases of this size.
        """
        canvas = tuple(images.shape[1:3])
        if canvas not in self._programs:
            known = ", ".join(f"{h} x {w}" for h, w in self._programs)
            raise InputError(
                f"images are {canvas[0]} x {canvas[1]} (height x width), but was exported for "
                f"{known}: pad them, or export again with --canvas"
            )
        return Detections(**self._programs[canvas](self._weights, images, sizes, scales))


def is_stablehlo(folder: epath.Path) -> bool:
    """Whether this is such a folder."""
    return (folder / ABOUT).exists()


def refuse(about: Mapping[str, Any], folder: PathLike) -> None:
    """Raises an error if JAX does not promise to run what another version exported.

    The age is counted from the day of the export: packages do not say when they were built.

    Args:
        about: what `export.json` says.
        folder: where, for the error.

    Raises:
        InputError: it is too old, too new, or called differently.
    """
    again = "export it again from its run, or install the jax and jaxlib that made it"
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    if not low <= about["calling_convention"] <= high:
        raise InputError(
            f"{folder} has calling convention {about['calling_convention']}, but jax "
            f"{jax.__version__} runs {low} to {high}: {again} ({about['jax']})"
        )
    theirs, ours = _numbers(about["jaxlib"]), _numbers(jaxlib.__version__)
    if theirs > ours:
        raise InputError(
            f"{folder} was made by jaxlib {about['jaxlib']}, which is newer than this one, "
            f"{jaxlib.__version__}: update jax, or {again}"
        )
    age = (datetime.date.today() - datetime.date.fromisoformat(about["made"])).days
    if theirs < ours and age > DAYS:
        raise InputError(
            f"{folder} was made {age} days ago by jaxlib {about['jaxlib']}; jaxlib "
            f"{jaxlib.__version__} promises to run only what is at most {DAYS} days old: {again}"
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


def _file(canvas: Sequence[int]) -> str:
    return f"{canvas[0]}x{canvas[1]}.jax_export"


def _read(file: epath.Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise MissingFileError(f"{file}: there is no such file") from error


def _read_about(folder: epath.Path) -> dict[str, Any]:
    file = folder / ABOUT
    try:
        about = json.loads(_read(file))
        datetime.date.fromisoformat(about["made"])
        assert isinstance(about["calling_convention"], int) and about["jax"] and about["canvases"]
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise InputError(
            f"{file} does not describe an export of this project: {error!r}"
        ) from error
    return about


def _program(file: epath.Path) -> Any:
    data = _read(file)
    try:
        return jax.jit(jax.export.deserialize(bytearray(data)).call)
    except Exception as error:  # flatbuffers raises whatever a damaged offset leads to
        raise InputError(f"{file} is damaged: {error!r}") from error

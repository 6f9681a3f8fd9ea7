"""A trained detector as files to copy, share and run elsewhere.

gfl-jax export RUN -o DIR
"""

from typing import Annotated, Any, Literal

import tyro

from gfl_jax.data.images import canvases_of
from gfl_jax.errors import InputError, UsageError
from gfl_jax.interop.convert import export_checkpoint
from gfl_jax.interop.exported import is_exported, write_exported
from gfl_jax.interop.programs import INPUTS, OUTPUTS, Output
from gfl_jax.interop.stablehlo import is_stablehlo, stamp, write_stablehlo
from gfl_jax.paths import as_path, local_path, write, writing
from gfl_jax.run import Run, exported_about, load

Format = Literal["safetensors", "mmdet", "stablehlo", "onnx"]


def main(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])],
    format: Format = "safetensors",
    canvas: tuple[int, int] | None = None,
    onnx_output: Output = "detections",
) -> None:
    """Writes a trained detector for other programs; docs/export.md shows how they run it.

    Args:
        run: a work directory, a folder of checkpoints or of `export`, a .pth or .safetensors file,
            or hf://OWNER/NAME.
        out: the folder to make, local or gs://; for mmdet the .pth file to write.
        format: 'safetensors': a folder with `config.json` and `model.safetensors`, which
            `gfl_jax.load`, `predict` and `eval` open. 'mmdet': a .pth for mmdetection 3.x.
            'stablehlo': a folder of programs for JAX on CPUs, GPUs and TPUs, and their weights.
            'onnx': a folder of .onnx files with weights, for other runtimes.
        canvas: for stablehlo and onnx: height and width of the padded images, multiples of 32.
            None: those that the run's images are resized to, upright and sideways.
        onnx_output: for onnx: 'raw' outputs of the head, 'boxes' and scores of every prior, or
            'detections' after NMS.

    Raises:
        InputError: it exists already, or cannot be written in this format.
        UsageError: flags that belong to another format.
    """
    if onnx_output != "detections" and format != "onnx":
        raise UsageError(f"--onnx-output {onnx_output} is for --format onnx, not {format}")
    if canvas and format not in ("stablehlo", "onnx"):
        raise UsageError(f"--canvas is for --format stablehlo and onnx, not {format}")
    if format == "mmdet":
        file = local_path(out, "--out")
        if file.suffix != ".pth":
            raise UsageError(f"--format mmdet writes a file: --out must end in .pth, it is {out}")
        print(f"{export_checkpoint(run, file)} arrays of {run} written to {file}")
        return
    folder = as_path(out)
    if is_exported(folder) or is_stablehlo(folder) or (folder / "checkpoints").exists():
        raise InputError(f"{folder} already holds a detector; choose a new folder")
    detector = load(run)
    write_format = {
        "safetensors": _safetensors,
        "stablehlo": _stablehlo,
        "onnx": _onnx,
    }[format]
    write_format(folder, detector, _canvases(detector, canvas), onnx_output)


def _safetensors(folder: Any, run: Run, canvases: Any, output: Output) -> None:
    about = exported_about(run)
    write_exported(folder, about, run.network, run.variables, run.experiment.detector)
    print(f'{folder} written: gfl_jax.load("{folder}") or gfl-jax predict --weights {folder} ...')


def _stablehlo(folder: Any, run: Run, canvases: Any, output: Output) -> None:
    about = _about(run) | {"inputs": INPUTS, "outputs": OUTPUTS["detections"]}
    write_stablehlo(folder, run.network, run.variables, run.experiment.detector, canvases, about)
    sizes = ", ".join(f"{height} x {width}" for height, width in canvases)
    print(f"{folder} written: programs for images of {sizes} (height x width), and their weights")


def _onnx(folder: Any, run: Run, canvases: Any, output: Output) -> None:
    from gfl_jax.interop.onnx_file import onnx_model

    about = stamp() | _about(run)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for canvas in canvases:
        file = folder / f"{canvas[0]}x{canvas[1]}_{output}.onnx"
        if file.exists():
            raise InputError(f"{file} exists already; choose a new folder")
        model = onnx_model(
            run.network, run.variables, run.experiment.detector, canvas, output, about
        )
        write(file, model.SerializeToString())
        print(f"{file} written")


def _canvases(run: Run, asked: tuple[int, int] | None) -> tuple[tuple[int, int], ...]:
    """(height, width) of the images that programs are made for."""
    data = run.experiment.data.for_evaluation()
    if asked is None:
        long_side, short_side = data.scale
        return canvases_of(data.scale) if data.keep_ratio else ((short_side, long_side),)
    if any(side < 32 or side % 32 for side in asked):
        raise UsageError(f"--canvas {asked[0]} {asked[1]}: sides must be multiples of 32")
    return (asked,)


def _about(run: Run) -> dict[str, Any]:
    """What whoever runs a program must know."""
    data = run.experiment.data.for_evaluation()
    return {
        "classes": run.category_names,
        "category_ids": run.category_ids,
        "resize": {
            "long_side": data.scale[0],
            "short_side": data.scale[1],
            "keep_ratio": data.keep_ratio,
            "interpolation": "bilinear, half-pixel centres, to uint8",
        },
    }


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax export, or python -m gfl_jax export")

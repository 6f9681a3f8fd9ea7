"""A trained detector as a folder to copy and share.

gfl-jax export RUN -o DIR
"""

from typing import Annotated, Literal

import tyro

from gfl_jax.errors import InputError
from gfl_jax.interop.convert import export_checkpoint
from gfl_jax.interop.exported import is_exported, write_exported
from gfl_jax.paths import as_path, local_path
from gfl_jax.run import describe, load

Format = Literal["safetensors", "mmdet"]


def main(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    out: Annotated[str, tyro.conf.arg(aliases=["-o"])],
    format: Format = "safetensors",
) -> None:
    """Writes a trained detector for other programs.

    Args:
        run: a work directory, a folder of checkpoints or of `export`, a .pth or .safetensors file,
            or hf://OWNER/NAME.
        out: the folder to make, local or gs://; for mmdet the .pth file to write.
        format: 'safetensors': a folder with `config.json` and `model.safetensors`, which
            `gfl_jax.load`, `predict` and `eval` open. 'mmdet': a .pth for mmdetection 3.x.

    Raises:
        InputError: it exists already.
    """
    if format == "mmdet":
        file = local_path(out, "--out")
        print(f"{export_checkpoint(run, file)} arrays of {run} written to {file}")
        return
    folder = as_path(out)
    if is_exported(folder) or (folder / "checkpoints").exists():
        raise InputError(f"{folder} already holds a detector; choose a new folder")
    detector = load(run)
    about = describe(detector.experiment, detector.category_ids, detector.category_names)
    write_exported(
        folder,
        about | {"step": detector.step, "temperature": detector.temperature},
        detector.network,
        detector.variables,
        detector.experiment.detector,
    )
    print(f'{folder} written: gfl_jax.load("{folder}") or gfl-jax predict --weights {folder} ...')


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax export, or python -m gfl_jax export")

"""PyTorch checkpoints in and out: `gfl-jax convert SRC DST`.

From PyTorch: SRC is a .pth or .safetensors file from mmdetection (2.x or 3.x) with a GFL, ATSS,
FCOS, FoveaBox, RetinaNet or SSD512; or a ResNet, alone or in a classifier or another detector, or
SSD's VGG-16, which get a random neck and head. DST becomes a work directory with a checkpoint at
step 0: `gfl-jax eval DST` evaluates it, `gfl-jax train CONFIG --workdir DST` continues from it.

To PyTorch: SRC is a work directory or a folder of checkpoints, DST a new .pth file with the names
and layouts of mmdetection 3.x (needs torch). What was imported is exported bit by bit. The file
also holds the experiment, so that detectors without a counterpart in mmdetection can be read back.
"""

import io
import json
import warnings
from pathlib import Path
from typing import Annotated, NamedTuple, cast

import jax
import numpy as np
import tyro
from etils import epath

from gfl_jax.cli import load_experiment
from gfl_jax.config import Experiment, to_dict
from gfl_jax.errors import InputError, naming, needs
from gfl_jax.interop.classes import Classes, classes_in, classes_of, in_order, some
from gfl_jax.interop.detector_file import detector_from, state_dict
from gfl_jax.interop.mmdet_text import (
    PIXELS,
    as_said,
    config_in,
    fields_said,
)
from gfl_jax.interop.names import in_short
from gfl_jax.interop.parts import backbone_part, detector_part
from gfl_jax.interop.pretrained import load_pretrained
from gfl_jax.interop.recognize import (
    around_backbone,
)
from gfl_jax.interop.torch_files import TorchFile, read_torch_file
from gfl_jax.models.network import Network
from gfl_jax.paths import PathLike, as_path, local_path, write, writing
from gfl_jax.run import describe, load
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import init_state, sgd


class Converted(NamedTuple):
    """What became of a PyTorch file.

    Attributes:
        experiment: the detector.
        arrays: how many were taken over.
        part: what of the file they are.
        left_out: names of the arrays that were not taken over.
    """

    experiment: Experiment
    arrays: int
    part: str
    left_out: list[str]


def import_checkpoint(
    source: Path,
    folder: Path | epath.Path,
    config: str = "",
    annotations: str = "",
    ema: bool = False,
) -> Converted:
    """Makes `folder` a work directory whose checkpoint, at step 0, is the file `source`.

    Args:
        source: a detector or a backbone, or what contains one.
        folder: to be made.
        config: file of the experiment, otherwise inferred from the file.
        annotations: COCO json whose categories are the classes; those that the file names are
            mapped to them by name.
        ema: whether to take the arrays that the file calls ema.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds code, its arrays are not exactly those of the model, or
            its classes or config contradict what is given.
    """
    kept = folder / "checkpoints"
    if kept.exists() and any(child.name.isdigit() for child in kept.iterdir()):
        raise InputError(f"{folder} already holds checkpoints; choose a new folder")
    content = read_torch_file(source)
    with naming(source):
        return _import(content, source, folder, config, annotations, ema)


def _import(
    content: TorchFile,
    source: Path,
    folder: Path | epath.Path,
    config: str,
    annotations: str,
    ema: bool,
) -> Converted:
    """As `import_checkpoint`, of a file that was read."""
    classes = classes_of(annotations) if annotations else None
    part = detector_part(content.arrays, ema=ema)
    if part:
        named = classes_in(content.meta)
        classes = _classes(named, classes, source, annotations)
        chosen = load_experiment(config) if config else None
        experiment, num_classes, network, variables, *_ = detector_from(
            part.arrays, content.meta, source, chosen
        )
        if num_classes != len(classes.names):
            raise InputError(
                f"{source} has outputs for {num_classes} classes, but "
                f"{'it' if named else annotations} names {len(classes.names)}: "
                f"{some(classes.names)}"
            )
        if named:
            variables = in_order(experiment, network, variables, named.names, classes.names)
    else:
        part = backbone_part(content.arrays, ema=ema)
        if classes is None:
            raise InputError(
                f"{source} holds a backbone alone: pass --annotations FILE, a COCO json whose "
                "categories are the classes of the detector around it"
            )
        said = fields_said(config_in(content.meta))
        pixels = {name: said[name] for name in PIXELS if name in said}
        experiment = (
            load_experiment(config) if config else as_said(around_backbone(part.arrays), pixels)
        )
        model = experiment.model.with_pretrained(str(source))
        network = Network(model, experiment.detector.predicts(len(classes.names)))
        variables = load_pretrained(network, network.init(experiment.train.seed), ema=ema)
    bad = [name for name, array in part.arrays.items() if not np.isfinite(array).all()]
    if bad:
        warnings.warn(f"{source} holds NaN or infinity in {in_short(bad)}", stacklevel=2)
    state = init_state(variables, sgd(experiment.train, lambda step: 0.0), experiment.train)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(0, jax.tree.map(np.asarray, state).items(), describe(experiment, *classes))
    return Converted(experiment, len(part.arrays), part.what, part.left_out)


def _classes(
    named: Classes | None, given: Classes | None, source: Path, annotations: str
) -> Classes:
    """The classes of a detector's labels, by what the file and the annotations say."""
    if named is None and given is None:
        raise InputError(
            f"{source} does not name its classes: pass --annotations FILE, a COCO json with these "
            "categories"
        )
    if given is None:
        return cast(Classes, named)
    if named is None:
        warnings.warn(
            f"{source} does not name its classes: they are taken to be "
            f"{some(given.names)}, by the ids of {annotations}",
            stacklevel=2,
        )
    elif sorted(named.names) != sorted(given.names):
        raise InputError(
            f"{source} was trained on {some(named.names)}, {annotations} has {some(given.names)}: "
            "the same names are needed. To train this detector on other classes: "
            f"gfl-jax train --model.init-from {source}"
        )
    return given


def export_checkpoint(source: PathLike, file: Path) -> int:
    """Writes the best checkpoint of a folder (without one, the newest) as a .pth for mmdet 3.x.

    Returns:
        The number of arrays written.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        InputError: the file exists.
        MissingExtraError: torch is not installed.
    """
    if file.exists():
        raise InputError(f"{file} already exists; choose a new file")
    with needs("torch"):
        import torch
    run = load(source)
    arrays = state_dict(run.network, run.variables, run.experiment.detector)
    meta = {
        "dataset_meta": {
            "classes": tuple(run.category_names),
            "category_ids": tuple(run.category_ids),
        },
        "gfl_jax": json.dumps(to_dict(run.experiment)),
        "gfl_jax_temperature": float(run.temperature),
    }
    content = {"meta": meta, "state_dict": {k: torch.from_numpy(v) for k, v in arrays.items()}}
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    saved = io.BytesIO()
    torch.save(content, saved)
    write(file, saved.getvalue())
    return len(arrays)


def main(
    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")],
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")],
    config: str = "",
    annotations: str = "",
    ema: bool = False,
) -> None:
    """Converts a PyTorch checkpoint to one of this project, or back.

    Args:
        src: a local .pth or .safetensors file; or a work directory or folder of checkpoints, local
            or gs://.
        dst: the work directory to make, local or gs://; or the local .pth file to write.
        config: config of the model, if it cannot be inferred from the file.
        annotations: COCO json whose categories are the classes, which get its ids and order. Those
            that the file names must be the same.
        ema: take the arrays whose names in the file say ema, instead of the others.
    """
    if as_path(src).is_dir():
        file = local_path(dst, "DST")
        if file.suffix != ".pth":
            raise InputError(f"{src} is a folder, so DST must be a .pth file; it is {dst}")
        print(f"{export_checkpoint(src, file)} arrays of {src} written to {file}")
        return
    weights = local_path(src, "SRC")
    converted = import_checkpoint(weights, as_path(dst), config, annotations, ema)
    if converted.part == "backbone":
        print(f"{src} holds no detector of this project: neck and head of {dst} are random")
    if converted.left_out:
        print(f"left out: {in_short(converted.left_out)}")
    print(
        f"{converted.arrays} arrays of the {converted.part} in {src}, all used, none "
        f"missing: step 0 of {dst}\n{converted.experiment.model}\n{converted.experiment.detector}\n"
        f"next: gfl-jax eval {dst} --data.root FOLDER"
    )


if __name__ == "__main__":
    raise SystemExit("run it as: gfl-jax convert, or python -m gfl_jax convert")

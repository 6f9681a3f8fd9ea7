"""PyTorch checkpoints in and out: `python -m gfl_jax.interop.convert SRC DST`.

SRC a .pth or .safetensors file, DST a folder: a detector of mmdetection (2.x or 3.x), or a
torchvision or timm backbone that gets a random neck and head. DST becomes a work directory whose
checkpoint is step 0: `python eval.py DST` evaluates it, `python train.py CONFIG --workdir DST`
trains on from it.

SRC a work directory or a folder of checkpoints, DST a new .pth file: written as mmdetection 3.x
names and lays out its arrays (needs torch). What came in comes out bit by bit.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from gfl_jax.config import Experiment, from_dict, load_experiment, to_dict
from gfl_jax.detectors.dense import Detector, GeneralDistribution
from gfl_jax.host import plain_errors
from gfl_jax.interop.names import load_state_dict, to_torch, torch_name
from gfl_jax.interop.torch_files import read_torch_file
from gfl_jax.models.network import Backbone, Model, Network, Variables
from gfl_jax.models.resnet import BLOCKS
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.loop import abstract_state
from gfl_jax.training.step import init_state, sgd

_OLD_NAMES = {
    r"bbox_head\.(?:fcos|fovea)_(cls|reg|centerness)\.": r"bbox_head.conv_\1.",
    r"(?:backbone|bbox_head)\.l2_norm\.": "neck.l2_norm.",
}
"""Names of mmdetection 2.x and what they are called since."""


def modern_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays under the names of mmdetection 3.x."""

    def renamed(name: str) -> str:
        for old, new in _OLD_NAMES.items():
            name = re.sub(f"^{old}", new, name)
        return name

    return {renamed(name): array for name, array in arrays.items()}


def infer_experiment(arrays: Mapping[str, np.ndarray]) -> tuple[Experiment, int]:
    """The experiment that a detector's arrays belong to, and its number of classes.

    What arrays do not show (the schedule, thresholds, colours) is as in the configs for COCO.

    Raises:
        ValueError: no detector of this project has such arrays.
    """
    heads = sorted({name.split(".")[1] for name in arrays if name.startswith("bbox_head.")})
    if "bbox_head.gfl_cls.weight" not in arrays:
        raise ValueError(
            f"no detector of this project: its bbox_head has {', '.join(heads) or 'nothing'}; "
            "GFL has gfl_cls and gfl_reg"
        )

    def shape(name: str) -> tuple[int, ...]:
        if name not in arrays or arrays[name].ndim != 4:
            raise ValueError(f"{name} is missing or no kernel of a convolution")
        return arrays[name].shape

    def count(prefix: str) -> int:
        return len({n.removeprefix(prefix).split(".")[0] for n in arrays if n.startswith(prefix)})

    project = arrays.get("bbox_head.integral.project", np.arange(2.0))
    model = Model(
        backbone=_infer_backbone(arrays, "backbone."),
        fpn_width=shape("neck.lateral_convs.0.conv.weight")[0],
        head_width=shape("bbox_head.gfl_cls.weight")[1],
        stacked_convs=count("bbox_head.cls_convs."),
    )
    box = GeneralDistribution(shape("bbox_head.gfl_reg.weight")[0] // 4 - 1, float(project[1]))
    experiment = Experiment(model=model, detector=Detector(box=box))
    return experiment, shape("bbox_head.gfl_cls.weight")[0]


def _infer_backbone(arrays: Mapping[str, np.ndarray], prefix: str) -> Backbone:
    stages = [
        len({name.split(".")[1] for name in names})
        for stage in range(1, 5)
        if (names := [n[len(prefix) :] for n in arrays if n.startswith(f"{prefix}layer{stage}.")])
    ]
    bottleneck = f"{prefix}layer1.0.conv3.weight" in arrays
    stem = arrays.get(f"{prefix}conv1.weight", np.zeros(0))
    for depth, blocks in BLOCKS.items():
        if tuple(stages) == blocks and bottleneck == (depth >= 50):
            return Backbone(depth=depth, width=len(stem))
    raise ValueError(
        f"no ResNet of this project: it has stages of {stages or 'no'} blocks; there are "
        + ", ".join(f"{depth}: {blocks}" for depth, blocks in BLOCKS.items())
    )


def state_dict(network: Network, variables: Variables, detector: Detector) -> dict[str, np.ndarray]:
    """All arrays as mmdetection's state dict has them, buffers included, in torch's layout."""
    arrays: dict[str, np.ndarray] = {}
    for path, array in network.by_path(variables).items():
        name = torch_name(path)
        arrays[name] = to_torch(path, array)
        if name.endswith("running_var"):
            arrays[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    bins = np.arange(detector.box.n + 1, dtype=np.float32)
    return arrays | {"bbox_head.integral.project": bins * np.float32(detector.box.delta)}


def read_detector(source: Path, config: str = "") -> tuple[Experiment, Network, Variables]:
    """A detector from a PyTorch file: its experiment, network and arrays.

    Args:
        source: .pth or .safetensors file.
        config: file of the experiment, otherwise the one that this project wrote into the file, or
            what the arrays tell.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds code, or its arrays are not exactly those of the model;
            every missing, unexpected or misshapen one is named.
    """
    arrays, meta = read_torch_file(source)
    return _detector(arrays, meta, source, config)


def _detector(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], source: Path, config: str
) -> tuple[Experiment, Network, Variables]:
    arrays = modern_names(arrays)
    experiment, num_classes = infer_experiment(arrays)
    if config:
        experiment = load_experiment(config)
    elif isinstance(meta.get("gfl_jax"), str):
        experiment = from_dict(Experiment, json.loads(meta["gfl_jax"]))
    network = Network(experiment.model, num_classes, experiment.detector.box.channels)
    abstract = jax.eval_shape(lambda: network.init(0))
    loaded, report = load_state_dict(
        network.by_path(abstract), arrays, ignore=(r"bbox_head\.integral\.project",)
    )
    report.raise_if_any(source)
    return experiment, network, network.replaced(abstract, loaded)


def import_checkpoint(
    source: Path, folder: Path, config: str = "", annotations: str = ""
) -> tuple[Experiment, int]:
    """Makes `folder` a work directory whose checkpoint, step 0, is that of the file `source`.

    Args:
        source: a detector or a backbone.
        folder: to be made.
        config: file of the experiment, otherwise told from the arrays.
        annotations: COCO json whose categories are the classes, where the file does not say.

    Returns:
        The experiment and the number of arrays read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds code, or its arrays are not exactly those of the model;
            every missing, unexpected or misshapen one is named.
    """
    if (folder / "checkpoints").exists():
        raise ValueError(f"{folder} already holds checkpoints; name a new folder")
    arrays, meta = read_torch_file(source)
    about = _categories(meta, annotations)
    count = len(about["category_names"])
    if any(name.startswith("bbox_head.") for name in arrays):
        experiment, network, variables = _detector(arrays, meta, source, config)
        if (classes := variables.params["bbox_head.gfl_cls.bias"].size) != count:
            raise ValueError(f"{source} has {classes} classes, the categories given are {count}")
    else:
        experiment = (
            load_experiment(config) if config else Experiment(Model(_infer_backbone(arrays, "")))
        )
        backbone = dataclasses.replace(experiment.model.backbone, pretrained=str(source))
        model = dataclasses.replace(experiment.model, backbone=backbone)
        network = Network(model, count, experiment.detector.box.channels)
        variables = network.load_pretrained(network.init(experiment.train.seed))
    state = init_state(variables, sgd(experiment.train, lambda step: 0.0), experiment.train)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, jax.tree.map(np.asarray, state), experiment, about)
    checkpoints.close()
    return experiment, len(arrays)


def _categories(meta: Mapping[str, Any], annotations: str) -> dict[str, Any]:
    """`category_ids` and `category_names` as checkpoints keep them."""
    if annotations:
        categories = json.loads(Path(annotations).read_bytes())["categories"]
        pairs = sorted((category["id"], category["name"]) for category in categories)
        return {"category_ids": [i for i, _ in pairs], "category_names": [n for _, n in pairs]}
    dataset = meta.get("dataset_meta")
    for holder in (meta, dataset if isinstance(dataset, dict) else {}):
        for names in (holder.get("classes"), holder.get("CLASSES")):
            if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
                ids = holder.get("category_ids", range(1, len(names) + 1))
                return {"category_ids": list(ids), "category_names": list(names)}
    raise ValueError(
        "the file does not name its classes: pass --annotations FILE, a COCO json whose categories "
        "they are"
    )


def export_checkpoint(source: Path, file: Path) -> int:
    """Writes the best (or only) checkpoint of a folder as a .pth for mmdetection 3.x.

    Returns:
        The number of arrays written.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: the file exists, or torch is missing.
    """
    if file.exists():
        raise ValueError(f"{file} exists; name a new file")
    try:
        import torch
    except ImportError as error:
        raise ValueError("writing a .pth needs torch: pip install torch") from error
    checkpoints = Checkpoints.find(source)
    experiment, about = checkpoints.about()
    names = about["category_names"]
    network = Network(experiment.model, len(names), experiment.detector.box.channels)
    variables = checkpoints.restore(
        abstract_state(network, experiment.train), experiment
    ).evaluated()
    arrays = state_dict(network, variables, experiment.detector)
    meta = {
        "dataset_meta": {"classes": tuple(names), "category_ids": tuple(about["category_ids"])},
        "gfl_jax": json.dumps(to_dict(experiment)),
    }
    content = {"meta": meta, "state_dict": {k: torch.from_numpy(v) for k, v in arrays.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".partial")
    torch.save(content, temporary)
    temporary.replace(file)
    return len(arrays)


def main(
    src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")],
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")],
    config: str = "",
    annotations: str = "",
) -> None:
    """Converts a PyTorch checkpoint to one of this project, or back.

    Args:
        src: a .pth or .safetensors file; or a work directory or folder of checkpoints.
        dst: the work directory to make; or the .pth file to write.
        config: config of the model, where the arrays alone do not tell it.
        annotations: COCO json whose categories are the classes, where the file does not name them.
    """
    if src.is_dir():
        if dst.suffix != ".pth":
            raise ValueError(f"{src} is a folder, so that DST must be a .pth file; it is {dst}")
        print(f"{export_checkpoint(src, dst)} arrays of {src} written to {dst}")
    else:
        experiment, count = import_checkpoint(src, dst, config, annotations)
        print(
            f"{count} arrays of {src}, every one used, none missing: step 0 of {dst}\n"
            f"{experiment.model}\n{experiment.detector}\n"
            f"next: python eval.py {dst} --data.root FOLDER"
        )


if __name__ == "__main__":
    with plain_errors():
        tyro.cli(main, prog="python -m gfl_jax.interop.convert", description=__doc__)

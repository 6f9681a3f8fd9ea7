"""PyTorch checkpoints in and out: `gfl-jax convert SRC DST`.

From PyTorch: SRC is a .pth or .safetensors file from mmdetection (2.x or 3.x) with a GFL, ATSS,
FCOS, FoveaBox, RetinaNet or SSD512; or a torchvision or timm ResNet or SSD's VGG-16, which get a
random neck and head. DST becomes a work directory with a checkpoint at step 0: `gfl-jax eval DST`
evaluates it, `gfl-jax train CONFIG --workdir DST` continues from it.

To PyTorch: SRC is a work directory or a folder of checkpoints, DST a new .pth file with the names
and layouts of mmdetection 3.x (needs torch). What was imported is exported bit by bit. The file
also holds the experiment, so that detectors without a counterpart in mmdetection can be read back.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import jax
import numpy as np
import tyro
from etils import epath

from gfl_jax import systems
from gfl_jax.cli import load_experiment
from gfl_jax.config import Experiment, from_dict, to_dict
from gfl_jax.detectors.box import GeneralDistribution
from gfl_jax.detectors.dense import Detector
from gfl_jax.errors import InputError, needs
from gfl_jax.interop.names import load_state_dict, to_torch, torch_name
from gfl_jax.interop.pretrained import load_pretrained
from gfl_jax.interop.torch_files import read_torch_file
from gfl_jax.models.network import Backbone, Model, Network, Variables
from gfl_jax.models.resnet import BLOCKS
from gfl_jax.paths import PathLike, as_path, local_path
from gfl_jax.run import describe, load
from gfl_jax.training.checkpoint import Checkpoints
from gfl_jax.training.step import init_state, sgd

_OLD_NAMES = {
    r"bbox_head\.(?:fcos|fovea)_(cls|reg|centerness)\.": r"bbox_head.conv_\1.",
    r"(?:backbone|bbox_head)\.l2_norm\.": "neck.l2_norm.",
    r"bbox_head\.(cls|reg)_convs\.(\d+)\.(weight|bias)$": r"bbox_head.\1_convs.\2.0.\3",
}
"""Names in mmdetection 2.x, and their replacements in 3.x."""


def modern_names(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same arrays under their names in mmdetection 3.x."""

    def renamed(name: str) -> str:
        for old, new in _OLD_NAMES.items():
            name = re.sub(f"^{old}", new, name)
        # SSD's extra levels, two convolutions each, were one list.
        if extra := re.match(r"backbone\.extra\.(\d+)\.(.*)", name):
            level, conv = divmod(int(extra[1]), 2)
            return f"neck.extra_layers.{level}.{conv}.conv.{extra[2]}"
        return name

    return {renamed(name): array for name, array in arrays.items()}


def infer_experiment(arrays: Mapping[str, np.ndarray]) -> Experiment:
    """The experiment that a detector's arrays belong to: one of `gfl_jax.systems`, in their sizes.

    What the arrays do not show (schedule, thresholds, colours, where bottlenecks stride) is as in
    that system.

    Raises:
        ValueError: no detector of this project has such arrays.
    """
    if "backbone.features.0.weight" in arrays:
        width = _shape(arrays, "backbone.features.0.weight")[0]
        return systems.variant(systems.ssd512, model={"width": width})
    heads = {name.split(".")[1] for name in arrays if re.match(r"bbox_head\..*\.weight$", name)}
    if "gfl_cls" in heads:
        system = systems.gfl
    elif {"atss_cls", "atss_centerness"} <= heads:
        system = systems.atss
    elif {"conv_cls", "conv_centerness"} <= heads:
        biased = "bbox_head.cls_convs.0.conv.bias" in arrays
        system = systems.fcos_improved if biased else systems.fcos
    elif "conv_cls" in heads and "bbox_head.cls_convs.0.gn.weight" not in arrays:
        system = systems.foveabox
    elif "retina_cls" in heads:
        system = systems.retinanet
    else:
        raise InputError(
            "not a detector this project knows: its bbox_head has "
            f"{', '.join(sorted(heads)) or 'nothing'}; there are GFL (gfl_cls), ATSS (atss_cls, "
            "atss_centerness), FCOS (conv_cls, conv_centerness), FoveaBox (conv_cls, no gn), "
            "RetinaNet (retina_cls) and SSD512 (backbone.features); pass the config of a variant "
            "as --config"
        )

    model = cast(Model, system.model)
    stacked = {n.split(".")[2] for n in arrays if n.startswith("bbox_head.cls_convs.")}
    depth, width = _infer_resnet(arrays, "backbone.")
    neck_width = _shape(arrays, "neck.lateral_convs.0.conv.weight")[0]
    head_width = _shape(arrays, f"bbox_head.{model.head.names}_cls.weight")[1]
    model = dataclasses.replace(
        model,
        backbone=dataclasses.replace(model.backbone, depth=depth, width=width),
        neck=dataclasses.replace(model.neck, width=neck_width),
        head=dataclasses.replace(model.head, width=head_width, stacked_convs=len(stacked)),
    )
    system = dataclasses.replace(system, model=model)
    if isinstance(system.detector.box, GeneralDistribution):
        project = arrays.get("bbox_head.integral.project", np.arange(2.0))
        n = _shape(arrays, "bbox_head.gfl_reg.weight")[0] // 4 - 1
        box = GeneralDistribution(n, float(project[1]))
        system = systems.variant(system, detector={"box": box})
    return system


def count_classes(arrays: Mapping[str, np.ndarray], experiment: Experiment) -> int:
    """The number of classes that the arrays of an experiment's detector have.

    Raises:
        ValueError: they do not belong to this detector.
    """
    model, detector = experiment.model, experiment.detector
    last = f"bbox_head.{model.cls_conv}.weight"
    channels = _shape(arrays, last)[0]
    classes, rest = divmod(channels, detector.priors.per_cell[0])
    if rest:
        raise InputError(
            f"{last} has {channels} channels, not a multiple of the "
            f"{detector.priors.per_cell[0]} priors per cell of {detector.priors}"
        )
    return classes - detector.classification.channels(0)


def _shape(arrays: Mapping[str, np.ndarray], name: str) -> tuple[int, ...]:
    if name not in arrays or arrays[name].ndim != 4:
        raise InputError(f"{name} is missing or not a convolution kernel")
    return arrays[name].shape


def _infer_resnet(arrays: Mapping[str, np.ndarray], prefix: str) -> tuple[int, int]:
    """Depth and width."""
    stages = [
        len({name.split(".")[1] for name in names})
        for stage in range(1, 5)
        if (names := [n[len(prefix) :] for n in arrays if n.startswith(f"{prefix}layer{stage}.")])
    ]
    bottleneck = f"{prefix}layer1.0.conv3.weight" in arrays
    stem = arrays.get(f"{prefix}conv1.weight", np.zeros(0))
    for depth, blocks in BLOCKS.items():
        if tuple(stages) == blocks and bottleneck == (depth >= 50):
            return depth, len(stem)
    raise InputError(
        f"not a ResNet of this project: it has stages of {stages or 'no'} blocks; there are "
        + ", ".join(f"{depth}: {blocks}" for depth, blocks in BLOCKS.items())
    )


def state_dict(network: Network, variables: Variables, detector: Detector) -> dict[str, np.ndarray]:
    """All arrays as in mmdetection's state dict, with buffers, in torch's layout."""
    arrays: dict[str, np.ndarray] = {}
    for path, array in network.by_path(variables).items():
        name = torch_name(path)
        arrays[name] = to_torch(path, array)
        if name.endswith("running_var"):
            arrays[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    if isinstance(detector.box, GeneralDistribution):
        bins = np.arange(detector.box.n + 1, dtype=np.float32)
        arrays["bbox_head.integral.project"] = bins * np.float32(detector.box.delta)
    return arrays


class Loaded(NamedTuple):
    """A detector from a PyTorch file."""

    experiment: Experiment
    num_classes: int
    network: Network
    variables: Variables


def read_detector(source: Path, config: str = "") -> Loaded:
    """A detector from a PyTorch file.

    Args:
        source: .pth or .safetensors file.
        config: file of the experiment; otherwise the one that this project wrote into the file, or
            the one inferred from the arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds code, or its arrays are not exactly those of the model;
            every missing, unexpected or misshapen one is named.
    """
    arrays, meta = read_torch_file(source)
    return _detector(arrays, meta, source, config)


def _detector(
    arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], source: Path, config: str
) -> Loaded:
    arrays = modern_names(arrays)
    if config:
        experiment = load_experiment(config)
    elif isinstance(meta.get("gfl_jax"), str):
        experiment = from_dict(Experiment, json.loads(meta["gfl_jax"]))
    else:
        experiment = infer_experiment(arrays)
    num_classes = count_classes(arrays, experiment)
    network = Network(experiment.model, experiment.detector.predicts(num_classes))
    abstract = jax.eval_shape(lambda: network.init(0))
    loaded, mismatch = load_state_dict(
        network.by_path(abstract), arrays, ignore=(r"bbox_head\.integral\.project",)
    )
    mismatch.raise_if_any(source)
    return Loaded(experiment, num_classes, network, network.replaced(abstract, loaded))


def import_checkpoint(
    source: Path, folder: Path | epath.Path, config: str = "", annotations: str = ""
) -> tuple[Experiment, int]:
    """Makes `folder` a work directory whose checkpoint, at step 0, is the file `source`.

    Args:
        source: a detector or a backbone.
        folder: to be made.
        config: file of the experiment; otherwise inferred from the arrays.
        annotations: COCO json whose categories are the classes, if the file does not name them.

    Returns:
        The experiment and the number of arrays read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds code, or its arrays are not exactly those of the model;
            every missing, unexpected or misshapen one is named.
    """
    if (folder / "checkpoints").exists():
        raise InputError(f"{folder} already holds checkpoints; choose a new folder")
    arrays, meta = read_torch_file(source)
    about = _categories(meta, annotations)
    count = len(about["category_names"])
    if any(name.startswith("bbox_head.") for name in arrays):
        experiment, classes, network, variables = _detector(arrays, meta, source, config)
        if classes != count:
            raise InputError(f"{source} has {classes} classes, but {count} categories are given")
    else:
        experiment = load_experiment(config) if config else _around_backbone(arrays)
        model = experiment.model.with_pretrained(str(source))
        network = Network(model, experiment.detector.predicts(count))
        variables = load_pretrained(network, network.init(experiment.train.seed))
    state = init_state(variables, sgd(experiment.train, lambda step: 0.0), experiment.train)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        categories = about["category_ids"], about["category_names"]
        checkpoints.save(
            0, jax.tree.map(np.asarray, state).items(), describe(experiment, *categories)
        )
    return experiment, len(arrays)


def _around_backbone(arrays: Mapping[str, np.ndarray]) -> Experiment:
    """SSD512 for a VGG-16, GFL for a ResNet."""
    if "features.0.weight" in arrays:
        width = _shape(arrays, "features.0.weight")[0]
        return systems.variant(systems.ssd512, model={"width": width})
    return Experiment(Model(Backbone(*_infer_resnet(arrays, ""))))


def _categories(meta: Mapping[str, Any], annotations: str) -> dict[str, Any]:
    """`category_ids` and `category_names` as checkpoints store them."""
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
    raise InputError(
        "the file does not name its classes: pass --annotations FILE, a COCO json with these "
        "categories"
    )


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
    }
    content = {"meta": meta, "state_dict": {k: torch.from_numpy(v) for k, v in arrays.items()}}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".partial")
    torch.save(content, temporary)
    temporary.replace(file)
    return len(arrays)


def main(
    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")],
    dst: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DST")],
    config: str = "",
    annotations: str = "",
) -> None:
    """Converts a PyTorch checkpoint to one of this project, or back.

    Args:
        src: a local .pth or .safetensors file; or a work directory or folder of checkpoints, local
            or gs://.
        dst: the work directory to make, local or gs://; or the local .pth file to write.
        config: config of the model, if it cannot be inferred from the arrays.
        annotations: COCO json whose categories are the classes, if the file does not name them.
    """
    if as_path(src).is_dir():
        file = local_path(dst, "DST")
        if file.suffix != ".pth":
            raise InputError(f"{src} is a folder, so DST must be a .pth file; it is {dst}")
        print(f"{export_checkpoint(src, file)} arrays of {src} written to {file}")
    else:
        weights = local_path(src, "SRC")
        experiment, count = import_checkpoint(weights, as_path(dst), config, annotations)
        print(
            f"{count} arrays of {src}, all used, none missing: step 0 of {dst}\n"
            f"{experiment.model}\n{experiment.detector}\n"
            f"next: gfl-jax eval {dst} --data.root FOLDER"
        )

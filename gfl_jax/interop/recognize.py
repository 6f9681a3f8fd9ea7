"""Tells from the names and shapes of PyTorch's arrays which detector they are."""

import dataclasses
import re
from collections.abc import Mapping
from typing import cast

import numpy as np

from gfl_jax import systems
from gfl_jax.config import Experiment
from gfl_jax.detectors.box import GeneralDistribution
from gfl_jax.errors import InputError
from gfl_jax.models.network import Backbone, Model
from gfl_jax.models.resnet import BLOCKS

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
        if project.ndim != 1 or len(project) < 2 or not 0 < project[1] < np.inf:
            raise InputError(f"bbox_head.integral.project is {project}, not [0, delta, ...]")
        box = GeneralDistribution(n, float(project[1]))
        system = systems.variant(system, detector={"box": box})
    return system


def count_classes(arrays: Mapping[str, np.ndarray], experiment: Experiment) -> int:
    """The number of classes that the arrays of an experiment's detector have.

    Raises:
        ValueError: they do not belong to this detector.
    """
    model, detector = experiment.model, experiment.detector
    last = f"bbox_head.{model.cls_convs[0]}.weight"
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
    for depth, blocks in BLOCKS.items():
        if tuple(stages) == blocks and bottleneck == (depth >= 50):
            return depth, _shape(arrays, f"{prefix}conv1.weight")[0]
    raise InputError(
        f"not a ResNet of this project: it has stages of {stages or 'no'} blocks; there are "
        + ", ".join(f"{depth}: {blocks}" for depth, blocks in BLOCKS.items())
    )


def is_vgg(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the backbone of a detector's arrays is a VGG, and no ResNet."""
    return "backbone.features.0.weight" in arrays


def backbone_in_words(arrays: Mapping[str, np.ndarray]) -> str:
    """The backbone of a detector's arrays: 'a ResNet-18 of width 64'."""
    if is_vgg(arrays):
        first = arrays["backbone.features.0.weight"]
        return f"a VGG of width {len(first)}" if first.ndim else "no VGG"
    try:
        return "a ResNet-{} of width {}".format(*_infer_resnet(arrays, "backbone."))
    except InputError:
        return "a backbone that is no ResNet of this project"


def around_backbone(arrays: Mapping[str, np.ndarray]) -> Experiment:
    """The experiment around a backbone's arrays: SSD512 for a VGG-16, GFL for a ResNet."""
    if "features.0.weight" in arrays:
        width = _shape(arrays, "features.0.weight")[0]
        return systems.variant(systems.ssd512, model={"width": width})
    return Experiment(Model(Backbone(*_infer_resnet(arrays, ""))))

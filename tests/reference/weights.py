"""The rule that the weights of the stored cases follow, so that they need not be stored."""

import re
import zlib

import numpy as np

CLASSIFIER = re.compile(
    r"bbox_head\.(gfl_cls|atss_cls|conv_cls|retina_cls|vfnet_cls|cls_convs\.\d+\.0)\.\w+$"
)
REGRESSOR = re.compile(
    r"bbox_head\.(gfl_reg|atss_reg|conv_reg|retina_reg|vfnet_reg\w*|reg_convs\.\d+\.0)\.\w+$"
)
CLASSIFIER_GAIN = {"retina_cls": 1.7, "cls_convs": 1.1}
REGRESSOR_GAIN = {"gfl_reg": 2.0, "atss_reg": 2.0, "conv_reg": 0.8, "retina_reg": 0.5}


def reference_param(
    name: str,
    shape: tuple[int, ...],
    seed: int,
    *,
    input_std: float = 1.0,
    box_bias: float = 0.0,
    basic_block: bool = False,
) -> np.ndarray:
    """An entry of a state dict in torch's layout, float32.

    Normal numbers from a generator that is seeded by seed and name, scaled so that features and
    outputs keep a useful size. Kernels have no mean over their inputs: the positive mean of ReLU
    features would otherwise make every output nearly constant.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.float32)
    if name.endswith("integral.project"):
        return np.arange(shape[0], dtype=np.float32)
    bits = np.random.PCG64(zlib.crc32(f"{seed}:{name}".encode()))
    n = np.random.Generator(bits).standard_normal(shape)
    cls, reg = CLASSIFIER.match(name), REGRESSOR.match(name)
    if leaf == "running_mean":
        value = 0.1 * n
    elif leaf == "running_var":
        value = np.exp(0.2 * n)
    elif leaf == "scale" or (leaf == "weight" and len(shape) == 1):
        value = 1 + 0.1 * n
        last = "bn2" if basic_block else "bn3"  # the norm that closes a residual branch
        if re.search(rf"layer\d+\.\d+\.{last}\.", name):
            value = 0.25 * value
        if "l2_norm" in name:
            value = 20 * value
    elif leaf == "weight":
        n = n - n.mean(axis=tuple(range(1, len(shape))), keepdims=True)
        if "lateral_convs" in name:
            gain = 0.35
        elif "fpn_convs" in name:
            gain = 1.0
        elif cls:
            gain = CLASSIFIER_GAIN.get(cls[1].split(".")[0], 2.0)
        elif reg:
            gain = REGRESSOR_GAIN.get(reg[1], 1.0)
        else:
            gain = 1.6
        value = gain * n / np.sqrt(np.prod(shape[1:]))
        if name in ("backbone.conv1.weight", "backbone.features.0.weight"):
            value = value / input_std
    else:
        value = 0.1 * n + (box_bias if name.endswith("conv_reg.bias") else 0.0)
        if cls and cls[1].startswith("cls_convs"):  # SSD: the background is the last of 81
            value = value + 8.4 * (np.arange(shape[0]) % 81 == 80)
        elif cls:
            value = value - 6.0
        elif name.endswith("gfl_reg.bias"):  # short distances are likelier
            value = value - 0.25 * (np.arange(shape[0]) % (shape[0] // 4))
    return value.astype(np.float32)

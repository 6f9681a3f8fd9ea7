"""Finds a detector or a backbone among the arrays of a PyTorch file.

Wrappers put `module.`, `model.` or `_orig_mod.` before all of them, classifiers and other detectors
hold a backbone beside a head that is none of ours, and averaged weights stand as a twin beside the
raw ones: `ema_backbone_conv1_weight`, or `ema_model.backbone.conv1.weight`.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from gfl_jax.errors import InputError
from gfl_jax.interop.names import in_short

_BACKBONES = {
    r"(.*?)layer1\.0\.conv1\.weight": r"(conv1|bn1|layer\d+)\.",
    r"(.*?)features\.0\.weight": r"features\.",
}
"""A name that a backbone has, by which it is found, and how all of its names begin."""


class Part(NamedTuple):
    """The arrays of a network, and what else the file holds.

    Attributes:
        what: 'detector' or 'backbone'.
        arrays: by name, without what stood before.
        left_out: all other names of the file.
    """

    what: str
    arrays: dict[str, np.ndarray]
    left_out: list[str]


def detector_part(arrays: Mapping[str, np.ndarray], *, ema: bool = False) -> Part | None:
    """The arrays of a detector of one stage, from `backbone.` to `bbox_head.`; None without one.

    Args:
        arrays: of a file, by name.
        ema: whether to take the twins that the names call ema, where there are any, instead of the
            others.

    Raises:
        InputError: there are several, or none whose names say ema.
    """
    named = _named(arrays)
    heads = {match[1] for name in named if (match := re.match(r"(.*?)bbox_head\.", name))}
    prefixes = {p for p in heads if any(name.startswith(f"{p}backbone.") for name in named)}
    return _part(named, prefixes, "", ema) if prefixes else None


def backbone_part(arrays: Mapping[str, np.ndarray], *, ema: bool = False) -> Part:
    """The arrays of a ResNet or VGG, alone or in a classifier or detector.

    Args:
        arrays: of a file, by name.
        ema: as for a detector.

    Raises:
        InputError: there is none, there are several, or none whose names say ema.
    """
    named = _named(arrays)
    for first, begins in _BACKBONES.items():
        if prefixes := {match[1] for name in named if (match := re.fullmatch(first, name))}:
            return _part(named, prefixes, begins, ema)
    raise InputError(
        "no detector or backbone of this project: a detector's names begin with backbone. and "
        "bbox_head., a ResNet's with layer1.0., a VGG's with features.0.; here they are "
        f"{in_short(arrays)}"
    )


def _named(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays without the marks of torch.compile, twins in names with dots like the others'."""
    named = {name.replace("_orig_mod.", ""): array for name, array in arrays.items()}
    twins = {"ema_" + name.replace(".", "_"): f"ema.{name}" for name in named}
    return {twins.get(name, name): array for name, array in named.items()}


def _part(named: Mapping[str, np.ndarray], prefixes: set[str], begins: str, ema: bool) -> Part:
    """The arrays behind one of the prefixes, of those whose names go on as `begins`."""

    def behind(prefix: str) -> dict[str, str]:
        longer = tuple(other for other in prefixes if len(other) > len(prefix))
        return {
            name.removeprefix(prefix): name
            for name in named
            if re.match(re.escape(prefix) + begins, name) and not name.startswith(longer)
        }

    averaged = {prefix for prefix in prefixes if _EMA.search(prefix)}
    if ema and not averaged:
        raise InputError("ema: no names of the file say that their arrays are averages")
    raw = prefixes - averaged
    if len(raw) > 1 or len(averaged) > 1:
        raise InputError(
            "the file holds several networks, whose names begin with "
            f"{', '.join(prefix or 'nothing' for prefix in sorted(prefixes))}: save the one that "
            "you want alone"
        )
    # What is not averaged, statistics of BatchNorm for instance, has no twin.
    wanted = [*raw, *averaged] if ema else [*(raw or averaged)]
    names = {short: name for prefix in wanted for short, name in behind(prefix).items()}
    taken = set(names.values())
    arrays = {short: named[name] for short, name in names.items()}
    return Part(
        "backbone" if begins else "detector", arrays, [name for name in named if name not in taken]
    )


_EMA = re.compile(r"(^|[._])ema([._]|$)")

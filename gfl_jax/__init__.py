"""Generalized Focal Loss detectors in JAX.

`load(workdir)` opens a trained detector, `Experiment` is all that determines one, and the losses
are functions of arrays. Each is imported when it is first used: the losses need jax alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gfl_jax.config import Experiment as Experiment
    from gfl_jax.losses import ciou_loss as ciou_loss
    from gfl_jax.losses import diou_loss as diou_loss
    from gfl_jax.losses import distribution_focal_loss as distribution_focal_loss
    from gfl_jax.losses import gaussian_nll_loss as gaussian_nll_loss
    from gfl_jax.losses import giou_loss as giou_loss
    from gfl_jax.losses import iou_loss as iou_loss
    from gfl_jax.losses import l1_loss as l1_loss
    from gfl_jax.losses import quality_focal_loss as quality_focal_loss
    from gfl_jax.losses import sigmoid_focal_loss as sigmoid_focal_loss
    from gfl_jax.losses import smooth_l1_loss as smooth_l1_loss
    from gfl_jax.losses import varifocal_loss as varifocal_loss
    from gfl_jax.run import load as load

__version__ = "0.1.0"

_LOSSES = (
    "ciou_loss",
    "diou_loss",
    "distribution_focal_loss",
    "gaussian_nll_loss",
    "giou_loss",
    "iou_loss",
    "l1_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "varifocal_loss",
)
_MODULES = {"Experiment": "config", "load": "run"} | dict.fromkeys(_LOSSES, "losses")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

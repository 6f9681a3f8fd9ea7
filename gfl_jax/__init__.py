"""Generalized Focal Loss detectors in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Experiment": "gfl_jax.config",
    **dict.fromkeys(
        (
            "quality_focal_loss",
            "distribution_focal_loss",
        ),
        "gfl_jax.losses",
    ),
}
"""What is imported when it is first used: the losses need jax alone."""

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

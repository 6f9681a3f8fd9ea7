"""What mmdetection's config, which its checkpoints carry as text, says about the detector.

The text is Python; it is parsed and never run.
"""

import ast
import contextlib
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from gfl_jax.config import Experiment, from_dict, to_dict
from gfl_jax.errors import InputError
from gfl_jax.interop.mmdet_config import model_config
from gfl_jax.models.network import AnyModel

_TRAINING = re.compile(
    r"bbox_head\.(regress_ranges|center_sampl|scale_ranges|sigma)|backbone\.(frozen|norm)"
)
"""Fields that change what a detector learns, not what it predicts."""

_NOT_COMPARED = re.compile(r"bbox_head\.(type|num_classes|conv_bias|norm_cfg|loss_)")
"""Told by the arrays, or of no use but for training."""


def config_in(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The names that the config in a file's `meta` assigns; empty if it holds none.

    mmdetection 2.x calls the text `config`, 3.x `cfg`. What is neither a literal, a `dict(...)` nor
    a name assigned before counts as None.
    """
    text = next((meta[key] for key in ("cfg", "config") if isinstance(meta.get(key), str)), "")
    names: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                names[statement.targets[0].id] = _value(statement.value, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return names


def _value(node: ast.AST | None, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names.get(node.id)
        case ast.List() | ast.Tuple():
            return [_value(item, names) for item in node.elts]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Dict():
            pairs = [
                (_value(key, names), item) for key, item in zip(node.keys, node.values, strict=True)
            ]
        case ast.Call(func=ast.Name(id="dict")):
            pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
        case _:
            return None
    found: dict[Any, Any] = {}
    for key, item in pairs:
        value = _value(item, names)
        if isinstance(key, str):
            found[key] = value
        elif key is None and isinstance(value, dict):  # **others
            found |= value
    return found


def checked(
    experiment: Experiment, meta: Mapping[str, Any], source: Any, *, named: bool
) -> Experiment:
    """The experiment, as the config in a file's `meta` says where the arrays do not.

    Args:
        experiment: inferred from the arrays, or named by the user.
        meta: of the file.
        source: the file, for messages.
        named: whether the user named it: then what contradicts it is a warning.

    Raises:
        InputError: the config contradicts an experiment that was inferred from the arrays.
    """
    config = config_in(meta)
    said: Mapping[str, Any] = {}
    with contextlib.suppress(InputError) if named else contextlib.nullcontext():
        said = fields_said(config)
    if not named:
        experiment = as_said(experiment, said)
        if "model.mean" not in said:
            lacks = "say how it treats pixels" if config else "hold its config"
            flags = [_flag(*field) for field in pixel_fields(experiment.model).items()]
            warnings.warn(
                f"{source} does not {lacks}; it is taken to be trained with {' '.join(flags)}. If "
                "it was not, name a config of this project with --config",
                stacklevel=3,
            )
    if not config:
        return experiment
    predicts, trains = contradictions(experiment, config)
    if predicts and not named:
        raise InputError(
            f"{source} says of itself: {'; '.join(predicts[:5])}. Name a config of this project "
            "that has it so with --config"
        )
    if found := pixel_contradictions(experiment.model, said) + predicts + trains:
        warnings.warn(f"{source} says of itself: {'; '.join(found[:5])}", stacklevel=3)
    return experiment


def experiment_in(meta: Mapping[str, Any]) -> Experiment | None:
    """The experiment that this project wrote into a file's `meta`, if it did.

    Raises:
        InputError: it is none that this version can read.
    """
    text = meta.get("gfl_jax")
    if not isinstance(text, str):
        return None
    try:
        return from_dict(Experiment, json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"the experiment in the file cannot be read: {error}") from error


def fields_said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says about fields of an `Experiment`, by their dotted names.

    Raises:
        InputError: it treats pixels in more than one way.
    """
    backbone, test = _get(config, "model.backbone"), _get(config, "model.test_cfg")
    test = test or config.get("test_cfg")
    style, nms = _get(backbone, "style"), _get(test, "nms")
    overlap = _get(nms, "iou_threshold") or _get(nms, "iou_thr")
    fields = {
        "model.backbone.caffe": style == "caffe" if isinstance(style, str) else None,
        "model.backbone.train_norm": _get(backbone, "norm_cfg.requires_grad"),
        "model.backbone.frozen_stages": _get(backbone, "frozen_stages"),
        "detector.inference.score_threshold": _get(test, "score_thr"),
        "detector.inference.nms_iou": overlap,
        "detector.inference.nms_pre": _get(test, "nms_pre"),
        "detector.inference.max_per_image": _get(test, "max_per_img"),
    }
    of_model = _pixels(_get(config, "model.data_preprocessor") or {})
    pixels = [of_model] if of_model else [*filter(None, map(_pixels, _dictionaries(dict(config))))]
    if any(found != pixels[0] for found in pixels):
        raise InputError("its config treats pixels in more than one way: name a --config")
    return {name: v for name, v in fields.items() if v is not None} | (pixels or [{}])[0]


def as_said(experiment: Experiment, fields: Mapping[str, Any]) -> Experiment:
    """The experiment with these fields, as far as its kinds have them.

    Raises:
        InputError: a value is none that the field can have.
    """
    value = to_dict(experiment)
    for name, said in fields.items():
        *parts, field = name.split(".")
        holder = value
        for part in parts:
            holder = holder.get(part, {})
        if field in holder:
            if not _is_like(said, holder[field]):
                raise InputError(f"its config says {said!r} where {name} is {holder[field]!r}")
            holder[field] = said
        elif name == "model.channel_order" and said != experiment.model.channel_order:
            raise InputError(
                f"its config says {said.upper()} pixels; this project's "
                f"{type(experiment.model).__name__} takes {experiment.model.channel_order.upper()}"
            )
    return from_dict(Experiment, value)


PIXELS = ("model.mean", "model.std", "model.channel_order", "model.backbone.caffe")


def pixel_fields(model: AnyModel) -> dict[str, Any]:
    """How a model treats pixels, and strides, by fields of an `Experiment`."""
    value = to_dict(model)
    fields = {name: _get(value, name.partition(".")[2]) for name in PIXELS}
    fields["model.channel_order"] = model.channel_order
    return {name: field for name, field in fields.items() if field is not None}


def pixel_contradictions(model: AnyModel, said: Mapping[str, Any]) -> list[str]:
    """Flags that make a model treat pixels, and stride, as is said."""
    ours = pixel_fields(model)
    return [_flag(name, said[name]) for name in ours if said.get(name, ours[name]) != ours[name]]


def _flag(name: str, value: Any) -> str:
    """A field as it is passed on the command line: --model.backbone.no-caffe."""
    parent, _, field = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{parent}.{field if value else f'no-{field}'}"
    words = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"--{parent}.{field} {words}"


def contradictions(
    experiment: Experiment, config: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Where an experiment and the config of a file differ, in mmdetection's words.

    Only what both say is compared: 'bbox_head.bbox_coder.target_stds [...], here [...]'.

    Returns:
        What changes the predictions; and what changes training alone.
    """
    value = to_dict(experiment) | {"num_classes": 1}
    try:
        ours = model_config(value)
    except ValueError:  # mmdetection has no such detector
        return [], []
    theirs = {"test_cfg": config.get("test_cfg")} | (_get(dict(config), "model") or {})
    extra = _get(theirs, "neck.add_extra_convs")
    if extra is True:
        on_input = _get(theirs, "neck.extra_convs_on_inputs") is not False
        theirs["neck"] = theirs["neck"] | {
            "add_extra_convs": "on_input" if on_input else "on_output"
        }
    predicts: list[str] = []
    trains: list[str] = []
    for part in ("backbone", "neck", "bbox_head", "test_cfg"):
        said = dict(_leaves(theirs.get(part), part))
        for name, here in _leaves(ours[part], part):
            if name in said and said[name] != here and not _NOT_COMPARED.search(name):
                change = f"{name} {said[name]}, here {here}"
                (trains if _TRAINING.search(name) else predicts).append(change)
    return predicts, trains


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}")
    else:
        yield name, _listed(value)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _get(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _dictionaries(item)
    if isinstance(value, dict):
        yield value


def _pixels(found: dict[str, Any]) -> dict[str, Any]:
    """How a normalisation, or a preprocessor, treats pixels; empty if this is none."""
    mean: Any = found.get("mean")
    std: Any = found.get("std")
    if not _is_like(mean, [0.0] * 3) or not _is_like(std, [0.0] * 3) or not min(std) > 0:
        return {}
    normalize = "Preprocessor" not in str(found.get("type", ""))
    swaps = found.get("to_rgb", found.get("bgr_to_rgb", normalize))
    return {
        "model.mean": [float(x) for x in mean],
        "model.std": [float(x) for x in std],
        "model.channel_order": "rgb" if swaps else "bgr",
    }


def _is_like(value: Any, like: Any) -> bool:
    """Whether a value can stand in a field's place; a whole number is a number too."""
    if isinstance(like, list):
        return (
            isinstance(value, list) and len(value) == len(like) and all(map(_is_like, value, like))
        )
    if isinstance(like, float):
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is type(like)

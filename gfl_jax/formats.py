"""What earlier versions stored, brought up to date."""

from collections.abc import Callable
from typing import Any

from gfl_jax.errors import InputError
from gfl_jax.models.network import Variables

FORMAT = 1
"""The format of checkpoints written now; `MIGRATIONS` brings older ones up to date."""


def _format_1(experiment: dict[str, Any]) -> dict[str, Any]:
    """Custom losses were called Own...; a data source was a name, beside the fields of all."""
    names = {"OwnBoxLoss": "CustomBoxLoss", "OwnClassification": "CustomClassification"}

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {field: renamed(item) for field, item in value.items()}
        return value | {"kind": names.get(value["kind"], value["kind"])}

    return renamed(experiment | {"data": _source_as_value(experiment["data"])})


def _source_as_value(data: dict[str, Any]) -> dict[str, Any]:
    name, data = data["source"], dict(data)
    names = [f"{split}_{of}" for split in ("train", "val") for of in ("annotations", "images")]
    names += ["root", "cache_dir", "on_error", "shapes"]
    fields = {field: data.pop(field) for field in names}
    shapes, of_coco = fields.pop("shapes"), {"kind": "CocoFolder", **fields}
    common = {field: fields[field] for field in ("root", "cache_dir")}
    of_tfds = {"kind": "Tfds", "name": name, "val_annotations": fields["val_annotations"]} | common
    data["source"] = {"shapes": shapes | common, "coco": of_coco}.get(name, of_tfds)
    return data


MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_format_1,)
"""Migrate the JSON of an experiment from format 0 to 1, from 1 to 2, ..."""


def weights_of_format_0(state: dict[str, Any], like: Variables) -> Variables:
    """The weights of a checkpoint whose only item was the whole training state.

    Args:
        state: `variables` (dictionaries of arrays by name), `ema`, and what training needs.
        like: shapes and dtypes; which variables are frozen has changed since.

    Raises:
        InputError: they belong to another model.
    """
    variables = state["variables"]
    arrays = {**variables["frozen"], **variables["stats"], **(state["ema"] or variables["params"])}

    for name, expected in {**like.params, **like.frozen, **like.stats}.items():
        if name not in arrays or arrays[name].shape != expected.shape:
            raise InputError(f"the checkpoint has no {name} of shape {list(expected.shape)}")
    params, frozen, stats = ({name: arrays[name] for name in part} for part in like)
    return Variables(params, frozen, stats)

"""A work directory as a value: the experiment, the classes and the weights of a trained detector.

A run keeps two folders of checkpoints: `checkpoints`, the newest ones, and `best`, the one with the
highest AP. Loading one needs neither its data set nor its optimiser, and runs no user code.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gfl_jax.config import Experiment, differences, from_dict, to_dict
from gfl_jax.errors import InputError
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import PathLike, as_path
from gfl_jax.training.checkpoint import Checkpoints

FORMAT = 1
"""The format written now; `_MIGRATIONS` brings older ones up to date."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained detector.

    Attributes:
        folder: of its checkpoints.
        step: steps trained.
        experiment: what it is and how it was trained.
        category_ids: of the class labels 0, 1, ..., as in the annotations.
        category_names: of the class labels.
        network: the model with outputs for these classes.
        variables: the weights, on the host; their moving average if training kept one.
    """

    folder: PathLike
    step: int
    experiment: Experiment
    category_ids: list[int]
    category_names: list[str]
    network: Network
    variables: Variables


def load(path: PathLike) -> Run:
    """Loads a trained detector; only its weights are read.

    Args:
        path: a work directory, of which the best checkpoint is loaded, or the newest if there is no
            best; or a folder of checkpoints. Local or `gs://...`.

    Raises:
        MissingFileError: there is no complete checkpoint.
        InputError: this version cannot read it.
    """
    checkpoints = Checkpoints.find(path)
    about = checkpoints.about()
    experiment = experiment_of(about)
    ids, names = about.get("category_ids"), about.get("category_names")
    if not isinstance(ids, list) or not isinstance(names, list) or len(ids) != len(names):
        raise InputError(
            f"the classes stored in the checkpoint in {checkpoints.folder} are damaged"
        )
    network = Network(experiment.model, experiment.detector.predicts(len(ids)))
    weights = jax.eval_shape(lambda: network.init(0))
    if "format" in about:
        weights = checkpoints.restore({"weights": weights})["weights"]
    else:
        weights = _weights_of_format_0(checkpoints.read("state"), weights)
    assert checkpoints.step is not None
    return Run(
        checkpoints.folder,
        checkpoints.step,
        experiment,
        ids,
        names,
        network,
        weights,
    )


def describe(
    experiment: Experiment, category_ids: Sequence[int], category_names: Sequence[str]
) -> dict[str, Any]:
    """What is stored with the arrays of a checkpoint."""
    return {
        "format": FORMAT,
        "experiment": to_dict(experiment),
        "category_ids": list(category_ids),
        "category_names": list(category_names),
    }


def experiment_of(about: dict[str, Any]) -> Experiment:
    """The experiment that a checkpoint is from.

    Raises:
        InputError: a newer version wrote it, or it is not a valid experiment.
    """
    stored = about.get("format", 0)
    if isinstance(stored, int) and stored > FORMAT:
        raise InputError(
            f"the checkpoint has format {stored}, but this gfl_jax reads up to {FORMAT}: "
            "update gfl_jax"
        )
    try:
        experiment = about["experiment"]
        for migrate in _MIGRATIONS[stored:]:
            experiment = migrate(experiment)
        return from_dict(Experiment, experiment)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the experiment stored in the checkpoint is damaged: {error!r}"
        ) from error


def changes_since(workdir: PathLike, experiment: Experiment) -> list[str]:
    """What changes for a run that resumes in `workdir`: 'train.lr: 0.01, now 0.02', ...

    Raises:
        InputError: its weights do not fit this experiment: they were trained with other priors.
    """
    folder = as_path(workdir) / "checkpoints"
    if not folder.exists():  # opening would create it
        return []
    checkpoints = Checkpoints(folder)
    if checkpoints.step is None:
        return []
    stored = experiment_of(checkpoints.about())
    if stored.detector.priors != experiment.detector.priors:
        raise InputError(
            f"the checkpoint {checkpoints.folder / str(checkpoints.step)} was trained with "
            f"{stored.detector.priors}, but detector.priors is {experiment.detector.priors}: its "
            "weights fit only the priors they were trained with"
        )
    return differences(to_dict(stored), to_dict(experiment))


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


_MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_format_1,)
"""Migrate the JSON of an experiment from format 0 to 1, from 1 to 2, ..."""


def _weights_of_format_0(state: dict[str, Any], like: Variables) -> Variables:
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

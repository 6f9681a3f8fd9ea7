"""A work directory as a value: the experiment, the classes and the weights of a trained detector.

A run keeps two folders of checkpoints: `checkpoints`, the newest ones, and `best`, the one of the
highest AP. Opening one needs neither its data set nor its optimiser.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from gfl_jax.config import Experiment, differences, from_dict, to_dict
from gfl_jax.errors import InputError
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import PathLike, as_path
from gfl_jax.training.checkpoint import Checkpoints

FORMAT = 1
"""Of what `about` says; older ones are brought up to date by `_migrate`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained detector.

    Attributes:
        folder: its checkpoints.
        step: steps trained.
        experiment: what it is and how it was trained.
        category_ids: of the class labels 0, 1, ..., as in the annotations.
        category_names: of the class labels.
        network: the model with outputs for these classes.
        variables: the weights, on the host.
    """

    folder: PathLike
    step: int
    experiment: Experiment
    category_ids: list[int]
    category_names: list[str]
    network: Network
    variables: Variables


def load(path: PathLike) -> Run:
    """Opens the best checkpoint of a work directory, else its newest; or a folder of checkpoints.

    Raises:
        FileNotFoundError: there is no complete checkpoint.
        ValueError: it cannot be read by this version.
    """
    checkpoints = Checkpoints.find(path)
    about = checkpoints.about()
    experiment = experiment_of(about)
    predicts = experiment.detector.predicts(len(about["category_ids"]))
    network = Network(experiment.model, predicts)
    abstract = jax.eval_shape(lambda: network.init(0))
    assert checkpoints.step is not None
    return Run(
        checkpoints.folder,
        checkpoints.step,
        experiment,
        about["category_ids"],
        about["category_names"],
        network,
        checkpoints.restore({"weights": abstract})["weights"],
    )


def describe(
    experiment: Experiment, category_ids: Sequence[int], category_names: Sequence[str]
) -> dict[str, Any]:
    """What is stored beside the arrays of a checkpoint."""
    return {
        "format": FORMAT,
        "experiment": to_dict(experiment),
        "category_ids": list(category_ids),
        "category_names": list(category_names),
    }


def experiment_of(about: dict[str, Any]) -> Experiment:
    """The experiment that a checkpoint was made by.

    Raises:
        ValueError: it was written by a newer version, or is none.
    """
    return from_dict(Experiment, _migrate(about)["experiment"])


def changes_since(workdir: PathLike, experiment: Experiment) -> list[str]:
    """What a run that continues in `workdir` changes: 'train.lr: 0.01, now 0.02', ...

    Raises:
        ValueError: its weights do not fit this experiment: they were trained with other anchors.
    """
    checkpoints = Checkpoints(as_path(workdir) / "checkpoints")
    if checkpoints.step is None:
        return []
    stored = experiment_of(checkpoints.about())
    if stored.detector.priors != experiment.detector.priors:
        raise InputError(
            f"the checkpoint {checkpoints.folder / str(checkpoints.step)} was trained with "
            f"{stored.detector.priors}, detector.priors is {experiment.detector.priors}: its "
            "weights fit its own anchors only"
        )
    return differences(to_dict(stored), to_dict(experiment))


def _migrate(about: dict[str, Any]) -> dict[str, Any]:
    """Brings what an older version stored up to date."""
    stored = about.get("format", 0)
    if stored > FORMAT:
        raise InputError(
            f"the checkpoint has format {stored}, this version of gfl_jax reads up to {FORMAT}: "
            "update gfl_jax"
        )
    experiment = about["experiment"]
    if isinstance(experiment["data"]["source"], str):
        about = about | {"experiment": experiment | {"data": _source_as_value(experiment["data"])}}
    return about


def _source_as_value(data: dict[str, Any]) -> dict[str, Any]:
    """Data of format 0: the source was a name, beside the fields of all sources."""
    name, data = data["source"], dict(data)
    names = [f"{split}_{of}" for split in ("train", "val") for of in ("annotations", "images")]
    names += ["root", "cache_dir", "on_error", "shapes"]
    fields = {field: data.pop(field) for field in names}
    shapes, of_coco = fields.pop("shapes"), {"kind": "CocoFolder", **fields}
    common = {field: fields[field] for field in ("root", "cache_dir")}
    of_tfds = {"kind": "Tfds", "name": name, "val_annotations": fields["val_annotations"]} | common
    data["source"] = {"shapes": shapes | common, "coco": of_coco}.get(name, of_tfds)
    return data

"""A trained detector as a value: its experiment, its classes and its weights.

A run keeps two folders of checkpoints: `checkpoints`, the newest ones, and `best`, the one with the
highest AP. Loading one needs neither its data set nor its optimiser, and runs no user code.
"""

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from gfl_jax.config import Experiment, differences, from_dict, to_dict
from gfl_jax.errors import InputError, MissingFileError
from gfl_jax.formats import FORMAT, MIGRATIONS, weights_of_format_0
from gfl_jax.interop.detector_file import read_detector
from gfl_jax.interop.exported import from_hub, is_exported, read_config, read_weights
from gfl_jax.interop.stablehlo import is_stablehlo
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import PathLike, as_path, local_path
from gfl_jax.predict import Predictor
from gfl_jax.training.checkpoint import Checkpoints

CALIBRATION = "calibration.json"
"""In a work directory: the temperature that `gfl-jax calibrate` found."""


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A trained detector. Call it with an image or with several, see `gfl_jax.predict`.

    Attributes:
        folder: of its checkpoints, or the file or folder that it is from.
        step: steps trained.
        experiment: what it is and how it was trained.
        category_ids: of the class labels 0, 1, ..., as in the annotations.
        category_names: of the class labels.
        network: the model with outputs for these classes.
        variables: the weights, on the host; their moving average if training kept one.
        temperature: that the distributions of sides are corrected by, see `gfl-jax calibrate`.
        about: what else is stored with the weights: AP, keys of the data, versions.
    """

    folder: PathLike
    step: int
    experiment: Experiment
    category_ids: list[int]
    category_names: list[str]
    network: Network
    variables: Variables
    temperature: float = 1.0
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        classes = ", ".join(self.category_names[:8])
        more = f" and {len(self.category_names) - 8} more" if len(self.category_names) > 8 else ""
        return f"Run({str(self.folder)!r}, step {self.step}: {classes}{more})"

    @functools.cached_property
    def predictor(self) -> Predictor:
        """Detects on images; keeps the weights on the device and its compiled programs."""
        return Predictor(
            self.network,
            self.variables,
            self.experiment.detector,
            self.experiment.data,
            self.category_ids,
            self.category_names,
            self.temperature,
        )

    def __call__(self, pictures: Any, *, distributions: bool = False, white: int = 0) -> Any:
        """Detections on an image, or on each of several; see `Predictor.__call__`."""
        return self.predictor(pictures, distributions=distributions, white=white)


def load(path: PathLike, classes: Sequence[str] = ()) -> Run:
    """Loads a trained detector; of a work directory only the weights are read.

    Args:
        path: a work directory, of which the best checkpoint is loaded, or the newest if there is no
            best; a folder of checkpoints; or a folder of `gfl-jax export`; local or `gs://...`. Or
            a .pth or .safetensors file in mmdetection's names, or `hf://OWNER/NAME`.
        classes: names of the classes, for a file that does not say them.

    Raises:
        MissingFileError: there is no complete checkpoint.
        InputError: this version cannot read it.
    """
    name = os.fspath(path)
    if name.endswith((".pth", ".pt", ".safetensors")):
        return _of_file(name, classes)
    if classes:
        raise InputError(f"{name} names its classes itself: leave out `classes`")
    folder = from_hub(name.removeprefix("hf://")) if name.startswith("hf://") else as_path(path)
    if is_exported(folder):
        about = read_config(folder)
        experiment, ids, names, network = _described(about, folder)
        weights = read_weights(folder, network)
        step, temperature = int(about.get("step", 0)), float(about.get("temperature", 1.0))
        return Run(folder, step, experiment, ids, names, network, weights, temperature, about)
    if is_stablehlo(folder) or name.endswith(".onnx") or any(folder.glob("*.onnx")):
        raise InputError(
            f"{folder} holds compiled programs, not a detector to train or evaluate: see "
            "docs/export.md for how to call them, or export the run with --format safetensors"
        )
    while True:
        checkpoints = Checkpoints.find(folder)
        try:
            return _of_checkpoints(checkpoints)
        except InputError:
            # A run that goes on may have deleted it meanwhile.
            if Checkpoints.find(folder).step == checkpoints.step:
                raise


def _of_checkpoints(checkpoints: Checkpoints) -> Run:
    """The newest of a folder of checkpoints."""
    about = checkpoints.about()
    experiment, ids, names, network = _described(about, checkpoints.folder)
    weights = jax.eval_shape(lambda: network.init(0))
    if "format" in about:
        weights = checkpoints.restore({"weights": weights})["weights"]
    else:
        weights = weights_of_format_0(checkpoints.read("state"), weights)
    assert checkpoints.step is not None
    files = [place / CALIBRATION for place in (checkpoints.folder, checkpoints.folder.parent)]
    file = next((file for file in files if file.exists()), None)
    step, temperature = checkpoints.step, _temperature(file, checkpoints.step) if file else 1.0
    return Run(
        checkpoints.folder, step, experiment, ids, names, network, weights, temperature, about
    )


def _temperature(file: epath.Path, step: int) -> float:
    """What `gfl-jax calibrate` wrote, if it was for these weights."""
    try:
        stored = json.loads(file.read_text())
        temperature, of_step = float(stored["temperature"]), int(stored["step"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged, delete it: {error!r}") from error
    if of_step != step:
        warnings.warn(
            f"{file} is for step {of_step}, the weights are of step {step}: it is not used. Run "
            "gfl-jax calibrate again",
            stacklevel=4,
        )
        return 1.0
    return temperature


def _described(
    about: dict[str, Any], folder: PathLike
) -> tuple[Experiment, list[int], list[str], Network]:
    """Experiment, classes and network of what `describe` wrote."""
    experiment = experiment_of(about)
    ids, names = about.get("category_ids"), about.get("category_names")
    if not isinstance(ids, list) or not isinstance(names, list) or len(ids) != len(names):
        raise InputError(f"the classes stored in the checkpoint in {folder} are damaged")
    network = Network(experiment.model, experiment.detector.predicts(len(ids)))
    return experiment, ids, names, network


def _of_file(name: str, classes: Sequence[str]) -> Run:
    """The detector in a PyTorch file."""
    file = local_path(name, "the file")
    if not file.is_file():
        raise MissingFileError(f"{file}: there is no such file")
    experiment, count, network, variables, said, temperature = read_detector(file)
    names = list(classes) or (said.names if said else [f"class {i}" for i in range(count)])
    if not classes and not said:
        warnings.warn(
            f"{file} does not name its {count} classes: load(..., classes=[...]) does",
            stacklevel=3,
        )
    if len(names) != count:
        raise InputError(f"{file} has outputs for {count} classes, but {len(names)} are named")
    ids = said.ids if said else list(range(1, count + 1))
    return Run(file, 0, experiment, ids, names, network, variables, temperature)


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


def exported_about(run: Run) -> dict[str, Any]:
    """What `config.json` of an exported detector says."""
    described = describe(run.experiment, run.category_ids, run.category_names)
    return {**run.about, **described, "step": run.step, "temperature": run.temperature}


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
        for migrate in MIGRATIONS[stored:]:
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

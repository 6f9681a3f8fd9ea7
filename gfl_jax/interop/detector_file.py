"""A detector in a .pth or .safetensors file: of mmdetection, or one that this project exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gfl_jax.config import Experiment
from gfl_jax.detectors.box import GeneralDistribution
from gfl_jax.detectors.dense import Detector
from gfl_jax.errors import InputError, naming
from gfl_jax.interop.classes import Classes, classes_in
from gfl_jax.interop.mmdet_text import checked, experiment_in
from gfl_jax.interop.names import in_short, load_state_dict, to_torch, torch_name
from gfl_jax.interop.parts import detector_part
from gfl_jax.interop.recognize import count_classes, infer_experiment, modern_names
from gfl_jax.interop.torch_files import read_torch_file
from gfl_jax.models.network import Network, Variables


class Loaded(NamedTuple):
    """A detector from a PyTorch file.

    Attributes:
        experiment: the detector.
        num_classes: that it has outputs for.
        network: the network.
        variables: its weights.
        classes: what the file calls them; None if it does not say.
        temperature: of the distributions of sides, 1 unless this project wrote another.
    """

    experiment: Experiment
    num_classes: int
    network: Network
    variables: Variables
    classes: Classes | None
    temperature: float


def read_detector(source: Path, experiment: Experiment | None = None) -> Loaded:
    """A detector from a PyTorch file.

    Args:
        source: .pth or .safetensors file.
        experiment: the detector; None: the one that this project wrote into the file, or the one
            inferred from the arrays and mmdetection's config in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, holds code, or its arrays are not exactly those of the model;
            every missing, unexpected or misshapen one is named.
    """
    content = read_torch_file(source)
    with naming(source):
        part = detector_part(content.arrays)
        if part is None:
            raise InputError(f"no detector; the names are {in_short(content.arrays)}")
        return detector_from(part.arrays, content.meta, source, experiment)


def detector_from(
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    source: Path,
    experiment: Experiment | None = None,
) -> Loaded:
    """As `read_detector`, of the arrays and the `meta` of a file that was read."""
    arrays = modern_names(arrays)
    named = experiment is not None
    experiment = experiment or experiment_in(meta) or infer_experiment(arrays)
    if experiment_in(meta) is None:
        experiment = checked(experiment, meta, source, named=named)
    num_classes = count_classes(arrays, experiment)
    network = Network(experiment.model, experiment.detector.predicts(num_classes))
    abstract = jax.eval_shape(lambda: network.init(0))
    loaded, mismatch = load_state_dict(
        network.by_path(abstract), arrays, ignore=(r"bbox_head\.integral\.project",)
    )
    mismatch.raise_if_any(source)
    variables = network.replaced(abstract, loaded)
    temperature = meta.get("gfl_jax_temperature", 1.0)
    temperature = temperature if isinstance(temperature, float) and temperature > 0 else 1.0
    return Loaded(experiment, num_classes, network, variables, classes_in(meta), temperature)


def state_dict(network: Network, variables: Variables, detector: Detector) -> dict[str, np.ndarray]:
    """All arrays as in mmdetection's state dict, with buffers, in torch's layout."""
    arrays: dict[str, np.ndarray] = {}
    for path, array in network.by_path(variables).items():
        name = torch_name(path)
        arrays[name] = to_torch(path, array)
        if name.endswith("running_var"):
            arrays[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    if isinstance(detector.box, GeneralDistribution):
        bins = np.arange(detector.box.n + 1, dtype=np.float32)
        arrays["bbox_head.integral.project"] = bins * np.float32(detector.box.delta)
    return arrays

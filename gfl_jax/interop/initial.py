"""The weights that a new run begins with: random, around a pretrained backbone, or a detector's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gfl_jax.config import Experiment
from gfl_jax.errors import InputError, MissingFileError, naming
from gfl_jax.hosts import print_once
from gfl_jax.interop.classes import class_outputs, classes_in, rows_taken, shared, some
from gfl_jax.interop.mmdet_text import (
    config_in,
    experiment_in,
    fields_said,
    pixel_contradictions,
    pixel_fields,
)
from gfl_jax.interop.names import in_short, load_state_dict, to_torch, torch_name
from gfl_jax.interop.parts import detector_part
from gfl_jax.interop.pretrained import load_pretrained
from gfl_jax.interop.recognize import backbone_in_words, is_vgg, modern_names
from gfl_jax.interop.torch_files import read_torch_file
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import as_path, local_path
from gfl_jax.run import load


class Trained(NamedTuple):
    """A trained detector, whatever file it is from.

    Attributes:
        arrays: by PyTorch's names, in PyTorch's layout.
        classes: names by label; none where the file does not say.
        pixels: how it treats pixels, as far as the file says, by fields of an `Experiment`.
    """

    arrays: dict[str, np.ndarray]
    classes: list[str]
    pixels: dict[str, Any]


def initial_weights(
    experiment: Experiment, network: Network, category_names: Sequence[str]
) -> Variables:
    """The weights that a new run begins with, as its model says.

    With `init_from` everything that the trained detector there has in the same shape is taken over,
    and of the class outputs the rows of the classes whose names both have, and the background's.

    Args:
        experiment: of the new run.
        network: its network.
        category_names: of its class labels.

    Raises:
        MissingFileError: a file that the model names is not there.
        InputError: it cannot be read, or its backbone or pixels are not those of the model.
    """
    variables = network.init(experiment.train.seed)
    source = network.model.init_from
    if not source:
        return load_pretrained(network, variables)
    trained = read_trained(source)
    if bad := [name for name, x in trained.arrays.items() if not np.isfinite(x).all()]:
        raise InputError(f"--model.init-from {source} holds NaN or infinity in {in_short(bad)}")
    ours = network.by_path(variables)
    in_torch = {torch_name(path): to_torch(path, array) for path, array in ours.items()}
    outputs = class_outputs(experiment)
    arrays = _as_named_here(trained.arrays, outputs)
    given = dict(arrays)
    rows = {
        name: rows_taken(
            in_torch[name],
            given.pop(name, np.zeros(0)),
            per_cell,
            category_names,
            trained.classes,
        )
        for name, per_cell in outputs.items()
    }
    if all(row is not None for row in rows.values()):  # weights and biases belong together
        given |= {name: row for name, row in rows.items() if row is not None}
    loaded, mismatch = load_state_dict(ours, given, ignore=(r"bbox_head\.integral\.project",))
    misshapen = [name for name, *_ in mismatch.misshapen]
    random = [*mismatch.missing, *misshapen]
    if differ := [name for name in random if name.startswith("backbone.")]:
        theirs, expected = backbone_in_words(given), backbone_in_words(in_torch)
        remedy = f"make {network.model.backbone_flag} like the checkpoint's"
        if is_vgg(given) != is_vgg(in_torch):
            remedy = "a run cannot begin with the weights of another kind of network"
        raise InputError(
            f"--model.init-from {source} has {theirs}, this model has {expected}: {remedy}. They "
            f"differ in {in_short(differ)}"
        )
    if flags := pixel_contradictions(network.model, trained.pixels):
        raise InputError(
            f"--model.init-from {source} was trained with other pixels than this model: pass "
            f"{' '.join(flags)}"
        )
    common = shared(category_names, trained.classes) if given.keys() >= outputs.keys() else []
    left_out = [name for name in outputs if name in arrays.keys() - given.keys()]
    others = [name for name in trained.classes if name not in common]
    print_once(
        f"weights of {source}: {len(ours) - len(random)} of {len(ours)} arrays\n"
        f"  classes taken over: {some(common)}; new: "
        f"{some([name for name in category_names if name not in common])}; left out: "
        f"{some(others)}\n"
        f"  not in it, therefore random: {in_short(random)}\n"
        f"  left out: {in_short([*mismatch.unexpected, *misshapen, *left_out])}"
    )
    if trained.classes and not given.keys() >= outputs.keys():
        print_once(
            "  its class outputs are not like this model's (width, priors per cell, "
            f"{len(trained.classes)} classes): none was taken over"
        )
    like = {name.strip().lower() for name in category_names}
    if near := [n for n in others if n not in category_names and n.strip().lower() in like]:
        print_once(f"  names must agree in case and blanks, which these do not: {some(near)}")
    if not trained.pixels:
        print_once(
            "  it does not say on what pixels it was trained; they must be those of this model: "
            "--model.mean, --model.std, --model.channel-order, --model.backbone.caffe"
        )
    return network.replaced(variables, loaded)


def _as_named_here(
    arrays: Mapping[str, np.ndarray], outputs: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The arrays of another dense detector with its class outputs named as in this one.

    gfl_cls, atss_cls, retina_cls and conv_cls play the same part.
    """
    renamed = dict(arrays)
    for name in outputs:
        alike = rf"bbox_head\.\w+_cls\.{name.rpartition('.')[2]}"
        others = [n for n in arrays if re.fullmatch(alike, n)]
        if re.fullmatch(alike, name) and name not in arrays and len(others) == 1:
            renamed[name] = renamed.pop(others[0])
    return renamed


def read_trained(source: str) -> Trained:
    """The detector in a work directory, a folder of checkpoints, or a .pth or .safetensors file.

    Raises:
        MissingFileError: there is none.
        InputError: it cannot be read, or holds no detector.
    """
    if as_path(source).is_dir():
        run = load(source)
        arrays = {
            torch_name(p): to_torch(p, x) for p, x in run.network.by_path(run.variables).items()
        }
        return Trained(arrays, run.category_names, pixel_fields(run.experiment.model))
    file = local_path(source, "--model.init-from")
    if not file.is_file():
        raise MissingFileError(
            f"--model.init-from {source}: there is no such work directory, folder of checkpoints, "
            ".pth or .safetensors file"
        )
    content = read_torch_file(file)
    with naming(f"--model.init-from {source}"):
        part = detector_part(content.arrays)
    if part is None:
        raise InputError(
            f"--model.init-from {source} holds no detector, whose names would begin with backbone. "
            f"and bbox_head.: they are {in_short(content.arrays)}. A backbone alone is named by "
            "--model.backbone.pretrained"
        )
    classes = classes_in(content.meta)
    stored = experiment_in(content.meta)
    pixels = pixel_fields(stored.model) if stored else fields_said(config_in(content.meta))
    return Trained(modern_names(part.arrays), classes.names if classes else [], pixels)

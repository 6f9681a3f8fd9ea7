"""Finds pretrained backbones and loads them."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gfl_jax.errors import InputError, MissingExtraError, MissingFileError, naming, needs
from gfl_jax.interop.mmdet_text import config_in, fields_said, pixel_contradictions
from gfl_jax.interop.names import load_state_dict
from gfl_jax.interop.parts import backbone_part
from gfl_jax.interop.torch_files import read_torch_file
from gfl_jax.models.network import Network, Variables

_SUFFIXES = (".pth", ".pt", ".safetensors")


def find_pretrained(name_or_path: str) -> Path:
    """Finds the file of a pretrained model, fetching it if needed.

    Args:
        name_or_path: A local file, which is used as it is, or the name of a repository on the
            Hugging Face hub, such as 'timm/resnet50.tv_in1k', whose model.safetensors is taken
            from ~/.cache/gfl_jax/pretrained if it is there, otherwise fetched (and cached) by
            huggingface_hub.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: There is no such file, or it could not be fetched; the message says
            which file to put where.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path) or path.suffix in _SUFFIXES:
        raise MissingFileError(
            f"no pretrained file {name_or_path}: pass the path of a .pth or .safetensors file, or "
            "the name of a repository on the Hugging Face hub such as timm/resnet50.tv_in1k"
        )
    kept = "~/.cache/gfl_jax/pretrained/" + name_or_path.replace("/", "--") + ".safetensors"
    if Path(kept).expanduser().is_file():
        return Path(kept).expanduser()
    try:
        with needs("hub"):
            from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name_or_path, "model.safetensors"))
    except Exception as error:  # no network, no such repository, ...
        reason = str(error) if isinstance(error, MissingExtraError) else type(error).__name__
        raise MissingFileError(
            f"could not fetch {name_or_path} from the Hugging Face hub ({reason}): "
            f"download model.safetensors of {name_or_path} and pass "
            f"--model.backbone.pretrained PATH (for SSD: --model.pretrained), or put it at {kept}"
        ) from error


def load_backbone(
    backbone_state: Mapping[tuple, Any],
    arrays: Mapping[str, np.ndarray],
    source: str,
    *,
    ema: bool = False,
) -> dict[tuple, Any]:
    """Loads the backbone that a classifier or detector in torchvision's names has.

    Args:
        backbone_state: The backbone's variables by path, such as ('layer1', 0, 'conv1', 'kernel').
        arrays: By PyTorch's names; what is not of the backbone is ignored.
        source: Where they are from, for messages.
        ema: Whether to take the arrays whose names say ema.

    Returns:
        A new mapping of the same paths, shapes and dtypes with these arrays.

    Raises:
        InputError: They are not of this backbone; what is missing, unexpected or of another shape
            is listed.
    """
    with naming(source):
        part = backbone_part(arrays, ema=ema)
    loaded, mismatch = load_state_dict(backbone_state, part.arrays)
    mismatch.raise_if_any(source)
    return loaded


def load_pretrained(network: Network, variables: Variables, *, ema: bool = False) -> Variables:
    """The same variables with the pretrained backbone of the network's model, if it names one.

    Raises:
        MissingFileError: It is not here and cannot be fetched; the message says what to do.
        InputError: Its file cannot be read, its arrays are not those of this backbone, or it was
            trained with other pixels than the model's.
    """
    model = network.model
    source = model.pretrained
    if not source:
        if problem := model.random_backbone_problem():
            warnings.warn(f"the backbone is random, but {problem}", stacklevel=2)
        return variables
    content = read_torch_file(find_pretrained(source))
    if flags := pixel_contradictions(model, fields_said(config_in(content.meta))):
        raise InputError(
            f"{source} was trained with other pixels than this model's: pass {' '.join(flags)}"
        )
    paths = network.by_path(variables).items()
    state = {path[1:]: array for path, array in paths if path[0] == "backbone"}
    loaded = load_backbone(state, content.arrays, source, ema=ema)
    return network.replaced(variables, {("backbone", *path): loaded[path] for path in state})

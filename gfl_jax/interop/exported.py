"""A trained detector as a folder that can be copied and shared: `config.json` and the weights.

The weights are a .safetensors file with mmdetection's names and layouts.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import safetensors.numpy
from etils import epath

from gfl_jax.detectors.dense import Detector
from gfl_jax.errors import InputError, MissingFileError, SetupError, UsageError, needs
from gfl_jax.interop.detector_file import state_dict
from gfl_jax.interop.names import load_state_dict
from gfl_jax.models.network import Network, Variables
from gfl_jax.paths import as_path, write, writing

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_exported(
    folder: epath.Path,
    about: Mapping[str, Any],
    network: Network,
    variables: Variables,
    detector: Detector,
) -> None:
    """Writes a folder.

    Args:
        folder: to write into, local or gs://; made if needed.
        about: what `config.json` says, as JSON.
        network: the network.
        variables: its weights.
        detector: what its outputs mean.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    weights = state_dict(network, variables, detector)
    write(folder / WEIGHTS, safetensors.numpy.save(weights, {"format": "pt"}))
    write(folder / CONFIG, json.dumps(about, indent=1, ensure_ascii=False))


def is_exported(folder: epath.Path) -> bool:
    """Whether this is such a folder."""
    return (folder / CONFIG).exists()


def read_config(folder: epath.Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        InputError: it is not a detector of this project.
    """
    try:
        about = json.loads((folder / CONFIG).read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(about, dict) or "experiment" not in about:
        raise InputError(
            f"{folder / CONFIG} describes no detector of this project: it has no 'experiment'"
        )
    return about


def read_weights(folder: epath.Path, network: Network) -> Variables:
    """The weights of a network.

    Raises:
        MissingFileError: the file is not there.
        InputError: it cannot be read, or does not hold exactly the arrays of this network.
    """
    file = folder / WEIGHTS
    try:
        arrays = safetensors.numpy.load(file.read_bytes())
    except FileNotFoundError as error:
        raise MissingFileError(f"{file}: there is no such file beside {CONFIG}") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{file} is damaged: {error}") from error
    like = jax.eval_shape(lambda: network.init(0))
    loaded, mismatch = load_state_dict(
        network.by_path(like), arrays, ignore=(r"bbox_head\.integral\.project",)
    )
    mismatch.raise_if_any(file)
    return network.replaced(like, loaded)


def from_hub(name: str) -> epath.Path:
    """The folder of `owner/name`, or `owner/name@revision`, of the Hugging Face hub, downloaded.

    Raises:
        MissingExtraError: huggingface-hub is not installed.
        MissingFileError: there is no such model, or no connection.
    """
    with needs("hub"):
        from huggingface_hub import errors, snapshot_download
    repo, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]
        )
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise MissingFileError(f"hf://{name} cannot be had from the hub: {_said(error)}") from error
    return as_path(folder)


def check_hub(name: str) -> None:
    """Checks what can be checked before anything is sent to `owner/name` of the hub.

    Raises:
        MissingExtraError: huggingface-hub is not installed.
        UsageError: this can be no name there.
        SetupError: this machine is not logged in.
    """
    with needs("hub"):
        from huggingface_hub import errors, get_token
        from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise UsageError(f"{name} is no name for the hub: {_said(error)}") from error
    if get_token() is None:
        raise SetupError(
            "no token for the Hugging Face hub: run `hf auth login`, or set HF_TOKEN to one that "
            "may write (https://huggingface.co/settings/tokens)"
        )


def to_hub(folder: epath.Path, name: str, *, private: bool, update: bool, message: str) -> str:
    """Uploads a folder as the model `owner/name` of the hub.

    Args:
        folder: what to upload.
        name: of the model.
        private: whether a new model can be seen by its owner alone.
        update: whether it may exist already: it then gets a new commit.
        message: of the commit.

    Returns:
        Where it is, for a browser.

    Raises:
        InputError: it exists already.
        SetupError: there is no connection, or the hub refuses it.
    """
    with needs("hub"):
        from huggingface_hub import HfApi, errors
    api = HfApi()
    try:
        url = api.create_repo(name, private=private, exist_ok=update)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
    except (OSError, ValueError, errors.HTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 409:
            raise InputError(
                f"the model {name} exists on the hub already: --update adds a commit to it"
            ) from error
        raise SetupError(f"{name} could not be pushed to {api.endpoint}: {_said(error)}") from error
    return str(url)


def _said(error: Exception) -> str:
    """What the hub says, or the first line of an error."""
    message = getattr(error, "server_message", None) or str(error)
    return next(iter(message.strip().splitlines()), "") or type(error).__name__

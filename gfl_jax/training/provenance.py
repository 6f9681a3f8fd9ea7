"""What a run is made with: versions, devices and data, kept in its work directory."""

import datetime
import importlib.metadata
import json
import platform
import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gfl_jax.data.records import PreparedSplit
from gfl_jax.distributed import Devices
from gfl_jax.paths import PathLike, as_path, write

FILE = "run.json"

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "opencv-python-headless",
    "pycocotools",
)
"""Their versions may change the numbers of a run."""


def made_with(
    devices: Devices, train_split: PreparedSplit, val_split: PreparedSplit
) -> dict[str, Any]:
    """Versions, devices and numbers of images, as JSON.

    Args:
        devices: the device mapping.
        train_split: images to train on.
        val_split: images to evaluate on.
    """
    return {
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": devices.kind,
        "devices": devices.count,
        "processes": devices.share[1],
        "images": {"train": len(train_split.image_ids), "val": len(val_split.image_ids)},
        "objects": {
            "train": int(train_split.num_boxes.sum()),
            "val": int(val_split.num_boxes.sum()),
        },
        "date": datetime.date.today().isoformat(),
    }


def git_revision(package: Path = Path(__file__).parents[1]) -> str:
    """The commit of the checkout that holds the package; empty if there is none.

    '+changes' behind it: files that git knows have been changed since.
    """
    if not (package.parent / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, or not this user's checkout
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""  # installed under another name, such as opencv-python


def record(workdir: PathLike, about: Mapping[str, Any]) -> str:
    """Writes what a run is about to its work directory, as it is from this start on.

    Returns:
        The id of the run, which is the same each time that it is resumed.

    Raises:
        WriteError: it could not be written.
    """
    file = as_path(workdir) / FILE
    try:
        run_id = str(json.loads(file.read_text())["id"])
    except (OSError, ValueError, TypeError, KeyError):  # a new run, or the file is damaged
        run_id = secrets.token_hex(4)
    write(file, json.dumps({"id": run_id, **about}, indent=1, ensure_ascii=False))
    return run_id

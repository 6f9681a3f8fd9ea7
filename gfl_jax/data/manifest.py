"""What a prepared folder says it holds, and whether all of that is there as it was written."""

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from gfl_jax.errors import InputError, MissingFileError, UserError
from gfl_jax.paths import size_of_file

FORMAT = 2
MANIFEST = "manifest.json"

SMALL = 2**24
"""Largest number of bytes of a file whose content is checked at every start; of a larger one, the
annotations of a large data set, its size is."""

_AGAIN = "copy the whole prepared folder again, or prepare the data set again"


def write_manifest(folder: epath.Path, splits: Mapping[str, Any]) -> None:
    """Writes the manifest of a prepared folder, the last of its files.

    Args:
        folder: local.
        splits: what `split_entry` returns, by name of the split.
    """
    (folder / MANIFEST).write_text(sealed({"format": FORMAT, "splits": splits}))


def split_entry(folder: epath.Path, split: str, shards: Mapping[str, int]) -> dict[str, Any]:
    """What the manifest says of the files of a split, which have been written.

    Args:
        folder: local.
        split: name, and that of its folder.
        shards: number of images in each file of images, by names relative to the folder.
    """
    small = sorted({f"{split}/{file.name}" for file in (folder / split).iterdir()} - {*shards})
    return {
        "shards": {name: count for name, count in shards.items() if count},
        "bytes": {name: size_of_file(folder / name) for name in (*shards, *small)},
        "crc32": {name: zlib.crc32((folder / name).read_bytes()) for name in small},
    }


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """What a prepared folder holds.

    Raises:
        MissingFileError: there is no complete prepared folder.
        InputError: another version prepared it, or the manifest is damaged.
    """
    try:
        text = (folder / MANIFEST).read_text()
        stored = json.loads(text).get("format")
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{folder} holds no prepared data set (no {MANIFEST}): make one with gfl-jax prepare "
            "SRC DST"
        ) from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged: {_AGAIN}") from error
    if stored != FORMAT:
        raise InputError(
            f"{folder / MANIFEST} has format {stored}, but this gfl_jax reads {FORMAT}: prepare "
            "the data set again, or use the version that prepared it"
        )
    try:
        return unsealed(text)
    except ValueError as error:
        raise InputError(f"{folder / MANIFEST} is damaged: {_AGAIN}") from error


def read_entry(folder: epath.Path, split: str) -> dict[str, Any]:
    """What the manifest says of a split, once its files are found to be there.

    Raises:
        MissingFileError: there is no complete prepared folder.
        InputError: another version prepared it, it lacks the split, or a file is missing or cut.
    """
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise InputError(
            f"{folder} has no split {split!r}, only {', '.join(manifest['splits'])}: prepare it "
            "again with the annotations of that split"
        )
    entry = manifest["splits"][split]

    def size_of(name: str) -> int:
        file = folder / name
        return size_of_file(file) if file.exists() else -1

    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(entry["bytes"], pool.map(size_of, entry["bytes"]), strict=True))
    for name, expected in entry["bytes"].items():
        if found[name] != expected:
            state = f"has {found[name]} bytes, not {expected}"
            state = "is missing" if found[name] < 0 else state
            raise InputError(f"{folder / name} {state}: {_AGAIN}")
    return entry


def whole(folder: epath.Path, split: str) -> dict[str, Any] | None:
    """What the manifest says of a split of which all files' sizes were checked, and small content.

    None if there is none, or it is not as it was written.
    """
    try:
        entry = read_entry(folder, split)
        for name in entry["crc32"]:
            if entry["bytes"][name] <= SMALL:
                read_small(folder, entry, name)
    except (UserError, OSError):
        return None
    return entry


def read_small(folder: epath.Path, entry: Mapping[str, Any], name: str) -> bytes:
    """A file of a split that is not of images.

    Raises:
        InputError: it is not as it was written.
    """
    content = (folder / name).read_bytes()
    if zlib.crc32(content) != entry["crc32"][name]:
        raise InputError(f"{folder / name} is damaged: {_AGAIN}")
    return content


def sealed(content: dict[str, Any]) -> str:
    """JSON of an object, with a checksum."""
    return json.dumps(content | {"crc32": _crc(content)}, indent=1)


def unsealed(text: str) -> dict[str, Any]:
    """The object of `sealed`; raises ValueError if anything about it has changed."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop("crc32", None) != _crc(content):
        raise ValueError("the checksum is wrong")
    return content


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())

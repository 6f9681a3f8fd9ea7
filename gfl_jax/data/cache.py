"""The cache: data sets that are named by their raw files, prepared at the first start."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gfl_jax.data.coco_format import OnError
from gfl_jax.data.folders import locked, new_folder
from gfl_jax.data.manifest import FORMAT, sealed, unsealed, whole
from gfl_jax.data.prepare import RawSplit, write_prepared
from gfl_jax.data.records import PreparedSplit, open_prepared


def open_in_cache(name: str, raw: RawSplit, cache_dir: Path, on_error: OnError) -> PreparedSplit:
    """Prepares a split in a cache, once; later calls reuse it.

    It is identified by the json's content and by the names, sizes and times of the image files that
    the json lists, and prepared again if any of these has changed or if the cache is damaged. The
    json is not read again while its own size and time are unchanged. Several processes may call
    this at once: one prepares, the others wait.

    Args:
        name: of the split.
        raw: its files.
        cache_dir: the cache's folder.
        on_error: "raise" stops on bad input; "skip" leaves it out.

    Raises:
        DataError: see `gfl_jax.data.prepare.prepare`.
        WriteError: the disk is full, or the folder cannot be written to.
    """
    source = hashlib.sha256(f"{name}\n{raw.annotations}\n{raw.images}\n{on_error}".encode())
    memory = cache_dir / f"{raw.annotations.stem}-{source.hexdigest()[:16]}.json"

    def folder_of(known: dict[str, Any]) -> Path:
        options = f"{name} {on_error} {raw.white} {FORMAT}"
        made_of = "\n".join([f"{options} {known['sha256']}", *known["names"]])
        key = hashlib.sha256(made_of.encode("utf-8", "surrogatepass"))
        key.update(_stamps(raw.images, known["names"]).tobytes())
        return cache_dir / f"{raw.annotations.stem}-{key.hexdigest()[:16]}"

    known = _recall(memory)
    stamp = _stamps(raw.annotations.parent, [raw.annotations.name]).tolist()
    if known["annotations"] == stamp:
        folder = folder_of(known)
        if folder.name in known["folders"] and whole(epath.Path(folder), name):
            return open_prepared(folder, name)
    with locked(memory):
        known = _recall(memory)
        if known["annotations"] != stamp:
            content, digest = raw.content
            names = sorted({n for n in map(_file_name, content["images"]) if n is not None})
            known |= {"annotations": stamp, "sha256": digest, "names": names}
        folder = folder_of(known)
        with locked(folder):
            if not whole(epath.Path(folder), name):
                if folder.exists():
                    print(f"{folder} is incomplete or damaged: preparing it again")
                with new_folder(folder) as partial:
                    write_prepared(partial, {name: raw}, on_error)
        earlier = [n for n in known["folders"] if n != folder.name and (cache_dir / n).is_dir()]
        if earlier:
            listed = ", ".join(str(cache_dir / other) for other in earlier)
            print(
                f"prepared from earlier states of {raw.annotations} or its images: {listed}; "
                "delete what no run uses"
            )
        known["folders"] = [*earlier, folder.name]
        new = memory.with_suffix(".new")
        new.write_text(sealed(known))
        new.replace(memory)
    return open_prepared(folder, name)


def _recall(memory: Path) -> dict[str, Any]:
    """What is remembered of a source: stamp, sha256 and file names of its json, its folders."""
    nothing: dict[str, Any] = {"annotations": None, "sha256": "", "names": [], "folders": []}
    try:
        return unsealed(memory.read_text())
    except (OSError, ValueError):  # absent or damaged
        return nothing


def _stamps(folder: Path, names: Sequence[str]) -> np.ndarray:
    """Sizes and times of files, which reveal a change; -1 for a missing file; int64 [N, 3].

    The second time, of the last change of the file's entry, cannot be set: it also reveals a file
    that a copy with the old date has replaced. Names relative to the folder are looked up a third
    faster than whole paths, and all images are looked up at every start.
    """
    stamps = []
    with contextlib.ExitStack() as stack:
        at: dict[str, Any] = {}
        if os.stat in os.supports_dir_fd and folder.is_dir():
            at["dir_fd"] = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, at["dir_fd"])
        for name in names:
            try:
                status = os.stat(name if at else os.path.join(folder, name), **at)
                stamps.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
            except (OSError, ValueError):
                stamps.append((-1, -1, -1))
    return np.array(stamps, np.int64).reshape(-1, 3)


def _file_name(entry: Any) -> str | None:
    name = entry.get("file_name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None

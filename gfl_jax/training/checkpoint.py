"""Orbax checkpoints, local or in a bucket: atomic, and written in the background.

A checkpoint has a few named items, trees of arrays that can each be read without the others, and a
plain dictionary about them; `gfl_jax.run` knows what they mean. An interrupted save leaves nothing
that counts as a checkpoint. Arrays are copies on the host, written by the first process only: any
number of processes can restore them.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gfl_jax.errors import InputError, MissingFileError, WriteError
from gfl_jax.paths import PathLike, as_path, path_for_checkpoints

_STATUS = re.compile("[A-Z_]+: ")
"""Prefix of ValueErrors from tensorstore, which reads and writes the arrays: 'RESOURCE_EXHAUSTED: '
for a full disk, 'PERMISSION_DENIED: ' for a bucket."""

_DAMAGED = "is damaged: delete this folder to go back to the previous one"


class Checkpoints:
    """A folder of checkpoints by step, local or in a bucket.

    Attributes:
        folder: its absolute path.
    """

    def __init__(self, folder: PathLike, *, keep: int = 1, writes: bool = False):
        """Opens the folder, and creates it if there is none.

        Args:
            folder: where the checkpoints are.
            keep: how many of the newest to keep.
            writes: True for the run that saves to it: leftovers of interrupted saves are removed.

        Raises:
            InputError: see `path_for_checkpoints`.
        """
        self.folder = path_for_checkpoints(folder)
        self._writing = -1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=writes
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @classmethod
    def find(cls, folder: PathLike) -> "Checkpoints":
        """The checkpoints of a work directory (its best, if it has one) or of a checkpoint folder.

        Raises:
            MissingFileError: there is no complete checkpoint in any of these places.
        """
        folder = as_path(folder)
        for candidate in (folder / "best", folder / "checkpoints", folder):
            if candidate.is_dir() and any(child.name.isdigit() for child in candidate.iterdir()):
                checkpoints = cls(candidate)
                if checkpoints.step is not None:
                    return checkpoints
        raise MissingFileError(
            f"no complete checkpoint in {folder}: pass a work directory of `gfl-jax train`, or a "
            "folder of checkpoints by step"
        )

    @property
    def step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Starts writing the items, once the previous save is done.

        Args:
            step: names the checkpoint; an existing one is left as it is.
            items: trees of host arrays by name.
            about: JSON values stored with them.

        Raises:
            WriteError: this save or the previous one failed, on a full disk for instance.
        """
        if step in self._manager.all_steps():
            return
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(about=ocp.args.JsonSave(dict(about)), **trees)
        with self._named_errors():
            self._manager.wait_until_finished()
            self._writing = step
            self._manager.save(step, args=args)

    def about(self) -> dict[str, Any]:
        """The dictionary that was saved with the newest checkpoint.

        Raises:
            MissingFileError: there is no complete checkpoint.
            InputError: it is damaged.
        """
        self._must_have_items(["about"])
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        try:
            return dict(self._manager.restore(self.step, args=args)["about"])
        except (OSError, ValueError, TypeError) as error:
            raise self._unreadable(error, _DAMAGED) from error

    def read(self, item: str) -> Any:
        """An item of the newest checkpoint as stored: dictionaries of arrays on the host.

        Raises:
            MissingFileError: there is no complete checkpoint.
        """
        self._must_have_items([item])
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore()})
        return self._manager.restore(self.step, args=args)[item]

    def _must_have_items(self, names: Iterable[str]) -> None:
        """Raises unless there is a checkpoint with these items."""
        for _ in range(5):
            if self.step is None:
                raise MissingFileError(f"no complete checkpoint in {self.folder}")
            folder = self.folder / str(self.step)
            if folder.is_dir():
                break
            self._manager.reload()  # a run that is saving has deleted it
        if missing := [name for name in names if not (folder / name).is_dir()]:
            raise InputError(
                f"the checkpoint {folder} does not hold {', '.join(missing)}: it was written by an "
                "older version of gfl_jax. It can be evaluated and converted, but not resumed: "
                "name another --workdir"
            )

    def restore(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """Items of the newest checkpoint, on the host; other items are not read.

        Args:
            like: for each item to read, a tree of the same structure, shapes and dtypes.

        Raises:
            MissingFileError: there is no complete checkpoint.
            InputError: a stored item does not match `like`: another model or optimiser made it.
        """
        self._must_have_items(like)
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), dict(like))
        trees = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        where = f"the checkpoint {self.folder / str(self.step)}"
        try:
            stored = self._manager.restore(self.step, args=ocp.args.Composite(**trees))
            items = {name: stored[name] for name in trees}
            different = _differences(abstract, items)
        except (OSError, ValueError, KeyError) as error:
            different = self._stored_differences(abstract)
            if not different:
                damaged = isinstance(error, OSError) or _STATUS.match(str(error))
                remedy = _DAMAGED if damaged else "cannot be read"
                raise self._unreadable(error, remedy) from error
        if different:
            raise InputError(
                f"{where} is of another model or optimiser than this config's; use another "
                f"--workdir, or that config: {different}"
            )
        return items

    def _unreadable(self, error: Exception, remedy: str) -> InputError:
        """The error of a checkpoint that could not be read."""
        folder = self.folder / str(self.step)
        if not folder.is_dir():
            remedy = "was deleted while it was read, by a run that goes on: try again"
        return InputError(f"the checkpoint {folder} {remedy}. {error}")

    def _stored_differences(self, like: Mapping[str, Any]) -> str:
        """What `_differences` says of the items as they are stored; '' if they cannot be read."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return _differences(like, {name: self.read(name) for name in like})
        return ""

    def clear(self) -> None:
        """Deletes all checkpoints."""
        for step in self._manager.all_steps():
            self._manager.delete(step)

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            WriteError: it could not be written.
        """
        with self._named_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turns failed writes into a WriteError that says what is lost and what is kept."""
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not _STATUS.match(str(error)):
                raise
            gone = isinstance(error, FileNotFoundError) or str(error).startswith("NOT_FOUND")
            if gone or not self.folder.is_dir():
                raise WriteError(
                    f"the checkpoint of step {self._writing} could not be written: {self.folder} "
                    "is gone, or parts of it. The same command begins with what is left"
                ) from error
            kept = "no earlier one" if self.step is None else f"the one of step {self.step}"
            raise WriteError(
                f"the checkpoint of step {self._writing} could not be written to {self.folder}, "
                f"which still has {kept}: free some space or fix permissions, then rerun the same "
                f"command. {str(error)[:200]}"
            ) from error

    def close(self) -> None:
        """Finishes pending writes and closes the folder."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        """For `with`: pending writes are finished when it ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; an error from inside the `with` takes precedence over a failed write."""
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()


def _differences(expected: Any, found: Any) -> str:
    """The first few arrays of two trees that differ in name, shape or dtype; '' if none does."""

    def kinds(tree: Any) -> dict[str, str]:
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}"
            for path, x in jax.tree.leaves_with_path(tree)
        }

    ours, theirs = kinds(expected), kinds(found)
    lines = [
        f"{name} is {theirs.get(name, 'missing')}, expected {ours.get(name, 'none')}"
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name)
    ]
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    return "; ".join(lines[:5]) + more

"""Checkpoints by Orbax: atomic, written in the background, found again by the newest complete step.

A run keeps two folders: `checkpoints`, the newest ones, and `best`, the one of the highest AP. Each
checkpoint holds the train state, which includes the step and so the position in the data, and the
experiment. A save that was interrupted leaves nothing that counts as a checkpoint. States are
copies on the host, of which the first process writes one: any number of processes restores them.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gfl_jax.config import Experiment, from_dict, to_dict


class Checkpoints:
    """One folder of checkpoints, by step."""

    def __init__(self, folder: Path, *, keep: int = 1, writes: bool = False):
        """Opens the folder, made when first saved to.

        Args:
            folder: where the checkpoints are.
            keep: how many of the newest stay.
            writes: True for the run whose folder it is: what interrupted saves left is removed.
        """
        self.folder, self._writing = folder.absolute(), -1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, cleanup_tmp_directories=writes
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @classmethod
    def find(cls, folder: Path) -> "Checkpoints":
        """The checkpoints of a work directory, its best one if there is one; or a folder of them.

        Raises:
            FileNotFoundError: there is no complete checkpoint in any of these places.
        """
        for candidate in (folder / "best", folder / "checkpoints", folder):
            if candidate.is_dir() and any(child.name.isdigit() for child in candidate.iterdir()):
                found = cls(candidate)
                if found.step is not None:
                    return found
        raise FileNotFoundError(
            f"no complete checkpoint in {folder}: name a work directory of train.py, or a folder "
            "whose entries are steps"
        )

    @property
    def step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, experiment: Experiment, info: dict[str, Any]) -> None:
        """Starts to write a host copy of the state; what is being written already is awaited first.

        Args:
            step: names the checkpoint; one that exists is left as it is.
            state: pytree of host arrays.
            experiment: what made it.
            info: small JSON values kept beside it.

        Raises:
            OSError: this or the save before failed, for want of space for instance.
        """
        if step in self._manager.all_steps():
            return
        about = {"experiment": to_dict(experiment), **info}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
        )
        with self._named_errors():
            self._manager.wait_until_finished()
            self._writing = step
            self._manager.save(step, args=args)

    def about(self) -> tuple[Experiment, dict[str, Any]]:
        """The experiment and the info of the newest checkpoint.

        Raises:
            FileNotFoundError: there is no complete checkpoint.
        """
        if self.step is None:
            raise FileNotFoundError(f"no complete checkpoint in {self.folder}")
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = dict(self._manager.restore(self.step, args=args)["about"])
        return from_dict(Experiment, about.pop("experiment")), about

    def restore(self, like: Any, experiment: Experiment) -> Any:
        """The newest state, on the host.

        Args:
            like: a state of the same structure, shapes and dtypes.
            experiment: what will use it.

        Raises:
            FileNotFoundError: there is no complete checkpoint.
            ValueError: the stored state differs from `like`: another model or optimiser; or it was
                trained with other anchors than those of `experiment`.
        """
        stored, _ = self.about()
        if stored.detector.priors != experiment.detector.priors:
            raise ValueError(
                f"the checkpoint {self.folder / str(self.step)} was trained with "
                f"{stored.detector.priors}, detector.priors is {experiment.detector.priors}: its "
                "weights fit its own anchors only"
            )
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        try:
            state = self._manager.restore(self.step, args=args)["state"]
            for (path, expected), found in zip(
                jax.tree.leaves_with_path(abstract), jax.tree.leaves(state), strict=True
            ):
                if (found.shape, found.dtype) != (expected.shape, expected.dtype):
                    raise ValueError(
                        f"{jax.tree_util.keystr(path)} is {found.dtype}{list(found.shape)}, "
                        f"expected {expected.dtype}{list(expected.shape)}"
                    )
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"the checkpoint {self.folder / str(self.step)} was made by another model or "
                f"optimiser than this config's; use another --workdir, or that config: {error}"
            ) from error
        return state

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            OSError: it could not be written.
        """
        with self._named_errors():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Failed writes as an OSError that says what is lost and what is not."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            shutil.rmtree(self.folder / f"{self._writing}.orbax-checkpoint-tmp", ignore_errors=True)
            kept = f"that of step {self.step} is" if self.step is not None else "none was"
            raise OSError(
                f"the checkpoint of step {self._writing} could not be written to {self.folder} "
                f"({kept} there from before): make room or mend the folder, then give the same "
                f"command again. {error}"
            ) from error

    def close(self) -> None:
        """Waits, and ends the use of the folder."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        """For `with`: what is being written when it ends is written to its end."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes; of an error that is under way and one of the closing, the first is raised."""
        with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
            self.close()

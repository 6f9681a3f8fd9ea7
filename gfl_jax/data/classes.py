"""Classes of two data sets, or of a checkpoint and a data set, that should be the same."""

import unicodedata
from collections.abc import Sequence

from gfl_jax.errors import InputError

Classes = Sequence[tuple[int, str]]
"""(category id, name) of each class label."""

_LISTED = 12

_ALIKE = ", letter by letter: these differ in case, in blanks or in how Unicode writes an accent"


def class_error(one: str, its: Classes, other: str, their: Classes) -> InputError:
    """The error of classes that differ: both lists, without what they have in common.

    Args:
        one: what has the first classes, for the message.
        its: these classes.
        other: what has the second classes.
        their: these.
    """

    def listed(classes: Classes, without: Classes) -> str:
        entries = [f"{i} {name!r}" for i, name in classes if (i, name) not in set(without)]
        more = [f"... ({len(entries)} in all)"] if len(entries) > _LISTED else []
        return ", ".join([*entries[:_LISTED], *more]) or "no other"

    def normal(classes: Classes) -> list[str]:
        return sorted(unicodedata.normalize("NFKC", name).strip().casefold() for _, name in classes)

    same_names = sorted(name for _, name in its) == sorted(name for _, name in their)
    return InputError(
        f"{one} and {other} have "
        + ("the same classes under other ids" if same_names else "other classes")
        + f" (id and name): {one} {listed(its, their)}; {other} {listed(their, its)}. "
        + "Both must list the same categories"
        + ("" if same_names or normal(its) != normal(their) else _ALIKE)
    )

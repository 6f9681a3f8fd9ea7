"""What looks wrong with a data set although no entry of it is: said before anything is trained."""

import numpy as np

from gfl_jax.data.records import FLAGGED, NO_AREA, RULES, THIN, Table

ENOUGH = 100_000
"""Boxes that are looked at, at every start."""

_ADVICE = {
    "crowds": "iscrowd 1 marks a region of many objects; single objects have 0",
    RULES[FLAGGED]: "remove the flag from objects that are to be found",
    RULES[NO_AREA]: "without the field `area` that of the box counts",
}


def nothing_to_train_on(table: Table, min_side: int) -> str:
    """Why no image can be trained on: what every rule leaves out, and what looks wrong.

    Args:
        table: of the training images.
        min_side: images with a shorter side, in pixels, are not trained on.
    """
    small = int((table.sizes.min(1) < min_side).sum())
    counts = {"crowds": int(table.crowd.sum())}
    for rule in (FLAGGED, NO_AREA, THIN):
        counts[RULES[rule]] = int((~table.crowd & (table.rule == rule)).sum())
    counts = {why: count for why, count in counts.items() if count}
    left_out = ", ".join(f"{count} {why}" for why, count in counts.items())
    why = suspicion(table) or next((_ADVICE[why] for why in counts if why in _ADVICE), "")
    return (
        f"no image can be trained on: of {len(table.sizes)} images {small} have a side under "
        f"{min_side} pixels; of {len(table.labels)} objects "
        + (f"these are not trained on: {left_out}" if left_out else "none is left out")
        + (f"; {why}" if why else "")
    )


def suspicion(table: Table) -> str:
    """Whether the first boxes look like those of another format; empty: they do not."""
    if not len(table.boxes):
        return ""
    starts = table.starts[: np.searchsorted(table.starts, ENOUGH) + 1]
    sizes = np.repeat(table.sizes[: len(starts) - 1], np.diff(starts), axis=0)
    sizes = sizes[:, ::-1]  # width, height
    start, end = table.boxes[: starts[-1], :2], table.boxes[: starts[-1], 2:]
    stated = end - start  # width and height, or the lower right corner
    if ((end <= 1.01) | ((start <= 1.01) & (stated <= 1.01))).all(1).mean() > 0.9:
        return (
            "the boxes lie between 0 and 1: they look like shares of the image's width and "
            "height, where COCO's are in pixels"
        )
    as_corners = ((stated > start) & (stated <= sizes + 1)).all(1)
    sticks_out = (end > 1.1 * sizes).any(1)
    if len(start) >= 3 and as_corners.mean() > 0.95 and sticks_out.mean() > 0.3:
        return (
            f"{sticks_out.sum()} of {len(start)} boxes extend far beyond their image: they look "
            "like x1, y1, x2, y2, where COCO's are x, y, width, height"
        )
    return ""

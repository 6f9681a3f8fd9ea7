"""Charts as SVG for a page: both axes from 0 to 1, colours by the page's style sheet."""

from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

SIZE = 300
"""Length of both axes."""


def chart(marks: str, x: str, y: str, title: str) -> str:
    """A chart with axes from 0 to 1.

    Args:
        marks: what `line`, `cell` and the like made.
        x: what the horizontal axis shows.
        y: what the vertical axis shows.
        title: said by screen readers.
    """
    grid, numbers = [], []
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        at = f"{tick * SIZE:g}", f"{SIZE - tick * SIZE:g}"
        grid.append(f'<path class="grid" d="M{at[0]} 0V{SIZE}M0 {at[1]}H{SIZE}"/>')
        numbers.append(f'<text x="{at[0]}" y="{SIZE + 16}" text-anchor="middle">{tick:g}</text>')
        numbers.append(f'<text x="-6" y="{at[1]}" dy="4" text-anchor="end">{tick:g}</text>')
    return (
        f'<svg class="chart" viewBox="-46 -8 {SIZE + 56} {SIZE + 46}" role="img" '
        f'aria-label="{escape(title)}">{"".join(grid)}{marks}{"".join(numbers)}'
        f'<text x="{SIZE / 2}" y="{SIZE + 34}" text-anchor="middle">{escape(x)}</text>'
        f'<text transform="rotate(-90)" x="{-SIZE / 2}" y="-34" text-anchor="middle">{escape(y)}'
        "</text></svg>"
    )


def line(points: Iterable[Sequence[float]], style: str) -> str:
    """A line through points (x, y) from 0 to 1; `style` is a class of the style sheet."""
    path = " ".join(f"{x * SIZE:.1f},{SIZE - y * SIZE:.1f}" for x, y in points)
    return f'<polyline class="{style}" points="{path}"/>'


def dot(x: float, y: float, style: str, title: str) -> str:
    """A dot at a point from 0 to 1, with a title that shows when it is pointed at."""
    return (
        f'<circle class="{style}" cx="{x * SIZE:.1f}" cy="{SIZE - y * SIZE:.1f}" r="4">'
        f"<title>{escape(title)}</title></circle>"
    )


def cell(x: float, y: float, side: float, strength: float, title: str) -> str:
    """A square with its lower left corner at a point; strength from 0 to 1."""
    return (
        f'<rect class="cell" x="{x * SIZE:.1f}" y="{SIZE - (y + side) * SIZE:.1f}" '
        f'width="{side * SIZE:.1f}" height="{side * SIZE:.1f}" opacity="{strength:.2f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def spark(values: np.ndarray) -> str:
    """A small line of values from 0 to 1, without axes."""
    step = 80 / max(len(values) - 1, 1)
    path = " ".join(f"{i * step:.0f},{22 - 20 * v:.1f}" for i, v in enumerate(values))
    return (
        '<svg class="spark" viewBox="0 0 80 24" aria-hidden="true">'
        f'<path class="grid" d="M0 22H80"/><polyline class="line one" points="{path}"/></svg>'
    )

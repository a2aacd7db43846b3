"""The one look of every figure: colour-blind palette, axis units, a caption that says what ran."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's palette without its yellow, which is too pale for a line on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DIVERGING = "RdBu_r"  # safe for red-green blindness, white in the middle
DPI = 150
CAPTION_SIZE = 7.5
CAPTION_CHARACTERS = 15  # an inch of it holds
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
}


@contextmanager
def figure(
    path: Path, *, caption: str, width: float = 7.0, height: float = 4.2
) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, written to `path` (PNG) when the block ends well.

    Sizes are inches. Needs no display and leaves matplotlib's global state as it was.
    """
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), dpi=DPI)
        axes = drawn.add_subplot()
        yield drawn, axes
        wrap = int(width * CAPTION_CHARACTERS)
        caption = "\n".join(textwrap.fill(line, wrap) for line in caption.splitlines())
        drawn.supxlabel(caption, fontsize=CAPTION_SIZE, color="#555555", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path)


def colour(index: int) -> str:
    """The palette's colours in turn."""
    return PALETTE[index % len(PALETTE)]


def count(value: float) -> str:
    """3500000 -> 3.5M: numbers as they stand on axes and in tables."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def format_axis(axis: object, formatter: Callable[[float], str]) -> None:
    """Tick labels of `axes.xaxis` or `axes.yaxis` by a function of the value."""
    axis.set_major_formatter(  # pyrefly: ignore [missing-attribute]
        FuncFormatter(lambda value, _: formatter(value))
    )


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean over each value and up to `reach` neighbours on both sides, as many left as right."""
    means = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        means.append(sum(window) / len(window))
    return means

"""What the reports' figures share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DPI = 150
CAPTION = {"fontsize": 7.5, "color": "#555555"}


def can_draw() -> bool:
    """Whether matplotlib is here; without it tables alone are written, and this says so."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    print("no figures: matplotlib is missing; make them elsewhere from the JSON")
    return False


@contextmanager
def figure(
    path: Path, *, rows: int = 1, columns: int = 1, size: tuple[float, float], caption: str
) -> Iterator[tuple[Any, Any]]:
    """(figure, 2-D array of axes), written to `path` (PNG) when the block ends well.

    The caption says what ran where. Needs no display.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        yield drawn, grid
        drawn.supxlabel(caption, **CAPTION)
        drawn.savefig(path, dpi=DPI)
    finally:
        plt.close(drawn)


def bare(axes) -> None:
    """No frame above and at the right, pale horizontal lines behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, color="#cccccc")
    axes.set_axisbelow(True)


def legend_above(drawn, axes, *, columns: int) -> None:
    """The axes' legend over the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    drawn.legend(
        handles, labels, loc="outside upper center", ncols=columns, fontsize=9, frameon=False
    )

"""One look for all figures, and how they are saved: the same records give the same bytes.

Figures are made without pyplot, so nothing global is left behind. Widths are those of a paper's column; colours
are those of Okabe and Ito, which colour-blind readers can tell apart. Texts are never read as mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMN_INCHES = 3.5

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
GREY, SILVER, PALE = "#666666", "#AAAAAA", "#DDDDDD"

SETTINGS = {
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": PALE,
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.minor.width": 0.3,
    "hatch.linewidth": 0.4,
    "text.parse_math": False,
    "svg.hashsalt": "tpme",
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """The look, inside a ``with`` block only."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


def new_figure(height: float, width: float = COLUMN_INCHES) -> Figure:
    """An empty figure of ``width`` by ``height`` inches that keeps its parts from overlapping."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> Any:
    """Fix the layout where it is now (it need not be found again on saving); returns the renderer to measure with."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure.canvas.get_renderer()


def save(figure: Figure, ending: str) -> bytes:
    """The figure as ``png`` or ``svg``, without dates or versions in it."""
    file = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[ending]
    with style():
        figure.savefig(file, format=ending, metadata=metadata)
    return file.getvalue()


def shorten(name: str, limit: int = 24) -> str:
    """A name that fits beside an axis; tables give it in full."""
    return name if len(name) <= limit else name[: limit - 1] + "…"

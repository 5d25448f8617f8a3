"""One look for all figures, and how they are saved: the same records give the same bytes.

Figures are made without pyplot, so nothing global is left behind. Widths are those of a paper's column; colours
are those of Okabe and Ito, which colour-blind readers can tell apart. Texts are never read as mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLUMN_INCHES = 3.5

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9", "#F0E442")
"""Of parts of a whole, in this order."""
GREY, SILVER, PALE = "#666666", "#AAAAAA", "#DDDDDD"

SETTINGS = {
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.titley": 1.0,  # else every drawing measures all ticks to place titles above them
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
    "pdf.fonttype": 42,  # TrueType: many conferences refuse Type 3
}


@contextmanager
def style() -> Iterator[None]:
    """The look, inside a ``with`` block only."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def margins(
    figure: Figure, left: float, right: float, bottom: float, top: float, across: float = 0, down: float = 0
) -> None:
    """Room around the axes and, for panels, ``across`` and ``down`` between them, in inches.

    Set by hand because the automatic layouts draw every figure several times to find the same.
    """
    width, height = figure.get_size_inches()
    grid: Any = figure.axes[0].get_gridspec()
    columns, rows = grid.ncols, grid.nrows
    panel_width = (width - left - right - (columns - 1) * across) / columns
    panel_height = (height - bottom - top - (rows - 1) * down) / rows
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
        wspace=across / panel_width, hspace=down / panel_height,
    )  # fmt: skip


def text_width(figure: Figure, texts: Iterable[str], size: float) -> float:
    """Width of the longest text in inches."""
    canvas: Any = figure.canvas
    renderer = canvas.get_renderer()
    widths = [0.0]
    for text in texts:
        drawn = figure.text(0, 0, text, fontsize=size)
        widths.append(drawn.get_window_extent(renderer).width)
        drawn.remove()
    return float(max(widths) / figure.dpi)


PDF_METADATA = {"CreationDate": None, "Creator": None, "Producer": None}


def save(figure: Figure, ending: str) -> bytes:
    """The figure as ``png``, ``svg`` or ``pdf``, without dates or versions in it."""
    file = io.BytesIO()
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": PDF_METADATA}[ending]
    with style():
        figure.savefig(file, format=ending, metadata=metadata)
    return file.getvalue()


def shorten(name: str, limit: int = 24) -> str:
    """A name that fits beside an axis, its middle left out: rows often differ in their ends. Tables give it in full."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[limit // 2 + 1 - limit :]}"

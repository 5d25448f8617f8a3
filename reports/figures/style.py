"""What all figures share: their look, axes, row labels, and how they are saved. The same records give the same bytes.

Figures are made without pyplot, so nothing global is left behind. Widths are those of a paper's column or page. A
colour of ``PHASE_COLOURS`` always means that phase, one of ``COLOURS`` a row; everything else is grey or ``INK``.
Colour is never the only cue: phases and rows also differ in hatches, dashes, markers or written names. Texts are never
read as mathematics.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tpme.bench.text import escaped
from tpme.reports.data.load import Array
from tpme.reports.data.others import source_marks
from tpme.reports.data.phase_colours import PHASE_COLOURS
from tpme.reports.data.section import Section
from tpme.reports.data.trials import OF_OTHERS

COLUMN_INCHES, PAGE_INCHES = 3.5, 7.0
FOOT_LINE_INCHES = 0.11
"""Height of a line of the text below a figure."""
LOG_FROM = 20
"""An axis is logarithmic where the largest value is more than this many times the smallest."""

COLOURS = ("#CC6677", "#332288", "#AA9933", "#117733", "#3FA7C4", "#882255")
"""Colours of rows: those of Tol's "muted" scheme, two of them darkened to be seen on white."""
INK, GREY, SILVER, PALE = "#3D4A5C", "#666666", "#AAAAAA", "#DDDDDD"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2.5, 1)), (0, (7, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = (None, "/////", ".....", "xxxxx", "-----", "|||||", "+++++", "\\\\\\\\\\", "ooo", "***")
PHASE_HATCHES = {
    "adapt": "/////", "prepare": ".....", "estimate": "xxxxx", "search": "-----", "round": "|||||", "warmup": "+++++",
    "probe": "\\\\\\\\\\", "other": "ooo",
}  # fmt: skip
"""Of the rarer kinds of phases; the others are plain."""

SETTINGS = {
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.titley": 1.0,  # a fixed position saves measuring all ticks in every drawing
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


@dataclass(frozen=True)
class Plot:
    """A finished figure; ``name`` is its file name without the ending."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Look:
    """How a row looks wherever it is not a line of its own: lines, markers and areas."""

    colour: str
    dashes: Any
    marker: str
    hatch: str | None


def row_looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of every row, by its place in ``names``; repeated names count once.

    Of six rows in a line no two share a colour, dashes or a marker; up to sixty differ in colour or hatching.
    """
    unique = dict.fromkeys(names)
    several = len(COLOURS)
    return {
        name: Look(
            COLOURS[place % several], DASHES[place % several], MARKERS[place % several],
            HATCHES[place // several % len(HATCHES)],
        )
        for place, name in enumerate(unique)
    }  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The common style, inside a ``with`` block."""
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

    Set explicitly because automatic layouts draw every figure several times for the same result.
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


def name_rows(
    figure: Figure,
    axes: Any,
    names: Sequence[str],
    *,
    right: float = 0.05,
    bottom: float = 0.36,
    top: float = 0.2,
    across: float = 0,
) -> Array:
    """Write names on the left of horizontal bars and set the margins. Returns the bars' positions, from the top down.

    ``right``, ``bottom``, ``top`` and ``across`` are the margins and the gap between panels, in inches.
    """
    position = np.arange(len(names), dtype=np.float64)[::-1]
    axes.set_yticks(position, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    margins(figure, text_width(figure, names, 6.5) + 0.12, right, bottom, top, across=across)
    return position


def log_axis(axes: Any, low: float, high: float, most: int = 3) -> None:
    """Make the x axis logarithmic from ``low`` to ``high`` with at most ``most`` ticks."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(_round_values(low, high, most)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _round_values(low: float, high: float, most: int) -> list[float]:
    """As many as ``most`` allows: 1, 2, 5 or 1, 3 times each power of ten, each power, or every n-th power."""
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        values = [digit * 10.0**power for power in powers for digit in digits]
        inside = [value for value in values if low <= value <= high]
        if len(inside) <= most:
            return inside
    stride = math.ceil(len(inside) / most)
    return [value for value in inside if round(math.log10(value)) % stride == 0]


def _power(value: float) -> str:
    """0.01 to 5000 as a number, other values as a power of ten."""
    if 0.0099 <= value <= 5000:
        return f"{value:g}"
    power = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**power)
    raised = "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return raised if digit == 1 else f"{digit}·{raised}"


def save(figure: Figure, ending: str) -> bytes:
    """The figure as ``png``, ``svg`` or ``pdf``, without dates or versions."""
    file = io.BytesIO()
    keys = {"png": ("Software",), "svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}
    with style():
        figure.savefig(file, format=ending, metadata=dict.fromkeys(keys[ending]))
    return file.getvalue()


def row_label(section: Section, name: str, limit: int = 24) -> str:
    """Name of a row beside an axis, with ``*`` if it has footnotes and its status if it did not finish.

    A long name loses its middle, because rows often differ in their ends; tables have it in full.
    """
    status = str(section.summary.loc[name, "status"])
    short, mark = _without_source(section, name)
    short = short if len(short) <= limit else f"{short[: limit // 2]}…{short[limit // 2 + 1 - limit :]}"
    mark += "*" if section.notes.marks[name] else ""
    return short + mark + ("" if status == "ok" else f" ({status})")


def _without_source(section: Section, name: str) -> tuple[str, str]:
    """The name of a row and the mark of its source; of mixed rows the name loses its source, which it has in tables."""
    if "source" not in section.group.mixed:
        return name, ""
    source = next((result.source.name for result in section.behind[name] if result.source is not None), None)
    if source is None:
        return name, ""
    said = OF_OTHERS + escaped(source)
    for text, instead in ((f" [{said}]", ""), (f", {said}", ""), (f"{said}, ", "")):
        name = name.replace(text, instead)
    return name, source_marks(one.result for one in section.records)[source]


def add_foot(figure: Figure, text: str) -> None:
    """Write a text below a finished figure, which grows by its lines: everything else keeps its size in inches."""
    if not text:
        return
    width, height = figure.get_size_inches()
    letters = 0.97 * (width - 0.08) * len(text) / text_width(figure, [text], 6)
    lines = textwrap.wrap(text, math.floor(letters))
    room = FOOT_LINE_INCHES * len(lines) + 0.04
    taller = height + room
    figure.set_size_inches(width, taller)
    for axes in figure.axes:
        box = axes.get_position(original=True)
        axes.set_position((box.x0, (box.y0 * height + room) / taller, box.width, box.height * height / taller))
    for other in figure.texts:
        other.set_y((other.get_position()[1] * height + room) / taller)
    for legend in figure.legends:
        if legend.get_bbox_to_anchor() is figure.bbox:
            legend.set_bbox_to_anchor((0, room / taller, 1, height / taller), figure.transFigure)
    below = "\n".join(lines)
    figure.text(0.04 / width, 0.04 / taller, below, fontsize=6, color=GREY, va="bottom", linespacing=1.1)


def phase_look(kind: str) -> dict[str, Any]:
    """Fill of a kind of phase, as keywords of a patch."""
    return {"facecolor": PHASE_COLOURS[kind], "hatch": PHASE_HATCHES.get(kind), "edgecolor": "white", "linewidth": 0.3}


def phase_letters(kind: str) -> str:
    """The colour of letters on that of a phase: white on a dark one (by its relative luminance)."""
    red, green, blue = to_rgb(PHASE_COLOURS[kind])
    return "white" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.27 else "black"


def phase_legend(figure: Figure, kinds: Iterable[str], across: int) -> float:
    """The legend of these kinds of phases at the top, ``across`` in a line. Returns its height in inches."""
    present = set(kinds)
    entries = [Patch(label=kind, **phase_look(kind)) for kind in PHASE_COLOURS if kind in present]
    by_line = [entry for column in range(across) for entry in entries[column::across]]  # filled column by column
    figure.legend(
        handles=by_line, loc="upper center", ncols=across, frameon=False, fontsize=6, handlelength=1.3,
        handleheight=0.9, columnspacing=1, borderaxespad=0.2,
    )  # fmt: skip
    return 0.08 + 0.13 * math.ceil(len(entries) / across)

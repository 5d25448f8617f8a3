"""What every figure module shares: a finished figure, and how a row is called in it."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure

from tpme.reports.data.section import Section
from tpme.reports.figures.style import shorten


@dataclass(frozen=True)
class Plot:
    """A finished figure; ``name`` is the file name it is saved under, without the ending."""

    name: str
    title: str
    caption: str
    figure: Figure


def row_label(section: Section, name: str, limit: int = 24) -> str:
    """Name of a row beside an axis, with ``*`` where it has footnotes and its end where it did not finish."""
    status = str(section.summary.loc[name, "status"])
    mark = "*" if section.notes.marks[name] else ""
    return shorten(name, limit) + mark + ("" if status == "ok" else f" ({status})")

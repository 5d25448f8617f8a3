"""The fields that tables are made of: how a quantity of the summary is shown, and which row of it is the best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan, nan
from typing import Any, Literal

import numpy as np
import pandas as pd

from tpme.reports.data.metrics import spread
from tpme.reports.data.resampling import LEVEL
from tpme.reports.data.section import Section
from tpme.reports.data.trials import Line
from tpme.reports.tables.table import MISSING, Column, Entry, Table, Value, number

Better = Literal["higher", "lower"]
Field = tuple[Column, Callable[[str, Line], Entry]]
"""A column, and how it makes its entry from the name of a row and its line of the summary."""

QUALITY_DIGITS = 4
"""Decimals of Recall and NDCG."""


def table_of(
    section: Section,
    name: str,
    title: str,
    made: Sequence[Field],
    rows: Iterable[str] | None = None,
    notes: Iterable[str] = (),
) -> Table:
    """A table over the rows of the summary (all, or those named), with the section's footnotes and instruments."""
    names = [str(row) for row in (section.summary.index if rows is None else rows)]
    entries = tuple(tuple(entry(row, section.lines[row]) for _, entry in made) for row in names)
    columns = tuple(column for column, _ in made)
    warnings = (*section.notes.shared, section.instruments)
    return Table(name, title, columns, entries, tuple(notes), warnings, section.notes.footnotes, section.name)


def method(section: Section) -> Field:
    """Name of the row with the marks of its footnotes."""
    marks = section.notes.marks
    return Column("method", "Method", numeric=False), lambda name, line: Entry(name, name, marks=marks[name])


def seeds() -> Field:
    """How many seeds finished, and of how many where some did not."""

    def entry(name: str, line: Line) -> Entry:
        finished, seeds = int(line["seeds_ok"]), int(line["seeds"])
        return Entry(str(seeds) if finished == seeds else f"{finished} of {seeds}", finished)

    return Column("seeds_finished", "Seeds", wide_only=True), entry


def status() -> Field:
    """How a row ended, for programs: people read it in the place of its quality."""
    return Column("status", machine_only=True), hidden("status")


def quality(section: Section, key: str, header: str, seeds: bool = False) -> list[Field]:
    """Mean and half the width of its interval; the bounds go to the formats for programs.

    With ``seeds`` the standard deviation over them, where any row has several, is a column for people, too.
    """
    best = best_rows(section.summary[key], "higher", QUALITY_DIGITS)

    def entry(name: str, line: Line) -> Entry:
        if isnan(line[key]):
            return Entry(str(line["status"]) if line["status"] != "ok" else MISSING)
        half = (line[f"{key}_high"] - line[f"{key}_low"]) / 2
        mean = decimals(line[key])
        return Entry(f"{mean} ± {decimals(half)}", line[key], name in best, short=mean)

    def spread(name: str, line: Line) -> Entry:
        return Entry(decimals(line[f"{key}_sd"]), value_of(line[f"{key}_sd"]))

    bounds = [(Column(f"{key}_{part}", machine_only=True), hidden(f"{key}_{part}")) for part in ("low", "high")]
    known = seeds and bool(section.summary[f"{key}_sd"].notna().any())
    column = Column(f"{key}_sd", "± seeds", machine_only=not known, wide_only=True)
    return [(Column(key, header, "higher"), entry), *bounds, (column, spread)]


def cost(
    section: Section,
    key: str,
    header: str,
    show: Callable[[float], str] = number,
    scale: float = 1,
    better: Better | None = "lower",
    of: Mapping[str, Line] | None = None,
) -> list[Field]:
    """A mean, bold where it is the best of the compared rows, ± the standard deviation over seeds where there is one.

    Args:
        section: whose rows.
        key: of the value in the line of a row; ``<key>_sd`` is its standard deviation.
        header: for people.
        show: how a value is printed; programs get it unscaled.
        scale: what values are divided by to be printed.
        better: which value is the best; None where none is.
        of: the lines that hold the values, by row; by default those of the summary.
    """
    lines = section.lines if of is None else of
    compared = pd.Series({name: lines[name].get(key) for name in section.compared if name in lines}, dtype=float)
    best = best_rows(compared, better) if better else set()

    def entry(name: str, line: Line) -> Entry:
        value, spread = lines[name].get(key, nan), lines[name].get(f"{key}_sd", nan)
        mean = show(value / scale)
        text = mean if isnan(spread) else f"{mean} ± {number(spread / scale, 2)}"
        return Entry(text, value_of(value), name in best, short=mean)

    made: list[Field] = [(Column(key, header, better), entry)]
    if any(f"{key}_sd" in line for line in lines.values()):
        spreads = Column(f"{key}_sd", machine_only=True)
        made.append((spreads, lambda name, line: Entry("", value_of(lines[name].get(f"{key}_sd")))))
    return made


def over_seeds(found: Mapping[tuple[str, str], Sequence[float]]) -> dict[str, dict[str, float]]:
    """The values of every (row, key) as lines for ``cost``: mean and ``<key>_sd``, NaN where there are too few."""
    lines: dict[str, dict[str, float]] = {}
    for (name, key), values in found.items():
        mean = float(np.mean(values)) if values else nan
        lines.setdefault(name, {}).update({key: mean, f"{key}_sd": spread(np.array(values))})
    return lines


def millions(value: float) -> str:
    """A parameter count in millions to the thousand; what is smaller than that keeps two digits."""
    return f"{value:.3f}" if value >= 1e-3 else number(value, 2)


def memory(section: Section, header: str, scale: float) -> list[Field]:
    """M; of a row that ran out of memory the most that was seen, as a lower bound."""
    (column, mean), *spreads = cost(section, "memory_bytes", header, scale=scale)

    def entry(name: str, line: Line) -> Entry:
        if line["status"] == "oom" and not isnan(line["memory_seen_bytes"]):
            return Entry(f"≥ {number(line['memory_seen_bytes'] / scale)}")
        return mean(name, line)

    seen = (Column("memory_seen_bytes", machine_only=True), hidden("memory_seen_bytes"))
    source = (Column("memory_source", machine_only=True), hidden("memory_source"))
    return [(column, entry), *spreads, seen, source]


def energy(section: Section) -> list[Field]:
    """E, the energy of a training epoch; no column where no row has any."""
    joules = section.summary["energy_epoch_j"]
    if joules.isna().all():
        return []
    unit, scale = ("kJ", 1e3) if joules.max() >= 1e4 else ("J", 1.0)
    return cost(section, "energy_epoch_j", f"E ({unit})", scale=scale)


def tpme(section: Section) -> list[Field]:
    """TPME in percent with its interval, and the rank by it; of a row that ran out of memory the lower bound."""
    best = best_rows(section.summary["tpme"], "lower")

    def percent(name: str, line: Line) -> Entry:
        if not isnan(line["tpme_lower_bound"]):
            return Entry(f"≥ {100 * line['tpme_lower_bound']:.2f}")
        if isnan(line["tpme"]):
            return Entry(MISSING)
        return Entry(f"{100 * line['tpme']:.2f}", 100 * line["tpme"], name in best)

    def bound(name: str, line: Line) -> Entry:
        return Entry("", 100 * line["tpme_lower_bound"])

    def interval(name: str, line: Line) -> Entry:
        if isnan(line["tpme_low"]):
            return Entry(MISSING)
        low, high = 100 * line["tpme_low"], 100 * line["tpme_high"]
        return Entry(f"{low:.2f}–{high:.2f}", low, short=f"{low:.1f}–{high:.1f}")

    def high(name: str, line: Line) -> Entry:
        return Entry("", 100 * line["tpme_high"])

    def rank(name: str, line: Line) -> Entry:
        known = not isnan(line["tpme_rank"])
        return Entry(str(int(line["tpme_rank"])), int(line["tpme_rank"])) if known else Entry(MISSING)

    return [
        (Column("tpme_percent", "TPME (%)", "lower"), percent),
        (Column("tpme_low_percent", f"{100 * LEVEL:.0f} %", wide_only=True), interval),
        (Column("tpme_high_percent", machine_only=True), high),
        (Column("tpme_lower_bound_percent", machine_only=True), bound),
        (Column("tpme_rank", "Rank"), rank),
    ]


def interval(key: str, header: str) -> list[Field]:
    """The bounds of an interval, in one column for people and in two for programs."""

    def entry(name: str, line: Line) -> Entry:
        low, high = line[f"{key}_low"], line[f"{key}_high"]
        return Entry(f"{number(low)}–{number(high)}" if not isnan(low) else MISSING, value_of(low))

    return [(Column(f"{key}_low", header), entry), (Column(f"{key}_high", machine_only=True), hidden(f"{key}_high"))]


def count(key: str, header: str) -> Field:
    """A count, or the mean of one over seeds."""

    def entry(name: str, line: Line) -> Entry:
        text = MISSING if isnan(line[key]) else f"{line[key]:.1f}".removesuffix(".0")
        return Entry(text, value_of(line[key]))

    return Column(key, header), entry


def percent(key: str, header: str) -> Field:
    """A share, shown in percent."""
    return Column(key, header), lambda name, line: Entry(f"{100 * line[key]:.2f}", value_of(line[key]))


def hidden(key: str) -> Callable[[str, Line], Entry]:
    """Entries of a column that only programs see."""
    return lambda name, line: Entry("", value_of(line[key]))


def value_of(value: Any) -> Value:
    """A numpy or pandas scalar as a plain one."""
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return None
    return value if isinstance(value, str) else float(value)


def decimals(value: float) -> str:
    """Recall or NDCG as it is printed."""
    return MISSING if pd.isna(value) else f"{value:.{QUALITY_DIGITS}f}"


def best_rows(values: pd.Series[Any], better: Better, digits: int = 12) -> set[str]:
    """The rows that hold the best value, as far as it is printed; none where there is no choice."""
    known = values.dropna().astype(float).round(digits)
    if known.nunique() < 2:
        return set()
    best = known.max() if better == "higher" else known.min()
    return {str(name) for name in known.index[known == best]}


def byte_unit(values: pd.Series[Any]) -> tuple[str, float]:
    """The unit that suits the largest value of a column."""
    largest = values.astype(float).max()
    return ("GB", 1e9) if pd.notna(largest) and largest >= 1e9 else ("MB", 1e6)


def bytes_text(value: Any) -> str:
    """A size with its unit."""
    if value is None or pd.isna(value):
        return MISSING
    unit, scale = byte_unit(pd.Series([value]))
    return f"{number(value / scale)} {unit}"

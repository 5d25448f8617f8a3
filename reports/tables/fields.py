"""Columns of tables: the entries of a quantity of the summary, its intervals, and its best row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import isnan, nan
from typing import Any

import pandas as pd

from tpme.bench.quantities import MISSING, QUALITY_DIGITS, Better, number, quantity
from tpme.reports.data.section import Section
from tpme.reports.data.stats import LEVEL
from tpme.reports.data.trials import Line
from tpme.reports.tables.table import Column, Entry, Table, Value

Field = tuple[Column, Callable[[str, Line], Entry]]
"""A column, and the function from a row's name and its line of the summary to the entry."""


def table_of(
    section: Section,
    name: str,
    title: str,
    columns: Sequence[Field],
    rows: Iterable[str] | None = None,
    notes: Iterable[str] = (),
) -> Table:
    """A table over all or the named rows of the summary, with the section's footnotes and instruments.

    Of other tasks than recommendation, without the columns that no row has.
    """
    names = [str(row) for row in (section.summary.index if rows is None else rows)]
    lines = [[entry(row, section.lines[row]) for _, entry in columns] for row in names]
    kept = [
        place
        for place, (column, _) in enumerate(columns)
        if section.ranked or column.machine_only or any(line[place].text != MISSING for line in lines)
    ]
    entries = tuple(tuple(line[place] for place in kept) for line in lines)
    warnings = tuple(text for text in (*section.notes.shared, section.instruments) if text)
    heads = tuple(columns[place][0] for place in kept)
    return Table(name, title, heads, entries, tuple(notes), warnings, section.notes.footnotes, section.name)


def method(section: Section) -> Field:
    """Name of the row with the marks of its footnotes."""
    marks = section.notes.marks
    return Column("method", "Method", numeric=False), lambda name, line: Entry(name, name, marks=marks[name])


def seeds() -> Field:
    """Number of finished seeds, and of all where some did not finish."""

    def entry(name: str, line: Line) -> Entry:
        finished, seeds = int(line["seeds_ok"]), int(line["seeds"])
        return Entry(str(seeds) if finished == seeds else f"{finished} of {seeds}", finished)

    return Column("seeds_finished", "Seeds", fact=True), entry


def quality(section: Section, key: str, seeds: bool = False) -> list[Field]:
    """Mean ± half the width of its interval; the bounds go to the formats for programs.

    With ``seeds`` the standard deviation over seeds is a column for people where any row has several. A metric without
    an interval over users has the deviation behind its mean instead.
    """
    what = section.quantity(key)
    best = best_rows(section.summary[key], what.better or "higher", QUALITY_DIGITS)
    resampled = bool(section.summary[f"{key}_low"].notna().any())

    def entry(name: str, line: Line) -> Entry:
        if isnan(line[key]):
            return Entry(str(line["status"]) if line["status"] != "ok" else MISSING)
        half = (line[f"{key}_high"] - line[f"{key}_low"]) / 2 if resampled else line[f"{key}_sd"]
        mean = what.format(line[key])
        text = mean if isnan(half) and not resampled else f"{mean} ± {what.format(half)}"
        return Entry(text, line[key], name in best, short=mean)

    def deviation(name: str, line: Line) -> Entry:
        return Entry(what.format(line[f"{key}_sd"]), value_of(line[f"{key}_sd"]))

    bounds = [hidden(f"{key}_{part}") for part in ("low", "high")]
    known = seeds and bool(section.summary[f"{key}_sd"].notna().any())
    column = Column(f"{key}_sd", "± seeds", machine_only=not known, wide_only=True)
    return [(Column(key, what.header, what.better), entry), *bounds, (column, deviation)]


def cost(
    section: Section,
    key: str,
    frame: pd.DataFrame | None = None,
    *,
    header: str | None = None,
    unit: tuple[str, float] | None = None,
) -> list[Field]:
    """A mean, bold where it is the best of the compared rows, ± the standard deviation over seeds where known.

    Args:
        section: whose rows.
        key: column of the values; ``<key>_sd`` is their standard deviation. Programs get both unscaled.
        frame: the values by row; by default the summary.
        header: for people; by default the quantity and the unit.
        unit: the unit in which people read the values, and its size; by default the one that suits the largest.
    """
    frame, what = section.summary if frame is None else frame, quantity(key)
    values = frame[key].astype(float).to_dict()
    spreads = frame[f"{key}_sd"].to_dict() if f"{key}_sd" in frame else {}
    name_of_unit, scale = unit or what.scale(values.values())
    compared = pd.Series({name: values[name] for name in section.compared if name in values}, dtype=float)
    best = best_rows(compared, what.better) if what.better else set()

    def entry(name: str, line: Line) -> Entry:
        spread = spreads.get(name, nan)
        mean = what.format(values[name] / scale)
        text = mean if isnan(spread) else f"{mean} ± {number(spread / scale, 2)}"
        return Entry(text, value_of(values[name]), name in best, short=mean)

    fields: list[Field] = [(Column(key, header or what.label(name_of_unit), what.better), entry)]
    if spreads:
        column = Column(f"{key}_sd", machine_only=True)
        fields.append((column, lambda name, line: Entry("", value_of(spreads[name]))))
    return fields


def memory(section: Section, unit: tuple[str, float]) -> list[Field]:
    """M; for a row that ran out of memory the largest reading, as a lower bound."""
    (column, mean), *spreads = cost(section, "memory_bytes", unit=unit)

    def entry(name: str, line: Line) -> Entry:
        if line["status"] == "oom" and not isnan(line["memory_seen_bytes"]):
            return Entry(f"≥ {number(line['memory_seen_bytes'] / unit[1])}")
        return mean(name, line)

    return [(column, entry), *spreads, hidden("memory_seen_bytes"), hidden("memory_source")]


def peak(section: Section, unit: tuple[str, float]) -> list[Field]:
    """The whole-run peak with the kind of phase where it lies, unless in training; of "oom" a lower bound."""
    [(column, highest)] = cost(section, "peak_bytes", unit=unit)

    def entry(name: str, line: Line) -> Entry:
        value = highest(name, line)
        if value.value is None:
            return value
        bound = "≥ " if line["status"] == "oom" else ""
        phase = "" if line["peak_phase"] == "train" else f" ({line['peak_phase']})"
        return replace(value, text=f"{bound}{value.text}{phase}", short=f"{bound}{value.text}")

    return [(column, entry), hidden("peak_phase")]


def ratio(section: Section, key: str) -> list[Field]:
    """A cost over that of the reference row; no column without one."""
    symbol = quantity(key).header.removesuffix(" ratio")
    return [] if section.reference is None else cost(section, key, header=f"{symbol} / {section.reference}")


def tpme(section: Section, *, bounds: bool = False) -> list[Field]:
    """TPME in percent and rank, for people with its ``bounds`` if asked; a row out of memory has its lower bound."""
    best = best_rows(section.summary["tpme"], "lower")

    def percent(name: str, line: Line) -> Entry:
        if not isnan(line["tpme_lower_bound"]):
            return Entry(f"≥ {100 * line['tpme_lower_bound']:.2f}")
        if isnan(line["tpme"]):
            return Entry(MISSING)
        return Entry(f"{100 * line['tpme']:.2f}", 100 * line["tpme"], name in best)

    def interval(name: str, line: Line) -> Entry:
        if isnan(line["tpme_low"]):
            return Entry("end of scale") if line["tpme_end"] else Entry(MISSING)
        low, high = 100 * line["tpme_low"], 100 * line["tpme_high"]
        return Entry(f"{low:.2f}–{high:.2f}", low, short=f"{low:.1f}–{high:.1f}")

    return [
        (Column("tpme_percent", quantity("tpme_percent").label("%"), "lower"), percent),
        (Column("tpme_low_percent", f"{100 * LEVEL:.0f} %", machine_only=not bounds), interval),
        (Column("tpme_high_percent", machine_only=True), lambda name, line: Entry("", 100 * line["tpme_high"])),
        (
            Column("tpme_lower_bound_percent", machine_only=True),
            lambda name, line: Entry("", 100 * line["tpme_lower_bound"]),
        ),
        rank(section),
    ]


def rank(section: Section) -> Field:
    """Rank by TPME, with "=" where several rows share it."""
    ties = set(section.ties)

    def entry(name: str, line: Line) -> Entry:
        if isnan(line["tpme_rank"]):
            return Entry(MISSING)
        place = int(line["tpme_rank"])
        return Entry(f"{place}=" if name in ties else str(place), place)

    return Column("tpme_rank", "Rank"), entry


def interval(key: str) -> list[Field]:
    """The bounds of an interval: one column for people, two for programs."""
    what = quantity(key)

    def entry(name: str, line: Line) -> Entry:
        low, high = line[f"{key}_low"], line[f"{key}_high"]
        return Entry(f"{number(low)}–{number(high)}" if not isnan(low) else MISSING, value_of(low))

    column = Column(f"{key}_low", f"{what.header}, {100 * LEVEL:.0f} % ({what.unit})")
    return [(column, entry), hidden(f"{key}_high")]


def count(key: str, frame: pd.DataFrame | None = None) -> Field:
    """A count, or the mean of one over seeds; of ``frame`` by row, by default of the summary."""
    values = None if frame is None else frame[key].astype(float).to_dict()

    def entry(name: str, line: Line) -> Entry:
        value = line[key] if values is None else values[name]
        text = MISSING if isnan(value) else f"{value:.1f}".removesuffix(".0")
        return Entry(text, value_of(value))

    return Column(key, quantity(key).header, fact=True), entry


def percent(key: str) -> Field:
    """A share, in percent."""
    return Column(key, quantity(key).label("%"), fact=True), lambda name, line: Entry(
        f"{100 * line[key]:.2f}", value_of(line[key])
    )


def hidden(key: str) -> Field:
    """A column for programs alone."""
    return Column(key, machine_only=True), lambda name, line: Entry("", value_of(line[key]))


def value_of(value: Any) -> Value:
    """A numpy or pandas scalar as a plain one."""
    if value is None or (not isinstance(value, str) and pd.isna(value)):
        return None
    return value if isinstance(value, str) else float(value)


def best_rows(values: pd.Series[Any], better: Better, digits: int = 12) -> set[str]:
    """The rows with the best value at ``digits`` decimals; none where all are equal."""
    known = values.dropna().astype(float).round(digits)
    if known.nunique() < 2:
        return set()
    best = known.max() if better == "higher" else known.min()
    return {str(name) for name in known.index[known == best]}

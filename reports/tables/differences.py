"""Which rows really differ in quality: paired tests over users, corrected for how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from tpme.bench.quantities import MISSING, QUALITY_DIGITS, number, quantity
from tpme.reports.data.ranks import METRICS, Metric
from tpme.reports.data.section import Section
from tpme.reports.data.stats import holm, paired
from tpme.reports.data.trials import Line
from tpme.reports.tables import fields
from tpme.reports.tables.table import Column, Entry, Table

LEVEL = 0.05
TESTED: dict[Metric, str] = {metric: quantity(f"{metric}_10").header for metric in METRICS}
"""The metrics whose differences are tested, each a family of tests, and their names."""


@dataclass(frozen=True)
class Difference:
    """Two rows on the same users."""

    first: str
    second: str
    difference: float
    """Mean over users of first minus second."""
    p: float
    """Adjusted by Holm's method over all pairs."""

    @property
    def significant(self) -> bool:
        """Whether the test tells the rows apart at the level of the whole family."""
        return self.p < LEVEL


def differences(section: Section, metric: Metric = "ndcg") -> list[Difference]:
    """A metric at 10 of every pair of finished rows, tested by paired randomisation over users (``stats.paired``).

    A user counts with the mean over the seeds of a row. Users of both rows are the same: a section holds one data set,
    and where data or protocols are mixed nothing is tested.
    """
    if {"dataset_fingerprint", "protocol"} & set(section.group.mixed):
        return []
    values = section.gains[metric]
    pairs = list(combinations(values, 2))
    adjusted = holm([paired(values[first] - values[second]) for first, second in pairs])
    return [
        Difference(first, second, float((values[first] - values[second]).mean()), p)
        for (first, second), p in zip(pairs, adjusted, strict=True)
    ]


def table(section: Section) -> Table:
    """For each row, those that the test does not tell apart from it."""
    made, tested, pairs = [fields.method(section)], set(), 0
    for metric in TESTED:
        found = differences(section, metric)
        tested |= {name for one in found for name in (one.first, one.second)}
        pairs = len(found)
        made += fields.quality(section, f"{metric}_10")
        made.append((Column(f"{metric}_10_not_told_apart", "Not told apart from", numeric=False), _alike(found)))
    note = (
        f"Paired randomisation test over users, {pairs} pairs, Holm's correction for each metric: rows that are not "
        f"listed differ at p < {LEVEL:g} over the whole column. A user counts with the mean over seeds; the test says "
        "nothing of how much another seed would change. Every pair is in the table pairs, for programs."
    )
    rows = [str(name) for name in section.summary.index if name in tested]
    return fields.table_of(section, "differences", "Which differences in quality are real", made, rows, notes=[note])


def _alike(found: Sequence[Difference]) -> Callable[[str, Line], Entry]:
    alike: dict[str, list[str]] = {}
    for one in found:
        if not one.significant:
            alike.setdefault(one.first, []).append(one.second)
            alike.setdefault(one.second, []).append(one.first)

    def entry(name: str, line: Line) -> Entry:
        text = ", ".join(sorted(alike.get(name, ())))
        return Entry(text or MISSING, text or None)

    return entry


def pairs(section: Section) -> Table:
    """Every pair of rows with its difference and p, for each metric."""
    columns = (
        Column("first", "First", numeric=False),
        Column("second", "Second", numeric=False),
        Column("metric", "Metric", numeric=False),
        Column("difference", "First − second"),
        Column("p_holm", "p"),
    )
    rows = tuple(
        (
            Entry(one.first, one.first),
            Entry(one.second, one.second),
            Entry(title, f"{metric}_10"),
            Entry(f"{one.difference:+.{QUALITY_DIGITS}f}", one.difference, one.significant),
            Entry(number(one.p, 2), one.p, one.significant),
        )
        for metric, title in TESTED.items()
        for one in differences(section, metric)
    )
    note = f"Paired randomisation test over users; p by Holm's correction over all pairs, bold below {LEVEL:g}."
    return Table("pairs", "Differences in quality by pairs", columns, rows, (note,), subject=section.name, long=True)

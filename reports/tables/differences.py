"""Differences in quality between rows: paired tests over users, corrected for their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tpme.bench.quantities import MISSING, QUALITY_DIGITS, number, quantity
from tpme.reports.data.paired_tests import P_LEVEL, Difference
from tpme.reports.data.section import Section
from tpme.reports.data.trials import Line
from tpme.reports.data.user_ranks import METRICS, Metric
from tpme.reports.tables import fields
from tpme.reports.tables.table import Column, Entry, Table

TESTED: dict[Metric, str] = {metric: quantity(f"{metric}_10").header for metric in METRICS}
"""The metrics whose differences are tested, each a family of tests, and their names."""


def table(section: Section) -> Table:
    """The rows that do not differ significantly from each row."""
    columns, tested, count = [fields.method(section)], set(), 0
    for metric in TESTED:
        tests = section.differences[metric]
        tested |= {name for test in tests for name in (test.first, test.second)}
        count = len(tests)
        columns += fields.quality(section, f"{metric}_10")
        columns.append((Column(f"{metric}_10_not_told_apart", "Not told apart from", numeric=False), _alike(tests)))
    note = (
        f"Paired randomisation test over users, {count} pairs, Holm's correction for each metric: rows that are not "
        f"listed differ at p < {P_LEVEL:g} over the whole column. A user counts with the mean over seeds; the test "
        "says nothing of how much another seed would change. Every pair is in the table pairs, for programs."
    )
    rows = [str(name) for name in section.summary.index if name in tested]
    return fields.table_of(section, "differences", "Which differences in quality are real", columns, rows, notes=[note])


def _alike(tests: Sequence[Difference]) -> Callable[[str, Line], Entry]:
    alike: dict[str, list[str]] = {}
    for test in tests:
        if not test.significant:
            alike.setdefault(test.first, []).append(test.second)
            alike.setdefault(test.second, []).append(test.first)

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
            Entry(test.first, test.first),
            Entry(test.second, test.second),
            Entry(title, f"{metric}_10"),
            Entry(f"{test.difference:+.{QUALITY_DIGITS}f}", test.difference, test.significant),
            Entry(number(test.p, 2), test.p, test.significant),
        )
        for metric, title in TESTED.items()
        for test in section.differences[metric]
    )
    note = f"Paired randomisation test over users; p by Holm's correction over all pairs, bold below {P_LEVEL:g}."
    return Table("pairs", "Differences in quality by pairs", columns, rows, (note,), subject=section.name, long=True)

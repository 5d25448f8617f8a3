"""Which rows really differ in quality: paired tests over users, corrected for how many there are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from tpme.reports import fields
from tpme.reports.regression.stats import holm, paired
from tpme.reports.section import Section
from tpme.reports.table import MISSING, Column, Entry, Table
from tpme.reports.trials import Line

LEVEL = 0.05


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


def differences(section: Section) -> list[Difference]:
    """NDCG@10 of every pair of finished rows, tested by paired randomisation over users (``stats.paired``).

    A user counts with the mean over the seeds of a row. Users of both rows are the same: a section holds one data set,
    and where data or protocols are mixed nothing is tested.
    """
    if {"dataset_fingerprint", "protocol"} & set(section.group.mixed):
        return []
    values = section.gains
    pairs = list(combinations(values, 2))
    adjusted = holm([paired(values[first] - values[second]) for first, second in pairs])
    return [
        Difference(first, second, float((values[first] - values[second]).mean()), p)
        for (first, second), p in zip(pairs, adjusted, strict=True)
    ]


def table(section: Section) -> Table:
    """For each row, those that the test does not tell apart from it in NDCG@10."""
    found = differences(section)
    alike: dict[str, list[str]] = {}
    for one in found:
        if not one.significant:
            alike.setdefault(one.first, []).append(one.second)
            alike.setdefault(one.second, []).append(one.first)
    tested = {name for one in found for name in (one.first, one.second)}

    def entry(name: str, line: Line) -> Entry:
        text = ", ".join(sorted(alike.get(name, ()))) or MISSING
        return Entry(text, text)

    made = [
        fields.method(section),
        *fields.quality(section, "ndcg_10", "NDCG@10"),
        (Column("not_told_apart", "Not told apart from", numeric=False), entry),
    ]
    note = (
        f"Paired randomisation test over users, {len(found)} pairs, Holm's correction: rows that are not listed differ "
        f"at p < {LEVEL:g} over the whole table. A user counts with the mean over seeds; the test says nothing of "
        "how much another seed would change."
    )
    rows = [str(name) for name in section.summary.index if name in tested]
    return fields.table_of(section, "differences", "Which differences in quality are real", made, rows, notes=[note])

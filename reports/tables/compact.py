"""The results in six columns, for a column or a page of a paper."""

from __future__ import annotations

from dataclasses import replace

from tpme.bench.quantities import byte_unit
from tpme.reports.data.section import Section
from tpme.reports.tables import fields
from tpme.reports.tables.table import Entry, Table

NOTE = (
    "T: training time of {time_of}. P: trained parameters. M: peak memory of training. TPME: the three, scaled to "
    "0..100 between the lowest and the highest row, weighted {weights} and added. Of all costs less is better; "
    "bold: the best of the rows with a TPME."
)


def compact(section: Section) -> Table:
    """The main quality, T, P, M and TPME of every row that finished, means alone."""
    summary = section.summary
    columns = [
        fields.method(section),
        *(fields.quality(section, what.key)[0] for what in section.qualities[:1]),
        fields.cost(section, "epoch_time_s")[0],
        fields.cost(section, "trainable_millions")[0],
        fields.cost(section, "memory_bytes", unit=byte_unit(summary["memory_bytes"]))[0],
        fields.tpme(section)[0],
    ]
    rows = [str(name) for name in summary.index[summary["status"] == "ok"]]
    seeds = sorted({int(summary["seeds_ok"][name]) for name in rows})
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else "".join(map(str, seeds))
    mean = f" Means over {several} seeds." if seeds and seeds[-1] > 1 else " One seed."
    note = NOTE.format(time_of=section.time_of, weights=str(section.weights).replace(",", ", ")) + mean
    title = "Quality and costs"
    if section.main is not None:
        title += f" ({section.main.header}{' on the test users' if section.ranked else ''})"
    table = fields.table_of(section, "results-compact", title, columns, rows, [note])
    plain = tuple(replace(column, better=None, header=column.header.removesuffix(" (%)")) for column in table.columns)
    return replace(table, columns=plain, rows=tuple(tuple(map(_bare, row)) for row in table.rows), warnings=())


def _bare(entry: Entry) -> Entry:
    """The entry without what stands behind the mean, and without marks."""
    return replace(entry, text=entry.text if entry.short is None else entry.short, marks=())

"""The HTML of ``tpme board``: who leads, and for every group its rows, their history and their records."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

from tpme.bench.quantities import MISSING, Quantity, quantity
from tpme.reports.data.answer import answer, best_rows, cheapest_rows
from tpme.reports.data.section import Section
from tpme.reports.data.trials import Line
from tpme.reports.history import CHARTED, chart, places
from tpme.reports.tables.fields import rank

COSTS = {
    "tpme": "tpme_percent",
    "epoch_time_s": "epoch_time_s",
    "trainable_millions": "trainable_millions",
    "memory_bytes": "memory_bytes",
    "peak_bytes": "peak_bytes",
}
"""Columns of a summary in the table of a group, after its qualities, and their quantities."""
OF_RECORD = ("epoch_time_s", "memory_bytes", "peak_bytes")
"""Columns of a record, before the main quality."""


@dataclass(frozen=True)
class BoardRow:
    """One row of a group, with everything that was ever measured of it."""

    name: str
    anchor: str
    records: tuple[Line, ...]
    """All records, oldest first, with the columns of ``load``, ``version``, ``commit``, ``latest`` and ``link``."""


@dataclass(frozen=True)
class BoardGroup:
    """One group of comparable records."""

    name: str
    anchor: str
    section: Section | None
    """The newest records; None where a group is in none of the last matrices."""
    rows: tuple[BoardRow, ...]
    row_of: Mapping[str, BoardRow]
    """The history of each row of the section."""
    qualities: tuple[Quantity, ...]
    """Those of its records, the main one first."""

    def shown(self) -> dict[str, Quantity]:
        """Columns of the summary in the table of the group, and their quantities."""
        return {what.key: what for what in self.qualities} | {key: quantity(name) for key, name in COSTS.items()}

    @property
    def newest(self) -> str:
        """When its newest record was started."""
        return max(str(line["started_at"]) for row in self.rows for line in row.records)


# --- who leads -----------------------------------------------------------------------------------------------

HEADS = ("Group", "Best {}", "Cheapest at that quality", "Fastest{}", "Lowest whole-run peak", "Newest")


def leaders(groups: Sequence[BoardGroup]) -> str:
    """A line for each group: its best quality, what buys it cheapest, its fastest row and its lowest peak."""
    mains = {group.section.main for group in groups if group.section is not None}
    [main] = mains if len(mains) == 1 else [None]
    ranked = all(group.section is None or group.section.ranked for group in groups)
    heads = [HEADS[0], HEADS[1].format(main.header if main else "quality"), HEADS[2]]
    heads += [HEADS[3].format(" epoch" if ranked else ""), *HEADS[4:]]
    lines = []
    for group in groups:
        if group.section is not None:
            count = sum(len(row.records) for row in group.rows)
            cells = [*_leads(group, group.section), f"{group.newest[:10]}{_small(f'{count:,} records')}"]
            fields = "".join(f'<td data-head="{head}">{cell}</td>' for head, cell in zip(heads[1:], cells, strict=True))
            name = html.escape(group.name)
            lines.append(f'<tr><th scope="row"><a href="#{group.anchor}">{name}</a></th>{fields}</tr>')
    return _table("leaders", [f'<th scope="col">{html.escape(head)}</th>' for head in heads], lines)


def _leads(group: BoardGroup, section: Section) -> Iterator[str]:
    good = best_rows(section)
    yield MISSING if section.main is None else _lead(group, section, section.main.key, good, "not told apart")
    yield _lead(group, section, "tpme", cheapest_rows(section, good), "tied")
    for key, noise in (("epoch_time_s", section.noise.time), ("peak_bytes", section.noise.memory)):
        costs = section.summary.loc[section.compared, key].dropna().sort_values(kind="stable")
        tied = costs.index[costs <= costs.min() * (1 + noise)]
        yield _lead(group, section, key, [str(name) for name in tied], "tied")


def _lead(group: BoardGroup, section: Section, key: str, rows: Sequence[str], tied: str) -> str:
    """The first row with its value, and how many more share its place."""
    if not rows:
        return MISSING
    unit, scale = group.shown()[key].scale([_number(section.lines[rows[0]], key)])
    value = _value(group, section, rows[0], key, scale)
    more = _small(f"{len(rows) - 1} more {tied}") if len(rows) > 1 else ""
    before, after = "TPME&nbsp;" if key == "tpme" else "", f"&nbsp;{unit}" if unit else ""
    return f"{html.escape(rows[0])}: {before}{value}{after}{more}"


def _small(text: str) -> str:
    return f' <span class="soft">({text})</span>'


def _number(line: Line, key: str) -> float:
    return 100 * line["tpme"] if key == "tpme" else float(line[key])


def _value(group: BoardGroup, section: Section, row: str, key: str, scale: float) -> str:
    """A number, linked to its record; to the list of records where it is over several seeds."""
    number = _number(section.lines[row], key)
    if isnan(number):
        return MISSING
    newest = [line["link"] for line in group.row_of[row].records if line["latest"]]
    link = newest[0] if len(newest) == 1 else f"#{group.row_of[row].anchor}"
    text = f"{number:.2f}" if key == "tpme" else group.shown()[key].format(number / scale)
    return f'<a href="{html.escape(link)}">{text}</a>'


# --- a group -------------------------------------------------------------------------------------------------


def group_html(group: BoardGroup) -> str:
    """Heading, the answer in sentences, table of the newest rows, charts of their history and lists of records."""
    parts = [f'<h2 id="{group.anchor}">{html.escape(group.name)}</h2>']
    if group.section is None:
        parts.append("<p>No longer part of a matrix: only its history is shown.</p>")
    else:
        said = answer(group.section)
        parts += [f"<p>{html.escape(text)}</p>" for text in (said.best, said.cheapest, said.trust)]
        parts.append(_rows(group, group.section))
    parts.append(_history(group))
    parts.append("<h3>Records</h3>")
    parts.append('<p class="soft">Of a learning-rate search only the selected trial is listed, for each version.</p>')
    parts += [_records(row, group.qualities[:1]) for row in group.rows]
    return "\n".join(parts)


def _history(group: BoardGroup) -> str:
    """Charts of the rows that were measured on several days or in several versions."""
    found = [(row, history) for row in group.rows if len(history := places(row.records)) > 1]
    if not found:
        return '<p class="soft">History: every row was measured on one day, in one version.</p>'
    parts = [
        "<h3>History</h3>",
        '<p class="soft">A dot is a record, the line joins means; <span class="new">filled</span>: the newest. '
        "Dashed: the code changed. A cross did not finish. Records of one day and version share a place.</p>",
    ]
    for row, history in found:
        charted = (*CHARTED, *(what.key for what in group.qualities[:1]))
        charts = "".join(chart(key, row.name, history) for key in charted)
        parts.append(f'<h4><a href="#{row.anchor}">{html.escape(row.name)}</a></h4><div class="charts">{charts}</div>')
    return "\n".join(parts)


def _rows(group: BoardGroup, section: Section) -> str:
    """The newest version of every row, in the order of the report."""
    scales = {
        key: what.scale(_number(line, key) for line in section.lines.values()) for key, what in group.shown().items()
    }
    heads = ['<th scope="col">Row</th>']
    heads += [
        f'<th scope="col" class="num">{html.escape(group.shown()[key].label(unit))}</th>'
        for key, (unit, _) in scales.items()
    ]
    heads += [
        '<th scope="col" class="num">Rank</th>',
        '<th scope="col" class="num">Seeds</th>',
        '<th scope="col">Newest</th>',
    ]
    _, place = rank(section)
    lines = []
    for name, line in section.lines.items():
        cells = [_value(group, section, name, key, scale) for key, (_, scale) in scales.items()]
        cells.append(place(name, line).text if line["status"] == "ok" else html.escape(line["status"]))
        cells.append(str(line["seeds_ok"]))
        newest = max(item["started_at"] for item in group.row_of[name].records)[:10]
        fields = "".join(f'<td class="num">{cell}</td>' for cell in cells)
        head = f'<th scope="row"><a href="#{group.row_of[name].anchor}">{html.escape(name)}</a></th>'
        lines.append(f"<tr>{head}{fields}<td>{newest}</td></tr>")
    return _table("rows", heads, lines)


def _records(row: BoardRow, main: Sequence[Quantity]) -> str:
    """All records of a row, newest first, folded."""
    rates = {line["lr"] for line in row.records}
    shown = [*map(quantity, OF_RECORD), *main]
    scales = {what: what.scale(line[what.key] for line in row.records) for what in shown}
    heads = ["Started", "Code", "Commit", "Seed", *(["Learning rates"] if len(rates) > 1 else []), "End"]
    heads += [what.label(unit) for what, (unit, _) in scales.items()]
    lines = []
    for line in reversed(row.records):
        fields = [
            line["started_at"][:16].replace("T", " "),
            line["version"][:7],
            line["commit"] or MISSING,
            str(line["seed"]),
        ]
        fields += [_rates(line["lr"])] if len(rates) > 1 else []
        cells = [*map(html.escape, (*fields, line["status"])), *_readings(line, scales)]
        cells[0] = f'<a href="{html.escape(line["link"])}">{cells[0]}</a>'
        cells[0] += ' <span class="new">newest</span>' if line["latest"] else ""
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    table = _table("records", [f'<th scope="col">{html.escape(head)}</th>' for head in heads], lines)
    count = f"{len(row.records)} record{'' if len(row.records) == 1 else 's'}"
    head = f'{html.escape(row.name)} <span class="soft">{count}</span>'
    return f'<details><summary>{head}</summary><div id="{row.anchor}">{table}</div></details>'


def _readings(line: Line, scales: Mapping[Quantity, tuple[str, float]]) -> Iterator[str]:
    for what, (_, scale) in scales.items():
        value = line[what.key] if line["status"] == "ok" else None
        yield what.format(nan if value is None else value / scale)


def _rates(text: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in json.loads(text).items())


def _table(kind: str, heads: Iterable[str], lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )

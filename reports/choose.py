"""``tpme choose``: the rows within an engineer's limits, best first, and the reasons against each of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from tpme.bench.errors import UserError
from tpme.bench.quantities import QUALITY_DIGITS, byte_unit, bytes_text, number, quantity
from tpme.reports.data.section import Section
from tpme.reports.data.summary import doubt
from tpme.reports.data.trials import Line
from tpme.reports.tables import fields
from tpme.reports.tables.fields import table_of
from tpme.reports.tables.table import Column, Entry, Table, plain

SECONDS = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600}
MILLIONS = {"": 1e-6, "K": 1e-3, "M": 1, "B": 1e3}

LIMITED = {
    key: quantity(key)
    for key in ("peak_bytes", "memory_bytes", "epoch_time_s", "trainable_millions", "ndcg_10", "recall_10")
}
"""The columns of a summary that can be limited: a quality from below, a cost from above."""


@dataclass(frozen=True)
class Limits:
    """Requirements on a row."""

    bounds: Mapping[str, float]
    """Column of ``LIMITED`` to its limit, in the unit of the column."""
    device: str | None = None
    """``cpu``, ``cuda``, or a part of the name of a device."""

    def __str__(self) -> str:
        texts = [
            f"{LIMITED[key].header} {'≥' if LIMITED[key].better == 'higher' else '≤'} {_amount(key, bound)}"
            for key, bound in self.items
        ]
        return ", ".join([*texts, *([f"device {self.device}"] if self.device else [])]) or "nothing"

    @property
    def items(self) -> list[tuple[str, float]]:
        """The limits in the order of ``LIMITED``."""
        return [(key, self.bounds[key]) for key in LIMITED if key in self.bounds]


@dataclass(frozen=True)
class Reason:
    """Why a row does not qualify."""

    code: str
    """``limit``, ``missing``, ``untrusted``, ``random-weights``, ``oom``, ``failed`` or ``device``."""
    text: str
    """For people, with value and limit."""
    quantity: str | None = None
    """The column of ``LIMITED`` concerned."""
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Choice:
    """The answer for one group of comparable records."""

    section: Section
    """Without the quality of rows whose encoders have random weights."""
    qualifying: tuple[str, ...]
    """Best first: by NDCG@10 as tables print it, then by TPME."""
    rejected: dict[str, tuple[Reason, ...]]


def choose(sections: Sequence[Section], limits: Limits) -> list[Choice]:
    """Judge every row of every section; one choice for each section, those where a row qualifies first.

    A limit is compared with the mean over the seeds that finished. Quality of random weights counts as missing.

    Raises:
        UserError: no section was measured on the requested device.
    """
    keys = sorted({section.group.key["device_key"] for section in sections})
    if limits.device is not None and not any(_on(section, limits.device) for section in sections):
        raise UserError(f"--device {limits.device}: none of these records is from there, but from {'; '.join(keys)}")
    return sorted((_judge(section, limits) for section in sections), key=lambda choice: not choice.qualifying)


def _judge(section: Section, limits: Limits) -> Choice:
    cells = section.cells[section.cells["selected"]]
    random = {
        str(row)
        for row, flags in zip(cells["row"], cells["flags"], strict=True)
        if any(code == "random-weights" for code, _ in flags)
    }
    summary = section.summary.copy()
    quality = [name for name in summary.columns if name.startswith(("recall_", "ndcg_"))]
    summary.loc[summary.index.isin(random), quality] = math.nan
    section = replace(section, summary=summary)
    reasons = {name: tuple(_reasons(section, line, limits, name in random)) for name, line in section.lines.items()}

    def order(name: str) -> tuple[float, float, str]:
        ndcg, tpme = (float(summary[key][name]) for key in ("ndcg_10", "tpme"))
        return (
            math.inf if math.isnan(ndcg) else -round(ndcg, QUALITY_DIGITS),
            math.inf if math.isnan(tpme) else tpme,
            name,
        )

    qualifying = sorted((name for name, against in reasons.items() if not against), key=order)
    return Choice(section, tuple(qualifying), {name: against for name, against in reasons.items() if against})


def _reasons(section: Section, line: Line, limits: Limits, random: bool) -> Iterator[Reason]:
    if limits.device is not None and not _on(section, limits.device):
        yield Reason("device", f"measured on {section.group.key['device_key']}")
    elif line["status"] == "oom":
        yield _out_of_memory(line, limits.bounds.get("peak_bytes", limits.bounds.get("memory_bytes")))
    elif line["status"] != "ok":
        yield Reason("failed", f"did not finish: {line['status']}")
    else:
        for key, limit in limits.items:
            reason = _violation(key, limit, line, random)
            if reason is not None:
                yield reason


def _out_of_memory(line: Line, limit: float | None) -> Reason:
    seen = None if math.isnan(line["memory_seen_bytes"]) else float(line["memory_seen_bytes"])
    text = "out of memory"
    text += "" if seen is None else f", at least {bytes_text(seen)}"
    text += "" if limit is None else f" (limit {_amount('peak_bytes', limit)})"
    return Reason("oom", text, "peak_bytes", seen, limit)


def _violation(key: str, limit: float, line: Line, random: bool) -> Reason | None:
    """The reason why a finished row breaks one limit; None where it keeps it."""
    name, value = LIMITED[key].header, None if math.isnan(line[key]) else float(line[key])
    least = LIMITED[key].better == "higher"
    bound, why = f"(limit {_amount(key, limit)})", doubt(line, key)
    if random and least:
        return Reason("random-weights", f"{name} means nothing with random weights {bound}", key, None, limit)
    if value is None:
        return Reason("missing", f"no {name} {bound}{f': {why}' if why else ''}", key, None, limit)
    if why:
        text = f"{name} {_amount(key, value)} is not to be trusted {bound}: {why}"
        return Reason("untrusted", text, key, value, limit)
    if value >= limit if least else value <= limit:
        return None
    return Reason("limit", f"{name} {_beside(key, value, limit)}", key, value, limit)


def _beside(key: str, value: float, limit: float) -> str:
    """A value that breaks its limit, with enough digits to show that it does."""
    unit, scale = _unit(key, limit)
    texts = (number(value / scale, digits) for digits in range(3, 17))
    text = next((text for text in texts if float(text) != limit / scale), repr(value / scale))
    return f"{text}{unit} {'<' if LIMITED[key].better == 'higher' else '>'} {limit / scale:g}{unit}"


def _amount(key: str, value: float) -> str:
    unit, scale = _unit(key, value)
    return f"{value / scale:.4g}{unit}"


def _unit(key: str, value: float) -> tuple[str, float]:
    """The unit in which a value of a column is printed, after a space, and its size."""
    unit, scale = LIMITED[key].scale([value])
    return f" {unit}" if unit else "", scale


def _on(section: Section, device: str) -> bool:
    wanted = device.lower()
    return wanted in set(section.cells["device"]) or wanted in section.group.key["device_key"].lower()


# --- answers -------------------------------------------------------------------------------------------------


def qualifying_table(choice: Choice, limits: Limits) -> Table:
    """The qualifying rows, best first; the best of each column is bold."""
    summary = choice.section.summary
    chosen = replace(choice.section, summary=summary.loc[list(choice.qualifying)])
    place = {name: index for index, name in enumerate(choice.qualifying, start=1)}
    columns = [
        (Column("place", "#"), lambda name, line: Entry(str(place[name]), place[name])),
        fields.method(choice.section),
        *fields.quality(chosen, "ndcg_10"),
        *fields.quality(chosen, "recall_10"),
        *fields.cost(chosen, "epoch_time_s"),
        *fields.cost(chosen, "trainable_millions"),
        *fields.memory(chosen, unit := byte_unit(summary["peak_bytes"])),
        *fields.cost(chosen, "peak_bytes", unit=unit),
        *(field for field in fields.tpme(chosen) if field[0].key.startswith(("tpme_percent", "tpme_lower_bound"))),
    ]
    title = f"{len(choice.qualifying)} of {len(summary)} rows qualify"
    notes = [f"Asked for: {limits}.", "In order of NDCG@10, then of TPME, which is that of 'tpme report'."]
    return table_of(chosen, "choose", title, columns, choice.qualifying, notes)


def rejected_table(choice: Choice, limits: Limits) -> Table:
    """The rows that do not qualify, with their reasons."""

    def reasons(name: str, line: Line) -> Entry:
        text = "; ".join(reason.text for reason in choice.rejected[name])
        return Entry(text, text)

    columns = [fields.method(choice.section), (Column("reasons", "Why not", numeric=False), reasons)]
    title = (
        f"{len(choice.rejected)} do not"
        if choice.qualifying
        else f"None of {len(choice.section.summary)} rows qualifies"
    )
    table = table_of(choice.section, "rejected", title, columns, choice.rejected)
    if choice.qualifying:
        return replace(table, subject="", warnings=())
    return replace(table, notes=(f"Asked for: {limits}.",))


def to_json(choices: Sequence[Choice], limits: Limits) -> str:
    """The limits, and for every group its qualifying rows, in order, and the reasons against the others."""
    groups = []
    for choice in choices:
        table = qualifying_table(choice, limits)
        keys = [column.key for column in table.columns]
        groups.append(
            {
                "name": choice.section.name,
                **choice.section.group.key,
                "qualifying": [
                    dict(zip(keys, (plain(entry.value) for entry in row), strict=True)) for row in table.rows
                ],
                "rejected": [
                    {"method": name, "reasons": [asdict(reason) for reason in reasons]}
                    for name, reasons in choice.rejected.items()
                ],
            }
        )
    content = {"limits": dict(limits.items), "device": limits.device, "groups": groups}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)

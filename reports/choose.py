"""``tpme choose``: the rows within an engineer's limits, best first, and the reasons against each of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import pandas as pd

from tpme.bench.errors import UserError
from tpme.bench.quantities import NAMED, QUALITY_DIGITS, Quantity, byte_unit, bytes_text, number, quantity
from tpme.reports.data.others import notes_of_others
from tpme.reports.data.qualities import worst_first
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
"""The columns of a summary that can be limited: a quality from below, a cost from above. So can named metrics."""


@dataclass(frozen=True)
class Limits:
    """Requirements on a row."""

    bounds: Mapping[str, float]
    """Column of ``LIMITED``, or of a named metric, to its limit, in the unit of the column."""
    device: str | None = None
    """``cpu``, ``cuda``, or a part of the name of a device."""
    metrics: Mapping[str, Quantity] = field(default_factory=dict)
    """The named metrics among the bounds; one of which more is better is limited from below."""

    def __str__(self) -> str:
        texts = [
            f"{what.header} {'≥' if what.better == 'higher' else '≤'} {_amount(what, bound)}"
            for what, bound in self.items
        ]
        return ", ".join([*texts, *([f"device {self.device}"] if self.device else [])]) or "nothing"

    @property
    def items(self) -> list[tuple[Quantity, float]]:
        """The limits in the order of ``LIMITED``, then those of named metrics."""
        return [(what, self.bounds[key]) for key, what in {**LIMITED, **self.metrics}.items() if key in self.bounds]


@dataclass(frozen=True)
class Reason:
    """Why a row does not qualify."""

    code: str
    """``limit``, ``missing``, ``untrusted``, ``random-weights``, ``oom``, ``failed`` or ``device``."""
    text: str
    """For people, with value and limit."""
    quantity: str | None = None
    """The column concerned."""
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Choice:
    """The answer for one group of comparable records."""

    section: Section
    """Without the quality of rows whose encoders have random weights."""
    qualifying: tuple[str, ...]
    """Best first: by the deciding quality as tables print it (NDCG@10, or the main metric), then by TPME."""
    rejected: dict[str, tuple[Reason, ...]]


def metric_limits(sections: Sequence[Section], texts: Sequence[str]) -> tuple[dict[str, float], dict[str, Quantity]]:
    """The bounds of ``NAME=VALUE``, such as ``accuracy=0.7``, and their metrics, for ``Limits``.

    Raises:
        UserError: not a name and a number, or no group has that metric.
    """
    known = {what.header: what for section in sections for what in section.qualities if what.key.startswith(NAMED)}
    bounds, metrics = {}, {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "they name none"
            raise UserError(f"--metric '{text}': give NAME=VALUE with a metric of these records; {there}")
        bounds[known[name].key] = _finite(text, value)
        metrics[known[name].key] = known[name]
    return bounds, metrics


def _finite(text: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"--metric '{text}': '{value}' is not a finite number")
    return number


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
    quality = [name for name in summary.columns if name.startswith(("recall_", "ndcg_", NAMED))]
    summary.loc[summary.index.isin(random), quality] = math.nan
    section = replace(section, summary=summary)
    reasons = {name: tuple(_reasons(section, line, limits, name in random)) for name, line in section.lines.items()}

    what = section.deciding
    good = pd.Series(math.nan, index=summary.index) if what is None else worst_first(summary[what.key], what)

    def order(name: str) -> tuple[float, float, str]:
        best, tpme = float(good[name]), float(summary["tpme"][name])
        return (
            math.inf if math.isnan(best) else -round(best, QUALITY_DIGITS),
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
        for what, limit in limits.items:
            reason = _violation(what, limit, line, random)
            if reason is not None:
                yield reason


def _out_of_memory(line: Line, limit: float | None) -> Reason:
    seen = None if math.isnan(line["memory_seen_bytes"]) else float(line["memory_seen_bytes"])
    text = "out of memory"
    text += "" if seen is None else f", at least {bytes_text(seen)}"
    text += "" if limit is None else f" (limit {_amount(LIMITED['peak_bytes'], limit)})"
    return Reason("oom", text, "peak_bytes", seen, limit)


def _violation(what: Quantity, limit: float, line: Line, random: bool) -> Reason | None:
    """The reason why a finished row breaks one limit; None where it keeps it."""
    key, name = what.key, what.header
    value = None if math.isnan(line.get(key, math.nan)) else float(line[key])
    least = what.better == "higher"
    bound, why = f"(limit {_amount(what, limit)})", doubt(line, key)
    if random and what.kind == "quality":
        return Reason("random-weights", f"{name} means nothing with random weights {bound}", key, None, limit)
    if value is None:
        return Reason("missing", f"no {name} {bound}{f': {why}' if why else ''}", key, None, limit)
    if why:
        text = f"{name} {_amount(what, value)} is not to be trusted {bound}: {why}"
        return Reason("untrusted", text, key, value, limit)
    if value >= limit if least else value <= limit:
        return None
    return Reason("limit", f"{name} {_beside(what, value, limit)}", key, value, limit)


def _beside(what: Quantity, value: float, limit: float) -> str:
    """A value that breaks its limit, with enough digits to show that it does."""
    unit, scale = _unit(what, limit)
    texts = (number(value / scale, digits) for digits in range(3, 17))
    text = next((text for text in texts if float(text) != limit / scale), repr(value / scale))
    return f"{text}{unit} {'<' if what.better == 'higher' else '>'} {limit / scale:g}{unit}"


def _amount(what: Quantity, value: float) -> str:
    unit, scale = _unit(what, value)
    return f"{value / scale:.4g}{unit}"


def _unit(what: Quantity, value: float) -> tuple[str, float]:
    """The unit in which a value of a column is printed, after a space, and its size."""
    unit, scale = what.scale([value])
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
    first = choice.section.deciding
    shown = sorted(choice.section.qualities, key=lambda what: what != first)
    columns = [
        (Column("place", "#"), lambda name, line: Entry(str(place[name]), place[name])),
        fields.method(choice.section),
        *(field for what in shown for field in fields.quality(chosen, what.key)),
        *fields.cost(chosen, "epoch_time_s"),
        *fields.cost(chosen, "trainable_millions"),
        *fields.memory(chosen, unit := byte_unit(summary[["peak_bytes", "memory_bytes"]].max())),
        *fields.cost(chosen, "peak_bytes", unit=unit),
        *(field for field in fields.tpme(chosen) if field[0].key.startswith(("tpme_percent", "tpme_lower_bound"))),
    ]
    title = f"{len(choice.qualifying)} of {len(summary)} rows qualify"
    order = f"In order of {first.header}, then of TPME" if first else "In order of TPME"
    notes = [f"Asked for: {limits}.", f"{order}, which is that of 'tpme report'."]
    notes += notes_of_others(recorded.result for recorded in choice.section.records)
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
    content = {"limits": {what.key: bound for what, bound in limits.items}, "device": limits.device, "groups": groups}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)

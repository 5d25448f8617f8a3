"""What ``tpme compare`` says: sentences with the answer, then a table for each quantity, or everything as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

from rich.console import Console

from tpme.bench.quantities import COSTS, MISSING, Quantity, amount, quantity
from tpme.bench.quantities import NAMED as NAMED_METRIC
from tpme.reports.changes import MEASURED, QUALITIES, Change, Outcome, RowPair, SectionPair
from tpme.reports.compare import TwoSets
from tpme.reports.data.section import Section
from tpme.reports.data.trials import differing_settings, shorten_path
from tpme.reports.tables.table import Column, Entry, Table, plain
from tpme.reports.tables.terminal import to_terminal

SHOWN = (*COSTS, "peak_bytes", *QUALITIES)
"""The quantities with a sentence and a table each; named metrics follow."""
IN_NAMES = ("device_key", "dataset", "protocol", "precision", "task", "time_of", "source")
"""Columns of ``GROUP`` that the name of a group holds."""
NAMED = 3
"""Number of rows that a sentence names."""
MOVES: tuple[Outcome, ...] = ("lower", "higher")
WORDS: dict[str, dict[Outcome, str]] = {"epoch_time_s": {"lower": "faster", "higher": "slower"}}
"""How B is called; otherwise by its outcome."""
STILL: dict[Outcome, str] = {
    "equal": "the same",
    "not told apart": "not told apart",
    "unclear": "unclear, for a side ran once",
}
"""Outcomes without a direction, in a sentence."""

Rows = Sequence[tuple[RowPair, Change]]


def word(change: Change) -> str:
    """What B is: "faster", "not told apart"."""
    return WORDS.get(change.key, {}).get(change.outcome, change.outcome)


def effect(change: Change) -> str:
    """``-12 % [-19, -4]``, ``×4.2 [×3.9, ×4.6]`` for a ratio beyond 2, ``+0.0123 [+0.001, +0.02]`` for a quality."""
    if change.effect is None or change.outcome == "equal":
        return MISSING
    form, unit = _form(change)
    text = form(change.effect) + unit
    if change.low is None or change.high is None:
        return text
    return f"{text} [{form(change.low)}, {form(change.high)}]"


def _form(change: Change) -> tuple[Callable[[float], str], str]:
    assert change.effect is not None
    if change.key in QUALITIES or change.key.startswith(NAMED_METRIC):
        return "{:+.4f}".format, ""
    if not 0.5 < change.effect < 2:
        return "×{:.3g}".format, ""
    return lambda ratio: _percent(100 * (ratio - 1)), " %"


def _percent(value: float) -> str:
    return f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.1f}"


# --- sentences -----------------------------------------------------------------------------------------------


def sentences(pair: SectionPair) -> list[str]:
    """What differs between the two sides of a group, then one sentence for each quantity."""
    return [
        *_differences(pair),
        *filter(None, (_sentence(pair, key) for key in _shown(pair))),
        *_ends(pair),
        *_trust(pair),
    ]


def _shown(pair: SectionPair) -> tuple[str, ...]:
    named = (change.key for row in pair.rows for change in row.changes if change.key.startswith(NAMED_METRIC))
    return (*SHOWN, *dict.fromkeys(named))


def _differences(pair: SectionPair) -> Iterator[str]:
    hidden = {*IN_NAMES, *(["dataset_fingerprint"] if "dataset" in pair.differs else [])}
    differs = dict(pair.differs)
    if "settings" in differs:
        apart = differing_settings(differs["settings"])
        differs["settings"] = tuple(apart[text] or "of another task" for text in differs["settings"])  # type: ignore[assignment]
    other = [_both(name.replace("_", " "), a, b) for name, (a, b) in differs.items() if name not in hidden]
    if other:
        yield f"Differs: {'; '.join(other)}."
    settings: dict[str, list[str]] = {}
    for row in pair.rows:
        for name, (a, b) in row.differs.items():
            settings.setdefault(name if name == "code version" else _both(name, a, b), []).append(row.a)
    if settings:
        texts = [f"{text} ({_count(names, pair)})" for text, names in settings.items()]
        yield f"Differs in settings: {'; '.join(texts)}."


def _both(name: str, a: str, b: str) -> str:
    return f"{name} {shorten_path(a)} in A, {shorten_path(b)} in B"


def _count(names: Sequence[str], pair: SectionPair) -> str:
    if len(names) == len(pair.rows):
        return "all rows" if len(names) > 1 else names[0]
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} of {len(pair.rows)} rows"


def _sentence(pair: SectionPair, key: str) -> str | None:
    """One quantity over all rows: how many rows moved which way, and the furthest of them."""
    rows = _rows(pair, key)
    if not rows:
        return None
    name = _title(pair.a.quantity(key))
    moved = [_moved(rows, outcome) for outcome in MOVES]
    counts = Counter(STILL.get(change.outcome) or f"not compared ({change.reason})" for _, change in _still(rows))
    order = [text for text in STILL.values() if text in counts]
    still = [text + _of(counts[text], rows) for text in dict.fromkeys([*order, *counts])]
    return f"{name}: {'; '.join([*filter(None, moved), *still])}."


def _moved(rows: Rows, outcome: Outcome) -> str:
    """The rows in which B is lower, or higher; the furthest of them by name."""
    moved = [(row, change) for row, change in rows if change.outcome == outcome]
    if not moved:
        return ""
    moved.sort(key=lambda item: item[1].effect or 0, reverse=outcome == "higher")
    named = ", ".join(f"{row.a} {effect(change)}" for row, change in moved[:NAMED])
    more = f" and {len(moved) - NAMED} more" if len(moved) > NAMED else ""
    return f"B is {word(moved[0][1])}{_of(len(moved), rows)} ({named}{more})"


def _still(rows: Rows) -> Rows:
    return [(row, change) for row, change in rows if change.outcome not in MOVES]


def _of(count: int, rows: Rows) -> str:
    """ "in 2 of 10 rows", where there are several."""
    if len(rows) == 1:
        return ""
    return f" in all {count} rows" if count == len(rows) else f" in {count} of {len(rows)} rows"


def _ends(pair: SectionPair) -> Iterator[str]:
    """Rows that did not finish, and rows that one side lacks."""
    ends = [f"{row.a}: {change.reason}" for row, change in _rows(pair, "status")]
    if ends:
        yield f"Not compared: {'; '.join(ends)}."
    for side, names in (("A", pair.only_a), ("B", pair.only_b)):
        if names:
            yield f"Only in {side}: {', '.join(names)}."


def _trust(pair: SectionPair) -> Iterator[str]:
    """What the intervals cover."""
    if any(change.low is not None for key in MEASURED for _, change in _rows(pair, key)):
        yield (
            f"Intervals of costs: 95 % bootstrap over seeds and the epochs after warm-up. {_noise(pair)} A and B ran "
            "at different times: no interval covers what else the machine did then."
        )
    if any(change.p is not None for key in QUALITIES for _, change in _rows(pair, key)):
        yield (
            "Quality: difference over the same users with its 95 % bootstrap interval; told apart by the paired "
            "randomisation test with Holm's correction over the rows. Another seed may move it further."
        )
    if any(change.low is not None for key in _shown(pair)[len(SHOWN) :] for _, change in _rows(pair, key)):
        yield "Quality: difference of the means over seeds with its 95 % interval by Welch's t."


def _noise(pair: SectionPair) -> str:
    if not pair.noise.source:
        return "How much two runs differ was not measured (tpme doctor --noise), so one run against another is unclear."
    what = pair.noise.text
    where = "" if pair.noise.source == "doctor" else " where a side ran once"
    return f"{what[0].upper()}{what[1:]}; nearer rows are not told apart{where}."


def _rows(pair: SectionPair, key: str) -> Rows:
    return [(row, change) for row in pair.rows if (change := row.change(key)) is not None]


def _title(what: Quantity) -> str:
    return f"{what.header} ({what.name})" if what.name else what.header


# --- tables --------------------------------------------------------------------------------------------------


def tables(pair: SectionPair) -> list[Table]:
    """A table for each quantity in which any row differs, and one of the exact counters that differ."""
    keys = _shown(pair)
    shown = [_table(pair.a.quantity(key), rows) for key in keys if (rows := _compared(pair, key))]
    counted = [(row, change) for row in pair.rows for change in row.changes if change.key not in (*keys, "status")]
    return [*shown, *([_counter_table(counted)] if counted else [])]


def _compared(pair: SectionPair, key: str) -> Rows:
    rows = [(row, change) for row, change in _rows(pair, key) if change.outcome != "not compared"]
    return rows if any(change.outcome != "equal" for _, change in rows) else []


def _table(what: Quantity, rows: Rows) -> Table:
    unit, scale = what.scale(value for _, change in rows for value in (change.a, change.b))
    columns = (
        Column("row", "Row", numeric=False),
        Column("seeds", "Seeds", wide_only=True),
        Column("a", f"A ({unit})" if unit else "A"),
        Column("b", f"B ({unit})" if unit else "B"),
        Column("effect", "B − A" if what.kind == "quality" else "B against A"),
        Column("word", "B is", numeric=False),
    )
    entries = tuple(
        (
            Entry(row.a),
            Entry(", ".join(map(str, row.seeds))),
            *(Entry(what.format(None if value is None else value / scale)) for value in (change.a, change.b)),
            Entry(effect(change)),
            Entry(word(change), best=change.outcome in ("lower", "higher")),
        )
        for row, change in rows
    )
    return Table(what.key, _title(what), columns, entries)


def _counter_table(rows: Rows) -> Table:
    columns = (
        Column("row", "Row", numeric=False),
        Column("counter", "Exact counter", numeric=False),
        Column("a", "A"),
        Column("b", "B"),
        Column("effect", "B against A"),
    )
    entries = []
    for row, change in rows:
        what = quantity(change.key)
        values = (amount(value, what.unit) for value in (change.a, change.b))
        entries.append((Entry(row.a), Entry(what.title), *(Entry(text) for text in values), Entry(effect(change))))
    return Table("counters", "Exact counters that differ", columns, tuple(entries))


def print_sets(sets: TwoSets, console: Console) -> None:
    """Print what the two sides are, and for every group the sentences, then the tables."""
    console.print(f"A: {sets.a}\nB: {sets.b}", soft_wrap=True)
    for pair in sets.pairs:
        name = pair.a.name if pair.a.name == pair.b.name else f"A: {pair.a.name}\nB: {pair.b.name}"
        console.print("", f"{name}\n", *sentences(pair), sep="\n")
        for table in tables(pair):
            console.print("", to_terminal(table, console.width))
    for side, sections in (("A", sets.only_a), ("B", sets.only_b)):
        for section in sections:
            text = f"Only in {side}: {section.name}: {', '.join(section.lines)}"
            console.print("", text, sep="\n")


# --- JSON ----------------------------------------------------------------------------------------------------


def to_json(sets: TwoSets) -> str:
    """All groups, rows and quantities; values in the units of their keys, ratios B / A, quality differences B - A."""

    def content(pair: SectionPair) -> dict[str, object]:
        return {
            "a": {"name": pair.a.name, **pair.a.group.key},
            "b": {"name": pair.b.name, **pair.b.group.key},
            "differs": pair.differs,
            "noise": asdict(pair.noise),
            "rows": [
                {
                    "row": row.a,
                    "row_in_b": row.b,
                    "differs": row.differs,
                    "seeds": row.seeds,
                    "changes": [{key: plain(value) for key, value in asdict(change).items()} for change in row.changes],
                }
                for row in pair.rows
            ],
            "only_a": pair.only_a,
            "only_b": pair.only_b,
        }

    def alone(sections: Iterable[Section]) -> list[Mapping[str, object]]:
        return [{"name": section.name, **section.group.key, "rows": list(section.lines)} for section in sections]

    text = {
        "a": str(sets.a),
        "b": str(sets.b),
        "groups": [content(pair) for pair in sets.pairs],
        "only_a": alone(sets.only_a),
        "only_b": alone(sets.only_b),
    }
    return json.dumps(text, indent=1, ensure_ascii=False, allow_nan=False)

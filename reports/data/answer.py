"""What a section says, in three sentences: the best quality, what buys it cheapest, and how far to trust both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from tpme.bench.quantities import bytes_text, number
from tpme.reports.data.notes import mixing
from tpme.reports.data.others import measured_here
from tpme.reports.data.qualities import worst_first
from tpme.reports.data.section import Section
from tpme.reports.data.trials import Line
from tpme.reports.data.user_ranks import Metric

METRIC: Metric = "recall"
"""Validation of recommendation selects by it, so does the answer; other tasks have no users to test over."""
NAMED = 6
"""Rows that are named; of more, their number."""
SHARED_DEVICE = frozenset({"foreign-process", "crowded"})
"""Flags of cells beside which other programs ran."""


@dataclass(frozen=True)
class Answer:
    """Three sentences in plain text."""

    best: str
    """The best quality, and which rows the paired test does not tell apart from it."""
    cheapest: str
    """Of those rows the cheapest, and what it costs."""
    trust: str
    """Seeds, noise, whether the device was shared, random weights: how far to trust the other two."""


def answer(section: Section) -> Answer:
    """The three sentences of a section, from its data alone."""
    good = best_rows(section)
    return Answer(_best(section, good), _cheapest(section, good), _trust(section))


def best_rows(section: Section) -> list[str]:
    """The row of the best quality, followed by those that the paired test does not tell apart from it, best first."""
    if "random-weights" in _flags(section):
        return []
    if section.main is None:
        return []
    known = section.summary[section.main.key].where(section.summary["status"] == "ok").dropna()
    order = [str(name) for name in worst_first(known, section.main).sort_values(ascending=False, kind="stable").index]
    if not order:
        return []
    tests = section.differences[METRIC] if section.ranked else ()
    worse = {name for test in tests if test.significant for name in (test.first, test.second)
             if order[0] in (test.first, test.second)}  # fmt: skip
    tested = bool(tests)
    return [order[0], *(name for name in order[1:] if tested and name not in worse)]


def cheapest_rows(section: Section, among: Sequence[str]) -> list[str]:
    """Those of the rows ``among`` that share the best rank by TPME, best first; empty where none has a rank."""
    ranks = section.summary["tpme_rank"]
    ranks = ranks[ranks.index.isin(among)].dropna()
    return [str(name) for name in ranks.index[ranks == ranks.min()]]


def _best(section: Section, good: Sequence[str]) -> str:
    what = section.main
    if not good or what is None:
        random = "random-weights" in _flags(section)
        why = "the encoders have random weights" if random else f"no row finished with {_lacking(section)}"
        return f"No quality to compare: {why}."
    value = what.format(section.summary[what.key][good[0]])
    text = f"Best {what.header}: {good[0]} ({value})"
    others = int(section.summary[what.key].notna().sum()) - 1
    if not others:
        return f"{text}, the only row."
    if not section.ranked:
        once = (section.summary["seeds_ok"] < 2).all()
        why = "every row ran once" if once else "a metric of few seeds"
        return f"{text}; no test says which differences are real: {why}."
    if not section.differences[METRIC]:
        return f"{text}; no paired test over users of different data or protocols."
    if len(good) == 1:
        return f"{text}, better than every other row by the paired test over users."
    if len(good) > others:
        return f"{text}; no other row is told apart from it by the paired test over users."
    return f"{text}; not told apart from it by the paired test over users: {_listed(good[1:])}."


def _cheapest(section: Section, good: Sequence[str]) -> str:
    """Among the rows of the best quality, or all where none is known, those of the best rank by TPME."""
    of_these = "Cheapest at that quality" if good else "Cheapest"
    among = good or [name for name, line in section.lines.items() if line["status"] == "ok"]
    cheapest = cheapest_rows(section, among)
    if any(isnan(section.lines[name]["tpme_rank"]) for name in among):  # a reference row may cost less, without a rank
        of_these += ", of the rows with a TPME"
    if good and not section.ranked:
        return _front(section, good[0])
    if not cheapest:
        if len(good) == 1 or (good and not len(section.compared)):
            return f"What that costs: {_costs(section, section.lines[good[0]])}."
        return "No row can be called the cheapest: none has a TPME."
    text = f"{of_these}: {cheapest[0]}"
    tied = "tied within noise" if section.noise.source else "at the same cost"
    text += f" ({tied}: {_listed(cheapest[1:])})" if len(cheapest) > 1 else ""
    return f"{text}, with {_costs(section, section.lines[cheapest[0]])}."


def _lacking(section: Section) -> str:
    return "ranks" if section.ranked else "a metric"


def _front(section: Section, best: str) -> str:
    """What the best quality costs, and the lowest TPME with its quality, where no test tells rows apart."""
    assert section.main is not None
    text = f"What that costs: {_costs(section, section.lines[best])}"
    lowest = next(iter(section.compared), None)
    if lowest is None or lowest == best:
        return f"{text}{'' if lowest is None else ', the lowest TPME'}."
    line = section.lines[lowest]
    value = section.main.format(line[section.main.key])
    return f"{text}. Lowest TPME: {lowest}, with {section.main.header} {value} and {_costs(section, line)}."


def _costs(section: Section, line: Line) -> str:
    """The costs of a row that were measured, and their ratio to those of the reference row, unless it is that."""
    parts = []
    if not isnan(line["epoch_time_s"]):
        best = line["time_to_best_s"]
        in_all = "" if isnan(best) else f" ({number(best)} s in all up to the best one)"
        per = "an epoch" if section.ranked else f"for {section.time_of}"
        parts.append(f"{number(line['epoch_time_s'])} s {per}{in_all}")
    if not isnan(line["trainable_millions"]):
        parts.append(f"{number(line['trainable_millions'])} M trainable parameters")
    if not isnan(line["memory_bytes"]):
        of_others = "source" in section.group.key
        parts.append(f"{bytes_text(line['memory_bytes'])} {'of memory' if of_others else 'while training'}")
    if not isnan(line["peak_bytes"]):
        parts.append(f"{bytes_text(line['peak_bytes'])} at the peak of the whole run ({line['peak_phase']})")
    text = ", ".join(parts) or "no cost measured"
    if section.reference is None or isnan(line["cost_ratio"]) or line is section.lines[section.reference]:
        return text
    share = f"{100 * line['cost_ratio']:.2g} % of {section.reference}'s cost"
    costs = "epoch time, parameters and training memory" if section.ranked else "time, parameters and memory"
    return f"{text}; {share} (weighted geometric mean of {costs})"


def _trust(section: Section) -> str:
    lines = [line for line in section.lines.values() if line["status"] == "ok"]
    seeds = sorted({int(line["seeds_ok"]) for line in lines})
    parts = []
    if seeds:
        counted = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else "one" if seeds == [1] else str(seeds[0])
        parts.append(f"{counted} seed{'' if seeds == [1] else 's'} a row")
    cells = section.cells[section.cells["selected"]]
    of_finished = cells.loc[cells["status"] == "ok", "flags"]
    finished = len(of_finished)
    shared = sum(any(code in SHARED_DEVICE for code, _ in marks) for marks in of_finished)
    if measured_here(recorded.result for recorded in section.records):
        parts.append(
            f"other programs competed for the device in {shared} of {finished} cells"
            if shared
            else "no cell is flagged for sharing its device"
        )
    parts.append(section.noise.text)
    if failed := len(cells) - finished:
        parts.append(f"{failed} of {len(cells)} cells did not finish")
    if "random-weights" in _flags(section):
        parts.append("with random weights costs are real and quality is meaningless")
    if "source" in section.group.key:
        some = "some rows " if "source" in section.group.mixed else ""
        parts.append(f"{some}measured by others ({section.group.key['source']}), not here")
    if section.group.mixed:
        parts.append(mixing(section.group).removeprefix("Mixed: ").rstrip("."))
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _flags(section: Section) -> set[str]:
    """The codes of the flags of the selected cells."""
    return {code for flags in section.cells.loc[section.cells["selected"], "flags"] for code, _ in flags}


def _listed(names: Sequence[str]) -> str:
    named, more = list(names[:NAMED]), len(names) - NAMED
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")

"""Footnotes: flags, failures and doubtful readings that a reader must know before trusting a number.

A text that applies to every finished row becomes a note on the table; the others become numbered footnotes, with the
same number in every table of a section.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from tpme.bench.quantities import bytes_text, quantity
from tpme.reports.data.summary import doubt
from tpme.reports.data.trials import Group, Line, mixture, settings

INSTRUMENTS = frozenset({"sampler", "cache-placement"})
"""Flags on how a cell was run or measured, which take nothing from its numbers; they are no footnotes of a row."""
MANY = 3
"""Number of flags, differing in their numbers alone, from which they become one footnote."""
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Notes:
    """Footnotes of one section."""

    shared: tuple[str, ...]
    """Texts that apply to every finished row, and how instruments worked, with the number of rows concerned."""
    footnotes: tuple[str, ...]
    """Footnote 1 first."""
    marks: dict[str, tuple[int, ...]]
    """Numbers of the footnotes of each row."""
    doubts: tuple[str, ...] = ()
    """Those of ``shared`` that say what the numbers mean, without how instruments worked."""


def notes_of(seeds: Mapping[str, Sequence[Line]], lines: Mapping[str, Line]) -> Notes:
    """Collect the footnotes of all rows, numbered in the order of ``lines``.

    Args:
        seeds: the cells of the selected trial of each row.
        lines: the summary of each row.
    """
    finished = {name: line for name, line in lines.items() if line["status"] == "ok"}
    several_sources = len({line["memory_source"] for line in finished.values() if line["compared"]}) > 1
    merged = _merged(message for cells in seeds.values() for cell in cells for _, message in cell["flags"])
    texts = {
        name: list(dict.fromkeys(_row_notes(name, seeds[name], line, several_sources, merged)))
        for name, line in lines.items()
    }
    of_finished = [texts[name] for name in finished]
    shared = [text for text in of_finished[0] if all(text in row for row in of_finished)] if of_finished[1:] else []
    single = {name: [text for text in row if text not in shared] for name, row in texts.items()}
    footnotes = list(dict.fromkeys(text for row in single.values() for text in row))
    number = {text: index for index, text in enumerate(footnotes, start=1)}
    marks = {name: tuple(sorted(number[text] for text in row)) for name, row in single.items()}
    doubts, instruments = (
        tuple(f"{text[0].upper()}{text[1:]}" for text in texts) for texts in (shared, _on_instruments(seeds, merged))
    )
    return Notes((*doubts, *instruments), tuple(footnotes), marks, doubts)


def _on_instruments(seeds: Mapping[str, Sequence[Line]], merged: Mapping[str, str]) -> Iterator[str]:
    """The texts of ``INSTRUMENTS``, with the number of rows that they apply to."""
    rows = Counter(
        text
        for cells in seeds.values()
        for text in {merged[message] for cell in cells for code, message in cell["flags"] if code in INSTRUMENTS}
    )
    for text, count in sorted(rows.items()):
        yield text if count == len(seeds) else f"{text} ({count} of {len(seeds)} rows)"


def mixing(group: Group) -> str:
    """The warning on a mixed group."""
    text = f"Mixed: rows of different {mixture(group)} share this table and its TPME, which compares them all the same."
    if "source" in group.mixed:
        return (
            f"{text} Some were measured by others, with other programs, machines and definitions of T, P, M and "
            "quality: no difference between their rows and others is told apart from a difference in measuring."
        )
    if group.cells["device"].nunique() > 1:
        text += " M is not one quantity: resident memory over a baseline on a CPU, GPU memory by NVML on a GPU."
    return text


def _merged(messages: Iterable[str]) -> dict[str, str]:
    """Each flag message, or, for ``MANY`` that differ in numbers alone, one with their ranges ("for 17 to 56%")."""
    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for message in messages:
        alike.setdefault(tuple(_NUMBER.split(message)), {})[message] = _NUMBER.findall(message)
    result: dict[str, str] = {}
    for words, variants in alike.items():
        ranges = [_range(numbers) for numbers in zip(*variants.values(), strict=True)]
        text = "".join(chain.from_iterable(zip_longest(words, ranges, fillvalue="")))
        result |= {message: text if len(variants) >= MANY else message for message in variants}
    return result


def _range(numbers: Sequence[str]) -> str:
    least, most = min(numbers, key=float), max(numbers, key=float)
    return least if least == most else f"{least} to {most}"


def _row_notes(
    name: str, seeds: Sequence[Line], line: Line, several_sources: bool, merged: Mapping[str, str]
) -> Iterator[str]:
    flags = dict.fromkeys(flag for cell in seeds for flag in cell["flags"])
    for code, message in flags:
        if code not in INSTRUMENTS:
            yield merged[message]
    options = settings(line["options"])
    if options and not name.endswith("]"):
        yield f"with {', '.join(options)}"
    if line["status"] != "ok":
        yield f"{line['status']} during {seeds[0]['failure_phase']}: {seeds[0]['failure_message']}"
        if line["status"] == "oom":
            bound = ", TPME the least it can be on the scale of the other rows"
            yield f"out of memory: M is the most that was seen{'' if math.isnan(line['tpme_lower_bound']) else bound}"
    elif line["seeds_ok"] < line["seeds"]:
        ends = sorted({cell["status"] for cell in seeds} - {"ok"})
        yield f"{line['seeds_ok']} of {line['seeds']} seeds finished ({', '.join(ends)}); the row is over those alone"
    if line["status"] == "ok" and line["compared"]:
        for key in ("epoch_time_s", "memory_bytes"):
            if why := doubt(line, key):
                yield f"no TPME, for {quantity(key).header} is missing or not to be trusted: {why}"
    if several_sources and line["compared"] and line["status"] == "ok":
        yield f"M by {line['memory_source']}"
    if line["search_trials"] > 1:
        yield f"learning rate selected on validation among {line['search_trials']} trials"
    if line["cached"] and not any(code == "cache-build" for code, _ in flags) and not math.isnan(line["cache_build_s"]):
        peak = line["cache_peak_bytes"]
        memory = "" if math.isnan(peak) else f" and {bytes_text(peak)} of memory"
        if memory and not line["cache_built"]:
            memory += " (of its builder alone, in an earlier run)"
        yield (
            f"trains on a feature cache that took {line['cache_build_s']:.1f} s{memory} to build, once, and "
            f"{line['cache_bytes'] / 1e6:.1f} MB on disk; not part of T and M"
        )
    if superseded := sum(cell["superseded"] for cell in seeds):
        yield f"replaces {superseded} older records of the same cells on the same device"

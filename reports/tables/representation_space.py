"""The table of the representation space: ranks of the trained model's states, beside those of the unadapted encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tpme.bench.quantities import MISSING, number
from tpme.bench.record import CellResult, SpaceFacts, Spectrum
from tpme.reports.data.section import Section
from tpme.reports.tables.fields import value_of
from tpme.reports.tables.table import Column, Entry, Table

RANKS = {
    "effective_rank": "Effective rank",
    "energy_rank_90": "90 % energy",
    "energy_rank_99": "99 % energy",
    "stable_rank": "Stable rank",
}
SPACES = {
    "text": "text",
    "text-mean": "text, mean",
    "image": "image",
    "image-mean": "image, mean",
    "items": "item vectors",
}
"""By their names in a record, in the order of the table."""


def representation_space(section: Section) -> Table:
    """One line per space of every row that measured it; means over seeds."""
    measured = dict(_measured(section))
    angles = sorted({k for seeds in measured.values() for facts in seeds for k in facts.overlap})
    columns = (
        Column("method", "Method", numeric=False),
        Column("space", "Space", numeric=False),
        Column("width", "Width"),
        *(column for key, title in RANKS.items() for column in _rank_columns(key, title)),
        *(Column(f"overlap_{k}", f"Overlap, k = {k}") for k in angles),
        Column("cka", "CKA"),
        *(Column(f"cosine_{k}", machine_only=True) for k in angles),
    )
    rows = tuple(
        (
            Entry(row, row, marks=section.notes.marks[row]),
            Entry(SPACES[space], space),
            Entry(str(seeds[0].width), seeds[0].width),
            *(entry for key in RANKS for entry in _rank_entries(key, seeds)),
            *(_share([facts.overlap.get(k) for facts in seeds]) for k in angles),
            _share([facts.cka for facts in seeds]),
            *(_hidden([facts.cosine.get(k) for facts in seeds]) for k in angles),
        )
        for (row, space), seeds in measured.items()
    )
    return Table(
        "representation",
        "Representation space",
        columns,
        rows,
        tuple(_notes(section)),
        (*section.notes.shared, section.instruments),
        section.notes.footnotes,
        section.name,
    )


def _measured(section: Section) -> Iterator[tuple[tuple[str, str], list[SpaceFacts]]]:
    """The facts of every seed by row and space."""
    for row, results in section.behind.items():
        for space in SPACES:
            if seeds := [facts for result in results if (facts := _spaces(result).get(space)) is not None]:
                yield (row, space), seeds


def _spaces(result: CellResult) -> Mapping[str, SpaceFacts]:
    return result.representation.spaces if result.representation else {}


def _rank_columns(key: str, title: str) -> Iterator[Column]:
    """Shown is the rank of centred states, the unadapted encoder's in brackets; CSV and JSON hold all four."""
    yield Column(key, title)
    for name in (f"{key}_unadapted", f"{key}_raw", f"{key}_raw_unadapted"):
        yield Column(name, machine_only=True)


def _rank_entries(key: str, seeds: Sequence[SpaceFacts]) -> Iterator[Entry]:
    after, before, raw, raw_before = (
        _mean([_rank(getattr(facts, spectrum), key) for facts in seeds])
        for spectrum in ("centred", "unadapted_centred", "raw", "unadapted_raw")
    )
    text = number(after) if np.isnan(before) else f"{number(after)} ({number(before)})"
    yield Entry(text, value_of(after), short=number(after))
    for value in (before, raw, raw_before):
        yield Entry("", value_of(value))


def _rank(spectrum: Spectrum | None, key: str) -> float | None:
    return None if spectrum is None else float(getattr(spectrum, key))


def _share(values: Sequence[float | None]) -> Entry:
    mean = _mean(values)
    return Entry(MISSING if np.isnan(mean) else f"{mean:.3f}", value_of(mean))


def _hidden(values: Sequence[float | None]) -> Entry:
    return Entry("", value_of(_mean(values)))


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else np.nan


def _notes(section: Section) -> Iterator[str]:
    known = [r.representation for seeds in section.behind.values() for r in seeds if r.representation is not None]
    if not known:
        return
    items = " or ".join(map(str, sorted({facts.items for facts in known})))
    yield (
        f"Final states of {items} items after training, in brackets those of the unadapted encoder: as the encoder is "
        "read, and at the mean of its tokens. Ranks are of states minus their mean over the items; effective: "
        "exponential of the entropy of the singular values; energy: the fewest singular values with that share of the "
        "sum of squares; stable: that sum over the largest square. Means over seeds."
    )
    yield (
        "Overlap: mean squared cosine of the principal angles between the leading subspaces of k dimensions before and "
        "after; random ones give about k / width. CKA: linear, unchanged by a rotation; for item vectors, with the "
        "unadapted states of all encoders. "
        "An encoder that stays frozen has overlap and CKA 1."
    )
    for row, results in section.behind.items():
        reasons = {(s, why) for r in results if r.representation for s, why in r.representation.reasons.items()}
        for space, reason in sorted(reasons):
            yield f"{SPACES[space]} of {row}: {reason}."

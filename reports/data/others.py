"""What a reader must know of rows that others measured: who did, and what their T, P, M and quality mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tpme.bench.record import CellResult

MARKS = "†‡§¶"
"""Behind the names of rows in a figure of mixed rows, one for each source."""


def notes_of_others(results: Iterable[CellResult]) -> tuple[str, ...]:
    """A note for each source: its name, the versions of what it measured, and its definitions."""
    commits: dict[tuple[str, tuple[tuple[str, str], ...]], set[str]] = {}
    for result in results:
        if result.source is not None:
            key = result.source.name, tuple(result.source.definitions.items())
            commits.setdefault(key, set()).update({result.source.commit[:12]} - {""})
    return tuple(
        " ".join([f"Measured by others: {name}{_at(versions)}.", *(f"{key}: {text}." for key, text in definitions)])
        for (name, definitions), versions in commits.items()
    )


def _at(versions: set[str]) -> str:
    if not versions:
        return ""
    return f", commit{'' if len(versions) == 1 else 's'} {', '.join(sorted(versions))}"


def source_marks(results: Iterable[CellResult]) -> dict[str, str]:
    """The mark of each source, by its name: the fifth source has the first mark twice."""
    names = sorted({result.source.name for result in results if result.source is not None})
    return {name: MARKS[place % len(MARKS)] * (1 + place // len(MARKS)) for place, name in enumerate(names)}


def foot_of_others(results: Sequence[CellResult], *, mixed: bool) -> str:
    """What a figure says of the rows that others measured; of ``mixed`` rows with the mark of each source. "" of none.

    A figure is copied without the page around it, so it names who measured.
    """
    commits: dict[str, set[str]] = {}
    for result in results:
        if result.source is not None:
            commits.setdefault(result.source.name, set()).update({result.source.commit[:12]} - {""})
    marks = source_marks(results)
    if not marks:
        return ""
    if not mixed:
        return f"Measured by others: {'; '.join(f'{name}{_at(commits[name])}' for name in marks)}"
    named = "; ".join(f"{marks[name]} {name}{_at(commits[name])}" for name in marks)
    return f"Mixed with rows measured by others, with other programs, machines and definitions: {named}"


def measured_here(results: Iterable[CellResult]) -> bool:
    """Whether any of these rows is our own."""
    return any(result.source is None for result in results)

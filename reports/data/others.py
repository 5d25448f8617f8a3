"""What a reader must know of rows that others measured: who did, and what their T, P, M and quality mean."""

from __future__ import annotations

from collections.abc import Iterable

from tpme.bench.record import CellResult


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


def measured_here(results: Iterable[CellResult]) -> bool:
    """Whether any of these rows is our own."""
    return any(result.source is None for result in results)

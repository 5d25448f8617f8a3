"""All figures of a report as files, drawn on several cores: drawing them takes longer than everything before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from tpme.bench.errors import UserError
from tpme.bench.workers import worker_processes
from tpme.reports.data.section import Section
from tpme.reports.figures.costs import Maker, made, makers
from tpme.reports.figures.style import save


@dataclass(frozen=True)
class Drawn:
    """A figure; ``files`` by ending, ``name`` is their name without it."""

    name: str
    title: str
    caption: str
    files: Mapping[str, bytes]


def draw(
    sections: Sequence[Section], endings: Sequence[str], workers: int, advance: Callable[[], None]
) -> list[list[Drawn]]:
    """Every figure there is something to show in, by section.

    Args:
        sections: of one report.
        endings: of ``png``, ``svg`` and ``pdf``.
        workers: processes; with 1 this one draws. They are forked: no other thread should be at work here.
        advance: called after each figure; there are ``len(sections) * len(makers())`` at most.

    Raises:
        UserError: a process died.
    """
    jobs = [(index, make) for index in range(len(sections)) for make in makers()]
    found: list[list[Drawn]] = [[] for _ in sections]
    for (index, _), drawn in zip(jobs, _results(sections, endings, jobs, workers), strict=True):
        found[index] += [] if drawn is None else [drawn]
        advance()
    return found


def _results(
    sections: Sequence[Section], endings: Sequence[str], jobs: Sequence[tuple[int, Maker]], workers: int
) -> Iterator[Drawn | None]:
    """In the order of ``jobs``."""
    workers = min(workers, len(jobs))  # all are forked at once
    if workers == 1:
        yield from (_drawn(sections[index], make, endings) for index, make in jobs)
        return
    try:
        # Forked: to send a thousand records to a process takes as long as to draw half of a group's figures.
        with worker_processes(workers, _know, sections, endings, fork=True) as submit:
            for job in [submit(_draw_known, index, make) for index, make in jobs]:
                yield job.result()
    except BrokenProcessPool:
        raise UserError("a process that draws figures died (out of memory?); try again with --workers 1") from None


def _drawn(section: Section, make: Maker, endings: Sequence[str]) -> Drawn | None:
    plot = made(make, section)
    if plot is None:
        return None
    return Drawn(plot.name, plot.title, plot.caption, {ending: save(plot.figure, ending) for ending in endings})


_known: tuple[Sequence[Section], Sequence[str]] = ((), ())
"""In a worker: what it draws from."""


def _know(sections: Sequence[Section], endings: Sequence[str]) -> None:
    global _known
    _known = sections, endings


def _draw_known(index: int, make: Maker) -> Drawn | None:
    sections, endings = _known
    return _drawn(sections[index], make, endings)

"""All figures of a report as files, drawn in several processes: drawing takes longer than the rest of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from tpme.bench.errors import UserError
from tpme.bench.workers import worker_processes
from tpme.reports.data.section import Section
from tpme.reports.figures.costs import Maker, make_plot, makers
from tpme.reports.figures.style import save


@dataclass(frozen=True)
class Drawn:
    """A figure as ``files`` by ending; ``name`` is their name without the ending."""

    name: str
    title: str
    caption: str
    files: Mapping[str, bytes]


def draw(
    sections: Sequence[Section], endings: Sequence[str], workers: int, advance: Callable[[], None]
) -> list[list[Drawn]]:
    """Every figure that has data, by section.

    Args:
        sections: of one report.
        endings: of ``png``, ``svg`` and ``pdf``.
        workers: number of processes; with 1 this process draws. They are forked: no other thread should run.
        advance: called after each figure; there are ``len(sections) * len(makers(sections))`` at most.

    Raises:
        UserError: a process died.
    """
    jobs = [(index, make) for index in range(len(sections)) for make in makers(sections)]
    figures: list[list[Drawn]] = [[] for _ in sections]
    for (index, _), drawn in zip(jobs, _results(sections, endings, jobs, workers), strict=True):
        figures[index] += [] if drawn is None else [drawn]
        advance()
    return figures


def _results(
    sections: Sequence[Section], endings: Sequence[str], jobs: Sequence[tuple[int, Maker]], workers: int
) -> Iterator[Drawn | None]:
    """In the order of ``jobs``."""
    workers = min(workers, len(jobs))  # all are forked at once
    if workers == 1:
        yield from (_drawn(sections[index], make, endings) for index, make in jobs)
        return
    try:
        # Forked: sending a thousand records to a process takes as long as drawing half of a group's figures.
        with worker_processes(workers, _set_job_data, sections, endings, fork=True) as submit:
            for job in [submit(_draw_job, index, make) for index, make in jobs]:
                yield job.result()
    except BrokenProcessPool:
        raise UserError("a process that draws figures died (out of memory?); try again with --workers 1") from None


def _drawn(section: Section, make: Maker, endings: Sequence[str]) -> Drawn | None:
    plot = make_plot(make, section)
    if plot is None:
        return None
    return Drawn(plot.name, plot.title, plot.caption, {ending: save(plot.figure, ending) for ending in endings})


_job_data: tuple[Sequence[Section], Sequence[str]] = ((), ())
"""Sections and endings, set once in each worker process."""


def _set_job_data(sections: Sequence[Section], endings: Sequence[str]) -> None:
    global _job_data
    _job_data = sections, endings


def _draw_job(index: int, make: Maker) -> Drawn | None:
    sections, endings = _job_data
    return _drawn(sections[index], make, endings)

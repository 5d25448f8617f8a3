"""Write the records of a run as a folder: ``report.md``, ``details.md``, the page ``index.html``, tables and figures.

Everything comes from the records, nothing from the clock or the machine: the same records give the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from tpme.bench.errors import UserError
from tpme.bench.text import escaped_lines
from tpme.bench.writing import write_atomically
from tpme.reports.data.columns import ALL_USERS
from tpme.reports.data.load import read, to_frame
from tpme.reports.data.section import Section, check_rows, make_section
from tpme.reports.data.tpme import DEFAULT, Weights, read_frames, write_frames
from tpme.reports.data.trials import OTHER_TASKS, names, split
from tpme.reports.markdown import Chapter, details_md, report_md, sentences
from tpme.reports.page import page
from tpme.reports.tables.compact import compact
from tpme.reports.tables.results import TABLES, all_tables
from tpme.reports.tables.table import to_csv, to_json, to_latex
from tpme.reports.tables.terminal import to_terminal

if TYPE_CHECKING:
    from tpme.reports.figures.draw import Drawn

TABLE_FORMATS = {"csv": to_csv, "json": to_json, "tex": to_latex}
PLOT_FORMATS = ("png", "svg", "pdf")
FORMATS = (*TABLE_FORMATS, *PLOT_FORMATS, "html")
ROWS_DRAWN = 30
"""A report with more rows over all its groups has figures only on request: a thousand records then take seconds."""


class Choices(TypedDict, total=False):
    """What a report may be told beside its records; every one may be left out."""

    weights: Weights
    """Of T, P and M in TPME."""
    frame: Path | None
    """File with frozen frames, to use instead of each group's own min and max."""
    rows: Sequence[str] | None
    """Rows or methods that get a TPME; by default all that adapt an encoder."""
    mix: bool
    """Put all records into one section, whatever their device, protocol or data, and say so."""
    history: bool
    """Also cells of earlier matrices and versions (``read``)."""
    reference: str | None
    """Row or method that ratios of costs refer to; by default full fine-tuning."""
    title: str | None


@dataclass(frozen=True)
class Report:
    """All sections of a report, and the command that makes it."""

    title: str
    sections: tuple[Section, ...]
    command: str


def make_report(paths: Iterable[Path | str], **choices: Unpack[Choices]) -> Report:
    """Read the records below ``paths`` and summarise them, a section for each comparable group.

    Args:
        paths: run folders or record files.
        choices: see ``Choices``.

    Raises:
        UserError: no records, a broken one, an unknown row, a frame that fits none of the records.
    """
    frame, rows, reference = choices.get("frame"), choices.get("rows"), choices.get("reference")
    weights = choices.get("weights", DEFAULT)
    roots = [Path(path) for path in paths]
    records = read(roots, history=choices.get("history", False))
    by_path = {str(recorded.path): recorded for recorded in records}
    groups = split(to_frame(records), choices.get("mix", False))
    if rows is not None:
        check_rows(rows, groups)
    if reference is not None:
        check_rows([reference], groups)
    frozen = {} if frame is None else {_key(stored.group): stored for stored in read_frames(frame)}
    if frame is not None and not any(_key(group.key) in frozen for group in groups):
        raise UserError(f"{frame}: made on another device, protocol, data, encoders or precision than these records")
    sections = []
    for name, group in zip(names(groups), groups, strict=True):
        stored = frozen.get(_key(group.key))
        used = (stored, frame.name) if frame is not None and stored is not None else None
        members = [by_path[path] for path in group.cells["path"]]
        sections.append(make_section(name, group, members, weights, rows, used, reference))
    if reference is not None and not any(section.reference for section in sections):
        raise UserError(f"--reference {reference}: its T, P or M is missing, so nothing can be compared with it")
    title = choices.get("title") or "What adaptation costs and what it buys"
    return Report(title, tuple(sections), _command(roots, choices))


def write_report(
    paths: Iterable[Path | str],
    out: Path,
    *,
    formats: Sequence[str] | None = None,
    workers: int = 1,
    show: Sequence[str] = ("results",),
    console: Console | None = None,
    **choices: Unpack[Choices],
) -> Report:
    """Write the folder: ``report.md``, ``details.md``, ``index.html``, ``tables/`` and ``plots/``, each file whole.

    Args:
        paths: run folders or record files.
        out: the folder; created where it does not exist.
        formats: those of ``FORMATS`` to write beside the texts; by default all, without figures where there are
            more than ``ROWS_DRAWN`` rows.
        workers: processes that draw figures; several are forked, while no other thread may run.
        show: names of the tables to print below the answer, of ``TABLES``.
        console: prints them, and the progress of drawing.
        choices: see ``Choices``; a ``frame`` file that does not exist is first written from these records.

    Raises:
        UserError: as ``make_report``, and for an unknown format or table; nothing is written then.
    """
    console = console or Console(quiet=True)
    for kind, asked, known in (("format", formats or (), FORMATS), ("table", show, TABLES)):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise UserError(f"{kind} '{unknown[0]}': choose of {', '.join(known)}")
    frame = choices.get("frame")
    if frame is not None and not frame.exists():
        free = choices.copy()
        free["frame"] = None
        freeze(frame, make_report(paths, **free), console)
    report = make_report(paths, **choices)
    if formats is None:
        formats = _default_formats(report, console)
    plots = _draw(report, formats, workers, console)
    several = len(report.sections) > 1
    chapters = [
        Chapter(section, all_tables(section), of_section, number if several else 0)
        for number, (section, of_section) in enumerate(zip(report.sections, plots, strict=True), start=1)
    ]
    weights = choices.get("weights", DEFAULT)
    html = page(report.title, report.sections, weights) if "html" in formats else None  # reads samples, which may fail
    for chapter in chapters:
        _write_chapter(chapter, out, formats)
    if html is not None:
        write_atomically(out / "index.html", escaped_lines(html).encode())
    details = details_md(report.title, chapters, formats, report.command)
    write_atomically(out / "details.md", escaped_lines(details).encode())
    write_atomically(out / "report.md", escaped_lines(report_md(report.title, chapters, formats)).encode())
    _print(chapters, show, console)
    console.print(f"Written to {out / 'report.md'}", soft_wrap=True)
    return report


def _write_chapter(chapter: Chapter, out: Path, formats: Sequence[str]) -> None:
    """Tables and figures of a section."""
    for table in chapter.tables:
        file = chapter.file(table.name)
        for ending, render in TABLE_FORMATS.items():
            if ending in formats and not (table.long and ending == "tex"):
                text = render(replace(table, name=file))  # LaTeX labels are unique over all groups
                write_atomically(out / "tables" / f"{file}.{ending}", text.encode())
    if "tex" in formats:
        small = replace(compact(chapter.section), name=chapter.file("results-compact"))
        write_atomically(out / "tables" / f"{small.name}.tex", to_latex(small, compact=True).encode())
    for plot in chapter.plots:
        for ending, content in plot.files.items():
            write_atomically(out / "plots" / f"{chapter.file(plot.name)}.{ending}", content)


def freeze(frame: Path, report: Report, console: Console) -> None:
    """Store the frames of a report in a file. Raises UserError where no row has a TPME."""
    frames = [section.frame for section in report.sections if section.frame is not None]
    if not frames:
        raise UserError(f"{frame}: not made, for none of these rows has a TPME")
    write_frames(frame, frames)
    console.print(f"{frame}: was not there; holds the frame of these records now", soft_wrap=True)


def _print(chapters: Sequence[Chapter], names: Sequence[str], console: Console) -> None:
    """Print the answer of every section and its tables of these names.

    What "Trust" sums up is left out; notes and footnotes that several tables share stand with the first.
    """
    told: set[str] = set()
    for chapter in chapters:
        if chapter.number:
            console.print(Text(f"Group {chapter.number}: {chapter.section.name}", style="bold"))
        for text in sentences(chapter.section):
            start, colon, rest = text.partition(":")
            console.print(Text.assemble((start + colon, "bold"), rest))
        console.print()
        told |= {*chapter.section.notes.shared, chapter.section.instruments}
        marked: set[str] = set()
        for table in chapter.tables:
            if table.name in names:
                console.print(to_terminal(table, console.width, told | marked), "")
                told |= set(table.notes)
                marked |= {text for _, text in table.used_footnotes}
    for name in names:
        if not any(table.name == name for chapter in chapters for table in chapter.tables):
            console.print(f"{name}: nothing in these records")


def _default_formats(report: Report, console: Console) -> Sequence[str]:
    """Every format; those without figures for a large report."""
    rows = sum(len(section.summary) for section in report.sections)
    if rows <= ROWS_DRAWN:
        return FORMATS
    message = f"{rows} rows in {len(report.sections)} groups: figures are drawn with --formats all"
    console.print(message)
    return [name for name in FORMATS if name not in PLOT_FORMATS]


def _draw(report: Report, formats: Sequence[str], workers: int, console: Console) -> list[list[Drawn]]:
    endings = [ending for ending in PLOT_FORMATS if ending in formats]
    if not endings:
        return [[] for _ in report.sections]
    from tpme.reports.figures.costs import makers
    from tpme.reports.figures.draw import draw  # matplotlib takes as long to load as a report of hundreds of records

    # No refresh thread: the drawing processes are forked meanwhile.
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("Figures", total=len(report.sections) * len(makers(report.sections)))
        return draw(report.sections, endings, workers, lambda: progress.update(task, advance=1, refresh=True))


def _key(group: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(({"evaluation": ALL_USERS, **OTHER_TASKS} | group).items()))  # older frames do not say


def _command(roots: Sequence[Path], choices: Choices) -> str:
    parts = ["tpme", "report", *(root.resolve().name for root in roots)]
    parts += ["--weights", str(choices.get("weights", DEFAULT))]
    if (frame := choices.get("frame")) is not None:
        parts += ["--frame", frame.name]
    if (rows := choices.get("rows")) is not None:
        parts += ["--rows", ",".join(rows)]
    parts += ["--mix"] if choices.get("mix") else []
    parts += ["--all"] if choices.get("history") else []
    if (reference := choices.get("reference")) is not None:
        parts += ["--reference", reference]
    if (title := choices.get("title")) is not None:
        parts += ["--title", title]
    return shlex.join(parts)

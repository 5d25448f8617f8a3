"""Write the records of a run as a folder: ``report.md``, the page ``index.html``, and every table and figure.

Everything comes from the records, nothing from the clock or the machine: the same records give the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.progress import Progress

from tpme.bench.errors import UserError
from tpme.bench.record import write_atomically
from tpme.reports.data.load import read, to_frame
from tpme.reports.data.section import Section, check_rows, make_section
from tpme.reports.data.tpme import DEFAULT, Weights, read_frames, write_frames
from tpme.reports.data.trials import names, shorten_path, split
from tpme.reports.page import page
from tpme.reports.tables.compact import compact
from tpme.reports.tables.results import TABLES, all_tables
from tpme.reports.tables.table import Table, escape_markdown, to_csv, to_json, to_latex, to_markdown
from tpme.reports.tables.terminal import to_terminal

if TYPE_CHECKING:
    from tpme.reports.figures.draw import Drawn

TABLE_FORMATS = {"csv": to_csv, "json": to_json, "tex": to_latex}
PLOT_FORMATS = ("png", "svg", "pdf")
FORMATS = (*TABLE_FORMATS, *PLOT_FORMATS, "html")
ROWS_DRAWN = 30
"""A report with more rows over all its groups has figures only on request: a thousand records then take seconds."""


@dataclass(frozen=True)
class Report:
    """All sections of a report, and the command that makes it."""

    title: str
    sections: tuple[Section, ...]
    command: str


def make_report(
    paths: Iterable[Path | str],
    *,
    weights: Weights = DEFAULT,
    frame: Path | None = None,
    rows: Sequence[str] | None = None,
    mix: bool = False,
    history: bool = False,
    reference: str | None = None,
    title: str | None = None,
) -> Report:
    """Read the records below ``paths`` and summarise them, a section for each comparable group.

    Args:
        paths: run folders or record files.
        weights: of T, P and M in TPME.
        frame: file with frozen frames, to use instead of each group's own min and max.
        rows: rows or methods that get a TPME; by default all that adapt an encoder.
        mix: put all records into one section, whatever their device, protocol or data, and say so.
        history: also cells of earlier matrices and versions (``read``).
        reference: row or method that ratios of costs refer to; by default full fine-tuning.
        title: of the report.

    Raises:
        UserError: no records, a broken one, an unknown row, a frame that fits none of the records.
    """
    roots = [Path(path) for path in paths]
    records = read(roots, history=history)
    by_path = {str(recorded.path): recorded for recorded in records}
    groups = split(to_frame(records), mix)
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
    return Report(
        title or "What adaptation costs and what it buys",
        tuple(sections),
        _command(roots, weights, frame, rows, mix, history, reference, title),
    )


def write_report(
    paths: Iterable[Path | str],
    out: Path,
    *,
    weights: Weights = DEFAULT,
    frame: Path | None = None,
    rows: Sequence[str] | None = None,
    mix: bool = False,
    history: bool = False,
    reference: str | None = None,
    title: str | None = None,
    formats: Sequence[str] | None = None,
    workers: int = 1,
    show: Sequence[str] = ("results",),
    console: Console | None = None,
) -> Report:
    """Write the folder: ``report.md``, ``index.html``, ``tables/`` and ``plots/``; each file is replaced as a whole.

    Args:
        paths: run folders or record files.
        out: the folder; created where it does not exist.
        weights, rows, mix, history, reference, title: as in ``make_report``.
        frame: as in ``make_report``; a file that does not exist is first written from these records.
        formats: those of ``FORMATS`` to write beside ``report.md``; by default all, without figures where there are
            more than ``ROWS_DRAWN`` rows.
        workers: processes that draw figures; several are forked, while no other thread may run.
        show: names of the tables to print, of ``TABLES``.
        console: prints them, and the progress of drawing.

    Raises:
        UserError: as ``make_report``, and for an unknown format or table; nothing is written then.
    """
    console = console or Console(quiet=True)
    for kind, asked, known in (("format", formats or (), FORMATS), ("table", show, TABLES)):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise UserError(f"{kind} '{unknown[0]}': choose of {', '.join(known)}")
    if frame is not None and not frame.exists():
        freeze(frame, make_report(paths, weights=weights, rows=rows, mix=mix, history=history), console)
    report = make_report(
        paths, weights=weights, frame=frame, rows=rows, mix=mix, history=history, reference=reference, title=title
    )
    if formats is None:
        formats = _default_formats(report, console)
    tables = [all_tables(section) for section in report.sections]
    plots = _draw(report, formats, workers, console)
    html = page(report.title, report.sections, weights) if "html" in formats else None  # reads samples, which may fail
    for index, (of_tables, of_plots) in enumerate(zip(tables, plots, strict=True)):
        for table in of_tables:
            file = _file(table.name, index)
            for ending, render in TABLE_FORMATS.items():
                if ending in formats and not (table.long and ending == "tex"):
                    text = render(replace(table, name=file))  # LaTeX labels are unique over all groups
                    write_atomically(out / "tables" / f"{file}.{ending}", text.encode())
        if "tex" in formats:
            small = replace(compact(report.sections[index]), name=_file("results-compact", index))
            write_atomically(out / "tables" / f"{small.name}.tex", to_latex(small, compact=True).encode())
        for plot in of_plots:
            for ending, content in plot.files.items():
                write_atomically(out / "plots" / f"{_file(plot.name, index)}.{ending}", content)
    if html is not None:
        write_atomically(out / "index.html", html.encode())
    write_atomically(out / "report.md", _markdown(report, tables, plots, formats).encode())
    _print(tables, show, console)
    return report


def freeze(frame: Path, report: Report, console: Console) -> None:
    """Store the frames of a report in a file. Raises UserError where no row has a TPME."""
    frames = [section.frame for section in report.sections if section.frame is not None]
    if not frames:
        raise UserError(f"{frame}: not made, for none of these rows has a TPME")
    write_frames(frame, frames)
    console.print(f"{frame}: was not there; holds the frame of these records now", markup=False, soft_wrap=True)


def _print(tables: Sequence[Sequence[Table]], names: Sequence[str], console: Console) -> None:
    """Print the tables of these names, section by section; notes that several share stand under the first."""
    for of_section in tables:
        printed: set[str] = set()
        for table in of_section:
            if table.name in names:
                console.print(to_terminal(table, console.width, printed), "")
                printed |= {*table.warnings, *(text for _, text in table.used_footnotes)}
    for name in names:
        if not any(table.name == name for of_section in tables for table in of_section):
            console.print(f"{name}: nothing in these records")


def _default_formats(report: Report, console: Console) -> Sequence[str]:
    """Every format; those without figures for a large report."""
    rows = sum(len(section.summary) for section in report.sections)
    if rows <= ROWS_DRAWN:
        return FORMATS
    message = f"{rows} rows in {len(report.sections)} groups: figures are drawn with --formats all"
    console.print(message, markup=False)
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
    return tuple(sorted(group.items()))


def _file(name: str, index: int) -> str:
    """File name of a table or plot; the first section's carry no number."""
    return name if index == 0 else f"{name}-{index + 1}"


def _command(
    roots: Sequence[Path],
    weights: Weights,
    frame: Path | None,
    rows: Sequence[str] | None,
    mix: bool,
    history: bool,
    reference: str | None,
    title: str | None,
) -> str:
    parts = ["tpme", "report", *(root.resolve().name for root in roots), "--weights", str(weights)]
    parts += [] if frame is None else ["--frame", frame.name]
    parts += [] if rows is None else ["--rows", ",".join(rows)]
    parts += ["--mix"] if mix else []
    parts += ["--all"] if history else []
    parts += [] if reference is None else ["--reference", reference]
    parts += [] if title is None else ["--title", title]
    return shlex.join(parts)


# --- report.md -----------------------------------------------------------------------------------------------


def _markdown(
    report: Report, tables: Sequence[Sequence[Table]], plots: Sequence[Sequence[Drawn]], formats: Sequence[str]
) -> str:
    several = len(report.sections) > 1
    lines = [f"# {escape_markdown(report.title)}", ""]
    if "html" in formats:
        lines += ["To sort, filter and weigh it yourself: [index.html](index.html), one file for a browser.", ""]
    if several:
        lines += [
            f"{len(report.sections)} groups of records, each with tables and a TPME of its own: costs and quality "
            "are not comparable between different devices, protocols, data, encoders or precisions.",
            "",
            *(f"{number}. {escape_markdown(section.name)}" for number, section in enumerate(report.sections, start=1)),
            "",
        ]
    for index, section in enumerate(report.sections):
        lines += _heading(several, index, section, "Results")
        lines += [escape_markdown(headline(section)), "", to_markdown(tables[index][0])]
        if index == 0:
            lines += ["## How to read the columns", "", *reading_guide(report.sections), ""]
    if "png" in formats:
        for index, section in enumerate(report.sections):
            lines += _heading(several, index, section, "Figures")
            for plot in plots[index]:
                lines += _figure(plot, _file(plot.name, index), formats)
    for index, section in enumerate(report.sections):
        lines += _heading(several, index, section, "More tables")
        for table in (table for table in tables[index][1:] if not table.long):
            lines += [f"### {escape_markdown(table.title)}", "", to_markdown(table, footnotes=False)]
            if table.used_footnotes:
                lines += ["Marks as in the table of results.", ""]
    lines += _repeat(report, formats)
    return "\n".join(lines).rstrip() + "\n"


def _heading(several: bool, index: int, section: Section, title: str) -> list[str]:
    suffix = f", group {index + 1}" if several else ""
    suffix += f": {escape_markdown(section.name)}" if several or section.group.mixed else ""
    return [f"## {title}{suffix}", ""]


def _figure(plot: Drawn, file: str, formats: Sequence[str]) -> list[str]:
    links = "".join(f" [{ending.upper()}](plots/{file}.{ending})" for ending in PLOT_FORMATS[1:] if ending in formats)
    return [
        f"### {escape_markdown(plot.title)}",
        "",
        f"![{escape_markdown(plot.title)}](plots/{file}.png)",
        "",
        f"{escape_markdown(plot.caption)}{links}",
        "",
    ]


# --- the sentences of report.md ------------------------------------------------------------------------------

MEASURED_M = {
    "cpu": (
        "peak resident memory of the process tree during training, over the baseline taken before data and model "
        "were loaded (a CPU has no device memory of its own)"
    ),
    "cuda": (
        "peak GPU memory during training as NVML reports it: that of the process where NVML can tell it, else that "
        "of the whole device over its idle baseline"
    ),
}


def headline(section: Section) -> str:
    """What ran, on what, and the best rows by Recall@10 and by TPME."""
    cells, summary = section.cells, section.summary
    failed = int((cells["status"] != "ok").sum())
    facts = next((recorded.result.dataset for recorded in section.records if recorded.result.dataset), None)
    data = section.group.key["dataset"]
    if facts is not None and "dataset_fingerprint" not in section.group.mixed:
        data += f" ({facts.users:,} users, {facts.items:,} items, {' and '.join(facts.modalities)})"
    encoders = shorten_path(section.group.key["encoders"]) or "no encoders"
    sentences = [
        f"{_plural(len(summary), 'row')} from {_plural(len(cells), 'cell')} on {data} with {encoders}; "
        f"{section.group.key['protocol']} protocol, {section.group.key['precision']}, on {_devices(section)}."
    ]
    if failed:
        sentences.append(f"{_plural(failed, 'cell')} did not finish.")
    if summary["recall_10"].notna().sum() > 1:
        best = summary["recall_10"].max()
        names = summary.index[summary["recall_10"].round(4) == round(best, 4)]
        sentences.append(f"Highest Recall@10: {', '.join(names)} ({best:.4f}).")
    if len(section.compared) > 1:
        least = section.compared[0]
        sentences.append(f"Lowest TPME: {least} ({100 * summary['tpme'].min():.2f} %).")
    return " ".join(sentences)


def reading_guide(sections: Sequence[Section]) -> list[str]:
    """A Markdown list of all columns: what each means and how it was measured."""
    devices = sorted({device for section in sections for device in section.cells["device"]})
    memory = "; ".join(
        (f"on {device.upper()}: " if len(devices) > 1 else "") + MEASURED_M[device] for device in devices
    )
    rows = pd.concat([section.summary for section in sections])
    sources = sorted(set(rows.loc[rows["compared"] & rows["memory_bytes"].notna(), "memory_source"]))
    weights = "{time:g}, {parameters:g} and {memory:g}".format_map(sections[0].weights.model_dump())
    lines = [
        "**Recall@K**: share of test users whose held-out last item is among the first K of the whole catalogue, the "
        "user's earlier items taken out, ties counted against the model (with one target this is the hit rate).",
        "**NDCG@K**: the same hits, each weighted by 1 / log2(1 + rank).",
        "**T**: median training time of an epoch after the warm-up epochs, in seconds. Data loading counts; "
        "validation, ranking, building a feature cache and saving do not.",
        "**P**: trainable parameters in millions, the recommender's own included.",
        f"**M**: {memory}." + (f" Here by: {escape_markdown('; '.join(sources))}." if sources else ""),
        "**TPME**: T, P and M, each scaled to 0..1 between the smallest and the largest of the compared rows, weighted "
        f"{weights} and added; in percent, lower is better. It says nothing across tables.",
        "**95 %** behind TPME: where it lies in 95 % of the resamplings of every row's seeds and epochs; rows whose "
        "intervals overlap may change places.",
        "**Rank**: by TPME. **Seeds**: runs that finished, of those started; **± seeds**, and ± behind a cost, is the "
        "standard deviation over them.",
        "**Bold**: the best of its column, where an arrow says what is better; of costs among the rows with a TPME.",
    ]
    return [f"- {line}" for line in lines]


def _devices(section: Section) -> str:
    names = {recorded.result.environment.device_name for recorded in section.records if recorded.result.environment}
    return " and ".join(sorted(names)) or section.group.key["device_key"]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _repeat(report: Report, formats: Sequence[str]) -> list[str]:
    kept = [ending for ending in TABLE_FORMATS if ending in formats]
    where = [f"The tables are in `tables/` as {', '.join(kept)}, unrounded where programs read them."] if kept else []
    return [
        "## To repeat it",
        "",
        "This report, from the folder that holds the runs:",
        "",
        "```",
        report.command,
        "```",
        "",
        "Every record holds the whole configuration of its cell; `tpme run` with the same matrix measures again "
        "what is missing and nothing else.",
        *where,
    ]

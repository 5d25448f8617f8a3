"""``report.md``, which answers and shows the results, and ``details.md``, which holds everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd

from tpme.bench.quantities import PUBLISHED, instruments_of
from tpme.reports.data.answer import answer
from tpme.reports.data.others import measured_here, notes_of_others
from tpme.reports.data.section import Section
from tpme.reports.data.trials import shorten_path
from tpme.reports.tables.table import Table, escape_markdown, to_markdown

if TYPE_CHECKING:
    from tpme.reports.figures.draw import Drawn

FIRST_FIGURES = ("quality-tpme", "memory-time")
"""Those of ``report.md``; the others are in ``details.md``."""
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


@dataclass(frozen=True)
class Chapter:
    """One section of a report with its tables, the results first, and its figures."""

    section: Section
    tables: Sequence[Table]
    plots: Sequence[Drawn]
    number: int
    """From 1; 0 in a report of one section."""

    def file(self, name: str) -> str:
        """File name of a table or figure; those of the first section carry no number."""
        return name if self.number < 2 else f"{name}-{self.number}"

    def heading(self, title: str, level: int = 2) -> str:
        """A heading that names the group where there are several, or where it is a mixture."""
        group = f", group {self.number}" if self.number else ""
        group += f": {escape_markdown(self.section.name)}" if self.number or self.section.group.mixed else ""
        return f"{'#' * level} {title}{group}"


def sentences(section: Section) -> tuple[str, str, str]:
    """The answer of a section in plain text, the third of them as "Trust: ..."."""
    said = answer(section)
    return said.best, said.cheapest, f"Trust: {said.trust[0].lower()}{said.trust[1:]}"


def report_md(title: str, chapters: Sequence[Chapter], formats: Sequence[str]) -> str:
    """The answer of every section, its results, and the first figures."""
    lines = [f"# {escape_markdown(title)}", ""]
    if chapters[1:]:
        lines += [f"{len(chapters)} groups of records. Costs and quality are comparable within a group alone.", ""]
    for chapter in chapters:
        if chapter.number:
            lines += [f"**Group {chapter.number}: {escape_markdown(chapter.section.name)}**", ""]
        *said, trust = (_bold_start(escape_markdown(text)) for text in sentences(chapter.section))
        lines += [*(f"- {text}" for text in said), f"- {trust} [Details](details.md)", ""]
        lines += [f"Measured: {escape_markdown(measured(chapter.section))}", ""]
    page = "To sort, filter and weigh the rows: [index.html](index.html). " if "html" in formats else ""
    lines += [f"{page}Everything else, and how to repeat it: [details.md](details.md).", ""]
    told: set[str] = set()
    for chapter in chapters:
        results = chapter.tables[0]
        notes = tuple(note for note in results.notes if note not in told)
        told |= set(notes)
        lines += [chapter.heading("Results"), "", to_markdown(replace(results, notes=notes, warnings=()))]
        lines += _figures(chapter, formats, [plot for plot in chapter.plots if plot.name in FIRST_FIGURES])
    return "\n".join(lines).rstrip() + "\n"


def details_md(title: str, chapters: Sequence[Chapter], formats: Sequence[str], command: str) -> str:
    """What the columns mean, what to know of all rows and of single ones, the other figures and tables."""
    page = ", the page is [index.html](index.html)" if "html" in formats else ""
    lines = [f"# Details: {escape_markdown(title)}", "", f"The answer is in [report.md](report.md){page}.", ""]
    lines += ["## How to read the columns", "", *reading_guide([chapter.section for chapter in chapters]), ""]
    for chapter in chapters:
        section = chapter.section
        lines += [chapter.heading("Notes"), ""]
        lines += [f"- {escape_markdown(text)}" for text in (*section.notes.shared, section.instruments) if text]
        footnotes = enumerate(section.notes.footnotes, start=1)
        lines += [*(f"- <sup>{mark}</sup> {escape_markdown(text)}" for mark, text in footnotes), ""]
    for chapter in chapters:
        plots = [plot for plot in chapter.plots if plot.name not in FIRST_FIGURES]
        if plots and "png" in formats:
            lines += [chapter.heading("Figures"), "", *_figures(chapter, formats, plots)]
    for chapter in chapters:
        lines += [chapter.heading("Tables"), ""]
        for table in chapter.tables[1:]:
            if not table.long:
                lines += [f"### {escape_markdown(table.title)}", "", to_markdown(table, footnotes=False)]
    ours = any(chapter.section.ranked for chapter in chapters)
    return "\n".join([*lines, *_repeat(command, formats, ours=ours)]).rstrip() + "\n"


def _bold_start(text: str) -> str:
    """The words before the first colon in bold."""
    start, colon, rest = text.partition(":")
    return f"**{start}{colon}**{rest}"


def _figures(chapter: Chapter, formats: Sequence[str], plots: Iterable[Drawn]) -> list[str]:
    """The PNG of each figure with its title and caption, and links to the other formats."""
    lines: list[str] = []
    for plot in plots if "png" in formats else ():
        file, title = chapter.file(plot.name), escape_markdown(plot.title)
        others = [ending for ending in ("svg", "pdf") if ending in formats]
        links = "".join(f" [{ending.upper()}](plots/{file}.{ending})" for ending in others)
        lines += [
            f"### {title}",
            "",
            f"![{title}](plots/{file}.png)",
            "",
            f"{escape_markdown(plot.caption)}{links}",
            "",
        ]
    return lines


def measured(section: Section) -> str:
    """What ran on what, in one line."""
    cells = section.cells
    facts = next((recorded.result.dataset for recorded in section.records if recorded.result.dataset), None)
    data = section.group.key["dataset"]
    if facts is not None and "dataset_fingerprint" not in section.group.mixed:
        data += f" ({facts.users:,} users, {facts.items:,} items, {' and '.join(facts.modalities)})"
    encoders = shorten_path(section.group.key["encoders"]) or ("no encoders" if section.ranked else "")
    conditions = [
        f"{section.group.key['protocol']} protocol" if section.group.key["protocol"] else "",
        section.group.key["precision"],
    ]
    devices = {recorded.result.environment.device_name for recorded in section.records if recorded.result.environment}
    device = " and ".join(sorted(devices)) or section.group.key["device_key"]
    others = "Some rows measured by others" if "source" in section.group.mixed else "Measured by others"
    return (
        f"{_plural(len(section.summary), 'row')} in {_plural(len(cells), 'run')} on {data}"
        f"{f' with {encoders}' if encoders else ''}; {', '.join(part for part in (*conditions, device) if part)}."
        + (f" {others}: {section.group.key['source']}." if "source" in section.group.key else "")
    )


def reading_guide(sections: Sequence[Section]) -> list[str]:
    """A Markdown list of all columns: what each means and how it was measured."""
    results = [recorded.result for section in sections for recorded in section.records]
    devices = sorted({instruments_of(result) for result in results})
    memory = "; ".join(
        (f"on {device.upper()}: " if len(devices) > 1 else "") + MEASURED_M[device]
        for device in devices
        if device in MEASURED_M
    )
    if PUBLISHED in devices:
        memory += f"{'; ' if memory else ''}of others: what they published"
    rows = pd.concat([section.summary for section in sections])
    ranked = any(section.ranked for section in sections)
    times = " or ".join(dict.fromkeys(section.time_of for section in sections))
    sources = sorted(set(rows.loc[rows["compared"] & rows["memory_bytes"].notna(), "memory_source"]))
    weights = "{time:g}, {parameters:g} and {memory:g}".format_map(sections[0].weights.model_dump())
    of_ranks = [
        "**Recall@K**: share of test users whose held-out last item is among the first K of the whole catalogue, the "
        "user's earlier items taken out, ties counted against the model (with one target this is the hit rate).",
        "**NDCG@K**: the same hits, each weighted by 1 / log2(1 + rank).",
    ]
    warm_up, rest = ("warm-up epochs", "ranking, building a feature cache") if ranked else ("warm-up", "evaluation")
    own_times = [
        f"**T**: median training time of {times} after the {warm_up}, in seconds. Data loading counts; validation, "
        f"{rest} and saving do not."
    ]
    to_best = [
        "**To best epoch**: everything that leads to the epoch with the best validation: feature cache, a method's "
        "estimation, search and rounds, training epochs of all stages.",
    ]
    of_phases = "loading, building the feature cache, training, validation, ranking and export"
    peak = [
        f"**Peak**: whole-run peak by the same instrument: the largest of {of_phases if ranked else 'all phases'}, "
        "and of all seeds; in brackets where it lies, unless in training."
    ]
    lines = [
        *(of_ranks if ranked else []),
        *(escape_markdown(note) for note in notes_of_others(results)),
        *(own_times if measured_here(results) else []),
        *(to_best if ranked else []),
        "**P**: trainable parameters in millions" + (", the recommender's own included." if ranked else "."),
        f"**M**: {memory}." + (f" Read as: {escape_markdown('; '.join(sources))}." if sources else ""),
        *(peak if rows["peak_bytes"].notna().any() or ranked else []),
        "**TPME**: T, P and M, each scaled to 0..1 between the smallest and the largest of the compared rows, weighted "
        f"{weights} and added; in percent, lower is better. It says nothing across tables.",
        "**Cost / fft**, or another row: T, P and M over those of that row, and their geometric mean with the weights "
        "of TPME. Other rows do not change it.",
        "**Rank**: by TPME; rows nearer than noise to the best row of a rank share it (=).",
        "**Seeds**: runs that finished, of those started; **± seeds**, and ± behind a cost, is the standard deviation "
        "over them.",
        "**Bold**: the best of its column, where an arrow says what is better; of costs among the rows with a TPME.",
    ]
    return [f"- {line}" for line in lines]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _repeat(command: str, formats: Sequence[str], *, ours: bool) -> list[str]:
    """How to make the report again; with ``ours``, also how to measure again what ``tpme run`` measured."""
    again = (
        "Every record holds the whole configuration of its cell; `tpme run` with the same matrix measures again what "
        "is missing and nothing else."
    )
    kept = [ending for ending in ("csv", "json", "tex") if ending in formats]
    where = [f"The tables are in `tables/` as {', '.join(kept)}, unrounded where programs read them."] if kept else []
    return [
        "## To repeat it",
        "",
        "This report, from the folder that holds the runs:",
        "",
        "```",
        command,
        "```",
        "",
        *([again] if ours else []),
        *where,
    ]

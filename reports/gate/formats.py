"""The gate's report for people and machines: terminal, Markdown, JUnit XML, GitHub annotations, benchmark JSON.

Every format says the same, and an improvement is told wherever a regression would be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpme.bench.record import write_atomically
from tpme.reports.gate.metrics import metric, shown
from tpme.reports.gate.verdict import CellVerdict, Comparison, GateReport, Verdict
from tpme.reports.tables.table import escape_markdown

_COLOURS: dict[Verdict, str] = {"regressed": "red", "improved": "green", "changed": "yellow"}
_MARKS: dict[Verdict, str] = {"regressed": "🔴", "improved": "🟢", "changed": "🟡", "same": "⚪"}
_HEADLINES = {
    "fine": "no regression",
    "regressed": "regressed",
    "baseline out of date": "the baseline is out of date: update it on purpose, with 'tpme baseline'",
    "nothing compared": "nothing was compared",
}
_COLUMNS = ("", "Cell", "Metric", "Base", "Head", "Change", "Evidence")


def headline(report: GateReport) -> str:
    """The outcome in one line: the verdict and how much was looked at."""
    regressed, improved = len(report.found("regressed")), len(report.found("improved"))
    numbers = sum(report.compared.values())
    cells = len(report.state("compared"))
    return (
        f"tpme {report.command}: {_HEADLINES[report.overall]} "
        f"({regressed} regressed, {improved} improved, {numbers} numbers of {cells} cell{'s' * (cells != 1)} compared)"
    )


def remarks(report: GateReport) -> Iterator[str]:
    """What else a reader must know: what was not compared and why, cells of one side, notes, the gate's own time."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.compared.items() if count)
    yield f"compared: {kinds or 'nothing'}"
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell, one in report.found("not compared"):
        reasons.setdefault((one.title, one.note or "no reason"), []).append(cell.name)
    for (title, reason), cells in reasons.items():
        yield f"not compared: {title} of {_list(cells)}: {reason}"
    for state, words in (("missing", "missing from the runs"), ("new", "new, not in the base")):
        for cell in report.state(state):
            yield f"{words}: {cell.name}{f' ({cell.note})' if cell.note else ''}"
    yield from report.notes
    yield f"the check itself took {report.duration_s:.2f} s"


def _list(cells: list[str]) -> str:
    return ", ".join(cells) if len(cells) <= 3 else f"{len(cells)} cells"


def _row(cell: CellVerdict, one: Comparison) -> tuple[str, ...]:
    unit = metric(one.metric).unit
    return (cell.name, one.title, shown(one.base, unit), shown(one.head, unit), change(one), evidence(one))


def change(one: Comparison) -> str:
    """The change of a number for people, with the interval of its ratio where there is one."""
    if one.ratio is None:
        return "-"
    interval = f" [{one.low - 1:+.1%}, {one.high - 1:+.1%}]" if one.low is not None and one.high is not None else ""
    return f"{one.ratio - 1:+.2%}{interval}"


def told(one: Comparison) -> str:
    """Before, after, change and evidence on one line."""
    unit = metric(one.metric).unit
    more = "; ".join(part for part in (change(one), evidence(one)) if part not in ("", "-"))
    return f"{shown(one.base, unit)} -> {shown(one.head, unit)}{f' ({more})' if more else ''}"


def evidence(one: Comparison) -> str:
    """Why the change is believed: the bound it exceeds and the test that rejects."""
    told = [] if one.bound is None else ["exact" if one.bound == 0 else f"bound {one.bound:.1%}"]
    told += [f"p = {one.p:.1e}"] if one.p is not None else []
    return ", ".join([*told, *([one.note] if one.note else [])])


def changed(report: GateReport) -> list[tuple[CellVerdict, Comparison]]:
    """Regressions, then improvements, then changes that are neither."""
    return [*report.found("regressed"), *report.found("improved"), *report.found("changed")]


def listed(report: GateReport, *, everything: bool = False) -> list[tuple[CellVerdict, Comparison]]:
    """What a table shows: changes, and of what stayed the same all that has an interval, or ``everything``."""
    same = [(cell, one) for cell, one in report.found("same") if everything or one.low is not None]
    return [*changed(report), *same]


def show(report: GateReport, console: Console, *, everything: bool = False) -> None:
    """Print the report: what is ``listed``, remarks, the verdict last."""
    rows = listed(report, everything=everything)
    if rows:
        title = escape(_line(f"{report.base} -> {report.head}"))
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        for name in ("Verdict", *_COLUMNS[1:]):
            table.add_column(name, justify="right" if name in ("Base", "Head", "Change") else "left")
        for cell, one in rows:
            texts = (escape(_line(text)) for text in _row(cell, one))
            table.add_row(one.verdict, *texts, style=_COLOURS.get(one.verdict, ""))
        console.print(table)
    for remark in remarks(report):
        console.print(_line(remark), markup=False, highlight=False)
    colour = "red" if report.exit_code else "green"
    console.print(f"[bold {colour}]{escape(headline(report))}[/]", highlight=False)


def _line(text: str) -> str:
    """On one line: where annotations are read, a line of somebody's message that starts with ``::`` would be one."""
    return " ".join(text.splitlines())


def markdown(report: GateReport) -> str:
    """For a pull request: the verdict, the changes as a table, the rest folded away."""
    lines = [f"### {'❌' if report.exit_code else '✅'} {headline(report)}", ""]
    lines += [f"{escape_markdown(report.base)} → {escape_markdown(report.head)}", ""]
    rows = listed(report)
    if rows:
        lines += [_pipes(_COLUMNS), _pipes(["---"] * len(_COLUMNS))]
        lines += [_pipes([f"{_MARKS[one.verdict]} {one.verdict}", *_row(cell, one)]) for cell, one in rows]
        lines += [""]
    lines += ["<details><summary>What was compared, and what was not</summary>", ""]
    lines += [f"- {escape_markdown(remark)}" for remark in remarks(report)]
    lines += ["", "</details>", ""]
    return "\n".join(lines)


def _pipes(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"


def junit(report: GateReport) -> str:
    """JUnit XML: a test case a comparison, failed where it regressed and skipped where nothing could be compared."""
    suite = ElementTree.Element("testsuite", name=f"tpme {report.command}", time=f"{report.duration_s:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("base", report.base), ("head", report.head), ("overall", report.overall)):
        ElementTree.SubElement(properties, "property", name=name, value=_xml(value))
    failures = skipped = 0
    for cell in report.cells:
        for one in cell.comparisons:
            case = ElementTree.SubElement(suite, "testcase", classname=_xml(cell.name), name=_xml(one.metric))
            failures += one.verdict == "regressed"
            skipped += one.verdict == "not compared"
            _outcome(case, one)
        if cell.state != "compared":
            skipped += 1
            case = ElementTree.SubElement(suite, "testcase", classname=_xml(cell.name), name="cell")
            ElementTree.SubElement(case, "skipped", message=_xml(f"{cell.state}; {cell.note or 'no partner'}"))
    # A gate that fails for another reason must not look green here.
    verdict = ElementTree.SubElement(suite, "testcase", classname="tpme", name="verdict")
    if report.exit_code:
        failures += 1
        ElementTree.SubElement(verdict, "failure", message=_xml(headline(report)))
    suite.set("tests", str(len(suite) - 1))
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _outcome(case: ElementTree.Element, one: Comparison) -> None:
    if one.verdict == "regressed":
        ElementTree.SubElement(case, "failure", message=_xml(f"{one.title} regressed: {told(one)}"))
    elif one.verdict == "not compared":
        ElementTree.SubElement(case, "skipped", message=_xml(one.note or "not compared"))
    else:
        ElementTree.SubElement(case, "system-out").text = _xml(f"{one.verdict}: {told(one)}")


_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold."""
    return _NOT_XML.sub(" ", text)


def github_annotations(report: GateReport) -> list[str]:
    """GitHub workflow commands: errors for regressions, notices for improvements, warnings for what was not judged."""
    levels = {"regressed": "error", "improved": "notice", "changed": "notice"}
    lines = []
    for cell, one in changed(report):
        lines.append(_command(levels[one.verdict], f"{cell.name}: {one.title} {one.verdict}", told(one)))
    for cell in report.state("missing"):
        lines.append(_command("warning", f"{cell.name}: missing", "in the base, but not in the runs"))
    for cell in report.state("new"):
        lines.append(_command("notice", f"{cell.name}: new", "in the runs, but not in the base"))
    level = "notice" if report.exit_code == 0 else "error"
    return [*lines, _command(level, f"tpme {report.command}", headline(report))]


def _command(level: str, title: str, message: str) -> str:
    def safe(text: str, more: bool = False) -> str:
        text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
        return text.replace(":", "%3A").replace(",", "%2C") if more else text

    return f"::{level} title={safe(title, more=True)}::{safe(message)}"


def smaller_is_better(report: GateReport) -> list[dict[str, Any]]:
    """Entries of github-action-benchmark's ``customSmallerIsBetter``: the head's costs in all cells of both sides."""
    entries = []
    for cell in report.cells:
        for one in cell.comparisons:
            if isinstance(one.head, str) or one.head is None or metric(one.metric).more_is_better:
                continue
            entry = {"name": f"{cell.name}: {one.title}", "unit": metric(one.metric).unit or "count", "value": one.head}
            entries.append(entry | ({"extra": f"base {one.base:g}"} if isinstance(one.base, float) else {}))
    return entries


def write(
    report: GateReport,
    *,
    as_json: Path | None = None,
    as_markdown: Path | None = None,
    as_junit: Path | None = None,
    as_benchmark: Path | None = None,
) -> None:
    """Write the formats that were asked for, each whole or not at all."""
    made: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (as_json, lambda: report.model_dump_json(indent=1) + "\n"),
        (as_markdown, lambda: markdown(report)),
        (as_junit, lambda: junit(report)),
        (as_benchmark, lambda: json.dumps(smaller_is_better(report), indent=1, ensure_ascii=False) + "\n"),
    )
    for path, text in made:
        if path is not None:
            write_atomically(path, text().encode())

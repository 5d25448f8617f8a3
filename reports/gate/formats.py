"""The gate's report for people and machines: terminal, Markdown, JUnit XML, GitHub annotations, benchmark JSON.

All formats have the same content, and improvements appear wherever regressions would.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tpme.bench.quantities import amount, quantity
from tpme.bench.text import escaped, escaped_json, escaped_lines
from tpme.bench.writing import write_atomically
from tpme.reports.gate.scope import join, kinds_settled, kinds_with, scope
from tpme.reports.gate.verdict import BETTER, WORSE, CellVerdict, Comparison, GateReport, Verdict
from tpme.reports.tables.table import escape_markdown, markdown_row

_COLOURS: dict[Verdict, str] = {
    "slower": "red",
    "regressed": "red",
    "faster": "green",
    "improved": "green",
    "changed": "yellow",
    "inconclusive": "magenta",
}
_MARKS: dict[Verdict, str] = {
    "slower": "🔴",
    "regressed": "🔴",
    "faster": "🟢",
    "improved": "🟢",
    "changed": "🟡",
    "inconclusive": "❔",
    "same": "⚪",
}
_HEADLINES = {
    "regressed": "regressed",
    "baseline out of date": "the baseline is out of date: update it with 'tpme baseline'",
    "inconclusive": "inconclusive: it may have regressed",
    "requirement not met": "what is required was not settled",
    "nothing compared": "nothing was compared",
}
_COLUMNS = ("", "Cell", "Metric", "Base", "Head", "Change", "Evidence")
WIDE = 110
"""Width of a terminal from which the evidence stands in its table; the files always have it."""


def headline(report: GateReport) -> str:
    """The outcome in one line: the verdict and how many numbers were compared."""
    counts = [("regressed", WORSE), ("improved", BETTER), ("inconclusive", ("inconclusive",))]
    told = ", ".join(f"{len(report.with_verdict(*verdicts))} {word}" for word, verdicts in counts)
    numbers, cells = sum(report.compared.values()), len(report.state("compared"))
    return (
        f"tpme {report.command}: {_outcome(report)} "
        f"({told}, {numbers} numbers of {cells} cell{'s' * (cells != 1)} compared)"
    )


def _outcome(report: GateReport) -> str:
    if report.overall != "fine":
        return _HEADLINES[report.overall]
    gaps: tuple[Verdict, ...] = ("inconclusive", "not compared")
    unsettled = [f"; {verdict}: {join(kinds)}" for verdict in gaps if (kinds := kinds_with(report, verdict))]
    settled = join(kinds_settled(report)) or "nothing"
    return f"no regression in {settled}{''.join(unsettled)}" if unsettled else "no regression"


def passed_in_part(report: GateReport) -> bool:
    """Whether the gate passes although something could not be compared or is inconclusive."""
    return report.exit_code == 0 and bool(kinds_with(report, "not compared") or report.with_verdict("inconclusive"))


def remarks(report: GateReport) -> Iterator[str]:
    """The lines below the table: what would settle what is open, what was not compared and why, cells of one side."""
    for cell, item in report.with_verdict("inconclusive"):
        yield f"inconclusive: {item.title} of {cell.name}{f': {item.advice}' if item.advice else ''}"
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.compared.items() if count)
    yield f"numbers compared: {kinds or 'none'}"
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell, item in report.with_verdict("not compared"):
        reasons.setdefault((item.title, item.note or "no reason"), []).append(cell.name)
    for (title, reason), cells in reasons.items():
        yield f"not compared: {title} of {_join(cells)}: {reason}"
    for state, words in (("missing", "missing from the runs"), ("new", "new, not in the base")):
        for cell in report.state(state):
            yield f"{words}: {cell.name}{f' ({cell.note})' if cell.note else ''}"
    yield from report.notes
    yield f"the check itself took {report.duration_s:.2f} s"


def _join(cells: list[str]) -> str:
    return ", ".join(cells) if len(cells) <= 3 else f"{len(cells)} cells"


def _row(cell: CellVerdict, item: Comparison) -> tuple[str, ...]:
    before, after = (amount(value, item.unit) for value in (item.base, item.head))
    return cell.name, item.title, before, after, change(item), evidence(item)


def change(item: Comparison) -> str:
    """The relative change for people, with the interval of its ratio if there is one."""
    if item.ratio is None:
        return "-"
    interval = (
        f" [{_percent(item.low)}, {_percent(item.high)}]" if item.low is not None and item.high is not None else ""
    )
    return f"{item.ratio - 1:+.2%}{interval}"


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.{1 if abs(ratio - 1) < 0.1 else 0}%}"


def describe(item: Comparison) -> str:
    """Before, after, change and evidence in one line."""
    more = "; ".join(part for part in (change(item), evidence(item)) if part not in ("", "-"))
    values = f"{amount(item.base, item.unit)} -> {amount(item.head, item.unit)}"
    return f"{values}{f' ({more})' if more else ''}"


def evidence(item: Comparison) -> str:
    """Bound, p-value and note of a comparison."""
    parts = [] if item.bound is None else ["exact" if item.bound == 0 else f"bound {100 * item.bound:.3g}%"]
    parts += [f"p = {item.p:.1g}"] if item.p is not None else []
    return ", ".join([*parts, *([item.note] if item.note else [])])


def changed(report: GateReport) -> list[tuple[CellVerdict, Comparison]]:
    """Regressions, then what is open, improvements, and changes that are neither."""
    order: tuple[tuple[Verdict, ...], ...] = (WORSE, ("inconclusive",), BETTER, ("changed",))
    return [row for verdicts in order for row in report.with_verdict(*verdicts)]


def listed(report: GateReport, *, everything: bool = False) -> list[tuple[CellVerdict, Comparison]]:
    """The rows of a table: changes, of ``ab`` also unchanged numbers with an interval, or all if ``everything``."""
    shown = report.with_verdict("same")
    same = [row for row in shown if everything or (report.command == "ab" and row[1].low is not None)]
    return [*changed(report), *same]


def show(report: GateReport, console: Console, *, everything: bool = False) -> None:
    """Print the report: what was compared first, the table, the remarks, and the verdict last."""
    console.print(escaped(scope(report)), soft_wrap=True)
    rows = listed(report, everything=everything)
    if rows:
        title = escaped(f"{report.base} -> {report.head}")
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
        columns = _COLUMNS[1:] if console.width >= WIDE else _COLUMNS[1:-1]
        for name in ("Verdict", *columns):
            justify: Literal["left", "right"] = "right" if name in ("Base", "Head", "Change") else "left"
            table.add_column(name, justify=justify, no_wrap=name in ("Verdict", "Change"))
        for cell, item in rows:
            texts = [escaped(text) for text in _row(cell, item)]
            table.add_row(item.verdict, *texts[: len(columns)], style=_COLOURS.get(item.verdict, ""))
        console.print(table)
    for remark in remarks(report):
        console.print(escaped(remark))
    colour = "red" if report.exit_code else "yellow" if passed_in_part(report) else "green"
    console.print(Text(headline(report), f"bold {colour}"))


def plain(report: GateReport) -> str:
    """Plain lines: what was compared first, changes and what is open, the remarks, and the verdict last."""
    rows = (f"{item.verdict}: {cell.name}: {item.title} {describe(item)}" for cell, item in changed(report))
    return escaped_lines("\n".join([scope(report), *rows, *remarks(report), headline(report)]))


def markdown(report: GateReport) -> str:
    """Markdown for a pull request: the verdict, a table of changes, and folded remarks."""
    mark = "❌" if report.exit_code else "⚠️" if passed_in_part(report) else "✅"
    lines = [f"### {mark} {headline(report)}", "", escape_markdown(scope(report)), ""]
    lines += [f"{escape_markdown(report.base)} → {escape_markdown(report.head)}", ""]
    rows = listed(report)
    if rows:
        lines += [markdown_row(_COLUMNS), markdown_row(["---"] * len(_COLUMNS))]
        for cell, item in rows:
            texts = (f"{_MARKS[item.verdict]} {item.verdict}", *_row(cell, item))
            lines.append(markdown_row(map(escape_markdown, texts)))
        lines += [""]
    lines += ["<details><summary>Details</summary>", ""]
    lines += [f"- {escape_markdown(remark)}" for remark in remarks(report)]
    lines += ["", "</details>", ""]
    return "\n".join(lines)


def junit(report: GateReport) -> str:
    """JUnit XML: one test case per comparison: failed if it regressed, skipped if open or not compared."""
    suite = ElementTree.Element("testsuite", name=f"tpme {report.command}", time=f"{report.duration_s:.3f}")
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("base", report.base), ("head", report.head), ("overall", report.overall)):
        ElementTree.SubElement(properties, "property", name=name, value=escaped(value))
    failures = skipped = 0
    for cell in report.cells:
        for item in cell.comparisons:
            case = ElementTree.SubElement(suite, "testcase", classname=escaped(cell.name), name=escaped(item.metric))
            failures += item.verdict in WORSE
            skipped += item.verdict in ("inconclusive", "not compared")
            _judged(case, item)
        if cell.state != "compared":
            skipped += 1
            case = ElementTree.SubElement(suite, "testcase", classname=escaped(cell.name), name="cell")
            ElementTree.SubElement(case, "skipped", message=escaped(f"{cell.state}; {cell.note or 'no partner'}"))
    # A gate that fails without a regression must not look green here.
    verdict = ElementTree.SubElement(suite, "testcase", classname="tpme", name="verdict")
    if report.exit_code:
        failures += 1
        ElementTree.SubElement(verdict, "failure", message=escaped(headline(report)))
    suite.set("tests", str(len(suite) - 1))
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _judged(case: ElementTree.Element, item: Comparison) -> None:
    if item.verdict in WORSE:
        ElementTree.SubElement(case, "failure", message=escaped(f"{item.title} {item.verdict}: {describe(item)}"))
    elif item.verdict == "inconclusive":
        message = f"inconclusive: {describe(item)}; {item.advice}"
        ElementTree.SubElement(case, "skipped", message=escaped(message))
    elif item.verdict == "not compared":
        ElementTree.SubElement(case, "skipped", message=escaped(item.note or "not compared"))
    else:
        ElementTree.SubElement(case, "system-out").text = escaped(f"{item.verdict}: {describe(item)}")


def github_annotations(report: GateReport) -> list[str]:
    """GitHub workflow commands: errors for regressions, warnings for what is open or missing, notices for the rest."""
    levels = {"slower": "error", "regressed": "error", "inconclusive": "warning"}
    lines = []
    for cell, item in changed(report):
        message = f"{describe(item)}{f'; {item.advice}' if item.advice else ''}"
        level = levels.get(item.verdict, "notice")
        lines.append(_command(level, f"{cell.name}: {item.title} {item.verdict}", message))
    if kinds := kinds_with(report, "not compared"):
        lines.append(_command("warning", f"not compared: {join(kinds)}", scope(report)))
    for cell in report.state("missing"):
        lines.append(_command("warning", f"{cell.name}: missing", "in the base, but not in the runs"))
    for cell in report.state("new"):
        lines.append(_command("notice", f"{cell.name}: new", "in the runs, but not in the base"))
    level = "notice" if report.exit_code == 0 else "error"
    return [*lines, _command(level, f"tpme {report.command}", headline(report))]


def _command(level: str, title: str, message: str) -> str:
    def safe(text: str, more: bool = False) -> str:
        text = escaped(text).replace("%", "%25")
        return text.replace(":", "%3A").replace(",", "%2C") if more else text

    return f"::{level} title={safe(title, more=True)}::{safe(message)}"


def smaller_is_better(report: GateReport) -> list[dict[str, Any]]:
    """Entries for github-action-benchmark's ``customSmallerIsBetter``: the costs of the head."""
    entries = []
    for cell in report.cells:
        for item in cell.comparisons:
            if isinstance(item.head, str) or item.head is None or quantity(item.metric).better == "higher":
                continue
            entry = {"name": f"{cell.name}: {item.title}", "unit": item.unit or "count", "value": item.head}
            entries.append(entry | ({"extra": f"base {item.base:g}"} if isinstance(item.base, float) else {}))
    return entries


def write(
    report: GateReport,
    *,
    as_json: Path | None = None,
    as_markdown: Path | None = None,
    as_junit: Path | None = None,
    as_benchmark: Path | None = None,
) -> None:
    """Write the requested formats, each atomically."""
    texts: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (as_json, lambda: escaped_json(report.model_dump_json(indent=1)) + "\n"),
        (as_markdown, lambda: escaped_lines(markdown(report))),
        (as_junit, lambda: junit(report)),
        (as_benchmark, lambda: escaped_json(json.dumps(smaller_is_better(report), indent=1)) + "\n"),
    )
    for path, text in texts:
        if path is not None:
            write_atomically(path, text().encode())

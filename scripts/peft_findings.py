"""What one learns from peft's method comparison: the tables of docs/peft-comparison/README.md, from imported records.

    tpme import peft-comparison FOLDER --out peft-metamathqa --commit 5d602fd
    python scripts/peft_findings.py peft-metamathqa docs/peft-comparison/README.md

Rewrites every block between ``<!-- NAME -->`` and ``<!-- / -->`` of the page.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from tpme.bench.quantities import bytes_text, number, quantity
from tpme.reports.data.section import Section
from tpme.reports.data.tpme import Weights, pareto, tpme
from tpme.reports.figures.weight_plot import winner
from tpme.reports.report import make_report
from tpme.reports.tables.table import escape_markdown, markdown_row

ACCURACY, FORGETTING = "metric_test accuracy", "metric_forgetting"
PROBLEMS = 1319
"""GSM8K's test problems: every published accuracy is a whole number of them."""
Z = 1.96
FFT, LORA = "full-finetuning [lr_0.00001]", "lora [rank32]"
FRONTS = {
    "epoch_time_s": "Training time T",
    "all_in_s": "train_time",
    "trainable_millions": "Trained parameters P",
    "memory_bytes": "Memory M",
    "stored_bytes": "Stored file",
}
WEIGHTS = ("0.45,0.10,0.45", "1,0,0", "0,1,0", "0,0,1", "0.8,0.1,0.1", "0.1,0.1,0.8")


def apart(a: float, b: float) -> bool:
    """Whether two accuracies differ by a two-sided test of two proportions at 5 %, as if of different problems."""
    mean = (a + b) / 2
    spread = math.sqrt(2 * mean * (1 - mean) / PROBLEMS)
    return abs(a - b) > Z * spread


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text."""
    head = list(head)
    lines = [markdown_row(head), markdown_row(["---", *(["---:"] * (len(head) - 1))])]
    return "\n".join([*lines, *(markdown_row(map(escape_markdown, row)) for row in rows)])


def accuracy(value: float) -> str:
    """A share with three decimals."""
    return f"{value:.3f}"


def amount(key: str, value: float) -> str:
    """A cost with its unit."""
    if key.endswith("_bytes"):
        return bytes_text(value) if value >= 1e6 else f"{value / 1e3:.1f} kB"
    if key.endswith("_s"):
        return f"{value:.0f} s"
    return f"{quantity(key).format(value)} M" if value >= 0.1 else f"{1e6 * value:,.0f}"


def headline(section: Section) -> str:
    """The numbers of the first paragraph."""
    rows = section.summary
    fft, lora, best = rows.loc[FFT], rows.loc[LORA], rows[ACCURACY].idxmax()
    alike = [not apart(rows[ACCURACY][best], value) for value in rows[ACCURACY]]
    worse = [value < fft[ACCURACY] and apart(fft[ACCURACY], value) for value in rows[ACCURACY]]
    ratio = rows["all_in_s"] / rows["epoch_time_s"]
    half = Z * math.sqrt(0.25 / PROBLEMS)
    rest = rows.drop([FFT, "osf [rank128]"])["memory_bytes"]
    facts = (
        f"{len(rows)} runs of one seed each; best accuracy {accuracy(rows[ACCURACY][best])} ({best}).",
        f"{sum(alike)} of them are not told apart from the best, {len(rows) - sum(worse)} are not worse than full "
        f"fine-tuning ({accuracy(fft[ACCURACY])}): with {PROBLEMS:,} problems an accuracy near one half is known to "
        f"± {100 * half:.1f} points, before any other seed.",
        f"Full fine-tuning takes {fft['epoch_time_s'] / lora['epoch_time_s']:.1f} times as long as LoRA of rank 32 by "
        f"training time alone ({fft['epoch_time_s']:.0f} s, {lora['epoch_time_s']:.0f} s), "
        f"{fft['all_in_s'] / lora['all_in_s']:.1f} times by `train_time` ({fft['all_in_s']:.0f} s, "
        f"{lora['all_in_s']:.0f} s).",
        f"`train_time` is {ratio.min():.2f} ({ratio.idxmin()}) to {ratio.max():.2f} ({ratio.idxmax()}) times the "
        "training time: the rest of it is data loading and evaluation.",
        f"Memory of all rows but full fine-tuning and OSF lies between {bytes_text(rest.min())} and "
        f"{bytes_text(rest.max())}; full fine-tuning takes {bytes_text(fft['memory_bytes'])}.",
        f"Intervals of T over the parts of a run are narrow (at most ± "
        f"{50 * ((rows['epoch_time_s_high'] - rows['epoch_time_s_low']) / rows['epoch_time_s']).max():.1f} %); they do "
        "not hold the difference between two runs.",
    )
    return "\n".join(f"- {_with_code(fact)}" for fact in facts)


def _with_code(text: str) -> str:
    """Escaped but for what stands in backticks."""
    return re.sub(r"\\`(.*?)\\`", lambda code: f"`{code[1].replace(chr(92), '')}`", escape_markdown(text))


def fronts(section: Section) -> str:
    """Accuracy against each cost: the rows that no other beats in both."""
    lines = []
    for key in FRONTS:
        rows = section.summary
        front = rows[pareto(rows, key, ACCURACY)].sort_values(key, ascending=False)
        names = [f"{name} ({amount(key, line[key])}, {accuracy(line[ACCURACY])})" for name, line in front.iterrows()]
        lines.append(f"- **{FRONTS[key]}**, {len(front)} rows: {escape_markdown('; '.join(names))}")
    return "\n".join(lines)


def _alike(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[[not apart(rows[ACCURACY].max(), value) for value in rows[ACCURACY]]]


def spreads(section: Section) -> str:
    """How far rows that are alike in accuracy lie apart in time and in what they forget."""
    good = _alike(section.summary)
    time, forgotten = (good[key].max() / good[key].min() for key in ("epoch_time_s", FORGETTING))
    return (
        f"These {len(good)} rows are not told apart from the best one by a test of two proportions. Their times differ "
        f"by a factor of {time:.1f},\nand how much they forget (loss on Wikipedia after training, less that before) by "
        f"a factor of {forgotten:.1f}: choose by that."
    )


def alike(section: Section) -> str:
    """The rows whose accuracy is not told apart from the best, by TPME."""
    rows = section.summary
    good = _alike(rows).sort_values("tpme")
    head = ("Row", "Accuracy", "Forgetting", "T", "All in", "P", "M", "Stored", "TPME (%)", "Cost / FFT")
    costs = ("epoch_time_s", "all_in_s", "trainable_millions", "memory_bytes", "stored_bytes")
    return table(
        head,
        (
            (
                str(name),
                accuracy(line[ACCURACY]),
                accuracy(line[FORGETTING]),
                *(amount(key, line[key]) for key in costs),
                f"{100 * line['tpme']:.1f}",
                number(line["cost_ratio"], 2),
            )
            for name, line in good.iterrows()
        ),
    )


def scale(section: Section) -> str:
    """Which row is the cheapest under most weights, and which rows set the scale of TPME."""
    rows, first = section.summary, winner(section)
    assert first is not None
    name, share = first
    ends = {key: " and ".join(map(str, rows[key].nlargest(2).index)) for key in ("epoch_time_s", "memory_bytes")}
    text = (
        f"TPME weighs time {section.weights.time:.2f}, parameters {section.weights.parameters:.2f} and memory "
        f"{section.weights.memory:.2f} between the least and the most of the {len(rows)} rows. {name} is the cheapest "
        f"under {int(100 * share)} % of all weights, and its accuracy is {accuracy(rows[ACCURACY][name])}: cost alone "
        f"chooses nothing. The scale is set by few rows: {ends['epoch_time_s']} for time, "
        f"{rows['trainable_millions'].idxmax()} for parameters, {ends['memory_bytes']} for memory. So "
        f"{(rows['tpme'] < 0.2).sum()} rows lie below 20 %;"
    )
    return f"{escape_markdown(text)} the [ratios to full fine-tuning](details.md) do not depend on them."


def weighted(section: Section) -> str:
    """Which rows have the lowest TPME under other weights, and where LoRA and full fine-tuning stand."""
    rows = section.summary
    good = _alike(rows).index
    lines = [(text, rows) for text in WEIGHTS]
    lines.append(("0.45,0.10,0.45 with train_time as T", rows.assign(epoch_time_s=rows["all_in_s"])))
    table_rows = []
    for text, costs in lines:
        scores: pd.Series[float] = tpme(costs, Weights.parse(text.partition(" ")[0]))
        ranks = scores.rank(method="min").astype(int)
        lowest = ", ".join(map(str, scores.sort_values(kind="stable").index[:3]))
        table_rows.append((text, lowest, scores[good].idxmin(), str(ranks[LORA]), str(ranks[FFT])))
    head = ("Weights of T, P, M", "Lowest TPME", "Lowest of those alike in accuracy", "LoRA's place", "FFT's place")
    return table(head, table_rows)


def stored(section: Section) -> str:
    """Rows whose stored bytes say something else than their trained parameters."""
    rows = section.summary
    each = rows["stored_bytes"] / (1e6 * rows["trainable_millions"])
    odd = pd.concat([each.sort_values().head(2), each.sort_values().tail(6)])
    return table(
        ("Row", "Trained", "Stored", "Bytes a trained parameter"),
        (
            (
                str(name),
                f"{1e6 * rows['trainable_millions'][name]:,.0f}",
                amount("stored_bytes", rows["stored_bytes"][name]),
                number(value),
            )
            for name, value in odd.items()
        ),
    )


def configurations(section: Section) -> str:
    """How many configurations methods have."""
    counts = section.summary.groupby("label").size()
    return (
        f"Configurations of one method can lie as far apart as methods do. {(counts == 1).sum()} of {len(counts)} "
        f"methods have one, LoRA has {counts['lora']}."
    )


def commits(section: Section) -> str:
    """The rows that ran at another commit of peft than most."""
    versions = pd.Series({name: results[0].code_version for name, results in section.behind.items()})
    usual = versions.mode()[0]
    others = versions.index[versions != usual]
    return (
        f'- **{len(others)} rows** ran at other commits of peft than the rest ([details](details.md), "Measured on"): '
        f"{escape_markdown(', '.join(map(str, others)))}."
    )


def rates(section: Section) -> str:
    """Methods with several configurations: their worst and best accuracy."""
    rows = section.summary
    lines = []
    for label, group in rows.groupby("label"):
        if len(group) > 1:
            low, high = group[ACCURACY].idxmin(), group[ACCURACY].idxmax()
            lines.append((group[ACCURACY][high] - group[ACCURACY][low], label, len(group), low, high))
    lines.sort(reverse=True)
    return table(
        ("Method", "Configurations", "Worst", "Best"),
        (
            (
                str(label),
                str(count),
                f"{low}: {accuracy(rows[ACCURACY][low])}",
                f"{high}: {accuracy(rows[ACCURACY][high])}",
            )
            for _, label, count, low, high in lines[:8]
        ),
    )


BLOCKS = {
    "headline": headline, "spreads": spreads, "alike": alike, "fronts": fronts, "scale": scale, "weights": weighted,
    "stored": stored, "configurations": configurations, "rates": rates, "commits": commits,
}  # fmt: skip


def rewritten(page: str, records: Path) -> str:
    """The page with every block made anew from the records."""
    (section,) = make_report([records]).sections
    hits = section.summary[ACCURACY] * PROBLEMS
    assert (hits - hits.round()).abs().max() < 1e-6, "an accuracy is no share of so many problems"

    def block(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{BLOCKS[found[1]](section)}\n<!-- / -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- / -->", block, page, flags=re.DOTALL)


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.write_text(rewritten(target.read_text(encoding="utf-8"), Path(sys.argv[1])), encoding="utf-8")

"""Writes the table of the last run of tests/faults into docs/reliability.md: python scripts/reliability.py FIGURES.

FIGURES is the file that TPME_FAULT_FIGURES names: a line of JSON a test.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
MARKS = "<!-- figures -->", "<!-- end -->"


def table(lines: list[str]) -> str:
    """The injections, failed tests and seconds of each kind of fault, and of all."""
    tests = [json.loads(line) for line in lines]
    injections, failed, seconds = Counter[str](), Counter[str](), Counter[str]()
    for facts in tests:
        injections[facts["what"]] += facts["injections"]
        failed[facts["what"]] += facts["failed"]
        seconds[facts["what"]] += facts["seconds"]
    rows = [(kind, count, failed[kind], seconds[kind]) for kind, count in injections.items() if count]
    rows.append(("**all**", injections.total(), failed.total(), sum(seconds.values())))
    body = "\n".join(f"| {kind} | {count} | {bad} | {spent:.0f} |" for kind, count, bad, spent in rows)
    took_s = max(facts["ended"] for facts in tests) - min(facts["ended"] - facts["seconds"] for facts in tests)
    machine = (
        f"{os.cpu_count()} cores, Linux {platform.release().partition('-')[0]}, Python {platform.python_version()}"
    )
    return f"""{datetime.now(UTC):%Y-%m-%d}, {machine}: {injections.total()} injections in {took_s / 60:.0f} minutes, \
{failed.total()} tests failed. Seconds are added up over the workers.

| fault | injections | tests failed | seconds |
|---|---:|---:|---:|
{body}"""


def main() -> None:
    """Replace the table on the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{table(lines)}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

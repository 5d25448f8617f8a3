"""The table of benchmark results in the documentation, from what pytest-benchmark kept of one run.

    tox -e bench -- --benchmark-json runs/bench.json
    python scripts/benchmark_table.py runs/bench.json --docs docs/lab/performance.md

Several files, of runs with other settings, follow each other in one table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workload import put

HEAD = "| work | target | measured | stand-in / scaled print | benchmark |\n|---|---|---|---:|---|"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or put it between the marks of a document."""
    parser = argparse.ArgumentParser(description="The benchmarks' results as a table.")
    parser.add_argument("runs", type=Path, nargs="+", help="files of --benchmark-json")
    parser.add_argument("--docs", type=Path, help="document whose marked part is replaced")
    options = parser.parse_args(arguments)
    text = table([json.loads(path.read_bytes()) for path in options.runs])
    if options.docs is None:
        sys.stdout.write(f"{text}\n")
    else:
        put(text, options.docs, "benchmarks")
    return 0


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Machine and rows of ``runs``, each the content of one file."""
    machine = runs[0]["machine_info"]
    lines = [f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores, {runs[0]['datetime'][:10]}.", "", HEAD]
    for run in runs:
        for benchmark in run["benchmarks"]:
            for row in benchmark["extra_info"].get("rows", ()):
                stand_in = "" if row["stand_in"] is None else f"{row['stand_in']:.2f}"
                place = benchmark["fullname"].rpartition("/")[2]
                lines.append(f"| {row['work']} | {row['target']} | {row['measured']} | {stand_in} | `{place}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

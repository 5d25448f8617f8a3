"""Write the table of benchmark results in the documentation from the JSON of pytest-benchmark.

    tox -e bench -- --benchmark-json runs/bench.json
    python scripts/benchmark_table.py runs/bench.json --docs docs/lab/performance.md

Rows of several files, from runs with other settings, follow each other in one table.
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
    """Print the table, or write it between the marks of a document."""
    parser = argparse.ArgumentParser(description="Benchmark results as a table.")
    parser.add_argument("runs", type=Path, nargs="+", help="files of --benchmark-json")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
    options = parser.parse_args(arguments)
    text = table([json.loads(path.read_bytes()) for path in options.runs])
    if options.docs is None:
        sys.stdout.write(f"{text}\n")
    else:
        put(text, options.docs, "benchmarks")
    return 0


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown: the machine, then the rows of ``runs``, each the content of one file."""
    machine = runs[0]["machine_info"]
    lines = [f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} cores, {runs[0]['datetime'][:10]}.", "", HEAD]
    for run in runs:
        for benchmark in run["benchmarks"]:
            for row in benchmark["extra_info"].get("rows", ()):
                stand_in = "" if row["stand_in"] is None else f"{row['stand_in']:.2f}"
                test = benchmark["fullname"].rpartition("/")[2]
                lines.append(f"| {row['work']} | {row['target']} | {row['measured']} | {stand_in} | `{test}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

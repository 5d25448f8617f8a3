"""Measure how often ``tpme ab`` errs here: on unchanged code, on 20 % slower steps, on 10 % more memory.

    python scripts/ab_calibration.py --docs docs/lab/calibration.md

Every comparison is one of ``tpme ab`` over a cell of a few seconds, in a temporary repository whose commits inject the
change. Results are stored one by one, so an interrupted calibration continues where it stopped. The default 40, 20 and
20 comparisons take about 40 minutes on two otherwise idle cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from workload import put

from tpme.bench.commands.ab import Pair, Request, compare, pair_cells
from tpme.bench.quantities import QUANTITIES
from tpme.bench.record import find_results, read_result
from tpme.bench.run.trees import Tree, trees
from tpme.reports.gate.readings import memory
from tpme.reports.gate.verdict import BETTER, WORSE, GateReport, Policy

MARK = "calibration"
MATRIX = """\
name = "calibration"
modalities = ["text"]
datasets = [{ name = "synthetic", synthetic = { users = 120, items = 100 } }]
encoders = [{ text = { source = "builtin:tiny-text" }, image = { source = "builtin:tiny-image" } }]
methods = [{ name = "injected" }]
time_limit_s = 120

[training]
epochs = 3
users_per_batch = 8
title_tokens = 16
"""
METHOD = '''\
"""LoRA with a change injected: work that lengthens every step, or memory held all the time."""

import time

import torch

from tpme.methods.lora import LoRA

SLOWDOWN, HELD_BYTES = 0.0, 0


class Injected(LoRA):
    def adapt(self, model, schedule):
        super().adapt(model, schedule)
        self.held = torch.ones(HELD_BYTES, dtype=torch.uint8)

    def before_step(self, state):
        self.began_s = time.perf_counter()

    def after_step(self, state, context):
        until = self.began_s + (1 + SLOWDOWN) * (time.perf_counter() - self.began_s)
        while time.perf_counter() < until:
            pass


METHOD = Injected
'''


@dataclass(frozen=True)
class Kind:
    """One row of the table: the injected change, number of comparisons, and the metrics that must show it."""

    name: str
    times: int
    metrics: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate, print the table and, with ``--docs``, write it into the documentation."""
    options = _options(arguments)
    kinds = (
        Kind("unchanged code", options.unchanged, ()),
        Kind("20 % slower steps", options.slower, ("step_s", "epoch_s")),
        Kind("10 % more memory", options.larger, ("host_rss_bytes", "torch_allocated_bytes")),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.jsonl"
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="tpme-calibration-") as temporary:
        folder = Path(temporary)
        repository = _repository(folder / "repository", folder, console)
        for kind in kinds:
            _calibrate(kind, repository, folder, results, console)
    table = _table(kinds, _read(results))
    sys.stdout.write(table + "\n")
    if options.docs is not None:
        put(table, options.docs, MARK)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how often 'tpme ab' errs on this machine.")
    parser.add_argument("--unchanged", type=int, default=40, help="comparisons of a revision with itself")
    parser.add_argument("--slower", type=int, default=20, help="comparisons with steps made 20 %% slower")
    parser.add_argument("--larger", type=int, default=20, help="comparisons with 10 %% more memory")
    parser.add_argument("--out", type=Path, default=Path("runs/ab-calibration"), help="folder for the results")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
    return parser.parse_args(arguments)


def _request(folder: Path, repository: Path) -> Request:
    return Request(str(folder / "matrix.toml"), methods_path=[repository / "methods"], device="cpu")


def _repository(root: Path, folder: Path, console: Console) -> Path:
    """Create a repository with a tag for each kind; one run of the base shows how much memory 10 % is."""
    root.mkdir()
    (folder / "matrix.toml").write_text(MATRIX)
    _git(root, "init", "-q", "-b", "main")
    _commit(root, METHOD, "base")
    _commit(root, METHOD + "\n# nothing changed\n", "unchanged code")
    _commit(root, METHOD.replace("SLOWDOWN, HELD_BYTES = 0.0, 0", "SLOWDOWN, HELD_BYTES = 0.2, 0"), "20 % slower steps")
    first = _new(folder / "first")
    with trees(root, "base", "base") as sides:
        _compare(sides, pair_cells(sides, _request(folder, root), first, root), first, console, rounds=1)
    peaks = [memory(read_result(path))["host_rss_bytes"] for path in find_results([first])]
    held = f"SLOWDOWN, HELD_BYTES = 0.0, {round(0.1 * min(peaks))}"
    _commit(root, METHOD.replace("SLOWDOWN, HELD_BYTES = 0.0, 0", held), "10 % more memory")
    return root


def _commit(root: Path, method: str, message: str) -> None:
    (root / "methods").mkdir(exist_ok=True)
    (root / "methods" / "injected.py").write_text(method)
    _git(root, "add", "-A")
    _git(root, "-c", "user.name=tpme", "-c", "user.email=tpme@example.org", "commit", "-q", "-m", message)
    _git(root, "tag", _tag(message))


def _tag(name: str) -> str:
    return name.replace(" % ", "-percent-").replace(" ", "-")


def _git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _calibrate(kind: Kind, repository: Path, folder: Path, results: Path, console: Console) -> None:
    """Make the missing comparisons of one kind, all over the same cells."""
    done = sum(line["kind"] == kind.name for line in _read(results))
    if done >= kind.times:
        return
    home = _new(folder / _tag(kind.name))
    with trees(repository, "base", _tag(kind.name)) as sides:
        planned = pair_cells(sides, _request(folder, repository), home, repository)
        for number in range(done + 1, kind.times + 1):
            report = _compare(sides, planned, home / str(number), console)
            line = _line(kind, report, home / str(number))
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            console.print(f"{kind.name} {number}/{kind.times}: {line}", highlight=False)
            shutil.rmtree(home / str(number))


def _compare(
    sides: tuple[Tree, Tree], planned: Sequence[Pair], folder: Path, console: Console, rounds: int = 2
) -> GateReport:
    pairs = [Pair(pair.key, pair.cell, dict(pair.jobs)) for pair in planned]
    return compare(pairs, sides, Policy(), folder, rounds=rounds, started=time.perf_counter(), console=console)


def _line(kind: Kind, report: GateReport, folder: Path) -> dict[str, Any]:
    """The stored result of one comparison."""
    comparisons = {compared.metric: compared for cell in report.cells for compared in cell.comparisons}
    records = [read_result(path) for path in find_results([folder])]
    ratios = {name: compared.ratio for name, compared in comparisons.items() if compared.kind in ("time", "memory")}
    return {
        "kind": kind.name,
        "regressed": sorted(name for name, compared in comparisons.items() if compared.verdict in WORSE),
        "improved": sorted(name for name, compared in comparisons.items() if compared.verdict in BETTER),
        "ratios": {name: round(ratio, 4) for name, ratio in ratios.items() if ratio is not None},
        "measured_again": bool(report.notes),
        "comparison_s": round(report.duration_s, 1),
        "cell_s": round(max(record.wall_s for record in records), 1),
        "device": ", ".join(report.head_devices),
    }


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _table(kinds: Sequence[Kind], lines: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table and what it was measured on."""
    rows = [
        "| injected | comparisons | alarms | reported as improved | change seen: median, range |",
        "|---|---|---|---|---|",
    ]
    for kind in kinds:
        own = [line for line in lines if line["kind"] == kind.name][: kind.times]
        if not own:
            continue
        # An injected change is detected only in the metrics that must show it; on unchanged code any alarm counts.
        alarms = sum(any(not kind.metrics or name in kind.metrics for name in line["regressed"]) for line in own)
        improved = sum(bool(line["improved"]) for line in own)
        name = kind.metrics[0] if kind.metrics else "step_s"
        seen = sorted(line["ratios"][name] - 1 for line in own)
        change = f"{QUANTITIES[name].title} {median(seen):+.1%}, {seen[0]:+.1%} to {seen[-1]:+.1%}"
        rows.append(f"| {kind.name} | {len(own)} | {alarms} | {improved} | {change} |")
    if not lines:
        return "\n".join(rows)
    again, cells = sum(line["measured_again"] for line in lines), max(line["cell_s"] for line in lines)
    comparison_s = median(line["comparison_s"] for line in lines)
    rows += [
        "",
        f"Measured on {lines[-1]['device']}: cells of at most {cells:.0f} s, "
        f"a comparison took {comparison_s:.0f} s (median), "
        f"{again} of {len(lines)} were measured more than once before judging.",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())

"""What reading and reporting a thousand records costs, and how soon the command line answers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tpme.bench.record import CellResult, Phase, find_results
from tpme.reports.data.load import read
from tpme.reports.report import FORMATS

METHODS = ("fft", "adapter", "lora", "bitfit", "prompt", "iisan", "frozen", "id")
EPOCHS = 8
LEAST_GAIN = 1.2
"""Reading records in one pass against parsing each, then checking it, with the collector walking what is kept."""
MOST_HELP = 3.0
"""``tpme --help`` against an interpreter that imports what no command line of this kind can do without."""


@pytest.fixture(scope="module")
def made_up() -> ModuleType:
    """The record builders of tests/reports."""
    path = Path(__file__).resolve().parents[1] / "reports" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tpme_reports_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pydantic look modules up by name
    spec.loader.exec_module(module)
    return module


def write_matrix(made_up: ModuleType, root: Path, methods: int, seeds: int, datasets: int, users: int = 1000) -> Path:
    """Records as large as real ones: a phase for each epoch, a thousand users, names as a matrix gives them."""

    class Full(made_up.Factory):  # type: ignore[misc, name-defined]
        def _phases(self, time: float, peak: float, device: str) -> tuple[Phase, ...]:
            load, train, validate, rank = super()._phases(time, peak, device)
            each = [load, *(phase for _ in range(EPOCHS) for phase in (train, validate)), rank]
            short = {"train": 1 / EPOCHS, "validate": 1 / EPOCHS}
            starts = np.cumsum([0.0, *(phase.wall_s * short.get(phase.kind, 1.0) for phase in each)])
            return tuple(
                phase.model_copy(update={"start_s": float(start), "wall_s": phase.wall_s * short.get(phase.kind, 1.0)})
                for phase, start in zip(each, starts[:-1], strict=True)
            )

    generator = np.random.default_rng(7)
    variants: list[dict[str, Any]] = [{"method": "iisan", "cached": True}]
    variants += [{"method": name} for name in METHODS]
    variants += [{"method": "lora", "options": {"rank": r, "alpha": 2 * r}} for r in (2, 4, 8, 16, 32, 64)]
    variants += [{"method": "adapter", "options": {"bottleneck": b}} for b in (16, 32, 64, 128)]
    variants += [{"method": f"plugged-in-method-{index}"} for index in range(methods)]
    for number in range(datasets):
        factory = Full(root / f"data-{number}", users=users)
        data = {
            "dataset": ("scientific", "instruments", "office")[number % 3],
            "dataset_fingerprint": f"{number:02x}" * 32,
        }
        for variant in variants[:methods]:
            time_s, millions = float(generator.uniform(2, 60)), float(10 ** generator.uniform(-2, 2))
            peak, skill = float(generator.uniform(0.4e9, 30e9)), float(generator.uniform(0.1, 0.35))
            for seed in range(1, seeds + 1):
                noise = 1 + 0.02 * float(generator.standard_normal())
                factory.write(
                    time=time_s * noise, millions=millions, peak=peak * (1 + (noise - 1) / 4), skill=skill, seed=seed,
                    **variant, **data,
                )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def thousand(made_up: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 methods, 5 seeds, 8 data sets."""
    return write_matrix(made_up, tmp_path_factory.mktemp("thousand"), 25, 5, 8)


def test_reading_records_takes_one_pass(thousand: Path, compare: Callable[..., Any]) -> None:
    def twice() -> list[CellResult]:
        return [CellResult.model_validate(json.loads(path.read_bytes())) for path in find_results([thousand])]

    compare("reading 1,000 records, against twice", twice, lambda: read([thousand]), LEAST_GAIN)


def test_a_report_of_a_thousand_records(thousand: Path, tmp_path: Path, benchmark: Any, say: Any, note: Any) -> None:
    """No gate: there is nothing to hold it against. A report of so many rows has figures only on request."""

    def spent(name: str, *options: str) -> float:
        command = [sys.executable, "-m", "tpme.bench.cli", "report", str(thousand), "--out", str(tmp_path / name)]
        start = time.perf_counter()
        subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    text_s = benchmark.pedantic(spent, ("text",), rounds=1)
    drawn_s = spent("drawn", "--formats", ",".join(FORMATS))
    assert not (tmp_path / "text" / "plots").exists()
    say(f"1,000 records in 8 groups: report {text_s:.2f} s, with all figures as PNG, SVG and PDF {drawn_s:.1f} s")
    note(
        "`tpme report` on 1,000 records in 8 groups",
        "5 s",
        f"{text_s:.1f} s; with figures, which so large a report has on request, {drawn_s:.0f} s",
    )


def test_help_comes_at_once(benchmark: Any, say: Callable[[str], None], note: Callable[..., None]) -> None:
    def answer(*command: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=os.environ)
        return time.perf_counter() - start

    bare = min(answer("-c", "import typer, pydantic") for _ in range(5))
    help_s = min(answer("-m", "tpme.bench.cli", "--help") for _ in range(5))
    benchmark.pedantic(answer, args=("-m", "tpme.bench.cli", "--help"), rounds=1)
    say(f"tpme --help {help_s * 1e3:.0f} ms, an interpreter with typer and pydantic {bare * 1e3:.0f} ms")
    note("`tpme --help`", "0.4 s", f"{help_s * 1e3:.0f} ms")
    assert help_s <= MOST_HELP * bare

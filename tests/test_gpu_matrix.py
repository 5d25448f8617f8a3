"""The matrix that is measured on a GPU, as its script runs it, on a CPU at a tiny shape."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tpme.bench.record import find_results, read_result
from tpme.bench.run.matrix import PreparedDataset, expand, load_matrix

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "gpu_matrix.sh"
ROWS = ["adapter", "bitfit", "fft", "iisan", "iisan (cached)", "lora"]
SPEED = ["fft", "frozen (cached)", "id", "iisan (cached)", "prompt"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gpu_matrix(world: Any, tiny: ModuleType, tmp_path: Path) -> Run:
    """The script over 40 users and items without images; keyword arguments are its environment."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "items.tsv").write_text("".join(f"item{n}\tthing number {n}\n" for n in range(40)))
    bought = (" ".join(f"item{(3 * user + place) % 40}" for place in range(5 + user % 7)) for user in range(40))
    (data / "users.tsv").write_text("".join(f"user{n}\t{items}\n" for n, items in enumerate(bought)))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, words in (("tpme", " -m tpme.bench.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (programs / name).chmod(0o755)
    small = ("embedding_dim=16", f"title_tokens={tiny.TOKENS}", "max_steps_per_epoch=2")
    settings = [word for setting in small for word in ("--set", f"training.{setting}")]

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TEXT": str(world.text),
            "IMAGE": str(world.image),
            "IMAGE_SIZE": str(tiny.SIDE),
            "EPOCHS": "1",
            "DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        command = [str(SCRIPT), str(data), "out", *settings]
        every = os.environ | variables | environment
        return subprocess.run(command, cwd=tmp_path, env=every, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_the_papers_matrix_in_pieces(gpu_matrix: Run, tmp_path: Path) -> None:
    cut = gpu_matrix(PIECE_S="1")
    assert cut.returncode == 75, cut.stderr
    assert "call again" in cut.stderr
    done = gpu_matrix(PASSES="paper speed")
    assert done.returncode == 0, done.stdout + done.stderr
    records = tmp_path / "out" / "records"
    results, speed = ([read_result(path) for path in find_results([records / name])] for name in ("paper", "speed"))
    assert sorted(result.cell.label for result in results) == ROWS
    assert sorted(result.cell.label for result in speed) == SPEED
    assert {result.status for result in (*results, *speed)} == {"ok"}
    assert {(result.cell.protocol, result.cell.training.precision) for result in results} == {("paper", "fp16")}
    assert {result.cell.training.users_per_batch for result in results} == {32, 64}
    for result in results:
        assert "random-weights" in {flag.code for flag in result.flags}, result.cell.label
    assert "Plan against measured" in (tmp_path / "out" / "plan-paper.txt").read_text()
    assert (tmp_path / "out" / "report" / "report.md").is_file()


def test_under_the_suite_protocol_all_rows_have_one_batch_size() -> None:
    settings = re.findall(r'--set "(\S+)"', next(line for line in SCRIPT.read_text().splitlines() if "own=(--" in line))
    matrix = load_matrix("iisan-paper", [setting.replace("$protocol", "suite") for setting in settings])
    cells = expand(matrix, {"scientific": PreparedDataset(Path(), "0" * 64, ("text", "image"))}, device="cpu")
    assert sorted(cell.label for cell in cells) == ROWS
    assert {(cell.protocol, cell.training.users_per_batch) for cell in cells} == {("suite", 32)}


def test_what_can_be_fast_is_on_in_every_row_of_the_last_pass() -> None:
    matrix = load_matrix(str(SCRIPT.with_name("gpu_speed.toml")))
    cells = expand(matrix, {"scientific": PreparedDataset(Path(), "0" * 64, ("text", "image"))}, device="cuda")
    assert sorted(cell.label for cell in cells) == SPEED
    assert {(c.protocol, c.training.precision, c.training.cuda_graphs) for c in cells} == {("suite", "bf16", True)}


def test_without_its_arguments_it_says_what_it_needs() -> None:
    told = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "gpu_matrix.sh DATA OUT" in told.stderr

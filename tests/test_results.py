"""The reports in the documentation are what their records say, byte for byte."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tpme.bench.run.matrix import PreparedDataset, expand, load_matrix
from tpme.reports.data.load import load
from tpme.reports.data.trials import select_trials

ROOT = Path(__file__).resolve().parents[1]
FORMATS = "html,csv,png"
DRAWN_WITH = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)


def content(path: Path) -> bytes | str:
    """What must be equal: all bytes, save the last digits of the page's numbers, which differ between machines.

    Of a figure only the name, where another version of matplotlib draws it.
    """
    if path.suffix == ".html":
        return re.sub(r"\d+\.\d+", lambda digits: f"{float(digits[0]):.13g}", path.read_text(encoding="utf-8"))
    if path.suffix == ".png" and (DRAWN_WITH is None or version("matplotlib") != DRAWN_WITH[1]):
        return b""
    return path.read_bytes()


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file of a report by its path."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["demo", "scientific-text", "all-methods", "scientific-adapted"])
def test_the_reports_regenerate_from_the_records(name: str, tmp_path: Path) -> None:
    """In a new process, with another hash seed. To repair: tpme report results/NAME --out docs/NAME --formats ..."""
    records = str(ROOT / "results" / name)
    command = [sys.executable, "-m", "tpme.bench.cli", "report", records, "--out", str(tmp_path), "--formats", FORMATS]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    expected, regenerated = contents(ROOT / "docs" / name), contents(tmp_path)
    assert regenerated.keys() == expected.keys()
    assert [path for path in expected if regenerated[path] != expected[path]] == []
    assert {Path(path).suffix for path in expected} == {".md", ".html", ".csv", ".png"}


def test_every_method_has_the_learning_rate_that_was_best_in_its_sweep() -> None:
    """By validation; those of cached and uncached rows are the same."""
    swept = select_trials(load([ROOT / "results" / "all-methods-lr"]))
    best = {(row.method, row.options): json.loads(row.lr) for row in swept[swept["selected"]].itertuples()}
    records = load([ROOT / "results" / "all-methods"])
    ran = {(row.method, row.options, row.cached): json.loads(row.lr) for row in records.itertuples()}
    data = {"synthetic": PreparedDataset(ROOT, "of the sweep", ("text", "image"))}
    for cell in expand(load_matrix("all-methods"), data, device="cpu"):
        options = json.dumps(cell.options, separators=(",", ":"), sort_keys=True)
        rates = ran.pop((cell.method, options, cell.cached))
        assert rates == cell.lr.model_dump(mode="json"), "the records are those of the preset"
        assert cell.method == "popularity" or rates == best[cell.method, options], cell.label
    assert not ran

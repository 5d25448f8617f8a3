"""The reports in the documentation are what their records say, byte for byte."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["demo", "scientific-text"])
def test_the_reports_regenerate_from_the_records(name: str, tmp_path: Path) -> None:
    """In a new process, with another hash seed. To repair: tpme report results/NAME --out docs/NAME --formats ..."""
    records = str(ROOT / "results" / name)
    command = [sys.executable, "-m", "tpme.bench.cli", "report", records, "--out", str(tmp_path), "--formats", FORMATS]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    expected, regenerated = contents(ROOT / "docs" / name), contents(tmp_path)
    assert regenerated.keys() == expected.keys()
    assert [path for path in expected if regenerated[path] != expected[path]] == []
    assert {Path(path).suffix for path in expected} == {".md", ".html", ".csv", ".png"}

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


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a report by its path; of figures only the names where another matplotlib draws them."""
    same = DRAWN_WITH is not None and version("matplotlib") == DRAWN_WITH[1]
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes() if same or path.suffix != ".png" else b"" for path in paths
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "scientific-text"])
def test_the_reports_regenerate_from_the_records(name: str, tmp_path: Path) -> None:
    """In a new process, with another hash seed. To repair: tpme report results/NAME --out docs/NAME --formats FORMATS."""
    records = str(ROOT / "results" / name)
    command = [sys.executable, "-m", "tpme.bench.cli", "report", records, "--out", str(tmp_path), "--formats", FORMATS]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    expected, regenerated = contents(ROOT / "docs" / name), contents(tmp_path)
    assert regenerated.keys() == expected.keys()
    assert [path for path in expected if regenerated[path] != expected[path]] == []
    assert {Path(path).suffix for path in expected} == {".md", ".html", ".csv", ".png"}

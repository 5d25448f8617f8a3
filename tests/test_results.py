"""The reports in the documentation are what their records say, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def texts(folder: Path) -> dict[str, bytes]:
    """The report and its tables; figures also depend on the version of what draws them."""
    found = [folder / "report.md", *(folder / "tables").iterdir()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("name", ["demo", "scientific-text"])
def test_the_tables_regenerate_from_the_records(name: str, tmp_path: Path) -> None:
    """In a process of its own, with another order of hashes. To repair: tpme report results/NAME --out docs/NAME."""
    records = str(ROOT / "results" / name)
    command = [sys.executable, "-m", "tpme.bench.cli", "report", records, "--out", str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    made, shown = texts(tmp_path), texts(ROOT / "docs" / name)
    assert made.keys() == shown.keys()
    assert [name for name in made if made[name] != shown[name]] == []

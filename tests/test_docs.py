"""What the documentation shows is executed: the method of docs/adding-a-method.md, file by file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(document: Path) -> dict[str, str]:
    """Fenced blocks of a document that carry a file name, by that name."""
    text = document.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.slow
def test_the_documented_method_runs(tmp_path: Path) -> None:
    from tpme.bench.record import find_results, read_result

    files = blocks(ROOT / "docs" / "adding-a-method.md")
    methods = tmp_path / "my-methods"
    methods.mkdir()
    (methods / "norms.py").write_text(files["norms.py"])
    (tmp_path / "matrix.toml").write_text(files["matrix.toml"])
    assert len(files["norms.py"].splitlines()) <= 40
    command = [sys.executable, "-m", "tpme.bench.cli", "run", "matrix.toml", "--methods-path", "my-methods"]
    environment = os.environ | {"TPME_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {r.cell.method: r for r in map(read_result, find_results([tmp_path / "runs" / "norms"]))}
    assert {method: result.status for method, result in results.items()} == {"norms": "ok", "frozen": "ok"}
    trained = results["norms"].parameters
    assert trained is not None
    # Two layers of each tiny encoder, two LayerNorms of width 64 a layer, scale and shift.
    assert trained.by_group["text"] == trained.by_group["image"] == 2 * 2 * 2 * 64
    assert (tmp_path / "runs" / "norms" / "report" / "report.md").is_file()

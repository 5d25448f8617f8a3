"""``tpme.reports`` as Python code uses it, and docs/reports.md, which is run here on made-up records."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tpme.reports
from tpme.reports.data.user_ranks import gains
from tpme.reports.report import make_report

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reports.md"


@pytest.fixture(scope="module")
def notebook(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that are left when all Python blocks of the document have run, one after another."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copytree(demo_run, folder / "runs" / "demo")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL):
            exec(compile(block, str(DOCUMENT), "exec"), names)
    return names


def test_the_documented_example_gives_what_the_report_says(notebook: dict[str, Any], demo_run: Path) -> None:
    (section,) = make_report([demo_run]).sections
    rows = notebook["rows"]
    expected = section.summary.loc[section.compared]
    assert sorted(rows.index) == sorted(expected.index)
    for name in ("tpme", "epoch_time_s", "memory_bytes", "recall_10", "ndcg_10"):
        assert rows[name].to_dict() == pytest.approx(expected[name].to_dict()), name
    assert "iisan (cached)" in rows.index[rows["front"]]
    half = notebook["tpme"](notebook["faster"], frame=notebook["frame"])["lora"]
    assert half < rows.loc["lora", "tpme"]
    assert 0 < notebook["recall_50"] < 1
    assert len(notebook["steps"]) == 40


def test_the_document_lists_every_column_of_the_frame(notebook: dict[str, Any]) -> None:
    listed = DOCUMENT.read_text(encoding="utf-8").split("## Columns")[1].split("\n## ")[0]
    told = [name for line in listed.splitlines() for name in re.findall(r"`(\w+)`", line.partition(" | ")[0])]
    assert len(told) == len(set(told))
    assert set(told) == set(notebook["df"].columns)


def test_load_tells_the_quality_of_every_cell(factory: Any) -> None:
    factory.write("lora", skill=0.4)
    factory.write("fft", status="oom", time=None)
    df = tpme.reports.load([factory.root]).set_index("method")
    ranks = tpme.reports.load_ranks(df.loc["lora", "ranks_path"])
    assert df.loc["lora", "ndcg_20"] == gains(ranks, "ndcg", 20).mean()
    assert df.loc["lora", "recall_5"] == ((ranks.rank <= 5) & ~ranks.in_history).mean()
    assert np.isnan(df.loc["fft", "recall_10"])


@pytest.mark.parametrize("before", ["", "import tpme.reports.report; ", "from tpme.reports.data.load import read; "])
def test_the_functions_are_there_whatever_was_imported_before(before: str) -> None:
    code = f"{before}from tpme.reports import load, tpme, pareto; assert all(map(callable, (load, tpme, pareto)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_record_is_read_without_pandas() -> None:
    code = "import sys, tpme.bench.record; sys.exit(bool({'pandas', 'numpy', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The tables in a real LaTeX: they compile, and none is wider than the page. Without one, test_table.py checks them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tpme.bench.record import Failure
from tpme.reports.report import write_report
from tpme.reports.tables.table import Column, Entry, Table, to_latex

PREAMBLE = r"""\documentclass[a4paper]{article}
\usepackage[T1]{fontenc}
\usepackage[margin=2cm]{geometry}
\usepackage{array,booktabs,amssymb,graphicx}
\begin{document}
"""
NAMES = (
    "a\\b & c% $x^2$ #1 {y} ~z",
    "[1] brackets first",
    "two -- dashes --- three",
    "straight \" and ' and `back`",
    "méthode naïve, Łódź, 中文, λ, 🙂",
    "<script>|x|</script>",
    "one_very_long_name_without_any_space_" * 3,
)


def installed() -> bool:
    """Whether there is a LaTeX, and the rules of the tables with it."""
    if shutil.which("pdflatex") is None or shutil.which("kpsewhich") is None:
        return False
    return subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True, check=False).returncode == 0


def compiled(folder: Path, tables: list[Path], layout: str = "") -> str:
    """The log of a document that holds the tables; skips where there is no LaTeX."""
    if not installed():
        pytest.skip("no pdflatex with booktabs is installed (Debian: apt-get install texlive-latex-recommended)")
    body = "\n".join(rf"\input{{{path.name}}}\clearpage" for path in tables)
    for path in tables:
        shutil.copy(path, folder)
    (folder / "all.tex").write_text(
        PREAMBLE.replace("a4paper", f"a4paper,{layout}") + body + "\n\\end{document}\n", encoding="utf-8"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    log = (folder / "all.log").read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, log[-3000:]
    return log


def too_wide(log: str) -> list[float]:
    """How far lines stick out, in points."""
    return [width for width in map(float, re.findall(r"Overfull \\hbox \((\d+\.\d+)pt", log)) if width > 1]


def test_every_table_of_a_report_compiles_and_fits_the_page(demo_run: Path, tmp_path: Path) -> None:
    write_report([demo_run], tmp_path / "report", formats=("tex",))
    tables = sorted((tmp_path / "report" / "tables").glob("*.tex"))
    assert len(tables) >= 8
    (tmp_path / "tex").mkdir()
    log = compiled(tmp_path / "tex", tables)
    assert too_wide(log) == []
    assert "Missing character" not in log


@pytest.mark.parametrize("layout", ["", "twocolumn"])
def test_the_compact_table_fits_a_column_and_a_page_unscaled(demo_run: Path, tmp_path: Path, layout: str) -> None:
    write_report([demo_run], tmp_path / "report", formats=("tex",))
    table = tmp_path / "report" / "tables" / "results-compact.tex"
    text = table.read_text(encoding="utf-8")
    assert "resizebox" not in text
    assert text.count(" & ") == 5 * text.count(r" \\")
    assert text.count("T: training time") == 1
    log = compiled(tmp_path, [table], layout)
    assert too_wide(log) == []
    assert "Missing character" not in log


def test_any_text_compiles(factory: Any, tmp_path: Path) -> None:
    columns = (Column("method", "Method & more", numeric=False), Column("x", "[X] (%)", "lower"))
    rows = tuple((Entry(name, name, marks=(1,)), Entry("0.5 ± 0.1", 0.5, best=True)) for name in NAMES)
    notes = tuple(f"note on {name}" for name in NAMES)
    path = tmp_path / "nasty.tex"
    path.write_text(to_latex(Table("nasty", "_title_", columns, rows, notes, (), ("footnote",))), encoding="utf-8")
    factory.write(
        "fft", status="error", failure=Failure(phase="train", message="50 % of $x_1$ \\end{table}"), time=None
    )
    factory.write("lora")
    write_report([factory.root], tmp_path / "report", formats=("tex",))
    (tmp_path / "tex").mkdir()
    log = compiled(tmp_path / "tex", [path, tmp_path / "report" / "tables" / "failures.tex"])
    assert "Missing character" not in log

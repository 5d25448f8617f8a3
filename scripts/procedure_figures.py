"""The figures of docs/procedures.md: for each method with a procedure of its own, one that only it can have.

    tpme run MATRIX --save-adapters --out RUN
    python scripts/procedure_figures.py light-peft RUN

The figure is written to ``docs/procedures``. It is made from what a run has left, never from numbers kept here; that of
fedpeptao trains in the folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from federation_figure import fedpeptao
from light_peft_figure import light_peft
from matplotlib.figure import Figure
from projection_figure import projection
from search_figure import autopeft

from tpme.reports.figures.style import save, style

OUT = Path(__file__).resolve().parents[1] / "docs" / "procedures"
FIGURES: Mapping[str, Callable[[Path], Figure]] = {
    "light-peft": light_peft,
    "ftp": projection,
    "autopeft": autopeft,
    "fedpeptao": fedpeptao,
}
"""By method: the function that draws its figure from the folder of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the figure of one method from a run."""
    parser = argparse.ArgumentParser(description="The figure of a method with a procedure of its own.")
    parser.add_argument("method", choices=list(FIGURES))
    parser.add_argument("run", type=Path, help="folder of a run with a cell of the method; fedpeptao trains in it")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figure")
    options = parser.parse_args(arguments)
    with style():
        content = save(FIGURES[options.method](options.run), "png")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.method}.png").write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

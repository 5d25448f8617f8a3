"""The figures of docs/procedures.md: for each method with a procedure of its own, one that only it can have.

    tpme run docs/procedures/ftp.toml --out RUN
    python scripts/procedure_figures.py ftp RUN

The figure is written to ``docs/procedures``. A figure is made from what a run has left, never from numbers kept here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, read_result
from tpme.reports.figures.style import INK, PAGE_INCHES, margins, new_figure, row_looks, save, style, text_width

OUT = Path(__file__).resolve().parents[1] / "docs" / "procedures"
MODALITIES = ("text", "image")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the figure of one method from a run."""
    parser = argparse.ArgumentParser(description="The figure of a method with a procedure of its own.")
    parser.add_argument("method", choices=list(FIGURES))
    parser.add_argument("run", type=Path, help="folder of a run with a cell of the method")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figure")
    options = parser.parse_args(arguments)
    with style():
        content = save(FIGURES[options.method](options.run), "png")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.method}.png").write_bytes(content)
    return 0


# --- FTP and TPGM -----------------------------------------------------------------------------------------------------

UNBOUND = 1.0
"""A radius that may change by this much a step does not hold a row back."""


def projection(run: Path) -> Figure:
    """Distance of the encoders from their anchors after every epoch, and the radii at the end, of every row.

    Raises UserError where ``run`` has no finished cell of ftp or tpgm.
    """
    found = (read_result(path) for path in run.rglob("attempt-*.json") if path.name.count(".") == 1)  # no job.json
    projected = (result for result in found if result.cell.method in ("ftp", "tpgm") and result.status == "ok")
    results = dict(sorted(((_projected_label(one), one) for one in projected), key=itemgetter(0)))
    if not results:
        raise UserError(f"{run}: no finished cell of 'ftp' or 'tpgm'; run docs/procedures/ftp.toml")
    looks = row_looks(results)
    figure = new_figure(PAGE_INCHES, 2.2)
    panels = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    for axes, modality in zip(panels, MODALITIES, strict=False):
        for label, result in results.items():
            look, curve = looks[label], _distances(result, modality)
            style_of = {"color": look.colour, "ls": look.dashes, "marker": look.marker, "ms": 3, "lw": 1.0}
            axes.plot(range(len(curve)), curve, label=label, **style_of)
        axes.set_title(f"{modality} encoder: distance from the anchor", pad=4)
        axes.set_xlabel("epoch")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.set_ylim(bottom=0)
    bound = {label: result for label, result in results.items() if not _unbound(result)}
    _draw_radii(panels[2], bound, {label: looks[label].colour for label in bound})
    panels[0].legend(frameon=False, fontsize=6, handlelength=2.6)
    margins(figure, 0.42, 0.1, 0.36, 0.2, across=0.4 + text_width(figure, bound, 6) / 2)
    return figure


def _draw_radii(axes: Any, results: Mapping[str, CellResult], colours: Mapping[str, str]) -> None:
    """Median radius, with the 10th and 90th percentile, and the share of rows at theirs, by row and encoder."""
    rows = [(label, modality) for label in results for modality in MODALITIES]
    for place, (label, modality) in enumerate(rows):
        low, middle, high = (_counter(results[label], f"{modality}_radius_p{q}") for q in (10, 50, 90))
        share = _counter(results[label], f"{modality}_rows_at_radius")
        axes.plot((low, high), (place, place), color=colours[label], lw=1.2)
        axes.plot(middle, place, color=colours[label], marker="o", ms=4)
        axes.annotate(
            f"{share:.0%}", (high, place), (3, 0), textcoords="offset points", va="center", color=INK, fontsize=6
        )
    axes.set_yticks(range(len(rows)), [f"{label}, {modality}" for label, modality in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set_title("radii at the end; rows at theirs", pad=4)
    axes.set_xlabel("radius (L1 norm of a row)")


def _distances(result: CellResult, modality: str) -> list[float]:
    """Relative distance before training and after every epoch."""
    name = f"{modality}_distance_epoch_"
    epochs = sorted(int(key.removeprefix(name)) for key in result.counters if key.startswith(name))
    return [0.0, *(_counter(result, f"{name}{epoch}") for epoch in epochs)]


def _counter(result: CellResult, name: str) -> float:
    value = result.counters[name].value
    assert value is not None
    return float(value)


def _unbound(result: CellResult) -> bool:
    return float(result.cell.options.get("radius_lr", 0)) >= UNBOUND


def _projected_label(result: CellResult) -> str:
    options = result.cell.options
    if _unbound(result):
        return "no radius (fft)"
    return ", ".join([result.cell.method, *(f"{key} = {value:g}" for key, value in options.items())])


FIGURES: Mapping[str, Callable[[Path], Figure]] = {"ftp": projection}
"""By method: the function that draws its figure from the folder of a run."""


if __name__ == "__main__":
    sys.exit(main())

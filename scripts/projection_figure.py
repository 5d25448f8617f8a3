"""How far FTP and TPGM let the encoders move."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, read_result
from tpme.reports.figures.style import PAGE_INCHES, margins, new_figure, row_looks

MODALITIES = ("text", "image")

UNBOUND = 1.0
"""A radius that grows by this much a step, and never shrinks, holds no row back."""


def projection(run: Path) -> Figure:
    """Distance of the encoders from their anchors after every epoch, and the share of rows at their radius at the end.

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
    _draw_shares(panels[2], results, {label: look.colour for label, look in looks.items()})
    panels[0].legend(frameon=False, fontsize=6, handlelength=2.6)
    margins(figure, 0.42, 0.2, 0.36, 0.2, across=0.45)
    return figure


def _draw_shares(axes: Any, results: Mapping[str, CellResult], colours: Mapping[str, str]) -> None:
    """Bars by encoder and row: the share of an encoder's rows that are at their radius in the last step."""
    places = []
    for group, modality in enumerate(MODALITIES):
        for place, (label, result) in enumerate(results.items(), start=group * (len(results) + 1)):
            share = _counter(result, f"{modality}_rows_at_radius")
            axes.barh(place, share, color=colours[label], height=0.75)
            axes.annotate(f"{share:.0%}", (share, place), (3, 0), textcoords="offset points", va="center", fontsize=6)
        places.append(group * (len(results) + 1) + (len(results) - 1) / 2)
    axes.set_yticks(places, MODALITIES)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1)
    axes.set_xticks((0, 0.5, 1), ("0", "50 %", "100 %"))
    axes.set_title("rows at their radius, at the end", pad=4)
    axes.set_xlabel("share of the rows of weights")


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
    options = result.cell.options
    return options.get("annealing") == 0 and float(options.get("radius_lr", 0)) >= UNBOUND


def _projected_label(result: CellResult) -> str:
    options = result.cell.options
    if _unbound(result):
        return "no radius (fft)"
    return ", ".join([result.cell.method, *(f"{key} = {value:g}" for key, value in options.items())])

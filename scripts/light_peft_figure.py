"""What Light-PEFT cut where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.record import read_result
from tpme.bench.train.delta import read_delta
from tpme.reports.figures.style import COLOURS, INK, PAGE_INCHES, PALE, margins, new_figure

MODALITIES = ("text", "image")


def light_peft(run: Path) -> Figure:
    """What was cut where: heads, feed-forward units, and ranks of the updates, by layer of each encoder.

    Raises UserError where ``run`` has no such cell with an adapter.
    """
    facts, state = read_delta(_adapter(run, "light-peft"))
    roles = json.loads(facts.options)["targets"]
    kept = {
        modality: {part: state[f"encoders.{modality}.light_peft.{part}"] for part in ("heads", "units", "ranks")}
        for modality in MODALITIES
        if f"encoders.{modality}.light_peft.heads" in state
    }
    depth = max(len(parts["heads"]) for parts in kept.values())
    figure = new_figure(PAGE_INCHES, len(kept) * (0.8 + 0.17 * depth))
    panels = figure.subplots(len(kept), 3, squeeze=False, width_ratios=(1, 1.5, 1.5))
    for row, (modality, parts) in zip(panels, kept.items(), strict=True):
        _draw_heads(row[0], parts["heads"])
        _draw_units(row[1], parts["units"])
        _draw_ranks(row[2], parts["ranks"], roles)
        for axes in row:
            axes.set_ylim(len(parts["heads"]) - 0.5, -0.5)
            axes.set_yticks(range(len(parts["heads"])), range(1, len(parts["heads"]) + 1))
            axes.grid(visible=False)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(f"{modality} encoder, layer")
    margins(figure, 0.45, 0.1, 0.55, 0.25, across=0.3, down=0.8)
    return figure


def _draw_heads(axes: Any, heads: Tensor) -> None:
    """Cells (layer, head), filled where the head is kept."""
    _draw_cells(axes, heads.tolist())
    axes.set_title(f"heads: {int(heads.sum())} of {heads.numel()} kept")
    axes.set_xticks(range(heads.shape[1]), range(1, heads.shape[1] + 1))
    axes.set_xlabel("head")


def _draw_units(axes: Any, units: Tensor) -> None:
    """Bars: the share of a layer's feed-forward units that is kept."""
    shares = units.float().mean(1).tolist()
    axes.barh(range(len(shares)), 1, color=PALE, height=0.8)
    axes.barh(range(len(shares)), shares, color=COLOURS[4], height=0.8)
    for layer, share in enumerate(shares):
        axes.text(0.01, layer, f"{share:.0%}", va="center", fontsize=6, color=INK)
    axes.set_title(f"feed-forward units: {int(units.sum()):,} of {units.numel():,} kept")
    axes.set_xlim(0, 1)
    axes.set_xticks((0, 0.5, 1), ("0", "50 %", "100 %"))
    axes.set_xlabel("share of the layer's units")


def _draw_ranks(axes: Any, ranks: Tensor, roles: Sequence[str]) -> None:
    """Cells (layer, role), with the number of ranks that are kept of the update."""
    counts = ranks.sum(2)
    _draw_cells(axes, counts.bool().tolist())
    for layer, row in enumerate(counts.tolist()):
        for place, count in enumerate(row):
            if count:
                axes.text(place, layer, str(count), ha="center", va="center", fontsize=6, color="white")
    updates = counts.bool()
    axes.set_title(f"ranks of updates: {int(counts.sum())} of {ranks.numel()}, in {int(updates.sum())} updates")
    axes.set_xticks(range(len(roles)), [role.replace("_", "\n") for role in roles])
    axes.set_xlabel("projection")


def _draw_cells(axes: Any, kept: Sequence[Sequence[bool]]) -> None:
    for layer, row in enumerate(kept):
        for place, one in enumerate(row):
            colour = COLOURS[1] if one else PALE
            axes.add_patch(Rectangle((place - 0.45, layer - 0.4), 0.9, 0.8, color=colour, lw=0))
    axes.set_xlim(-0.5, len(kept[0]) - 0.5)


def _adapter(run: Path, method: str) -> Path:
    """The adapter of a cell of ``method`` in the folder of a run. Raises UserError where there is none."""
    for path in sorted(run.rglob("attempt-*.json")):
        result = read_result(path)
        if result.cell.method == method and "adapter" in result.files:
            return path.parent / result.files["adapter"]
    raise UserError(f"{run}: no finished cell of '{method}' with an adapter; run its matrix with --save-adapters")

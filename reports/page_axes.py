"""The axes that a reader of the page can choose, and what every row has on each: value and bounds.

The page computes TPME and the cost ratio itself, because they follow its weights; all else comes from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import isfinite, isnan
from typing import Any

from tpme.bench.quantities import CUTOFFS, RANKING
from tpme.bench.record import CellResult
from tpme.reports.data.metrics import SPLIT_CUTOFF
from tpme.reports.data.qualities import OF_RANKS, validation
from tpme.reports.data.section import Section
from tpme.reports.data.serving import inference_costs
from tpme.reports.data.stats import LEVEL
from tpme.reports.data.trials import Line, lines_of

SEEDS, RUNS = "standard deviation over seeds", "quartiles of the timed runs"
REPEATS, USERS = f"{100 * LEVEL:.0f} % interval over seeds and epochs", f"{100 * LEVEL:.0f} % interval over users"

COMPUTED = ("tpme_percent", "cost_ratio")
COSTS = {
    "tpme_percent": ("TPME", "time, parameters and memory as one number", REPEATS),
    "cost_ratio": ("Cost ratio", "T, P and M over those of one row, their weighted geometric mean", ""),
    "epoch_time_s": ("Epoch training time T", "median time of an epoch, training alone", REPEATS),
    "memory_bytes": (
        "Training peak memory M",
        "the most that training held, without what comes before and after",
        SEEDS,
    ),
    "peak_bytes": (
        "Whole-run peak memory",
        "the most from loading to export, the build of a feature cache included",
        "",
    ),
    "trainable_millions": ("Trainable parameters P", "weights that training changes", ""),
    "flops": ("FLOPs of a training step", "floating-point operations, forward and backward", ""),
    "energy_epoch_j": ("Epoch energy E", "of training an epoch, by the counter of the GPU", SEEDS),
    "all_in_s": ("Time until trained, all included", "feature cache, the method's own search, all epochs", SEEDS),
    "time_to_best_s": ("Time to the best epoch", "the same, up to the epoch that validated best", SEEDS),
    "inference_flops": ("Inference: FLOPs of an item", "floating-point operations of encoding it", ""),
    "inference_items_per_s": ("Inference: items a second", "items encoded, in batches", RUNS),
    "inference_user_s": ("Inference: time to serve a user", "ranking the whole catalogue for one user", RUNS),
}
"""Title of each cost, what it is, and what the bars at a point are."""
CUTS = {f"{k}": f"@{k}" for k in sorted(CUTOFFS, key=lambda k: k != SPLIT_CUTOFF)} | {
    f"{SPLIT_CUTOFF}_warm": f"@{SPLIT_CUTOFF}, targets seen in training",
    f"{SPLIT_CUTOFF}_cold": f"@{SPLIT_CUTOFF}, targets never seen in training",
}
MEANS = {
    "recall": "share of users whose held-out item is among the first {k}",
    "ndcg": "as Recall, and a higher place counts more",
}
METRICS = {
    f"{key}_{cut}": (name + words, MEANS[key].format(k=cut.partition("_")[0]), USERS)
    for cut, words in CUTS.items()
    for key, name in RANKING.items()
} | {"valid_recall_10": ("Recall@10 in validation", "of the best epoch, on the users' last item but one", "")}


@dataclass(frozen=True)
class Axis:
    """One quantity to plot."""

    key: str
    title: str
    help: str
    unit: str
    scale: float
    """Size of the unit in that of the values."""
    better: int
    """1 where more is better, -1 where less is."""
    bars: str
    """What the bars at a point are; empty where there are none."""


class Axes:
    """Axes with data of one section, for costs and for quality, and the values of its rows."""

    def __init__(self, section: Section) -> None:
        served = inference_costs(section.behind)
        old = section.summary.reindex(columns=served.columns)  # records that hold a throughput alone
        frame = section.summary.drop(columns=served.columns, errors="ignore").join(
            served.reindex(old.index).fillna(old)
        )
        counted = section.counters(("forward_flops", "backward_flops"))
        self._frame = frame.assign(flops=counted["forward_flops"] + counted["backward_flops"])
        self._lines = dict(zip(section.lines, lines_of(self._frame), strict=True))
        offered = {"tpme_percent": section.frame is not None, "cost_ratio": section.reference is not None}
        costs = COSTS if section.ranked else _other_costs(section.time_of, section.parts)
        metrics = METRICS | {
            what.key: (what.header, f"as its records name it; {what.better} is better", SEEDS)
            for what in section.qualities
            if what.key not in METRICS
        }
        self._section = section
        self.costs = [self._axis(key, costs) for key in costs if offered.get(key, self._has(key))]
        self.metrics = [self._axis(key, metrics) for key in metrics if self._has(key)]

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """Those to choose across (``x``) and up (``y``)."""
        return {"x": [asdict(axis) for axis in self.costs], "y": [asdict(axis) for axis in self.metrics]}

    def values(self, name: str) -> dict[str, float | list[float]]:
        """By key the value of a row, or ``[value, low, high]`` where bounds are known; nothing for what is missing."""
        line = self._lines[name]
        found: dict[str, float | list[float]] = {}
        for axis in (*self.costs, *self.metrics):
            value, bounds = _number(line, axis.key), _bounds(line, axis.key)
            lower_bound = axis.key == "memory_bytes" and line["status"] == "oom"
            if value is not None and not lower_bound and axis.key not in COMPUTED:
                found[axis.key] = [value, *bounds] if bounds else value
        return found

    def _has(self, key: str) -> bool:
        return key in self._frame and bool(self._frame[key].notna().any())

    def _axis(self, key: str, axes: dict[str, tuple[str, str, str]]) -> Axis:
        what = self._section.quantity(key)
        unit, scale = what.scale(self._frame.get(key, ()))
        better = 1 if what.better == "higher" else -1
        title, explained, bars = axes[key]
        return Axis(key, title, explained, "millions" if unit == "M" else unit, scale, better, bars)


def _bounds(line: Line, key: str) -> tuple[float, ...]:
    low, high, spread = (_number(line, f"{key}_{end}") for end in ("low", "high", "sd"))
    if low is not None and high is not None:
        return low, high
    return (line[key] - spread, line[key] + spread) if spread else ()


def _number(line: Line, key: str) -> float | None:
    value = line.get(key)
    return None if value is None or isnan(value) else float(value)


def _other_costs(time_of: str, parts: str) -> dict[str, tuple[str, str, str]]:
    """The costs of another task than recommendation, which has no feature cache and perhaps no epochs."""
    repeats = REPEATS.replace("epochs", parts)
    return COSTS | {
        "tpme_percent": (*COSTS["tpme_percent"][:2], repeats),
        "epoch_time_s": ("Training time T", f"of {time_of}, training alone", repeats),
        "memory_bytes": ("Training peak memory M", "the most that was held, as its rows were measured", SEEDS),
        "all_in_s": ("All in", "the whole time of training, as its rows were measured", SEEDS),
        "energy_epoch_j": ("Training energy E", f"of {time_of}, by the counter of the GPU", SEEDS),
        "stored_bytes": ("Stored", "bytes that must be kept beside the untouched model", ""),
    }


def learning(result: CellResult, validated: str = OF_RANKS[0].header) -> dict[str, Any] | None:
    """Loss, the ``validated`` quality and seconds of training after every epoch; None for a cell without one.

    ``best`` is the index of the best epoch from 0, ``starts`` are those at which a later training stage begins: its
    loss may be another one.
    """
    epochs = result.epochs
    if not epochs:
        return None
    best = [place for place, epoch in enumerate(epochs) if epoch.index == result.best_epoch]
    return {
        "loss": _short([epoch.loss for epoch in epochs]),
        "valid": _short([validation(epoch, validated) for epoch in epochs]),
        "time": _short(list(accumulate(epoch.train_s for epoch in epochs))),
        "best": best[0] if best else None,
        "starts": [i for i in range(1, len(epochs)) if epochs[i].stage != epochs[i - 1].stage],
    }


def _short(values: Sequence[float | None]) -> list[float | None]:
    """Five digits each, which is finer than a screen."""
    return [float(f"{value:.5g}") if value is not None and isfinite(value) else None for value in values]

"""The numbers that the gate compares: name, title, kind, unit and format of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["status", "counter", "time", "memory", "quality"]

KINDS: tuple[Kind, ...] = ("status", "counter", "time", "memory", "quality")


@dataclass(frozen=True)
class GateMetric:
    """One number. Counters are equal on every machine; higher is better for ``quality``, lower for all other kinds."""

    name: str
    title: str
    kind: Kind
    unit: str = ""

    @property
    def more_is_better(self) -> bool:
        """Whether an increase is an improvement."""
        return self.kind == "quality"


_LISTED = (
    GateMetric("status", "end of the cell", "status"),
    GateMetric("trainable_parameters", "trainable parameters", "counter"),
    GateMetric("trainable_parameters_max", "trainable parameters at most", "counter"),
    GateMetric("total_parameters", "all parameters", "counter"),
    GateMetric("stored_bytes", "stored state", "counter", "bytes"),
    GateMetric("forward_flops", "forward FLOPs of a step", "counter", "FLOP"),
    GateMetric("backward_flops", "backward FLOPs of a step", "counter", "FLOP"),
    GateMetric("saved_bytes", "saved for backward", "counter", "bytes"),
    GateMetric("gradient_bytes", "gradients", "counter", "bytes"),
    GateMetric("weight_bytes", "weights", "counter", "bytes"),
    GateMetric("optimizer_bytes", "optimiser state", "counter", "bytes"),
    GateMetric("cache_bytes", "feature cache", "counter", "bytes"),
    GateMetric("steps_per_epoch", "steps an epoch", "counter"),
    GateMetric("steps", "training steps", "counter"),
    GateMetric("step_s", "training step", "time", "s"),
    GateMetric("epoch_s", "training epoch", "time", "s"),
    GateMetric("torch_allocated_bytes", "allocated memory peak", "memory", "bytes"),
    GateMetric("host_rss_bytes", "resident memory peak", "memory", "bytes"),
    GateMetric("recall_10", "Recall@10", "quality"),
    GateMetric("ndcg_10", "NDCG@10", "quality"),
)
METRICS: dict[str, GateMetric] = {metric.name: metric for metric in _LISTED}
COUNTERS: tuple[str, ...] = tuple(metric.name for metric in _LISTED if metric.kind == "counter")
_PREFIXES: dict[str, tuple[tuple[str, float], ...]] = {
    "bytes": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)),
    "FLOP": (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)),
    "s": (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)),
}


def gate_metric(name: str) -> GateMetric:
    """The metric called ``name``; an unlisted name is a method's own counter (``report()``)."""
    return METRICS.get(name) or GateMetric(name, name, "counter")


def format_value(value: float | str | None, unit: str) -> str:
    """A value for people: ``1.53 GB``, ``21.4 ms``, ``796,736``."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    digits = 6 if unit == "FLOP" else 4  # exact, and usually nearly the same
    for prefix, size in _PREFIXES.get(unit, ()):
        if abs(value) >= size:
            return f"{value / size:.{digits}g} {prefix}"
    whole = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4f}"
    return f"{whole} {unit}".strip()

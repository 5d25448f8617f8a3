"""Every quantity once: its key, names, unit, direction, number format, and the rule by which memory is read.

Keys are those of records, data frames, CSV columns and baselines; values are stored in the SI unit of the key. This
module imports nothing heavy, so that a command may name a quantity before it loads pandas or torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, Memory, Reading

Better = Literal["higher", "lower"]
Kind = Literal["status", "counter", "time", "memory", "quality"]
"""How the gate compares a quantity; counters are exact, equal on every machine."""
KINDS: tuple[Kind, ...] = ("status", "counter", "time", "memory", "quality")
MemoryRule = Literal["held", "allocated"]
"""Which instrument is meant by "memory": see ``INSTRUMENTS``."""

MISSING = "–"
CUTOFFS = (5, 10, 20)
QUALITY_DIGITS = 4
"""Decimals of Recall and NDCG."""
RANKING = {"recall": "Recall", "ndcg": "NDCG"}
"""Metrics of a ranking and their names."""

PUBLISHED = "published"
"""In place of a device: the memory of what others measured, by whichever instrument they had."""
_ANY = ("nvml_process_bytes", "nvml_device_bytes", "torch_reserved_bytes", "torch_allocated_bytes", "host_rss_bytes")
INSTRUMENTS: dict[MemoryRule, dict[str, tuple[str, ...]]] = {
    "held": {"cpu": ("host_rss_bytes",), "cuda": ("nvml_process_bytes", "nvml_device_bytes"), PUBLISHED: _ANY},
    "allocated": {"cpu": ("host_rss_bytes",), "cuda": ("torch_allocated_bytes",), PUBLISHED: _ANY},
}
"""By rule and device the fields of ``Memory``, the preferred one first; the last one is taken valid or not.

``held`` is what a job takes away from other jobs, and M of TPME. ``allocated`` is what its tensors occupy: it repeats
closely and compares with a plan. A CPU has no memory of its own, so both are the resident memory of the process tree.
"""

Prefix = tuple[str, float, float]
"""A unit for people, its size, and the value from which it is used."""
PREFIXES: dict[str, tuple[Prefix, ...]] = {
    "bytes": (("GB", 1e9, 1e9), ("MB", 1e6, 1e6), ("kB", 1e3, 1e3)),
    "FLOP": (("TFLOP", 1e12, 1e12), ("GFLOP", 1e9, 1e9), ("MFLOP", 1e6, 1e6)),
    "s": (("s", 1.0, 1.0), ("ms", 1e-3, 1e-3), ("µs", 1e-6, 1e-6)),
}
"""Units of a single value; a smaller value keeps the SI unit."""
COLUMN_UNITS: dict[str, tuple[Prefix, ...]] = {
    "bytes": PREFIXES["bytes"][:2],
    "FLOP": PREFIXES["FLOP"][:2],
    "J": (("kJ", 1e3, 1e4), ("J", 1.0, 0.0)),
}
"""Units of a whole column, chosen by its largest value; the last one is the smallest in use."""
MS: tuple[Prefix, ...] = (("ms", 1e-3, 0.0),)
ITEM_FLOP: tuple[Prefix, ...] = (("GFLOP", 1e9, 1e9), ("MFLOP", 1e6, 0.0))


@dataclass(frozen=True)
class Quantity:
    """One quantity."""

    key: str
    header: str
    """Short name, for a column or an axis."""
    name: str = ""
    """Name in a sentence; that of the column where it is not set."""
    unit: str = ""
    """Of the stored value: ``s``, ``bytes``, ``FLOP``, ``J``, ``M`` (millions), ``%``, ``items/s``, or none."""
    better: Better | None = "lower"
    kind: Kind | None = None
    """None where only reports show it."""
    digits: int = 3
    """Significant digits."""
    decimals: int | None = None
    """Decimals in the place of ``digits``; what would be 0 then, but is no quality, keeps two digits."""
    units: tuple[Prefix, ...] = ()
    """Units of its column in place of ``COLUMN_UNITS``."""
    memory: MemoryRule | None = None

    @property
    def title(self) -> str:
        """Name in a sentence."""
        return self.name or self.header

    def format(self, value: float | None) -> str:
        """A value without its unit; a dash for a missing one."""
        if value is None or not math.isfinite(value):
            return MISSING
        if self.decimals is None:
            return number(value, self.digits)
        whole = self.kind == "quality" or value >= 10**-self.decimals
        return f"{value:.{self.decimals}f}" if whole else number(value, 2)

    def label(self, unit: str) -> str:
        """The header of a column in that unit."""
        return f"{self.header} ({unit})" if unit else self.header

    def scale(self, values: Iterable[float | None]) -> tuple[str, float]:
        """The unit in which a column of these values is printed, by the largest one, and its size."""
        largest = max((value for value in values if value is not None and not math.isnan(value)), default=0.0)
        *larger, smallest = self.units or COLUMN_UNITS.get(self.unit) or ((self.unit, 1.0, 0.0),)
        return next(((name, size) for name, size, least in larger if largest >= least), smallest[:2])


def _counter(key: str, header: str, name: str, unit: str = "") -> Quantity:
    return Quantity(key, header, name, unit, kind="counter")


def _quality(key: str, header: str) -> Quantity:
    return Quantity(key, header, better="higher", kind="quality", decimals=QUALITY_DIGITS)


QUANTITIES: dict[str, Quantity] = {
    entry.key: entry
    for entry in (
        # the three costs of TPME, and TPME
        Quantity("epoch_time_s", "T", "epoch time", "s"),
        Quantity("trainable_millions", "P", "trainable parameters", "M", decimals=3),
        Quantity("memory_bytes", "M", "memory", "bytes", memory="held"),
        Quantity("memory_sum_bytes", "M, all", "memory of all devices together", "bytes", memory="held"),
        Quantity("memory_seen_bytes", "Memory seen", unit="bytes", memory="held"),
        Quantity("peak_bytes", "Peak", "whole-run peak", "bytes", memory="held"),
        Quantity("tpme_percent", "TPME", unit="%"),
        Quantity("time_ratio", "T ratio"),
        Quantity("parameters_ratio", "P ratio"),
        Quantity("memory_ratio", "M ratio"),
        Quantity("cost_ratio", "Cost", "weighted geometric mean of the ratios of T, P and M"),
        Quantity("energy_epoch_j", "E", "energy of an epoch", "J"),
        # what else a cell costs
        Quantity("all_in_s", "All in", "time of everything that leads to the trained model", "s"),
        Quantity("time_to_best_s", "To best epoch", "time of everything up to the best epoch", "s"),
        Quantity("wall_s", "Whole cell", unit="s"),
        Quantity("total_millions", "All parameters", unit="M", digits=4),
        Quantity("cache_build_s", "Cache build", unit="s"),
        Quantity("cache_peak_bytes", "Cache build peak", "peak memory of building the cache", "bytes", memory="held"),
        Quantity("training_energy_j", "Training energy", unit="J", units=(("J", 1.0, 0.0),)),
        Quantity("procedure_trials", "Trials", better=None),
        Quantity("procedure_trials_failed", "Failed", better=None),
        Quantity("procedure_search_s", "Search", "the method's own search", unit="s"),
        Quantity("procedure_proposing_s", "of it proposing", unit="s"),
        Quantity("procedure_search_runs", "In FFT runs"),
        Quantity("search_wall_s", "lr search", unit="s"),
        # serving the adapted model
        Quantity("inference_items_per_s_1", "One by one", "items encoded one by one", "items/s", "higher"),
        Quantity("inference_items_per_s", "Inference", "items encoded in batches", "items/s", "higher"),
        Quantity("inference_held_bytes", "Memory", unit="bytes", memory="held"),
        Quantity("inference_allocated_bytes", "allocated", unit="bytes", memory="allocated"),
        # a training step
        Quantity("data_wait_s", "Data wait", unit="s", units=MS),
        Quantity("forward_s", "FP", unit="s", units=MS),
        Quantity("backward_s", "BP", unit="s", units=MS),
        Quantity("update_s", "WU", unit="s", units=MS),
        Quantity("collective_s", "Collectives", "of FP and BP", unit="s", units=MS),
        Quantity("flops", "FLOPs of a step", unit="FLOP"),
        Quantity("mfu_percent", "MFU", unit="%", better="higher"),
        Quantity("planned_peak_bytes", "Peak, plan", unit="bytes"),
        Quantity("measured_peak_bytes", "measured", unit="bytes", memory="allocated"),
        Quantity("phase_peak_bytes", "Peak", unit="bytes", memory="allocated"),
        Quantity("peak_ratio", "Ratio", better=None),
        # what the gate compares, in its order
        Quantity("status", "End", "end of the cell", kind="status"),
        _counter("trainable_parameters", "Trainable", "trainable parameters"),
        _counter("trainable_parameters_max", "Trainable at most", "trainable parameters at most"),
        _counter("total_parameters", "All parameters", "all parameters"),
        _counter("stored_bytes", "Stored", "stored state", "bytes"),
        _counter("forward_flops", "Forward", "forward FLOPs of a step", "FLOP"),
        _counter("backward_flops", "Backward", "backward FLOPs of a step", "FLOP"),
        _counter("saved_bytes", "Saved", "saved for backward", "bytes"),
        _counter("gradient_bytes", "Gradients", "gradients", "bytes"),
        _counter("weight_bytes", "Weights", "weights", "bytes"),
        _counter("optimizer_bytes", "Optimiser", "optimiser state", "bytes"),
        Quantity("cache_bytes", "Cache", "feature cache", "bytes", kind="counter", units=(("MB", 1e6, 0.0),)),
        _counter("steps_per_epoch", "Steps an epoch", "steps an epoch"),
        _counter("steps", "Steps", "training steps"),
        Quantity(
            "inference_flops", "FLOPs an item", "FLOPs of encoding an item", "FLOP", kind="counter", units=ITEM_FLOP
        ),
        _counter("inference_loaded_bytes", "Loaded", "loaded for inference", "bytes"),
        Quantity("step_s", "Step", "training step", "s", kind="time"),
        Quantity("epoch_s", "Epoch", "training epoch", "s", kind="time"),
        Quantity("inference_single_s", "Item", "encoding one item", "s", kind="time"),
        Quantity("inference_batch_s", "Batch", "encoding a batch of items", "s", kind="time"),
        Quantity("inference_user_s", "User", "serving one user", "s", kind="time", units=MS),
        Quantity("torch_allocated_bytes", "Allocated", "allocated memory peak", "bytes", kind="memory"),
        Quantity("host_rss_bytes", "Resident", "resident memory peak", "bytes", kind="memory"),
        Quantity("inference_torch_allocated_bytes", "Allocated", "allocated peak of inference", "bytes", kind="memory"),
        Quantity("inference_host_rss_bytes", "Resident", "resident peak of inference", "bytes", kind="memory"),
        # quality
        *(
            _quality(f"{metric}_{k}{key}", f"{name}@{k}{part}")
            for metric, name in RANKING.items()
            for k in CUTOFFS
            for key, part in (("", ""), *((("_warm", " warm"), ("_cold", " cold")) if k == 10 else ()))
        ),
        _quality("valid_recall_10", "Validation Recall@10"),
        # counts
        Quantity("users", "Users", better=None),
        Quantity("users_cold", "Users, cold", better=None),
        Quantity("cannot_hit", "Cannot hit", better=None),
        Quantity("best_epoch", "Best epoch", better=None),
        Quantity("epochs_run", "Epochs", better=None),
        Quantity("search_trials", "lr trials", better=None),
    )
}
COUNTERS: tuple[str, ...] = tuple(key for key, entry in QUANTITIES.items() if entry.kind == "counter")
"""The exact counters that the gate judges."""
COSTS = ("epoch_time_s", "trainable_millions", "memory_bytes")
"""T, P and M, in this order."""


NAMED = "metric_"
"""Begins the keys of metrics that records name themselves."""


def quantity(key: str) -> Quantity:
    """The quantity of that key; an unlisted one is a counter of a method's own ``report()``.

    Which way a metric improves is known to its records alone (``named_quality``).
    """
    if key.startswith(NAMED):
        return Quantity(key, key.removeprefix(NAMED), better=None, kind="quality", decimals=QUALITY_DIGITS)
    return QUANTITIES.get(key) or _counter(key, key, key)


def named_quality(name: str, higher_is_better: bool) -> Quantity:
    """A metric that records name themselves, as a quantity."""
    better: Better = "higher" if higher_is_better else "lower"
    return Quantity(f"{NAMED}{name}", name, better=better, kind="quality", decimals=QUALITY_DIGITS)


# --- numbers -------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent where one can be avoided; ``–`` for none."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= size < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def rate_text(value: float) -> str:
    """A rate with three significant digits and separators of thousands: ``0.125``, ``34.5``, ``1,960,000``."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else number(rounded)


def byte_unit(values: Iterable[float | None]) -> tuple[str, float]:
    """``GB`` or ``MB``, whichever suits the largest of these sizes, and its bytes."""
    return quantity("memory_bytes").scale(values)


def bytes_text(value: float | None) -> str:
    """A size with its unit."""
    if value is None or math.isnan(value):
        return MISSING
    unit, scale = byte_unit([value])
    return f"{number(value / scale)} {unit}"


def amount(value: float | str | None, unit: str) -> str:
    """A single value with its unit: ``1.53 GB``, ``21.4 ms``, ``796,736``."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    digits = 6 if unit == "FLOP" else 4  # exact, and usually nearly the same
    for prefix, size, least in PREFIXES.get(unit, ()):
        if abs(value) >= least:
            return f"{value / size:.{digits}g} {prefix}"
    whole = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4f}"
    return f"{whole} {unit}".strip()


_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}
BYTES = {
    "B": 1.0,
    **{letter: 1e3**power for letter, power in _POWERS.items()},
    **{f"{letter}B": 1e3**power for letter, power in _POWERS.items()},
    **{f"{letter}iB": 1024.0**power for letter, power in _POWERS.items()},
}
"""Units of a size as it is typed: ``8G`` is ``8GB``, as tables print it; only ``8GiB`` is binary."""


def parse_quantity(option: str, text: str, units: Mapping[str, float], example: str) -> float:
    """Convert ``"8GB"`` by the factors of ``units``, whose case does not matter. Raises UserError."""
    factors = {unit.lower(): factor for unit, factor in units.items()}
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    value = math.inf if match is None else float(match[1]) * factors.get(match[2], math.inf)
    if not math.isfinite(value):
        names = ", ".join(unit for unit in units if unit)
        raise UserError(f"{option} '{text}': give a number and a unit ({names}) such as {example}")
    return value


# --- memory --------------------------------------------------------------------------------------------------


def memory_instrument(key: str, memory: Memory, device: str) -> str:
    """The field of ``memory`` that holds the quantity on a device: the first valid one of its rule, else the last."""
    rule = quantity(key).memory
    assert rule is not None, f"{key} follows no memory rule"
    *preferred, last = INSTRUMENTS[rule][device]
    readings = ((name, getattr(memory, name)) for name in preferred)
    return next((name for name, reading in readings if reading.valid and reading.value is not None), last)


def instruments_of(result: CellResult) -> str:
    """The key of ``INSTRUMENTS`` for a record: its device, or ``PUBLISHED``."""
    return result.cell.device if result.source is None else PUBLISHED


def memory_reading(key: str, memory: Memory | None, device: str) -> Reading:
    """The reading of a quantity that has a memory rule; a missing one where no memory was recorded."""
    if memory is None:
        return Reading.missing("none", "nothing was trained, or the attempt ended before")
    reading: Reading = getattr(memory, memory_instrument(key, memory, device))
    return reading

"""What it costs to serve an adapted model: FLOPs and bytes, and medians of timed runs with their quartiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from tpme.bench.quantities import memory_reading, quantity
from tpme.bench.record import CellResult, Inference, Reading, Timings
from tpme.reports.data.metrics import over_seeds

READ = ("inference_flops", "inference_loaded_bytes", "inference_held_bytes", "inference_allocated_bytes")
"""Quantities that are read once."""
TIMED = {"inference_items_per_s_1": "single", "inference_items_per_s": "batch", "inference_user_s": "user"}
"""Quantities that are timed in several runs, and the field of ``Inference`` with the times."""
COLUMNS = (*READ, *(f"{key}{end}" for key in TIMED for end in ("", "_low", "_high", "_runs")))
"""Columns of one cell: quartiles are ``_low`` and ``_high``."""

Results = Mapping[str, Sequence[CellResult]]
"""The records of every row."""


def served(behind: Results) -> dict[str, list[CellResult]]:
    """The records that say what inference costs, for every row that has any."""
    rows = {name: [seed for seed in seeds if seed.inference is not None] for name, seeds in behind.items()}
    return {name: seeds for name, seeds in rows.items() if seeds}


def inference_costs(behind: Results) -> pd.DataFrame:
    """A line for each row of ``served``: ``COLUMNS`` and, for each of ``READ``, ``_sd``; NaN for what was not measured.

    What is read is the mean over seeds; median, quartiles and number are those of the runs of all seeds.
    """
    rows = served(behind)
    read = over_seeds(rows, {(name, key): _valid(key, rows[name]) for name in rows for key in READ})
    timed = {name: dict(pair for key in TIMED for pair in _spread(key, seeds)) for name, seeds in rows.items()}
    lines = read.join(pd.DataFrame.from_dict(timed, orient="index", dtype=np.float64))
    return lines.reindex(columns=[*COLUMNS, *(f"{key}_sd" for key in READ)])


def cell_costs(result: CellResult) -> dict[str, float]:
    """The columns of one cell; NaN for what is not known."""
    costs = dict.fromkeys(COLUMNS, np.nan)
    if result.inference is None:
        old = result.inference_items_per_s
        return costs | ({"inference_items_per_s": old.value} if old is not None and old.value is not None else {})
    costs |= {key: value for key in READ for value in _valid(key, [result])}
    return costs | dict(pair for key in TIMED for pair in _spread(key, [result]))


def unmeasured(behind: Results) -> Iterator[str]:
    """What was not measured, or not well, and why: a sentence for each quantity and reason, naming its rows."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, seeds in served(behind).items():
        for key in (*READ, *TIMED):
            known = ((_timings(key, seed) if key in TIMED else _reading(key, seed)).reason for seed in seeds)
            for reason in dict.fromkeys(filter(None, known)):
                reasons.setdefault((key, reason), []).append(name)
    for (key, reason), names in reasons.items():
        title = quantity(key).title
        yield f"{title[0].upper()}{title[1:]} of {', '.join(names)}: {reason}."


def facts_of(result: CellResult) -> Inference:
    """What a record of ``served`` says."""
    assert result.inference is not None
    return result.inference


def _timings(key: str, result: CellResult) -> Timings:
    timings: Timings = getattr(facts_of(result), TIMED[key])
    return timings


def _reading(key: str, result: CellResult) -> Reading:
    facts = facts_of(result)
    if key == "inference_flops":
        return facts.flops_per_item
    return (
        facts.loaded_bytes if key == "inference_loaded_bytes" else memory_reading(key, facts.memory, result.cell.device)
    )


def _valid(key: str, seeds: Sequence[CellResult]) -> list[float]:
    readings = [_reading(key, seed) for seed in seeds]
    return [reading.value for reading in readings if reading.valid and reading.value is not None]


def _spread(key: str, seeds: Sequence[CellResult]) -> Iterator[tuple[str, float]]:
    """Median and quartiles over the runs of all seeds, in the unit of the quantity."""
    timings = [_timings(key, seed) for seed in seeds]
    values = [t.size / s if quantity(key).unit == "items/s" else s for t in timings for s in t.run_s]
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)) if values else [np.nan] * 3
    yield from ((key, median), (f"{key}_low", low), (f"{key}_high", high), (f"{key}_runs", len(values)))

"""Where the wall time of the cells of a section goes, by kind of phase."""

from __future__ import annotations

from itertools import chain
from typing import get_args

import pandas as pd

from tpme.bench.quantities import memory_reading
from tpme.bench.record import PhaseKind
from tpme.reports.data.metrics import over_seeds
from tpme.reports.data.section import Section


def phase_times(section: Section) -> pd.DataFrame:
    """A line for each row with phases, in the order of the summary, NaN where the row has no such phase.

    Columns, for each kind of phase in the order of ``PhaseKind``: seconds (``<kind>_s``, the mean over seeds),
    ``<kind>_s_sd`` and the highest peak memory of all seeds (``<kind>_peak_bytes``).
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, dict[str, float]] = {}
    for kind in get_args(PhaseKind):
        for row, results in section.behind.items():
            seeds = [result for result in results if result.phases]
            phases = [[phase for phase in result.phases if phase.kind == kind] for result in seeds]
            if any(phases):
                # A seed without such a phase spent no time in it: the first one builds the cache of all.
                seconds[row, f"{kind}_s"] = [sum(phase.wall_s for phase in seed) for seed in phases]
                device = seeds[0].cell.device
                read = [memory_reading("phase_peak_bytes", phase.memory, device).value for phase in chain(*phases)]
                known = [value for value in read if value is not None]
                peaks.setdefault(f"{kind}_peak_bytes", {}).update({row: max(known)} if known else {})
    rows = [row for row in section.lines if any(row == key[0] for key in seconds)]
    return over_seeds(rows, seconds).join(pd.DataFrame(peaks, index=rows, dtype=float))

"""The table of the two scales of cost: TPME with its interval, and ratios to one row."""

from __future__ import annotations

from tpme.reports.data.ratios import RATIOS
from tpme.reports.data.resampling import DRAWS
from tpme.reports.data.section import Section
from tpme.reports.data.stats import LEVEL
from tpme.reports.tables import fields
from tpme.reports.tables.table import Table


def scales(section: Section) -> Table:
    """TPME with its interval and rank, and every cost over that of the reference; rows with either."""
    known = section.summary[["tpme", "tpme_lower_bound", "cost_ratio"]].notna().any(axis=1)
    columns = [fields.method(section), *fields.tpme(section, bounds=True)]
    for key in (*RATIOS, "cost_ratio"):
        columns += fields.ratio(section, key)
    rows = section.summary.index[known]
    return fields.table_of(section, "tpme", "Two scales: TPME and ratios", columns, rows, _notes(section))


def _notes(section: Section) -> list[str]:
    notes = []
    if names := section.compared:
        whose = f"the scale of {section.frame_from}" if section.frame_from else "their own least and most"
        notes.append(f"TPME compares {len(names)} rows ({', '.join(names)}) on {whose}.")
        notes.append(_interval_note(section))
        notes.append(f"Ties in rank (=): {section.noise.text}.")
    if section.reference is not None:
        weights = str(section.weights).replace(",", ", ")
        notes.append(
            f"Ratios: T, P and M over those of {section.reference}. Cost: their geometric mean with the weights "
            f"{weights}. No other row changes them."
        )
    return notes


def _interval_note(section: Section) -> str:
    """What was resampled for the interval of TPME, and what was not."""
    seeds = section.summary.loc[section.compared, "seeds_ok"]
    what = section.parts if (seeds == 1).all() else f"seeds and {section.parts}"
    scale = f"on the scale of {section.frame_from}" if section.frame_from else "the scale taken anew each time"
    note = (
        f"{100 * LEVEL:.0f} %: where TPME lies in that share of {DRAWS:,} resamplings of every row's {what}, {scale}; "
        "P is exact. Rows whose intervals overlap may change places."
    )
    alone = [str(name) for name in seeds.index[seeds == 1]]
    summary = section.summary.loc[section.compared]
    ends = summary.index[summary["tpme_end"]]
    if len(ends) and section.frame_from is None:
        varied = section.weights.time > 0 or len(alone) < len(seeds)
        row = "this row is" if len(ends) == 1 else "each of these rows is"
        why = f"{row} the minimum or maximum in every resample" if varied else "no cost that counts was measured twice"
        note += f" No interval for {' and '.join(map(str, ends))}: {why}."
    if alone:
        whose = "One seed a row" if len(alone) == len(seeds) else f"Of one seed ({', '.join(alone)})"
        note += f" {whose}: what another one would change is not in it."
    return note

"""What a method's own search cost beside its winner: in seconds, and in runs of full fine-tuning."""

from __future__ import annotations

from functools import partial

from tpme.reports.data.section import Section
from tpme.reports.tables import fields
from tpme.reports.tables.table import Table

COUNTS, SECONDS = ("procedure_trials", "procedure_trials_failed"), ("procedure_search_s", "procedure_proposing_s")
REFERENCE = "fft"


def searches(section: Section) -> Table:
    """Trials and seconds of the search of every row that has one; runs of the fastest row of ``fft``, if there is one.

    Such a run is all that leads to the trained model: its epochs, the early stop included.
    """
    frame = section.counters((*COUNTS, *SECONDS))
    frame = frame[frame["procedure_search_s"].notna()]
    runs = section.summary.loc[section.summary["method"] == REFERENCE, "all_in_s"].dropna()
    frame["procedure_search_runs"] = frame["procedure_search_s"] / (runs.min() if len(runs) else float("nan"))
    cost = partial(fields.cost, section, frame=frame)
    columns = [fields.method(section), *(fields.count(key, frame) for key in COUNTS)]
    columns += [field for key in (*SECONDS, *(["procedure_search_runs"] if len(runs) else [])) for field in cost(key)]
    note = "Means over seeds. Search: all trials of all attempts, and proposing what to try; part of all in, not of T."
    if len(runs):
        note += f" In FFT runs: over the {runs.min():.1f} s of everything that leads to the model of '{runs.idxmin()}'."
    else:
        note += " A matrix with a row 'fft' also says how many runs of full fine-tuning that is."
    return fields.table_of(section, "searches", "What the search cost", columns, frame.index, [note])

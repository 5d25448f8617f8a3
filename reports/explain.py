"""The sentences of a report: what was run, what came out, what each column means and how it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from tpme.reports.data.section import Section
from tpme.reports.data.trials import own_path
from tpme.reports.tables.table import escape_markdown

MEASURED_M = {
    "cpu": (
        "peak resident memory of the process tree during training, over the baseline taken before data and model "
        "were loaded (a CPU has no device memory of its own)"
    ),
    "cuda": (
        "peak GPU memory during training as NVML reports it: that of the process where NVML can tell it, else that "
        "of the whole device over its idle baseline"
    ),
}


def headline(section: Section) -> str:
    """What was run, on what, and the two rows that stand out."""
    cells, summary = section.cells, section.summary
    failed = int((cells["status"] != "ok").sum())
    facts = next((recorded.result.dataset for recorded in section.records if recorded.result.dataset), None)
    data = section.group.key["dataset"]
    if facts is not None and "dataset_fingerprint" not in section.group.mixed:
        data += f" ({facts.users:,} users, {facts.items:,} items, {' and '.join(facts.modalities)})"
    encoders = own_path(section.group.key["encoders"]) or "no encoders"
    told = [
        f"{_many(len(summary), 'row')} from {_many(len(cells), 'cell')} on {data} with {encoders}; "
        f"{section.group.key['protocol']} protocol, {section.group.key['precision']}, on {_devices(section)}."
    ]
    if failed:
        told.append(f"{_many(failed, 'cell')} did not finish.")
    if summary["recall_10"].notna().sum() > 1:
        best = summary["recall_10"].max()
        names = summary.index[summary["recall_10"].round(4) == round(best, 4)]
        told.append(f"Highest Recall@10: {', '.join(names)} ({best:.4f}).")
    if len(section.compared) > 1:
        least = section.compared[0]
        told.append(f"Lowest TPME: {least} ({100 * summary['tpme'].min():.2f} %).")
    return " ".join(told)


def reading_guide(sections: Sequence[Section]) -> list[str]:
    """A Markdown list: every column, what it means and how it was measured."""
    devices = sorted({device for section in sections for device in section.cells["device"]})
    memory = "; ".join(
        (f"on {device.upper()}: " if len(devices) > 1 else "") + MEASURED_M[device] for device in devices
    )
    sources = sorted({source for section in sections for source in _memory_sources(section)})
    lines = [
        "**Recall@K**: share of test users whose held-out last item is among the first K of the whole catalogue, the "
        "user's earlier items taken out, ties counted against the model (with one target this is the hit rate).",
        "**NDCG@K**: the same hits, each weighted by 1 / log2(1 + rank).",
        "**T**: median training time of an epoch after the warm-up epochs, in seconds. Data loading counts; "
        "validation, ranking, building a feature cache and saving do not.",
        "**P**: trainable parameters in millions, the recommender's own included.",
        f"**M**: {memory}." + (f" Here by: {escape_markdown('; '.join(sources))}." if sources else ""),
        "**TPME**: T, P and M, each scaled to 0..1 between the smallest and the largest of the compared rows, weighted "
        f"{_weights(sections[0])} and added; in percent, lower is better. It says nothing across tables.",
        "**95 %** behind TPME: where it lies in 95 % of the resamplings of every row's seeds and epochs; rows whose "
        "intervals overlap may change places.",
        "**Rank**: by TPME. **Seeds**: runs that finished, of those started; **± seeds**, and ± behind a cost, is the "
        "standard deviation over them.",
        "**Bold**: the best of its column, where an arrow says what is better; of costs among the rows with a TPME.",
    ]
    return [f"- {line}" for line in lines]


def _memory_sources(section: Section) -> list[str]:
    rows = section.summary[section.summary["compared"] & section.summary["memory_bytes"].notna()]
    return [str(source) for source in rows["memory_source"]]


def _weights(section: Section) -> str:
    weights = section.weights
    return f"{weights.time:g}, {weights.parameters:g} and {weights.memory:g}"


def _devices(section: Section) -> str:
    names = {recorded.result.environment.device_name for recorded in section.records if recorded.result.environment}
    return " and ".join(sorted(names)) or section.group.key["device_key"]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")

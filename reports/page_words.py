"""Words of the page that depend on what its groups hold: the columns' meanings, and what T is the time of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tpme.reports.data.qualities import validated
from tpme.reports.data.section import Section
from tpme.reports.page_axes import METRICS

RANKED = (
    "<b>±</b>: behind Recall and NDCG half the 95 % interval over users, behind T and M the standard deviation over "
    "seeds.",
    "<b>T</b>: training time of an epoch; <b>P</b>: millions of trainable parameters; <b>M</b>: peak memory of "
    "training alone; <b>Whole-run peak</b>: the highest from loading to export, the build of a feature cache included, "
    "and in brackets the phase where it lies (hover for what that does); <b>E</b>: energy of a training epoch.",
    "<b>Recall@10</b>: share of test users whose next item is among the first ten recommended; <b>NDCG@10</b>: the "
    "same, and higher places count more.",
)
OTHER = (
    "<b>±</b>: the standard deviation over seeds.",
    "<b>T</b>: training time of what its column names; <b>P</b>: millions of trainable parameters; <b>M</b>: peak "
    "memory of training alone; where others measured, what they say under “How far to trust these numbers”.",
)
SEED = "<b>Seed</b>: number of the random start; several seeds are several runs of the same row."
EPOCH = "<b>Epoch</b>: once through all training users."


def words(sections: Sequence[Section]) -> dict[str, str]:
    """Fields of the page's HTML: ``meanings``, ``repeats`` of the marks; ``time``, ``memory``, ``parts`` of labels."""
    ranked = any(section.ranked for section in sections)
    other = not all(section.ranked for section in sections)
    lines: Iterable[str] = (*(RANKED if ranked else ()), *(OTHER if other else ()))
    return {
        "meanings": "\n".join(f"<li>{line}</li>" for line in lines),
        "repeats": f"<li>{SEED}{f' {EPOCH}' if ranked else ''}</li>",
        "time": "Epoch time T" if ranked else "Time T",
        "memory": "Memory M" if any("source" in section.group.key for section in sections) else "Training memory M",
        "parts": "epochs" if ranked else "parts",
    }


def group_words(section: Section) -> dict[str, object]:
    """The same of a group, for its columns and curves."""
    curve = validated(epoch for first in section.firsts().values() for epoch in first.result.epochs)
    others = "source" in section.group.key
    read_by = sorted(set(section.summary["memory_source"][section.summary["memory_bytes"].notna()]))
    return {
        "qualities": [
            {
                "key": what.key,
                "title": what.header,
                "help": SHORT.get(what.key) or METRICS.get(what.key, ("", "as its records name it"))[1],
                "better": 1 if what.better == "higher" else -1,
            }
            for what in section.qualities
        ],
        "time_of": section.time_of,
        "time_title": "Epoch time T" if section.parts == "epochs" else f"T of {section.time_of}",
        "memory_title": "Memory M" if others else "Training memory M",
        "memory_help": f"By {'; '.join(read_by)}" if others and read_by else "Peak memory of training",
        "parts": section.parts,
        "along": "seconds of training, without cache and validation" if section.ranked else "seconds of training",
        "validated": curve,
        "validation": curve if not curve or "valid" in curve else f"{curve} in validation",
    }


SHORT = {
    "recall_10": "Share of users whose next item is among the first ten",
    "ndcg_10": "As Recall@10, and higher places count more",
}
"""What a column of the table is, where an axis says more."""

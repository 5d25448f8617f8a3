"""Which cells may be compared, which are the same row, and which learning rate of a row is shown.

Three nested sets: a *group* holds everything that may share a TPME frame; a *row* is one configured method in it;
a *trial* is one learning rate of that row, run with one or more seeds. Only the trial with the best validation
result is shown, so test numbers never choose a learning rate.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pandas as pd

from tpme.bench.record import Training

GROUP = ("device_key", "protocol", "dataset", "dataset_fingerprint", "modalities", "encoders", "precision")
"""Rows that differ in any of these share a frame only where a reader asks for it: costs or task are not the same."""

ROW = ("label", "options", "training", "code_version")

Line = Mapping[str, Any]
"""One line of a table by column."""

PLURAL = dict(zip(GROUP, ("devices", "protocols", "data", "data", "modalities", "encoders", "precisions"), strict=True))


@dataclass(frozen=True)
class Group:
    """Cells that may be compared with each other, or that a reader mixed."""

    key: dict[str, str]
    """The value of each name in ``GROUP``; those of a mixed group are joined by "and"."""
    cells: pd.DataFrame
    """The cells with a column ``row``: how the row is called in every table and plot."""

    @cached_property
    def mixed(self) -> tuple[str, ...]:
        """The names in ``GROUP`` in which the rows differ; empty unless groups were mixed."""
        return _mixed(self.cells)


def select_trials(frame: pd.DataFrame) -> pd.DataFrame:
    """Mark the learning rate of each row that is shown: the best mean validation Recall@10 over its seeds.

    A trial is compared only with trials of which as many seeds finished: one whose other seed diverged would win
    by luck. Ties go to the earlier trial. Adds ``selected``, and over all trials of the row ``search_trials``,
    ``search_cells`` and ``search_wall_s``; ``trial_valid_recall_10`` is the mean the choice was made on.
    """
    frame = frame.copy()
    finished = frame["valid_recall_10"].where(frame["status"] == "ok").astype(float)
    keys = [frame[name] for name in (*GROUP, *ROW)]
    trial = [*keys, frame["lr"]]
    frame["trial_valid_recall_10"] = finished.groupby(trial).transform("mean")
    rows = frame.groupby(list(GROUP + ROW), sort=False)
    frame["search_trials"] = rows["lr"].transform("nunique")
    frame["search_cells"] = rows["lr"].transform("size")
    frame["search_wall_s"] = rows["wall_s"].transform("sum")
    order = pd.DataFrame(
        {
            "finished": -(frame["status"] == "ok").astype(int).groupby(trial).transform("sum"),
            "quality": -frame["trial_valid_recall_10"].fillna(-1.0),
            "index": frame["lr_trial"],
            "lr": frame["lr"],
        }
    ).sort_values(["finished", "quality", "index", "lr"], kind="stable")
    chosen = order["lr"].groupby([key.loc[order.index] for key in keys], sort=False).transform("first")
    frame["selected"] = frame["lr"] == chosen.loc[frame.index]
    return frame


def split(frame: pd.DataFrame, mix: bool = False) -> list[Group]:
    """The groups of a table, sorted by their key. Cells that read no encoder join every group of the same rest.

    With ``mix`` everything is one group, and the names of its rows carry what differs.
    """
    if mix:
        return [_group(frame)]
    return [_group(cells) for _, cells in _with_free_cells(frame).groupby(list(GROUP), sort=True)]


def lines_of(frame: pd.DataFrame) -> list[Line]:
    """The lines of a table as plain values: pandas takes long over one value at a time."""
    columns = {str(name): frame[name].tolist() for name in frame}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def names(groups: Sequence[Group]) -> list[str]:
    """A name for people for each group: data, protocol, precision and device, and whatever else sets it apart."""
    data = {(group.key["dataset"], group.key["dataset_fingerprint"]) for group in groups}
    namesakes = len({name for name, _ in data}) < len(data)
    rest = [*(["dataset_fingerprint"] if namesakes else []), "modalities", "encoders"]
    told = [key for key in rest if len({group.key[key] for group in groups}) > 1]
    return [
        (f"rows of different {mixture(group)} mixed: " if group.mixed else "")
        + ", ".join(
            [
                group.key["dataset"],
                f"{group.key['protocol']} protocol",
                group.key["precision"],
                group.key["device_key"],
                *(
                    group.key[key][:12] if key == "dataset_fingerprint" else shorten_path(group.key[key])
                    for key in told
                ),
            ]
        )
        for group in groups
    ]


def mixture(group: Group) -> str:
    """What a mixed group mixes: "devices and protocols"."""
    return " and ".join(dict.fromkeys(PLURAL[name] for name in group.mixed))


def shorten_path(text: str) -> str:
    """Absolute paths in a text cut to their last two parts: a report tells nothing of a machine's folders."""
    return re.sub(r"(?<![^\s(])/(?:[^/\s(),]+/)*([^/\s(),]+/[^/\s(),]+)", r"\1", text)


def _with_free_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Popularity and ID-only cells may name no encoder: give each group its own copy of them."""
    free = frame[frame["encoders"] == ""]
    bound = frame[frame["encoders"] != ""]
    rest = [name for name in GROUP if name not in ("encoders", "modalities")]
    parts = [bound]
    for _, cell in free.iterrows():
        same = bound[(bound[rest] == cell[rest]).all(axis=1)]
        homes = same[["encoders", "modalities"]].drop_duplicates()
        copies = pd.DataFrame([cell] * max(1, len(homes))).astype(frame.dtypes)
        if len(homes):
            copies[["encoders", "modalities"]] = homes.to_numpy()
        parts.append(copies)
    return pd.concat(parts, ignore_index=True)


def _group(cells: pd.DataFrame) -> Group:
    key = {name: " and ".join(sorted({str(value) for value in cells[name]} - {""})) for name in GROUP}
    return Group(key, cells.assign(row=_row_names(cells)))


def _mixed(cells: pd.DataFrame) -> tuple[str, ...]:
    """Cells that read no encoder do not differ from others in it."""
    return tuple(name for name in GROUP if len(set(cells[name]) - {""}) > 1)


def _row_names(cells: pd.DataFrame) -> list[str]:
    """The label, followed by what sets the row apart: options, unusual training settings, code version.

    Options are left out where no other row has the label; a footnote gives them. In a mixed group device, protocol,
    data and so on follow where they differ.
    """
    distinct = cells.drop_duplicates(list(ROW))
    variants = distinct.groupby("label")["options"].nunique()
    usual = _usual_training(distinct)
    versions = distinct["code_version"].nunique() > 1
    apart = {name: _telling(sorted(set(cells[name]) - {""})) for name in _mixed(cells)}
    if (cells.groupby("dataset")["dataset_fingerprint"].nunique() == 1).all():
        apart.pop("dataset_fingerprint", None)  # the name says it

    @cache
    def name(label: str, options: str, training: str, version: str, *rest: str) -> str:
        extra = settings(options) if variants[label] > 1 else []
        extra += [
            _setting(key, value) for key, value in json.loads(training).items() if json.dumps(value) != usual[key]
        ]
        extra += [f"@{version[:7]}"] if versions else []
        extra += [texts[value] for texts, value in zip(apart.values(), rest, strict=True) if value]
        return f"{label} [{', '.join(extra)}]" if extra else label

    return list(map(name, *(cells[key] for key in (*ROW, *apart))))


def _telling(values: Sequence[str]) -> dict[str, str]:
    """A short text for each value that tells it from the others: of its parts the first, or all, that not all share."""
    texts = [re.sub(r"\((?:R|TM)\)| Processor\b", "", shorten_path(value)) for value in values]
    texts = [text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text for text in texts]  # fingerprints
    parts = [re.split(r", (?![^()]*\))", text) for text in texts]  # commas in brackets part nothing
    own = [[part for part in one if not all(part in other for other in parts)] or one for one in parts]
    for short in ([one[0] for one in own], [", ".join(one) for one in own]):
        if len(set(short)) == len(values):
            return dict(zip(values, short, strict=True))
    return {value: f"{text} ({number})" for number, (value, text) in enumerate(zip(values, texts, strict=True), 1)}


def _usual_training(rows: pd.DataFrame) -> dict[str, str]:
    """Of each training setting the value most rows have; a tie goes to the default."""
    settings = [json.loads(training) for training in rows["training"]]
    default = Training().model_dump(mode="json")
    usual = {}
    for key in settings[0]:
        counts = Counter(json.dumps(setting[key]) for setting in settings)
        usual[key] = max(sorted(counts), key=lambda value: (counts[value], value == json.dumps(default[key])))
    return usual


def settings(text: str) -> list[str]:
    """``{"rank":4}`` as ``["rank=4"]``."""
    return [_setting(key, value) for key, value in json.loads(text).items()]


def _setting(key: str, value: Any) -> str:
    if value is True:
        return key
    return f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"

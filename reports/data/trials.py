"""Groups of comparable cells, the rows in a group, and the learning rate that stands for a row.

Three nested sets: a *group* holds everything that may share a TPME frame; a *row* is one configured method in it;
a *trial* is one learning rate of that row, run with one or more seeds. Reports show the trial with the best validation
result alone, so test results never choose a learning rate.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pandas as pd

from tpme.bench.record import Cell, Training

OTHER_TASKS = {"task": Cell.model_fields["task"].default, "settings": "{}", "time_of": "epoch", "source": ""}
"""Columns that tell apart what is not recommendation measured here, and their values there, which no name shows."""
GROUP = (
    "device_key", "protocol", "dataset", "dataset_fingerprint", "modalities", "encoders", "precision", "evaluation",
    *OTHER_TASKS,
)  # fmt: skip
"""Rows that differ in any of these share a frame only on request: their costs or their tasks differ."""

ROW = ("label", "options", "training", "code_version")

Line = Mapping[str, Any]
"""One line of a table by column."""

PLURAL = dict(
    zip(
        GROUP,
        (
            "devices", "protocols", "data", "data", "modalities", "encoders", "precisions", "test users",
            "tasks", "settings", "units of T", "sources",
        ),
        strict=True,
    )
)  # fmt: skip
OF_OTHERS = "measured by others: "
"""Before the name of a source, in names of groups and of mixed rows."""
VARIANT = "experiment"
"""The option that holds the name under which others published a variant."""


@dataclass(frozen=True)
class Group:
    """Cells that are comparable, or that were mixed on request."""

    key: dict[str, str]
    """The value of each name in ``GROUP``; those of a mixed group are joined by "and".

    Without those of ``OTHER_TASKS`` at their defaults: stored frames of recommendation stay valid.
    """
    cells: pd.DataFrame
    """The cells with a column ``row``: the name of the row in every table and figure."""

    @cached_property
    def mixed(self) -> tuple[str, ...]:
        """The names in ``GROUP`` in which the rows differ; empty unless groups were mixed."""
        return _mixed(self.cells)


def select_trials(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the learning rate of each row: the best mean validation Recall@10 over its seeds.

    Trials with more finished seeds come first: one whose other seed diverged would win by luck. Ties go to the earlier
    trial. Adds ``selected``, and over all trials of the row ``search_trials``,
    ``search_cells`` and ``search_wall_s``; ``trial_valid_recall_10`` is the mean that decides.
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
    """The groups of a table, sorted by their key. Cells without an encoder join every group that agrees in the rest.

    With ``mix`` there is one group, and the names of its rows say what differs.
    """
    if mix:
        return [_group(frame)]
    return [_group(cells) for _, cells in _with_free_cells(frame).groupby(list(GROUP), sort=True)]


def lines_of(frame: pd.DataFrame) -> list[Line]:
    """The lines of a table as plain values; access to single values is slow in pandas."""
    columns = {str(name): frame[name].tolist() for name in frame}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def names(groups: Sequence[Group]) -> list[str]:
    """A readable name for each group: data, protocol, precision and device, and what else distinguishes it.

    What others measured says so.
    """
    data = {(group.key["dataset"], group.key["dataset_fingerprint"]) for group in groups}
    namesakes = len({name for name, _ in data}) < len(data)
    rest = [*(["dataset_fingerprint"] if namesakes else []), "modalities", "encoders", "evaluation"]
    distinct = [key for key in rest if len({group.key[key] for group in groups}) > 1]
    apart = differing_settings([group.key.get("settings", "{}") for group in groups])
    return [
        (f"rows of different {mixture(group)} mixed: " if group.mixed else "")
        + ", ".join(
            part
            for part in [
                *dict.fromkeys((group.key.get("task", ""), group.key["dataset"])),
                f"{group.key['protocol']} protocol" if group.key["protocol"] else "",
                group.key["precision"],
                group.key["device_key"],
                *(
                    group.key[key][:12] if key == "dataset_fingerprint" else shorten_path(group.key[key])
                    for key in distinct
                ),
                "" if group.mixed else apart[group.key.get("settings", "{}")],
                f"T of {group.key['time_of']}" if "time_of" in group.key else "",
                f"{OF_OTHERS}{group.key['source']}" if "source" in group.key else "",
            ]
            if part
        )
        for group in groups
    ]


def differing_settings(texts: Iterable[str]) -> dict[str, str]:
    """For each JSON object of settings those that not all share, as words; nothing of settings that only some have."""
    unique = {text: json.loads(text) for text in dict.fromkeys(texts)}
    known = [setting for setting in unique.values() if setting]
    keys = [key for key in (known[0] if known else {}) if all(key in setting for setting in known)]
    differ = [key for key in keys if any(setting[key] != known[0][key] for setting in known)]
    return {
        text: ", ".join(_setting(key, setting[key]) for key in differ) if setting else ""
        for text, setting in unique.items()
    }


def mixture(group: Group) -> str:
    """The plural names of what a mixed group mixes: "devices and protocols"."""
    return " and ".join(dict.fromkeys(PLURAL[name] for name in group.mixed))


def shorten_path(text: str) -> str:
    """Cut absolute paths in a text to their last two parts: reports do not show the folders of a machine."""
    return re.sub(r"(?<![^\s(:])~?/(?:[^/\s(),]+/)*([^/\s(),]+/[^/\s(),]+)", r"\1", text)


def _with_free_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Copy cells without an encoder (popularity, ID-only) into every group that agrees in the rest."""
    without = (frame["encoders"] == "") & (frame["task"] == OTHER_TASKS["task"])
    free, bound = frame.loc[without], frame.loc[~without]
    rest = [name for name in GROUP if name not in ("encoders", "modalities")]
    parts = [bound]
    for _, cell in free.iterrows():
        same = bound[(bound[rest] == cell[rest]).all(axis=1)]
        homes = same[["encoders", "modalities"]].drop_duplicates()
        copies = pd.DataFrame([cell] * max(1, len(homes))).astype(frame.dtypes)
        if len(homes):
            copies[["encoders", "modalities"]] = homes.to_numpy()
        parts.append(copies)
    whole: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return whole


def _group(cells: pd.DataFrame) -> Group:
    key = {name: " and ".join(sorted({str(value) for value in cells[name]} - {""})) for name in GROUP}
    shown = {name: value for name, value in key.items() if value != OTHER_TASKS.get(name)}
    return Group(shown, cells.assign(row=_row_names(cells)))


def _mixed(cells: pd.DataFrame) -> tuple[str, ...]:
    """Names in ``GROUP`` with several values; a cell without an encoder does not differ in it.

    Rows of others differ from rows without a source, which were measured here.
    """
    return tuple(name for name in GROUP if len(set(cells[name]) - ({""} if name != "source" else set())) > 1)


def _row_names(cells: pd.DataFrame) -> list[str]:
    """The label, followed by what distinguishes the row: options, unusual training settings, code version.

    Options and code version are left out where all rows of the label agree in them: every method has a code version,
    and a footnote lists the options; rows of others always show them. In a mixed group device, protocol, data and so
    on follow where they differ.
    """
    distinct = cells.drop_duplicates(list(ROW))
    variants = distinct.groupby("label")[["options", "code_version"]].nunique()
    usual = _usual_training(distinct)
    published = set(cells["label"][cells["source"] != ""])
    differing = {name: _short_values(sorted(set(cells[name]) - {""})) for name in _mixed(cells)}
    if "settings" in differing:
        differing["settings"] = differing_settings(differing["settings"])
    if "source" in differing:
        differing["source"] = {name: f"{OF_OTHERS}{name}" for name in differing["source"]}
    if (cells.groupby("dataset")["dataset_fingerprint"].nunique() == 1).all():
        differing.pop("dataset_fingerprint", None)  # the name identifies it

    @cache
    def name(label: str, options: str, training: str, version: str, *rest: str) -> str:
        extra = settings(options) if variants["options"][label] > 1 or label in published else []
        extra += [
            _setting(key, value) for key, value in json.loads(training).items() if json.dumps(value) != usual[key]
        ]
        extra += [f"@{version[:7]}"] if variants["code_version"][label] > 1 and label not in published else []
        extra += [text for texts, value in zip(differing.values(), rest, strict=True) if (text := texts.get(value))]
        return f"{label} [{', '.join(extra)}]" if extra else label

    return list(map(name, *(cells[key] for key in (*ROW, *differing))))


def _short_values(values: Sequence[str]) -> dict[str, str]:
    """A short, distinct text for each value: the first, or all, of its comma-separated parts that not all share."""
    texts = [re.sub(r"\((?:R|TM)\)| Processor\b", "", shorten_path(value)) for value in values]
    texts = [text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text for text in texts]  # fingerprints
    parts = [re.split(r", (?![^()]*\))", text) for text in texts]  # commas in brackets do not separate
    distinct = [[part for part in value if not all(part in other for other in parts)] or value for value in parts]
    for short in ([value[0] for value in distinct], [", ".join(value) for value in distinct]):
        if len(set(short)) == len(values):
            return dict(zip(values, short, strict=True))
    return {value: f"{text} ({number})" for number, (value, text) in enumerate(zip(values, texts, strict=True), 1)}


def _usual_training(rows: pd.DataFrame) -> dict[str, str]:
    """The most frequent value of each training setting; a tie goes to the default."""
    settings = [json.loads(training) for training in rows["training"]]
    default = Training().model_dump(mode="json")
    usual = {}
    for key in settings[0]:
        counts = Counter(json.dumps(setting[key]) for setting in settings)
        usual[key] = max(sorted(counts), key=lambda value: (counts[value], value == json.dumps(default[key])))
    return usual


def settings(text: str) -> list[str]:
    """``{"rank":4}`` as ``["rank=4"]``; what others named a variant stands for all of its settings."""
    options = json.loads(text)
    if VARIANT in options:
        return [str(options[VARIANT])] if options[VARIANT] != "default" else []
    return [_setting(key, value) for key, value in options.items()]


def _setting(key: str, value: Any) -> str:
    if value is True:
        return key
    return f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"

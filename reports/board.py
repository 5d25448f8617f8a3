"""``tpme board``: one static page over many runs, devices, data sets and versions of the code.

It says who leads in each comparable group, lists the rows of every group, and shows their history over versions of the
code. Leaders and rows are those of ``tpme report``: the newest version of each cell of the last matrices. The history
holds everything that ever ran. There is no script in the page; its links lead to the record files, relative to it.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from urllib.parse import quote

import pandas as pd

from tpme.bench.text import escaped_lines
from tpme.bench.writing import write_atomically
from tpme.reports.board_html import BoardGroup, BoardRow, group_html, leaders
from tpme.reports.data.load import Recorded, read_every, to_frame, with_quality
from tpme.reports.data.qualities import qualities_of
from tpme.reports.data.section import Section, make_section
from tpme.reports.data.tpme import DEFAULT
from tpme.reports.data.trials import Group, Line, lines_of, names, shorten_path, split


def write_board(paths: Iterable[Path | str], out: Path) -> Path:
    """Write ``out/index.html`` from all records below ``paths`` and return its path.

    Raises UserError where there are no records or one cannot be read.
    """
    every = read_every(paths)
    page = out / "index.html"
    groups = _groups(every, out)
    style = files("tpme.reports").joinpath("assets", "board.css").read_text(encoding="utf-8")
    frame = files("tpme.reports").joinpath("assets", "board.html").read_text(encoding="utf-8")
    text = Template(frame).substitute(
        title="Benchmark board",
        style=style,
        facts=html.escape(_facts(every)),
        leaders=leaders(groups),
        groups="\n".join(group_html(group) for group in groups),
    )
    write_atomically(page, escaped_lines(text).encode())
    return page


def _facts(every: Sequence[Recorded]) -> str:
    days = sorted(recorded.result.started_at[:10] for recorded in every)
    counts = {
        "record": len(every),
        "device": len({recorded.device_key for recorded in every}),
        "data set": len({recorded.result.cell.dataset_fingerprint for recorded in every}),
        "version": len({recorded.result.code_version for recorded in every}),
    }
    listed = ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in counts.items())
    return f"{listed} of measured code; {days[0]} to {days[-1]}."


# --- groups and rows -----------------------------------------------------------------------------------------


def _groups(every: Sequence[Recorded], out: Path) -> list[BoardGroup]:
    """The groups of all records, newest first."""
    by_path = {str(recorded.path): recorded for recorded in every}
    latest = split(to_frame([recorded for recorded in every if recorded.latest]))
    sections = {
        _key(group): make_section(name, group, [by_path[path] for path in group.cells["path"]], DEFAULT)
        for name, group in zip(names(latest), latest, strict=True)
    }
    current = {path for section in sections.values() for path in section.cells["path"][section.cells["selected"]]}
    past = split(_history(every, out, current))
    groups = [
        _group(number, title, group, sections.get(_key(group)), every)
        for number, (title, group) in enumerate(zip(_titles(past), past, strict=True), start=1)
    ]
    return sorted(groups, key=lambda group: group.newest, reverse=True)


def _group(number: int, title: str, group: Group, section: Section | None, every: Sequence[Recorded]) -> BoardGroup:
    """One group of all records; rows of the section come first, in its order."""
    rows: dict[str, list[Line]] = {}
    for line in lines_of(group.cells.sort_values(["started_at", "seed"], kind="stable")):
        rows.setdefault(line["row"], []).append(line)
    row_of = dict(zip(group.cells["path"], group.cells["row"], strict=True))
    firsts = section.firsts() if section else {}
    current = {name: row_of[str(first.path)] for name, first in firsts.items()}
    order = dict.fromkeys([*current.values(), *rows])
    listed = {row: BoardRow(row, f"g{number}r{place}", tuple(rows[row])) for place, row in enumerate(order, start=1)}
    newest = {name: listed[row] for name, row in current.items()}
    paths = set(group.cells["path"])
    qualities = qualities_of(recorded.result for recorded in every if str(recorded.path) in paths)
    return BoardGroup(title, f"g{number}", section, tuple(listed.values()), newest, qualities)


def _titles(groups: Sequence[Group]) -> list[str]:
    """The names of groups without revisions of encoders, unless they tell groups apart."""
    whole = [shorten_path(name) for name in names(groups)]
    short = [re.sub(r"@[0-9a-f]{7,40}\b", "", name) for name in whole]
    return short if len(set(short)) == len(set(whole)) else whole


def _key(group: Group) -> tuple[tuple[str, str], ...]:
    return tuple(group.key.items())


def _history(every: Sequence[Recorded], out: Path, current: set[str]) -> pd.DataFrame:
    """All records of selected learning rates, with quality; rows keep their name over the versions of their code."""
    frame = with_quality(to_frame(every))
    environments = [recorded.result.environment for recorded in every]
    revisions = [(known.git_revision or "")[:7] if known else "" for known in environments]
    changed = [bool(known and known.git_dirty) for known in environments]
    frame = frame.assign(
        latest=[recorded.latest for recorded in every],
        commit=[
            f"{revision}+" if dirty and revision else revision
            for revision, dirty in zip(revisions, changed, strict=True)
        ],
        link=[quote(os.path.relpath(path, out).replace(os.sep, "/")) for path in frame["path"]],
        version=frame["code_version"],
        code_version="",
    )
    return frame[frame["selected"] | frame["path"].isin(current)]

"""``tpme compare``: two sets of results side by side, groups paired by what they share, rows by their settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from tpme.reports.changes import SectionPair, larger_noise, row_pair, with_quality
from tpme.reports.data.section import Section
from tpme.reports.data.trials import GROUP, OTHER_TASKS, Line, lines_of
from tpme.reports.report import make_report


@dataclass(frozen=True)
class TwoSets:
    """Everything that is to be said of two sets of results."""

    a: Path
    b: Path
    pairs: tuple[SectionPair, ...]
    only_a: tuple[Section, ...] = ()
    """Groups of A without a partner."""
    only_b: tuple[Section, ...] = ()


def compare(a: Path, b: Path) -> TwoSets:
    """Compare the records below ``a`` (a folder or a record file) with those below ``b``.

    Where each side holds a single row these are compared, whatever they are: two record files, say.

    Raises UserError where one of them holds no records or a broken one.
    """
    left, right = (make_report([path]).sections for path in (a, b))
    far = sorted(product(range(len(left)), range(len(right))), key=lambda pair: _apart(left[pair[0]], right[pair[1]]))
    single = [len(section.lines) for section in (*left, *right)] == [1, 1]
    partner: dict[int, int] = {}
    for i, j in far:
        if i not in partner and j not in partner.values():
            partner[i] = j
    return TwoSets(
        a,
        b,
        tuple(_pair(left[i], right[j], single) for i, j in sorted(partner.items())),
        tuple(section for i, section in enumerate(left) if i not in partner),
        tuple(section for j, section in enumerate(right) if j not in partner.values()),
    )


def _apart(a: Section, b: Section) -> tuple[bool, ...]:
    """How little two groups share; what makes most incomparable comes first."""
    kinds = [set(section.cells["device"]) for section in (a, b)]
    unlike = {key: a.group.key.get(key) != b.group.key.get(key) for key in GROUP}
    first = ("task", "source", "dataset_fingerprint", "dataset", "protocol")
    rest = ("device_key", "settings", "time_of", "encoders", "modalities", "precision", "evaluation")
    return (*(unlike[key] for key in first), kinds[0] != kinds[1], *(unlike[key] for key in rest))


def _pair(a: Section, b: Section, single: bool) -> SectionPair:
    keys = [{name: section.group.key.get(name, OTHER_TASKS.get(name, "")) for name in GROUP} for section in (a, b)]
    differs = {name: (keys[0][name], keys[1][name]) for name in GROUP if keys[0][name] != keys[1][name]}
    pair = SectionPair(a, b, differs | _other_packages(a, b), larger_noise(a, b))
    heads = _heads(a), _heads(b)
    matched = list(zip(a.lines, b.lines, strict=True)) if single else _matched(*heads)
    rows = tuple(row_pair(pair, i, j, _settings_apart(heads[0][i], heads[1][j])) for i, j in matched)
    return replace(
        pair,
        rows=with_quality(pair, rows),
        only_a=tuple(name for name in a.lines if name not in {i for i, _ in matched}),
        only_b=tuple(name for name in b.lines if name not in {j for _, j in matched}),
    )


# --- which rows ----------------------------------------------------------------------------------------------


def _heads(section: Section) -> dict[str, Line]:
    """The first cell of the selected trial of every row: its settings are those of the row."""
    heads: dict[str, Line] = {}
    for cell in lines_of(section.cells[section.cells["selected"]]):
        heads.setdefault(cell["row"], cell)
    return {name: heads[name] for name in section.lines}


def _matched(a: Mapping[str, Line], b: Mapping[str, Line]) -> list[tuple[str, str]]:
    """Rows that are the same: first in all settings, then in method and options."""
    found: dict[str, str] = {}
    for names in (("label", "options", "training"), ("label", "options")):
        free = {tuple(b[j][name] for name in names): j for j in b if j not in found.values()}
        for i in a:
            if i not in found and (j := free.pop(tuple(a[i][name] for name in names), None)) is not None:
                found[i] = j
    return [(i, found[i]) for i in a if i in found]


def _settings_apart(a: Line, b: Line) -> dict[str, tuple[str, str]]:
    apart = {name: (a[name], b[name]) for name in ("label", "options") if a[name] != b[name]}
    for prefix in ("training", "lr"):
        old, new = json.loads(a[prefix]), json.loads(b[prefix])
        apart |= {
            f"{prefix}.{name}": (json.dumps(old.get(name)), json.dumps(new.get(name)))
            for name in old | new
            if old.get(name) != new.get(name)
        }
    if a["code_version"] != b["code_version"]:
        apart["code version"] = a["code_version"][:7], b["code_version"][:7]
    return apart


def _other_packages(a: Section, b: Section) -> dict[str, tuple[str, str]]:
    """Packages of other versions in A and B."""

    def versions(section: Section) -> dict[str, str]:
        found: dict[str, set[str]] = {}
        for recorded in section.records:
            for name, version in (recorded.result.environment.packages if recorded.result.environment else {}).items():
                found.setdefault(name, set()).add(version)
        return {name: " and ".join(sorted(all_versions)) for name, all_versions in sorted(found.items())}

    old, new = versions(a), versions(b)
    return {name: (old[name], new[name]) for name in old if name in new and old[name] != new[name]}

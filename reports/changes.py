"""How far one row of B lies from the same row of A: costs, exact counters and quality, with intervals and no judgement.

Costs are compared as ratios B / A, quality as a difference over the same users. What another device, other data or
another protocol makes incomparable carries its reason; P and counters, equal on every machine, are compared regardless.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tpme.bench.quantities import COSTS
from tpme.bench.side_files import load_ranks
from tpme.reports.data.load import Recorded
from tpme.reports.data.metrics import bootstrap_means
from tpme.reports.data.paired_tests import P_LEVEL
from tpme.reports.data.resampling import DRAWS, draw
from tpme.reports.data.section import Section
from tpme.reports.data.stats import Floats, holm, interval, paired, welch
from tpme.reports.data.summary import doubt, repeats_of
from tpme.reports.data.ties import RunNoise
from tpme.reports.data.trials import Line
from tpme.reports.data.user_ranks import METRICS
from tpme.reports.gate.measures import counters

Outcome = Literal["equal", "lower", "higher", "not told apart", "unclear", "not compared"]
"""B against A. ``unclear``: nothing says how far two runs of the same code would differ."""

MEASURED = ("epoch_time_s", "memory_bytes", "peak_bytes")
"""Costs that depend on the device; P, the third cost of TPME, is exact."""
QUALITIES = tuple(f"{metric}_10" for metric in METRICS)
OF_MODEL = (
    "trainable_parameters_max", "total_parameters", "stored_bytes", "gradient_bytes", "weight_bytes", "optimizer_bytes",
)  # fmt: skip
"""Exact counters that depend on the model alone, so also other data leave them comparable."""
TASK = {
    "dataset_fingerprint": "data", "protocol": "protocol", "task": "task", "settings": "settings",
    "time_of": "unit of T", "source": "source",
}  # fmt: skip
"""What must agree for counters of the data to be compared; costs need the same device, too."""
QUALITY_TASK = {**TASK, "evaluation": "test users"}


@dataclass(frozen=True)
class Change:
    """One quantity of one row in A and in B."""

    key: str
    a: float | None
    b: float | None
    outcome: Outcome
    effect: float | None = None
    """``b / a``; of a quality ``b - a``."""
    low: float | None = None
    high: float | None = None
    p: float | None = None
    """Of a quality: paired over users, adjusted by Holm's method over the rows."""
    reason: str | None = None
    """Why it is not compared."""


@dataclass(frozen=True)
class RowPair:
    """A row of A and the same one in B."""

    a: str
    b: str
    differs: Mapping[str, tuple[str, str]]
    """What was set otherwise, or ran other code: name to the values in A and B."""
    seeds: tuple[int, int]
    changes: tuple[Change, ...]

    def change(self, key: str) -> Change | None:
        """The change of a quantity."""
        return next((change for change in self.changes if change.key == key), None)


@dataclass(frozen=True)
class SectionPair:
    """A group of A and the group of B that shares most with it."""

    a: Section
    b: Section
    differs: Mapping[str, tuple[str, str]]
    """Columns of ``GROUP``, and packages, that differ."""
    noise: RunNoise
    """How much two runs of one cell differ."""
    rows: tuple[RowPair, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()


# --- costs and counters --------------------------------------------------------------------------------------


def larger_noise(a: Section, b: Section) -> RunNoise:
    """The larger noise of the two sides; that of the device where one measured it."""
    return max(a.noise, b.noise, key=lambda noise: (noise.source == "doctor", noise.time))


def row_pair(pair: SectionPair, a: str, b: str, differs: Mapping[str, tuple[str, str]]) -> RowPair:
    """Compare the costs and counters of row ``a`` of A with those of row ``b`` of B; quality follows for all rows."""
    lines = pair.a.lines[a], pair.b.lines[b]
    row = RowPair(a, b, differs, (int(lines[0]["seeds_ok"]), int(lines[1]["seeds_ok"])), ())
    if lines[0]["status"] != "ok" or lines[1]["status"] != "ok":
        reason = f"it ended {lines[0]['status']} in A, {lines[1]['status']} in B"
        return replace(row, changes=(Change("status", None, None, "not compared", reason=reason),))
    return replace(row, changes=(*_costs(pair, row), *_counters(pair, row)))


def _costs(pair: SectionPair, row: RowPair) -> Iterator[Change]:
    """T, P, M and the whole-run peak, where either side has them."""
    lines = pair.a.lines[row.a], pair.b.lines[row.b]
    draws = _draws("A", pair.a, row.a), _draws("B", pair.b, row.b)
    for key in (*COSTS, "peak_bytes"):
        a, b = (float(line[key]) for line in lines)
        if np.isnan(a) and np.isnan(b):
            continue
        reason = _unlike(pair, {"device_key": "device", **TASK}) if key in MEASURED else None
        reason = reason or _doubt(lines, key)
        if reason is not None:
            yield Change(key, _or_none(a), _or_none(b), "not compared", reason=reason)
        elif key in MEASURED:
            floor = _floor(pair.noise, key, row.seeds)
            yield _ratio(key, a, b, (draws[0].get(key), draws[1].get(key)), min(row.seeds) > 1, floor)
        else:
            yield _exact(key, a, b)


def _floor(noise: RunNoise, key: str, seeds: tuple[int, int]) -> float | None:
    """Below which relative difference rows are not told apart; None where that is not known.

    Where it is the spread over seeds, rows with several seeds on both sides need none: their interval holds it.
    """
    if not noise.source or (noise.source == "seeds" and min(seeds) > 1):
        return None
    return noise.time if key == "epoch_time_s" else noise.memory


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _doubt(lines: tuple[Line, Line], key: str) -> str | None:
    """Why a quantity of either side is missing or not to be trusted."""
    for side, line in zip("AB", lines, strict=True):
        why = doubt(line, key)
        if why or np.isnan(line[key]):
            return f"missing or not to be trusted in {side}: {why or 'older records do not hold it'}"
    return None


def _draws(side: str, section: Section, row: str) -> dict[str, Floats]:
    """Resampled T (over seeds and epochs), M and whole-run peak (over seeds) of a row, where anything was repeated.

    The draws of the two sides must be independent, so their generators differ by the name of the side.
    """
    name, repeats = f"{side}: {row}", repeats_of(section.behind[row])
    drawn = draw(name, repeats)
    draws = {"epoch_time_s": drawn[:, 0]} if repeats.several else {}
    cells = section.cells
    finished = (cells["row"] == row) & cells["selected"] & (cells["status"] == "ok")
    peaks = cells["peak_bytes"][finished].to_numpy(dtype=np.float64)
    if len(peaks) > 1:
        chosen = np.random.default_rng(zlib.crc32(name.encode())).integers(len(peaks), size=(DRAWS, len(peaks)))
        draws |= {"memory_bytes": drawn[:, 2], "peak_bytes": peaks[chosen].max(axis=1)}
    return draws


def _ratio(
    key: str, a: float, b: float, draws: tuple[Floats | None, Floats | None], several: bool, noise: float | None
) -> Change:
    """B / A of a measured cost: told apart beyond the noise floor, and where the interval leaves 1 out.

    With one seed on a side and no noise floor nothing is known of another run, and the outcome is ``unclear``.
    """
    if a <= 0:
        return Change(key, a, b, "not compared", reason="A holds no positive value")
    ratio, low, high = b / a, None, None
    known = [drawn for drawn in draws if drawn is not None and np.isfinite(drawn).all()]
    if len(known) == 2:
        low, high = interval(known[1] / known[0])
        low, high = min(low, ratio), max(high, ratio)
    outcome: Outcome = "higher" if b > a else "lower"
    if a == b:
        outcome = "equal"
    elif noise is None and not several:
        outcome = "unclear"
    elif (noise is not None and abs(ratio - 1) <= noise) or (low is not None and high is not None and low <= 1 <= high):
        outcome = "not told apart"
    return Change(key, a, b, outcome, ratio, low, high)


def _exact(key: str, a: float, b: float) -> Change:
    outcome: Outcome = "equal" if a == b else "higher" if b > a else "lower"
    return Change(key, a, b, outcome, b / a if a else None)


def _counters(pair: SectionPair, row: RowPair) -> Iterator[Change]:
    """The exact counters that both sides know and that differ."""
    a, b = counters(pair.a.behind[row.a][0]), counters(pair.b.behind[row.b][0])
    same_task = _unlike(pair, TASK) is None
    told = {"trainable_parameters"}  # P
    if all(side.get("trainable_parameters_max") == side.get("trainable_parameters") for side in (a, b)):
        told.add("trainable_parameters_max")
    for key, value in a.items():
        if key not in told and b.get(key, value) != value and (same_task or key in OF_MODEL):
            yield _exact(key, value, b[key])


def _unlike(pair: SectionPair, keys: Mapping[str, str]) -> str | None:
    """Why what needs these columns of ``GROUP`` to agree is not compared."""
    names = [name for key, name in keys.items() if key in pair.differs]
    return f"other {' and '.join(names)}" if names else None


# --- quality -------------------------------------------------------------------------------------------------


def with_quality(pair: SectionPair, rows: tuple[RowPair, ...]) -> tuple[RowPair, ...]:
    """The rows with Recall@10 and NDCG@10: a paired test over users, whose gains are means over seeds.

    Named metrics have no users: their difference has an interval where both sides have several seeds.
    """
    changes: dict[str, list[Change]] = {row.a: list(row.changes) for row in rows}
    firsts = pair.a.firsts(), pair.b.firsts()
    reasons = {row.a: _unlike(pair, QUALITY_TASK) or _unpaired(firsts[0][row.a], firsts[1][row.b]) for row in rows}
    for metric, key in zip(METRICS, QUALITIES, strict=True):
        gains = pair.a.gains[metric], pair.b.gains[metric]
        both = [row for row in rows if row.a in gains[0] and row.b in gains[1]]
        tested = [row for row in both if reasons[row.a] is None]
        apart = [gains[1][row.b] - gains[0][row.a] for row in tested]
        adjusted = holm([paired(difference) for difference in apart])
        for row, difference, p, bounds in zip(tested, apart, adjusted, _intervals(apart), strict=True):
            a, b = float(gains[0][row.a].mean()), float(gains[1][row.b].mean())
            outcome: Outcome = "not told apart" if p >= P_LEVEL else "higher" if b > a else "lower"
            outcome = outcome if difference.any() else "equal"
            changes[row.a].append(Change(key, a, b, outcome, float(difference.mean()), *bounds, p))
        for row in both:
            if reason := reasons[row.a]:
                a, b = float(gains[0][row.a].mean()), float(gains[1][row.b].mean())
                changes[row.a].append(Change(key, a, b, "not compared", reason=reason))
    for row in rows:
        changes[row.a] += _named(pair, row)
    return tuple(replace(row, changes=tuple(changes[row.a])) for row in rows)


def _named(pair: SectionPair, row: RowPair) -> Iterator[Change]:
    """The named metrics that both sides of a row have."""
    reason = _unlike(pair, TASK)
    for what in pair.a.qualities:
        if what.key in QUALITIES or what not in pair.b.qualities:
            continue
        a, b = (_over_seeds(section, name, what.key) for section, name in ((pair.a, row.a), (pair.b, row.b)))
        if not len(a) or not len(b):
            continue
        means = float(a.mean()), float(b.mean())
        if reason is not None:
            yield Change(what.key, *means, "not compared", reason=reason)
            continue
        low, high = welch(a, b) if min(len(a), len(b)) > 1 else (None, None)
        outcome: Outcome = "higher" if means[1] > means[0] else "lower"
        if means[0] == means[1]:
            outcome = "equal"
        elif low is None or high is None:
            outcome = "unclear"
        elif low <= 0 <= high:
            outcome = "not told apart"
        yield Change(what.key, *means, outcome, means[1] - means[0], low, high)


def _over_seeds(section: Section, row: str, key: str) -> Floats:
    """A metric of the finished seeds of a row."""
    cells = section.cells
    chosen = (cells["row"] == row) & cells["selected"] & (cells["status"] == "ok")
    return cells.loc[chosen, key].dropna().to_numpy(dtype=np.float64)


def _intervals(apart: Sequence[Floats]) -> list[tuple[float, float]]:
    """The 95 % bootstrap interval over users of the mean of each, rows of equally many users at once."""
    bounds: dict[int, tuple[float, float]] = {}
    for users in {len(difference) for difference in apart}:
        alike = [place for place, difference in enumerate(apart) if len(difference) == users]
        values = np.stack([apart[place] for place in alike], axis=1)
        bounds |= dict(zip(alike, map(interval, bootstrap_means(values, np.ones_like(values)).T), strict=True))
    return [bounds[place] for place in range(len(apart))]


def _unpaired(*records: Recorded) -> str | None:
    """Why the users of two rows are not paired, from a record of each."""
    if any(flag.code == "random-weights" for recorded in records for flag in recorded.result.flags):
        return "an encoder with random weights: its quality means nothing"
    ranks = [load_ranks(path) for recorded in records if (path := recorded.beside("ranks"))]
    return None if all(ranks[0].paired_with(other) for other in ranks) else "other test users or targets"

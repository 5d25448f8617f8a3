"""Compare AutoPEFT's Bayesian search with random search of the same budget, from the records of a run.

    tpme run scripts/search_comparison.toml --out RUN
    python scripts/search_comparison.py RUN --docs docs/procedures.md

A search is judged by the area that its trials dominate, of the logarithm of the number of parameters and validation
NDCG@10, above the worst of all trials and as a share of the box up to the best of all. Searches of one seed begin with
the same random trials, so seeds are pairs; a sign test says whether their differences could be chance.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from math import comb
from pathlib import Path

import numpy as np
from workload import put

from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, read_result
from tpme.methods.parts.search_front import Points, hypervolume

LEVEL = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the comparison, or write it between the marks of a document."""
    parser = argparse.ArgumentParser(description="AutoPEFT's Bayesian search against random search.")
    parser.add_argument("run", type=Path, help="folder of a run of scripts/search_comparison.toml")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
    options = parser.parse_args(arguments)
    text = comparison(searches(options.run))
    if options.docs is None:
        sys.stdout.write(f"{text}\n")
    else:
        put(text, options.docs, "search-comparison")
    return 0


def searches(run: Path) -> dict[tuple[str, int], CellResult]:
    """The finished searches in the folder of a run, by engine and seed. Raises UserError where there is none."""
    found = {}
    for path in sorted(run.rglob("attempt-*.json")):
        result = read_result(path)
        if result.status == "ok" and "procedure_trials" in result.counters:
            found[str(result.cell.options.get("engine", "auto")), result.cell.seed] = result
    if not found:
        raise UserError(f"{run}: no finished cell with a search; run scripts/search_comparison.toml")
    return found


def trials_of(result: CellResult) -> Points:
    """Parameters and NDCG@10 of the trials in their order, (n, 2); NaN where one did not finish."""
    names = sorted(match[1] for key in result.counters if (match := re.fullmatch(r"(trial_\d+)_parameters", key)))
    values = [[result.counters[f"{name}_parameters"].value, result.counters[f"{name}_ndcg_10"].value] for name in names]
    return np.array(values, dtype=np.float64)


def shares(trials: Mapping[tuple[str, int], Points]) -> dict[tuple[str, int], Points]:
    """The dominated share of the box of all trials, after each trial of every search: (n,)."""
    scaled = {key: np.stack([-np.log10(points[:, 0]), points[:, 1]], axis=1) for key, points in trials.items()}
    every = np.concatenate(list(scaled.values()))
    worst, best = np.nanmin(every, axis=0), np.nanmax(every, axis=0)
    box = float(np.prod(best - worst))
    return {
        key: np.array([hypervolume(points[: n + 1], worst) / box for n in range(len(points))])
        for key, points in scaled.items()
    }


def comparison(found: Mapping[tuple[str, int], CellResult]) -> str:
    """A table by seed, and what it shows. Raises UserError where no seed has both searches."""
    engine = next((name for name, _ in found if name != "random"), None)
    seeds = sorted(seed for name, seed in found if name == engine and ("random", seed) in found)
    if engine is None or not seeds:
        raise UserError("no seed has a Bayesian and a random search; run scripts/search_comparison.toml")
    area = shares({key: trials_of(result) for key, result in found.items()})
    lines = [
        f"| seed | trials | dominated share, {engine} | random | best NDCG@10 of a trial, {engine} | random |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for seed in seeds:
        pair = [(engine, seed), ("random", seed)]
        best = [np.nanmax(trials_of(found[key])[:, 1]) for key in pair]
        lines.append(
            f"| {seed} | {len(area[pair[0]])} | {area[pair[0]][-1]:.3f} | {area[pair[1]][-1]:.3f} "
            f"| {best[0]:.4f} | {best[1]:.4f} |"
        )
    return "\n".join([*lines, "", verdict([area[engine, s][-1] - area["random", s][-1] for s in seeds], engine)])


def verdict(differences: Sequence[float], engine: str) -> str:
    """One sentence: whether the Bayesian search dominates more than random search, by a two-sided sign test."""
    signs = [difference for difference in differences if difference]
    wins, n = sum(difference > 0 for difference in signs), len(signs)
    p = min(1.0, 2 * sum(comb(n, k) for k in range(max(wins, n - wins), n + 1)) / 2**n)
    mean = float(np.mean(differences))
    facts = f"{wins} of {len(differences)} seeds, mean difference {mean:+.3f}, sign test p = {p:.2g}"
    if p >= LEVEL:
        return f"Not shown to be better than random search of the same budget: `{engine}` dominates more in {facts}."
    better = "Better" if wins > n - wins else "Worse"
    return f"{better} than random search of the same budget: `{engine}` dominates more in {facts}."


if __name__ == "__main__":
    sys.exit(main())

"""Which configurations to try next: at random, or by Bayesian optimisation of two objectives with botorch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tpme.bench.errors import UserError, missing_extra
from tpme.methods.parts.search_front import Points, copula, non_dominated
from tpme.methods.parts.search_space import SearchSpace, Vector

Engine = Literal["auto", "random", "gp", "saas"]
STARTS = 5
"""Starts of the local search; a start is one step away from a configuration that no other one dominates."""
LEFT = 16
"""A space with fewer vectors than these beyond twice the tried ones is drawn from: botorch starts at untried ones."""
SAMPLES = 32
"""Quasi-Monte-Carlo samples of the acquisition function."""


def chosen_engine(engine: Engine) -> Engine:
    """The engine that ``auto`` stands for: SAAS where it is installed, else a plain Gaussian process.

    Raises UserError, with the command that installs it, where the engine's packages are missing.
    """
    saas = all(find_spec(package) is not None for package in ("jax", "numpyro"))
    if engine != "random" and find_spec("botorch") is None:
        extra = "saas" if engine == "saas" else "search"
        error = missing_extra(f"method 'autopeft' with engine = '{engine}'", "botorch", extra)
        raise UserError(f'{error}; or search at random, with options = {{ engine = "random" }}')
    if engine == "saas" and not saas:
        raise missing_extra("method 'autopeft' with engine = 'saas'", "jax and numpyro", "saas")
    return ("saas" if saas else "gp") if engine == "auto" else engine


def propose(
    engine: Engine, space: SearchSpace, vectors: Sequence[Vector], points: Points, tried: Sequence[Vector], q: int
) -> list[Vector]:
    """The next ``q`` configurations, none of which was tried; fewer where the space is used up.

    Args:
        engine: as ``chosen_engine`` returns it. vectors, points: those with a result, and their objectives (n, 2),
            both to be maximised. tried: all, also those that failed.
    """
    random = np.random.default_rng(int(torch.randint(2**31, ())))
    found: list[Vector] = []
    nearly_used_up = len(space) < 2 * len(tried) + LEFT
    if engine != "random" and len(vectors) > 1 and not nearly_used_up:
        found = _acquired(engine, space, vectors, points, q, random)
    new = (vector for vector in itertools.chain(found, space.draw(random)) if space.valid(vector))
    return _distinct(new, tried, q)


def distinct_draws(space: SearchSpace, random: np.random.Generator, count: int) -> list[Vector]:
    """Random configurations to begin with, no two the same."""
    return _distinct(space.draw(random), (), count)


def _distinct(vectors: Any, tried: Sequence[Vector], count: int) -> list[Vector]:
    """The first ``count`` of ``vectors`` that are new; in a space that is nearly used up, fewer."""
    known, found = set(tried), list[Vector]()
    for vector in itertools.islice(vectors, 1000 * count):
        if vector not in known:
            known.add(vector)
            found.append(vector)
        if len(found) == count:
            break
    return found


def _acquired(
    engine: Engine, space: SearchSpace, vectors: Sequence[Vector], points: Points, q: int, random: np.random.Generator
) -> list[Vector]:
    """The maximum of the log of the noisy expected hypervolume improvement, by local search, one after the other.

    The reference point is the worst result of each objective, after the copula.
    """
    from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
    from botorch.models import ModelListGP
    from botorch.optim import optimize_acqf_discrete_local_search
    from botorch.sampling.normal import SobolQMCNormalSampler

    inputs = torch.from_numpy(space.unit(vectors))
    outputs = torch.from_numpy(copula(points, points))
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        model=ModelListGP(*[_fitted(engine, inputs, outputs[:, [objective]]) for objective in range(2)]),
        ref_point=outputs.min(dim=0).values.tolist(),
        X_baseline=inputs,
        prune_baseline=True,
        sampler=SobolQMCNormalSampler(torch.Size([SAMPLES]), seed=int(random.integers(2**31))),
    )
    best, _ = optimize_acqf_discrete_local_search(
        acquisition,
        discrete_choices=[torch.arange(choices, dtype=torch.float64) / (choices - 1) for choices in space.choices],
        q=q,
        num_restarts=STARTS,
        raw_samples=64,
        batch_initial_conditions=_starts(space, vectors, points, random),
        X_avoid=inputs,
        max_batch_size=128,
    )
    return [space.nearest(point) for point in best.numpy()]


def _starts(space: SearchSpace, vectors: Sequence[Vector], points: Points, random: np.random.Generator) -> Tensor:
    """One random step from random configurations of the front: (starts, 1, coordinates)."""
    front = [vector for vector, kept in zip(vectors, non_dominated(points), strict=True) if kept]
    starts = []
    for _ in range(STARTS):
        start = list(front[random.integers(len(front))])
        at = int(random.integers(len(start)))
        start[at] = (start[at] + int(random.integers(1, space.choices[at]))) % space.choices[at]
        starts.append(start)
    return torch.from_numpy(space.unit(starts))[:, None]


def _fitted(engine: Engine, inputs: Tensor, outputs: Tensor) -> Any:
    """A Gaussian process on inputs (n, coordinates) and outputs (n, 1): plain, or SAAS by NUTS (as published)."""
    if engine == "saas":
        from botorch.fit import fit_fully_bayesian_model_nuts
        from botorch.models.fully_bayesian import SaasFullyBayesianSingleTaskGP

        saas = SaasFullyBayesianSingleTaskGP(inputs, outputs)
        fit_fully_bayesian_model_nuts(
            saas, warmup_steps=128, num_samples=64, thinning=4, max_tree_depth=6, disable_progbar=True
        )
        return saas
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    plain = SingleTaskGP(inputs, outputs)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(plain.likelihood, plain))
    return plain

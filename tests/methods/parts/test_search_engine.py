"""What the engines propose; Bayesian optimisation where botorch is installed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from tpme.bench.errors import UserError
from tpme.methods.parts import search_engine
from tpme.methods.parts.search_engine import chosen_engine, distinct_draws, propose
from tpme.methods.parts.search_front import Points, hypervolume
from tpme.methods.parts.search_space import EncoderSize, SearchSpace, Vector

needs_botorch = pytest.mark.skipif(find_spec("botorch") is None, reason="botorch is not installed (extra search)")
needs_saas = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("botorch", "jax", "numpyro")), reason="SAAS is not installed (extra saas)"
)
SPACE = SearchSpace({m: EncoderSize(width=16, depth=2, key_value=32) for m in ("text", "image")})


def objectives(vectors: Sequence[Vector]) -> Points:
    """A mock of a search: quality falls with the distance from one point of the unit cube."""
    target = np.linspace(0.2, 0.8, len(SPACE.choices))
    quality = -np.abs(SPACE.unit(vectors) - target).mean(axis=1)
    return np.stack([[-SPACE.parameters(vector) for vector in vectors], quality], axis=1)


def searched(engine: Any, seed: int, batches: int = 4) -> list[Vector]:
    """Eight random configurations, then batches of four."""
    torch.manual_seed(seed)
    tried = distinct_draws(SPACE, np.random.default_rng(seed), 8)
    for _ in range(batches):
        tried += propose(engine, SPACE, tried, objectives(tried), tried, 4)
    return tried


def shares(*searches: Sequence[Vector]) -> list[float]:
    """The share of the box of all points that each search dominates, of log parameters and quality."""
    points = [objectives(vectors) for vectors in searches]
    points = [np.stack([-np.log(-each[:, 0]), each[:, 1]], axis=1) for each in points]
    every = np.concatenate(points)
    worst, best = every.min(axis=0), every.max(axis=0)
    return [hypervolume(each, worst) / float(np.prod(best - worst)) for each in points]


def test_random_proposals_are_valid_new_and_follow_the_seed() -> None:
    tried = searched("random", seed=0)
    assert len(set(tried)) == len(tried) == 24
    assert all(map(SPACE.valid, tried))
    assert searched("random", seed=0) == tried
    assert searched("random", seed=1) != tried


def test_a_space_that_is_used_up_gives_fewer() -> None:
    space = SearchSpace({"text": EncoderSize(width=1, depth=1, key_value=2)}, ["serial"])
    assert distinct_draws(space, np.random.default_rng(0), 4) == [(0, 1)]


def test_the_rest_of_a_space_that_is_nearly_used_up_is_drawn_at_random() -> None:
    """Where botorch would find too few configurations to start from."""
    space = SearchSpace({"text": EncoderSize(width=4, depth=1, key_value=8)}, ["serial"])
    every = list(filter(space.valid, itertools.product(*map(range, space.choices))))
    tried = every[: len(every) - 1]
    assert propose("gp", space, tried, np.zeros((len(tried), 2)), tried, 4) == [every[-1]]
    assert propose("gp", space, every, np.zeros((len(every), 2)), every, 4) == []


def test_what_no_encoder_gets_a_module_of_is_never_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes_off = tuple(choices - 1 for choices in SPACE.choices)
    layers_off = tuple(0 for _ in SPACE.choices)
    good = distinct_draws(SPACE, np.random.default_rng(0), 3)
    monkeypatch.setattr(search_engine, "_acquired", lambda *_: [sizes_off, layers_off, good[0], good[2]])
    assert propose("gp", SPACE, good[:2], objectives(good[:2]), good[:2], 1) == [good[2]]


@pytest.mark.parametrize(
    ("installed", "engine", "expected"),
    [
        ((), "random", "random"),
        (("botorch",), "auto", "gp"),
        (("botorch", "jax", "numpyro"), "auto", "saas"),
        (("botorch", "jax", "numpyro"), "gp", "gp"),
    ],
)
def test_auto_is_the_best_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], engine: Any, expected: str
) -> None:
    monkeypatch.setattr(search_engine, "find_spec", lambda name: name if name in installed else None)
    assert chosen_engine(engine) == expected


@pytest.mark.parametrize(
    ("installed", "engine", "message"),
    [
        (
            (),
            "auto",
            r"'auto' needs botorch: pip .*\[search\]'; or search at random, with options = { engine = \"random\" }",
        ),
        ((), "saas", r"'autopeft' with engine = 'saas' needs botorch: pip install .*\[saas\]'"),
        (("botorch",), "saas", r"'autopeft' with engine = 'saas' needs jax and numpyro: pip install .*\[saas\]'"),
    ],
)
def test_a_search_without_its_extra_names_the_command(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], engine: Any, message: str
) -> None:
    monkeypatch.setattr(search_engine, "find_spec", lambda name: name if name in installed else None)
    with pytest.raises(UserError, match=message) as error:
        chosen_engine(engine)
    assert "\n" not in str(error.value)


@needs_botorch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_bayesian_optimisation_beats_random_search_on_a_mock() -> None:
    """By the dominated share, which never falls, after as many trials from the same random ones."""
    found, random = searched("gp", seed=1), searched("random", seed=1)
    assert found[:8] == random[:8]
    assert len(set(found)) == len(found) == 24
    growing = shares(*(found[:n] for n in range(8, 25)))
    assert growing == sorted(growing)
    by_engine = shares(found, random)
    assert by_engine[0] > by_engine[1] + 0.1


@needs_botorch
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_same_state_gives_the_same_batch_which_is_new() -> None:
    tried = searched("random", seed=2, batches=0)
    batches = []
    for _ in range(2):
        torch.manual_seed(5)
        batches.append(propose("gp", SPACE, tried, objectives(tried), tried, 2))
    assert batches[0] == batches[1]
    assert len(set(batches[0]) - set(tried)) == 2
    assert all(map(SPACE.valid, batches[0]))


@needs_saas
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_saas_proposes_what_is_new() -> None:
    tried = searched("random", seed=2, batches=0)
    found = propose("saas", SPACE, tried, objectives(tried), tried, 2)
    assert len(set(found) - set(tried)) == 2


def test_without_two_results_a_proposal_is_random() -> None:
    tried = list(itertools.islice(SPACE.draw(np.random.default_rng(0)), 3))
    assert len(propose("gp", SPACE, tried[:1], objectives(tried[:1]), tried, 2)) == 2

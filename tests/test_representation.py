"""The measure of the representation space: its mathematics, and what a run records of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tpme.bench.record import Representation, SpaceFacts, Spectrum
from tpme.bench.run import representation
from tpme.bench.run.representation import centre, compare, decompose, describe, linear_cka, spectrum
from tpme.bench.train.ending import TimeLimitReached
from tpme.methods.registry import BUILTIN, create, method_class

ROWS, WIDTH = 400, 40


def states(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def skewed(seed: int = 0) -> Tensor:
    """States whose columns differ in scale, rotated, with a mean."""
    return states(seed=seed) * torch.linspace(1, 0.01, WIDTH, dtype=torch.float64) @ rotation(9) + 0.3


def rotation(seed: int = 1, width: int = WIDTH) -> Tensor:
    q, _ = torch.linalg.qr(states(width, width, seed=seed))
    return q


def ranks_of(matrix: Tensor) -> Spectrum:
    return spectrum(decompose(matrix).squares)


def close(one: Spectrum, other: Spectrum) -> bool:
    return one.model_dump() == pytest.approx(other.model_dump(), rel=1e-8)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_a_matrix_without_a_preferred_direction_has_full_rank() -> None:
    orthonormal, _ = torch.linalg.qr(states())
    found = ranks_of(orthonormal)
    assert found.effective_rank == pytest.approx(WIDTH)
    assert found.stable_rank == pytest.approx(WIDTH)
    assert (found.energy_rank_90, found.energy_rank_99) == (36, 40)


def test_one_direction_has_rank_one() -> None:
    found = ranks_of(states(ROWS, 1) @ states(1, WIDTH))
    assert found.effective_rank == pytest.approx(1)
    assert found.stable_rank == pytest.approx(1)
    assert (found.energy_rank_90, found.energy_rank_99) == (1, 1)


def test_ranks_of_known_singular_values() -> None:
    """3, 2, 1: energy 9, 4, 1 of 14; shares 1/2, 1/3, 1/6."""
    left, _ = torch.linalg.qr(states(ROWS, 3))
    found = ranks_of(left @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ rotation(width=3))
    assert found.effective_rank == pytest.approx(2 ** (1 / 2) * 3 ** (1 / 3) * 6 ** (1 / 6))
    assert found.stable_rank == pytest.approx(14 / 9)
    assert (found.energy_rank_90, found.energy_rank_99) == (2, 3)


def test_ranks_change_neither_with_scale_nor_with_rotation() -> None:
    found = ranks_of(skewed())
    assert close(ranks_of(123.0 * skewed()), found)
    assert close(ranks_of(skewed() @ rotation()), found)


def test_ranks_are_those_of_a_singular_value_decomposition() -> None:
    assert close(spectrum(torch.linalg.svdvals(skewed()).square()), ranks_of(skewed()))
    few = skewed()[:10]  # fewer rows than columns
    assert close(spectrum(torch.linalg.svdvals(few).square()), ranks_of(few))


def test_the_mean_counts_in_raw_states_alone() -> None:
    facts = describe(states() + 100, None)
    assert facts.raw.effective_rank < 5
    assert close(facts.centred, ranks_of(centre(states())))


def test_states_that_are_the_same_for_all_items_have_rank_zero() -> None:
    facts = describe(torch.full((ROWS, 3), 0.1, dtype=torch.float64), states())
    assert (facts.raw.energy_rank_99, facts.centred.energy_rank_99, facts.centred.effective_rank) == (1, 0, 0)
    assert facts.cka is None


# --- similarity -------------------------------------------------------------------------------------------------------


def test_a_space_is_its_own() -> None:
    facts = compare(skewed(), skewed())
    assert facts.overlap == pytest.approx({8: 1.0, 32: 1.0})  # 40 wide: there are no 128 dimensions
    assert facts.cosine == pytest.approx({8: 1.0, 32: 1.0})
    assert facts.cka == pytest.approx(1)
    assert (facts.unadapted_raw, facts.unadapted_centred) == (facts.raw, facts.centred)


def test_random_subspaces_overlap_by_their_share_of_the_width() -> None:
    found = [compare(states(900, 200, seed=seed), states(900, 200, seed=seed + 50)).overlap for seed in range(5)]
    for k in (8, 32, 128):
        assert sum(overlap[k] for overlap in found) / len(found) == pytest.approx(k / 200, rel=0.15)


def test_subspaces_in_part_the_same() -> None:
    """Of eight leading directions six stay and two are replaced by those at places 20 and 21."""
    scales = torch.linspace(2, 1, WIDTH, dtype=torch.float64)
    left, _ = torch.linalg.qr(centre(states()))
    swapped = list(range(WIDTH))
    for one, other in ((6, 20), (7, 21)):
        swapped[one], swapped[other] = other, one
    facts = compare((left * scales)[:, swapped], left * scales)
    assert facts.overlap[8] == pytest.approx(6 / 8)
    assert facts.cosine[8] == pytest.approx(6 / 8)


def test_cka_sees_no_rotation_and_the_overlap_does() -> None:
    facts = compare(5 * skewed() @ rotation(3) + 1, skewed())
    assert facts.cka == pytest.approx(1)
    assert facts.overlap[8] < 0.6


def test_cka_of_independent_states_is_small() -> None:
    assert 0 < (linear_cka(states(4000, 20), states(4000, 30, seed=1)) or 0) < 0.05


def test_a_state_that_is_not_finite_is_refused() -> None:
    broken = states()
    broken[3, 3] = torch.nan
    with pytest.raises(ArithmeticError, match="not finite"):
        describe(broken, None)


# --- in a run ---------------------------------------------------------------------------------------------------------


def probed(world: Any, folder: Path, method: Any, **changes: Any) -> Any:
    result = world.tell(world.matrix([method], **{"probe_items": 40, **changes}), folder)
    assert result.status == "ok", result.failure
    return result


def spaces(result: Any) -> dict[str, SpaceFacts]:
    assert isinstance(result.representation, Representation)
    assert result.representation.reasons == {}
    return result.representation.spaces


@pytest.mark.parametrize(
    "method", [pytest.param({"name": "frozen"}, marks=pytest.mark.slow), {"name": "iisan", "cached": True}]
)
def test_frozen_encoders_keep_their_space(world: Any, tmp_path: Path, method: dict[str, Any]) -> None:
    found = spaces(probed(world, tmp_path, method))
    assert list(found) == ["text", "text-mean", "image", "image-mean", "items"]
    for name in ("text", "text-mean", "image", "image-mean"):
        facts = found[name]
        assert (facts.raw, facts.centred) == (facts.unadapted_raw, facts.unadapted_centred)
        assert facts.overlap == pytest.approx({8: 1.0})
        assert facts.cka == pytest.approx(1)
    assert found["items"].width == 16
    assert found["items"].unadapted_raw is None
    assert 0 < (found["items"].cka or 0) < 1


def test_adapted_encoders_are_compared_with_unadapted_ones(world: Any, tmp_path: Path) -> None:
    lr = {"text": 1e-2, "image": 1e-9, "recommender": 1e-3}
    found = spaces(probed(world, tmp_path / "fft", {"name": "fft"}, lr=lr))
    frozen = spaces(probed(world, tmp_path / "frozen", {"name": "frozen"}))
    for name in ("text", "image"):
        assert found[name].unadapted_raw == frozen[name].raw
    assert found["text"].cka < 0.99
    assert found["text"].centred != found["text"].unadapted_centred
    assert found["image"].cka == pytest.approx(1, abs=1e-4)
    assert found["image"].overlap[8] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUILTIN if method_class(name).modalities is None])
def test_every_method_can_be_measured(world: Any, tmp_path: Path, name: str) -> None:
    """Merged and inserted tokens, gathered ones, weights that are merged for inference ..."""
    options = {"autopeft": {"configuration": {"text": {"serial": 2}, "image": {"prefix": 2}}}}.get(name, {})
    method = create(name, options)
    frozen = method.frozen_encoders(("text", "image"))
    found = spaces(
        probed(world, tmp_path, {"name": name, "options": options}, training={"epochs": len(method.stages())})
    )
    assert list(found) == ["text", "text-mean", "image", "image-mean", "items"]
    for modality in ("text", "image"):
        same = found[modality].centred == found[modality].unadapted_centred
        assert same == (modality in frozen), modality


def test_methods_without_encoders_have_item_vectors_alone(world: Any, tmp_path: Path) -> None:
    found = spaces(probed(world, tmp_path, {"name": "id"}))
    assert list(found) == ["items"]
    assert (found["items"].cka, found["items"].overlap) == (None, {})


def test_it_is_off_by_default_and_changes_nothing_else(world: Any, tmp_path: Path) -> None:
    off, on = (
        world.tell(world.matrix(["bitfit"], **settings), tmp_path / str(len(settings)))
        for settings in ({}, {"probe_items": 1000})
    )
    assert off.representation is None
    assert (on.representation.probe_items, on.representation.items) == (1000, on.dataset.items)
    assert off.cell_id == on.cell_id
    assert off.parameters == on.parameters
    assert [epoch.loss for epoch in off.epochs] == [epoch.loss for epoch in on.epochs]
    assert [phase.kind for phase in on.phases if phase.kind != "probe"] == [phase.kind for phase in off.phases]


@pytest.mark.slow
def test_its_phase_counts_towards_no_cost(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made to take half a gigabyte and three seconds, which no T, M, P or all-in time may hold."""
    import time

    held = []

    def slow(*args: Any) -> Any:
        held.append(torch.ones(2**27))
        time.sleep(3)
        return compare(*args)

    monkeypatch.setattr(representation, "compare", slow)
    result = probed(world, tmp_path, {"name": "frozen"})
    [phase] = [phase for phase in result.phases if phase.kind == "probe"]
    assert phase.wall_s > 3
    assert phase.memory.host_rss_bytes.value > 2**29
    assert result.epoch_time_s.value < 3
    assert result.all_in_s.value < 3
    assert result.training_memory.host_rss_bytes.value < 2**29
    assert result.phases.index(phase) > max(n for n, p in enumerate(result.phases) if p.kind == "train")


def test_a_space_that_cannot_be_measured_is_missing_with_its_reason(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(representation, "_final_states", fail)
    result = probed(world, tmp_path, {"name": "lora"})
    assert list(result.representation.spaces) == ["items"]
    assert result.representation.reasons == dict.fromkeys(("text", "image"), "RuntimeError: out of luck")


def test_a_measure_that_fails_does_not_end_the_cell(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_args: Any) -> Any:
        raise TimeLimitReached("took too long")

    monkeypatch.setattr(representation, "describe", late)
    result = probed(world, tmp_path, {"name": "id"})
    assert result.representation is None
    [flag] = [flag.message for flag in result.flags if flag.code == "no-representation"]
    assert flag == "the representation space was not measured: TimeLimitReached: took too long"


@pytest.mark.slow
def test_a_finished_cell_without_the_measure_runs_again(world: Any, tmp_path: Path) -> None:
    [first] = world.run(world.matrix(["popularity"]), tmp_path)
    [again] = world.run(world.matrix(["popularity"], probe_items=30), tmp_path)
    assert (first.attempt, again.attempt, again.representation.items) == (1, 2, 30)
    for settings in ({"probe_items": 30}, {}):
        [kept] = world.run(world.matrix(["popularity"], **settings), tmp_path)
        assert kept.attempt == 2
    [other] = world.run(world.matrix(["popularity"], probe_items=31), tmp_path)
    assert other.attempt == 3

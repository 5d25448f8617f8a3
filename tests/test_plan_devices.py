"""``tpme plan --devices``: a rank's share of a step, memory, traffic, time in collectives, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tpme.bench.commands.plan import render
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.devices import PROFILES
from tpme.bench.counting.exact import count, run_step
from tpme.bench.counting.meta import MetaCell
from tpme.bench.counting.modes import rounded
from tpme.bench.counting.rank_step import RankStep, count_rank
from tpme.bench.counting.roofline import expected_transfer_s
from tpme.bench.counting.traffic import Traffic, all_gather, all_reduce
from tpme.bench.errors import UserError
from tpme.bench.run.matrix import PreparedDataset, expand
from tpme.bench.run.plan import MatrixPlan, plan_matrix

pytestmark = pytest.mark.slow

WIDTH, USERS, LENGTH = 16, 8, 4
PROCEDURES = ["autopeft", "fedpeptao", "ftp", "light-peft", "tpgm"]


@pytest.fixture(scope="module")
def meta(world: Any) -> Callable[..., MetaCell]:
    """``meta("fft", shard=True)``: a cell on 8 users who fill 4 of 10 slots each."""

    def make(method: str, *, cached: bool = False, protocol: str = "paper", **training: Any) -> MetaCell:
        matrix = world.matrix(
            [{"name": method, "cached": cached}],
            protocol=protocol,
            training={"users_per_batch": USERS, "dropout": 0.0} | training,
        )
        [cell] = expand(matrix, {"world": PreparedDataset(world.data, "0" * 64, ("text", "image"))}, device="cuda")
        lengths = np.full(USERS, LENGTH)
        return MetaCell(cell, DataShape(USERS, 1000, 10, np.zeros(1001), lengths, None, "a test"))

    return make


def shown(plan: MatrixPlan) -> str:
    screen = io.StringIO()
    render(plan, Console(file=screen, width=100, color_system=None))
    return screen.getvalue()


def share_of(cell: MetaCell, ranks: int, memory_bytes: int | None = None) -> RankStep:
    return count_rank(cell, count(cell), ranks, memory_bytes=memory_bytes, workspace_bytes=0)


# --- a rank's share --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fft", "lora", "dyt", "id"])
def test_where_all_divides_evenly_each_rank_computes_its_part(meta: Callable[..., MetaCell], method: str) -> None:
    cell = meta(method)
    whole = run_step(cell, fused_attention=True)
    cell.model.zero_grad(set_to_none=True)
    for ranks in (2, 4, 8):
        step = share_of(cell, ranks).step
        assert step.forward_flops * ranks == whole.forward_flops
        assert step.backward_flops * ranks == whole.backward_flops


def test_one_rank_is_the_whole(meta: Callable[..., MetaCell]) -> None:
    cell = meta("lora", protocol="suite")
    whole = run_step(cell, fused_attention=True)
    cell.model.zero_grad(set_to_none=True)
    share = share_of(cell, 1)
    assert (share.step.forward_flops, share.step.backward_flops) == (whole.forward_flops, whole.backward_flops)
    assert share.step.gradient_bytes == whole.gradient_bytes
    assert share.traffic.total == 0


def test_the_rank_with_most_work_is_counted(meta: Callable[..., MetaCell]) -> None:
    cell = meta("fft", protocol="suite")
    items = len(cell.batch.items)
    assert items % 4
    whole = run_step(cell, fused_attention=True)
    cell.model.zero_grad(set_to_none=True)
    step = share_of(cell, 4).step
    assert whole.forward_flops / 4 < step.forward_flops < whole.forward_flops / 4 * 1.2


def test_the_model_is_counted_as_before_after_a_share(meta: Callable[..., MetaCell]) -> None:
    cell = meta("fft")
    count(cell)  # the first time, constants of the encoder are moved
    before = count(cell)
    share_of(cell, 4)
    assert count(cell) == before


# --- traffic ---------------------------------------------------------------------------------------------------------


def test_the_traffic_of_replicas_is_their_vectors_and_gradients(meta: Callable[..., MetaCell]) -> None:
    cell = meta("lora", protocol="suite")
    counts = count(cell)
    traffic = share_of(cell, 4).traffic
    padded = -(-len(cell.batch.items) // 4) * 4
    assert traffic.item_vectors == traffic.vector_gradients == all_gather(padded * WIDTH * 4, 4)
    assert traffic.gradients == all_reduce(counts.trainable * 4, 4)
    assert traffic.sharded_weights == traffic.sharded_gradients == 0


def test_every_pass_gathers_its_vectors(meta: Callable[..., MetaCell]) -> None:
    one, two = (share_of(meta(method), 2).traffic for method in ("lora", "dyt"))
    assert two.item_vectors == 2 * one.item_vectors


def test_sharded_encoders_are_gathered_twice_and_their_gradients_are_not_added_up_everywhere(
    meta: Callable[..., MetaCell],
) -> None:
    cell = meta("fft", devices=4, shard=True)
    traffic = share_of(cell, 4).traffic
    views = cell.model.views.values()
    whole = sum(p.numel() for view in views for p in view.module.parameters()) * 4
    layers = sum(p.numel() for view in views for layer in view.layers for p in layer.parameters()) * 4
    assert 0 < layers < whole
    assert traffic.sharded_weights == all_gather(whole + layers, 4)
    assert traffic.sharded_gradients == all_gather(whole, 4)
    assert traffic.gradients == all_reduce(count(cell).trainable * 4 - whole, 4)


def test_frozen_encoders_that_are_sharded_are_gathered_once(meta: Callable[..., MetaCell]) -> None:
    cell = meta("iisan", devices=4, shard=True)
    traffic = share_of(cell, 4).traffic
    whole = sum(p.numel() for view in cell.model.views.values() for p in view.module.parameters()) * 4
    assert traffic.sharded_weights == all_gather(whole, 4)
    assert traffic.sharded_gradients == 0


def test_time_in_collectives_is_that_of_the_slowest_link() -> None:
    device = PROFILES["h200"].model_copy(
        update={"efficiency": 0.5, "link_bytes_per_s": 8e9, "node_link_bytes_per_s": 2e9, "link_latency_s": 1e-3}
    )
    traffic = Traffic(10**9, 10**9, 0, 0, 0, rounds=10)
    assert expected_transfer_s(traffic, device, 1) == pytest.approx(2e9 / 4e9 + 10 * 1e-3)
    slow = device.model_copy(update={"node_link_latency_s": 5e-3})
    assert expected_transfer_s(traffic, slow, 2) == pytest.approx(2e9 / 1e9 + 10 * 5e-3)
    assert expected_transfer_s(traffic, device.model_copy(update={"link_bytes_per_s": None}), 2) is None


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_rank_holds_the_activations_of_its_share(meta: Callable[..., MetaCell]) -> None:
    cell = meta("fft", protocol="suite")
    step = run_step(cell, fused_attention=True)
    cell.model.zero_grad(set_to_none=True)
    share = share_of(cell, 4)
    assert share.step.saved_bytes < step.saved_bytes / 2
    counts = count(cell)
    assert share.peak_bytes > counts.weight_bytes + counts.optimizer_bytes, "the weights are whole"


def test_sharding_spreads_weights_gradients_and_optimiser(meta: Callable[..., MetaCell]) -> None:
    cell = meta("fft", devices=8, shard=True)
    views = list(cell.model.views.values())
    groups = [[layer.parameters() for layer in view.layers] for view in views]
    assert all(len(layers) == 2 for layers in groups), "two layers are gathered at a time, so here all"
    layers = [[sum(p.numel() for p in layer) * 4 for layer in encoder] for encoder in groups]
    whole = [sum(p.numel() for p in view.module.parameters()) * 4 for view in views]
    largest = [max(*sizes, size - sum(sizes)) for sizes, size in zip(layers, whole, strict=True)]
    saved = share_of(meta("fft"), 8).peak_bytes - share_of(cell, 8).peak_bytes
    replicas = sum(rounded(p.numel() * 4) for view in views for p in view.module.parameters()) + 3 * sum(whole)
    # Of weights, gradients and two moments an eighth is left; gathered weights and gradients to be scattered are added.
    assert saved == pytest.approx(replicas - 4 * sum(whole) / 8 - sum(whole) - sum(largest), abs=2048)


def test_states_that_do_not_fit_whole_are_spread_over_the_ranks(meta: Callable[..., MetaCell]) -> None:
    cell = meta("iisan", cached=True)
    counts = count(cell)
    size = sum(counts.cache_bytes.values())
    step = share_of(cell, 4, memory_bytes=10**15)
    half = 2 * size // 4 + counts.weight_bytes + 1000
    spread = share_of(cell, 4, memory_bytes=half)
    assert step.peak_bytes - spread.peak_bytes == pytest.approx(size * 3 / 4, abs=1024)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_on_several_devices(planned: Any) -> None:
    device = PROFILES["h200"].model_copy(update={"operator_s": 1e-12})
    plan = planned(["fft", "popularity"], device=device, devices=4, nodes=2)
    alone = planned(["fft", "popularity"], device=device)
    fft, popularity = (cell.on_devices for cell in plan.cells)
    assert [cell.on_devices for cell in alone.cells] == [None, None]
    assert alone.all_cells is None
    assert [cell.work for cell in plan.cells] == [cell.work for cell in alone.cells]
    assert (fft.devices, fft.nodes, fft.fits) == (4, 2, "yes")
    assert fft.step_s == fft.compute_s + fft.collectives_s
    assert fft.compute_s < plan.cells[0].expected.step_s
    assert fft.speed_up == plan.cells[0].expected.step_s / fft.step_s
    assert plan.cells[0].peak_bytes == fft.peak_bytes < plan.cells[0].work.peak_bytes
    assert (popularity.problem, popularity.step_s) == ("trains nothing", None)
    one_node = planned(["fft"], device=device, devices=4).cells[0].on_devices
    assert one_node.collectives_s < fft.collectives_s
    assert one_node.compute_s == fft.compute_s
    text = " ".join(shown(plan).split())
    assert "Together on 4 devices on 2 nodes" in text
    assert "an upper bound" in text
    assert "50.0 GB/s between nodes" in text
    assert "On one device alone: popularity: trains nothing." in text
    assert max(map(len, shown(plan).splitlines())) <= 100


def test_a_matrix_that_sets_devices_is_planned_on_them(planned: Any) -> None:
    by_matrix = planned(["fft"], training={"devices": 2}).cells[0].on_devices
    by_option = planned(["fft"], devices=2).cells[0].on_devices
    assert by_matrix == by_option
    assert by_matrix.step_s is by_matrix.fits is None, "no device profile"
    assert planned(["fft"], training={"devices": 2}, devices=1).cells[0].on_devices is None


def test_methods_that_own_the_procedure_train_on_one_device(planned: Any) -> None:
    methods = [{"name": name, "options": {"clients": 2}} if name == "fedpeptao" else name for name in PROCEDURES]
    plan = planned([*methods, "lora"], devices=2, device=PROFILES["h200"])
    reasons = {cell.label: cell.on_devices.problem for cell in plan.cells if cell.on_devices}
    assert reasons.pop("lora") is None
    assert set(reasons) == set(PROCEDURES)
    assert set(reasons.values()) == {"controls its whole procedure, which runs on one device"}


def test_a_profile_without_links_leaves_times_out(planned: Any) -> None:
    device = PROFILES["h200"].model_copy(update={"link_bytes_per_s": None})
    plan = planned(["fft"], devices=2, device=device)
    [cell] = plan.cells
    assert cell.on_devices.compute_s is not None
    assert cell.on_devices.collectives_s is cell.on_devices.step_s is cell.on_devices.speed_up is None
    assert plan.all_cells is None
    assert "not known" in shown(plan)
    assert "link_bytes_per_s" in shown(plan)


def test_all_cells_side_by_side_or_one_by_one(world: Any, harness: ModuleType) -> None:
    matrix = world.matrix(["fft", "popularity", "tpgm"], seeds=[1, 2, 3, 4], training={"epochs": 3})
    plan = plan_matrix(matrix, store=world.store, console=harness.quiet(), devices=2, device=PROFILES["h200"])
    fft, _, tpgm = plan.cells
    one = [3 * cell.expected.epoch_s for cell in (fft, tpgm)]
    together = 3 * fft.on_devices.step_s * fft.work.epoch_steps
    assert plan.all_cells is not None
    assert plan.all_cells.cells == 12
    assert plan.all_cells.device_s == pytest.approx(4 * sum(one))
    assert plan.all_cells.side_by_side_s == pytest.approx(4 * sum(one) / 2)
    assert plan.all_cells.one_by_one_s == pytest.approx(4 * (together + one[1]))
    assert "All epochs of all cells (12): " in " ".join(shown(plan).split())


def test_no_cell_is_split_when_cells_stand_side_by_side(planned: Any) -> None:
    plan = planned(["fft"], devices=8, device=PROFILES["h200"])
    assert plan.all_cells.side_by_side_s == plan.cells[0].expected.epoch_s


def test_a_share_that_cannot_be_counted_leaves_the_rest_of_the_row(
    world: Any, harness: ModuleType, tmp_path: Path
) -> None:
    body = """
    def encode(self, model, items):
        assert len(items) > 20, "all items, please"
        return model.encode_items(items)
    """
    harness.write_method(tmp_path, "greedy", body)
    plan = plan_matrix(
        world.matrix(["greedy"]), store=world.store, methods_path=[tmp_path], console=harness.quiet(), devices=16
    )
    [cell] = plan.cells
    assert cell.work is not None
    assert "all items, please" in cell.on_devices.problem


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 0}, "--devices 0"),
        ({"devices": -1}, "--devices -1"),
        ({"nodes": 0}, "--nodes 0"),
        ({"devices": 8, "nodes": 3}, "--nodes 3: the devices of a cell .8. do not divide evenly .* such as 9"),
        ({"nodes": 2}, "--nodes 2: the devices of a cell .1. do not divide evenly"),
        ({"devices": 33}, "method 'fft' on data set 'world': a step has 32 users, too few for 33 devices"),
    ],
)
def test_devices_that_a_cell_cannot_use_are_refused(planned: Any, settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(["fft"], **settings)


def test_from_the_command_line(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    matrix = str(world.write(tmp_path / "small.toml", world.matrix(["frozen"])))
    plan = ("plan", matrix, "--store", str(world.store))
    ran = harness.tpme_here(*plan, "--devices", "2", "--device-profile", "h100", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    [cell] = MatrixPlan.model_validate(json.loads(ran.stdout)).cells
    assert cell.on_devices is not None
    assert set(cell.on_devices.traffic_bytes) == {
        "item_vectors", "vector_gradients", "gradients", "sharded_weights", "sharded_gradients",
    }  # fmt: skip
    for arguments in (("--devices", "0"), ("--devices", "4", "--nodes", "3")):
        ran = harness.tpme_here(*plan, *arguments, cwd=tmp_path)
        assert ran.returncode == 2
        assert ran.stderr.startswith("tpme: --")
        assert len(ran.stderr.splitlines()) == 1

"""Inference: FLOPs counted on real data, timed passes, memory of a phase of its own, and what of it a record says."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.counting.encoding import item_flops
from tpme.bench.record import CellResult, Timings
from tpme.bench.run import inference
from tpme.bench.run.inference import FEWEST, LEAST_S, MOST
from tpme.bench.task.items import Items

WIDTH = 8


def numbered(*ids: int) -> Items:
    return Items(torch.tensor(ids))


# --- FLOPs an item -------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_encoders_and_of_the_head(tiny: ModuleType) -> None:
    """Against the closed formula of a BERT: per token and layer 4 D^2 + 2 D F of projections, 2 T D of attention."""
    _, model = tiny.build("frozen", modalities=("text",))
    model.eval()
    items = tiny.items(("text",))
    d, t = tiny.WIDTH, items.tokens.shape[1]
    layer = 2 * t * (4 * d * d + 2 * d * tiny.FFN) + 2 * 2 * t * t * d
    assert item_flops(model.encode_items, items) == (tiny.DEPTH * layer + 2 * d * tiny.DIM, ())


def test_only_work_that_the_data_asks_for_is_counted() -> None:
    """Items with even ids leave after the first layer."""
    first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def encode(items: Items) -> Tensor:
        x = first(items.ids[:, None].float().expand(-1, WIDTH))
        stays = (items.ids % 2).bool()
        x[stays] = second(x[stays])
        return x

    one = 2 * WIDTH * WIDTH
    assert item_flops(encode, numbered(2, 4)) == (one, ())
    assert item_flops(encode, numbered(1, 2, 4, 6)) == (1.25 * one, ())
    assert item_flops(encode, numbered(1, 3)) == (2 * one, ())


def test_fused_operators_are_counted_by_their_parts() -> None:
    """Attention by torch's math, a whole layer of nn.TransformerEncoder without its fast path."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True).eval()
    data = torch.randn(2, 3, WIDTH)
    flops, uncounted = item_flops(lambda _: layer(data), numbered(1, 2))
    assert uncounted == ()
    assert flops == 2 * 3 * (4 * WIDTH * WIDTH + 2 * WIDTH * 16) + 2 * 2 * 3 * 3 * WIDTH
    assert torch.backends.mha.get_fastpath_enabled()
    q = torch.randn(2, 1, 3, WIDTH)
    assert item_flops(lambda _: functional.scaled_dot_product_attention(q, q, q), numbered(1, 2))[0] == 4 * 9 * WIDTH


def test_compiled_parts_are_counted_as_without_and_stay_compiled() -> None:
    """Under a dispatch mode dynamo would give up a function for good."""

    def hidden(_graph: object, _inputs: object) -> Callable[..., tuple[Tensor]]:
        """A compiler whose code shows no operator, as a fused kernel does."""
        return lambda *_: (torch.zeros(2, WIDTH),)

    compiled = torch.compile(nn.Linear(WIDTH, WIDTH), backend=hidden)
    data = torch.randn(2, WIDTH)
    assert item_flops(lambda _: compiled(data), numbered(1, 2)) == (2 * WIDTH * WIDTH, ())
    with torch.no_grad():
        assert not compiled(data).any()


def test_an_operator_without_a_formula_is_named() -> None:
    data = torch.randn(3, 3)
    flops, uncounted = item_flops(lambda _: torch.matrix_exp(data @ data.T), numbered(1))
    assert flops == 2 * 27
    assert uncounted == ("aten.linalg_matrix_exp",)


@pytest.mark.gpu
def test_flops_are_the_same_on_a_gpu(tiny: ModuleType) -> None:
    _, model = tiny.build("lora")
    items = tiny.items()
    on_cpu = item_flops(model.eval().encode_items, items)
    assert item_flops(model.cuda().encode_items, items.to(torch.device("cuda"))) == on_cpu


# --- measured in a cell --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CellResult]:
    """Records by row."""
    rows = ["lora", "id", "popularity", {"name": "frozen", "cached": [False, True]}]
    results = world.run(world.matrix(rows), tmp_path_factory.mktemp("rows"))
    return {result.cell.label: result for result in results}


def test_every_row_says_what_serving_it_costs(cells: dict[str, CellResult]) -> None:
    assert len(cells) == 5
    for result in cells.values():
        facts = result.inference
        assert facts is not None
        assert result.inference_items_per_s is None
        assert (facts.single.size, facts.batch.size, facts.user.size) == (1, result.dataset.items, 1)
        for timings in (facts.single, facts.batch, facts.user):
            assert FEWEST <= len(timings.run_s) <= MOST
        [phase] = [phase for phase in result.phases if phase.kind == "inference"]
        assert phase.memory == facts.memory
        assert facts.memory.host_rss_bytes.value is not None
        assert facts.flops_per_item.valid
        assert not facts.flops_by_data
        assert f"one pass over {result.dataset.items} items" in facts.flops_per_item.source
    passed = [phase.kind for phase in cells["lora"].phases]
    assert passed.index("export") < passed.index("inference")


def test_flops_and_bytes_of_the_rows(cells: dict[str, CellResult]) -> None:
    """Ids are looked up; a cached row has its side network and the table of states; a merged one costs the same."""
    flops = {name: result.inference.flops_per_item.value for name, result in cells.items()}
    loaded = {name: result.inference.loaded_bytes.value for name, result in cells.items()}
    assert flops["id"] == flops["popularity"] == 0
    assert flops["lora"] == flops["frozen"] > 100 * flops["frozen (cached)"] > 0
    assert "without the encoders of text and image" in cells["frozen (cached)"].inference.flops_per_item.source
    assert {name: result.inference.looked_up for name, result in cells.items() if result.inference.looked_up} == {
        "frozen (cached)": ("text", "image")
    }
    for name in ("frozen", "lora", "id"):
        assert loaded[name] == pytest.approx(4 * cells[name].parameters.total, rel=0.02), "buffers are few"
    cached = cells["frozen (cached)"]
    assert loaded["frozen (cached)"] == 4 * cached.parameters.total + cached.cache.bytes
    assert loaded["popularity"] == 4 * (1 + cached.dataset.items), "a buffer: one number for every item, and padding"


DYNAMIC = """
def encode_fewer(self, model):
    whole = model.encode_items
    extra = torch.nn.Linear(64, 64)

    def encode(items):
        rows = items.ids % 2 == 0
        extra(torch.ones(int(rows.sum()), 64))
        return whole(items)

    return encode

def prepare_inference(self, model):
    model.encode_items = self.encode_fewer(model)
"""


def test_flops_that_depend_on_the_data_say_so(
    run_cell: Callable[..., CellResult], cells: dict[str, CellResult]
) -> None:
    plain = run_cell("pass")
    dynamic = run_cell(DYNAMIC)
    more = 2 * 64 * 64
    assert dynamic.inference.flops_by_data
    assert dynamic.inference.flops_per_item.value == plain.inference.flops_per_item.value + more / 2
    assert "they differ with the data" in dynamic.inference.flops_per_item.source
    assert dynamic.inference.flops_per_item.valid


def test_an_operator_without_a_formula_makes_the_count_invalid(run_cell: Callable[..., CellResult]) -> None:
    body = """
    def prepare_inference(self, model):
        whole = model.encode_items
        model.encode_items = lambda items: whole(items) + 0 * torch.matrix_exp(torch.eye(3)).sum()
    """
    reading = run_cell(body).inference.flops_per_item
    assert not reading.valid
    assert reading.reason == "no FLOP formula for aten.linalg_matrix_exp"


def test_a_failure_costs_its_own_reading_alone(run_cell: Callable[..., CellResult]) -> None:
    body = """
    def prepare_inference(self, model):
        whole = model.encode_items
        def encode(items):
            if len(items) == 1:
                raise ValueError("one item has no neighbours")
            return whole(items)
        model.encode_items = encode
    """
    result = run_cell(body)
    assert result.status == "ok"
    assert result.inference.single == Timings(size=1, reason="ValueError: one item has no neighbours")
    assert result.inference.flops_per_item.reason == "ValueError: one item has no neighbours"
    assert result.inference.batch.run_s
    assert result.inference.user.run_s
    body = """
    def prepare_inference(self, model):
        def encode(items):
            raise ValueError("nothing")
        model.encode_items = encode
    """
    failed = run_cell(body)
    assert failed.status == "ok"
    assert failed.inference.user.reason == "there are no item vectors: ValueError: nothing"


def test_a_trained_cell_is_a_result_also_where_inference_cannot_be_measured(
    run_cell: Callable[..., CellResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_trainer: Any, _items: Items) -> None:
        raise MemoryError

    monkeypatch.setattr(inference, "_service", full)
    result = run_cell("pass")
    assert (result.status, result.inference) == ("ok", None)
    assert [flag.message for flag in result.flags if flag.code == "no-inference"] == [
        "inference was not measured: MemoryError"
    ]


def test_a_user_is_served_the_best_items_that_are_new(
    run_cell: Callable[..., CellResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The served ids are those of the highest scores, without padding and without the history."""
    seen = []

    def watched(trainer: Any, items: Items) -> Callable[[int], Tensor]:
        serve = service(trainer, items)
        vectors = trainer.model.encode_items(items)
        table = vectors[torch.arange(trainer.dataset.manifest.items + 1) % len(items)]

        def checked(turn: int) -> Tensor:
            ids = serve(turn)
            history = torch.from_numpy(
                trainer.dataset.test.inputs[turn % len(trainer.dataset.test.inputs)].astype("int64")
            )
            user = trainer.model.user_vectors(table[history][None], history[None] > 0)[0, -1]
            scores = table @ user
            scores[history] = scores[0] = -torch.inf
            torch.testing.assert_close(scores[ids[0]], scores.topk(10).values)
            seen.append(turn)
            return ids

        return checked

    service = inference._service
    monkeypatch.setattr(inference, "_service", watched)
    result = run_cell("pass")
    assert result.inference.user.reason is None
    assert len(seen) >= FEWEST


def test_short_work_is_repeated_within_a_run_and_long_work_is_not() -> None:
    trainer = SimpleNamespace(device=torch.device("cpu"), outcome=SimpleNamespace(step_s=[]))
    turns: list[int] = []
    short = inference._timed(trainer, turns.append, 1)
    assert len(short.run_s) == MOST
    assert short.passes > 1
    assert turns == list(range(2 + MOST * short.passes)), "every pass has its own number"
    assert sum(short.run_s) * short.passes < 5 * LEAST_S
    long = inference._timed(trainer, lambda _: time.sleep(0.05), 1)
    assert (len(long.run_s), long.passes) == (FEWEST, 1)
    assert min(long.run_s) >= 0.05

"""Inference: FLOPs counted on real data, timed passes, memory of a phase of its own, and what of it a record says."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.counting.encoding import item_flops
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
    flops, uncounted = item_flops(lambda _: torch.linalg.inv(data @ data.T), numbered(1))
    assert flops == 2 * 27
    assert uncounted == ("aten.linalg_inv_ex",)


@pytest.mark.gpu
def test_flops_are_the_same_on_a_gpu(tiny: ModuleType) -> None:
    _, model = tiny.build("lora")
    items = tiny.items()
    on_cpu = item_flops(model.eval().encode_items, items)
    assert item_flops(model.cuda().encode_items, items.to(torch.device("cuda"))) == on_cpu

from __future__ import annotations

import copy
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.view import EncoderView
from tpme.methods.parts.parallel import ParallelBottleneck, add_parallel

IMAGE = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(3, 49, (3, 7), generator=torch.Generator().manual_seed(0))


def encoded(view: EncoderView) -> Tensor:
    """Every hidden state of three items, (3, L + 2, T, width)."""
    reads = Reads(levels=tuple(range(view.shape.depth + 1)), final=True, tokens="all")
    items = Items(torch.arange(3), tokens=TOKENS, token_mask=torch.ones_like(TOKENS), image=IMAGE)
    return view.encode(reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image).states


def view_of(family: str) -> EncoderView:
    return EncoderView(small_encoder(family), modality_of(family))


def _unchanged(_x: Tensor, f: Tensor) -> Tensor:
    return f


def _only_sum(kept: list[Tensor], x: Tensor, f: Tensor) -> Tensor:
    kept[:] = [x.detach(), f.detach()]
    return torch.zeros_like(f)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_branch_that_returns_f_changes_nothing(family: str) -> None:
    view = view_of(family)
    before = encoded(view)
    for layer in range(view.shape.depth):
        add_parallel(view, layer, _unchanged)
    torch.testing.assert_close(encoded(view), before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_branch_gets_the_input_of_the_half_and_the_output_before_the_residual(family: str) -> None:
    """Without f, a layer ends with x in a pre-norm encoder, and with its norm of x in a post-norm one."""
    view, kept = view_of(family), []
    add_parallel(view, 1, partial(_only_sum, kept))
    plain = view_of(family)
    half = []
    plain.insert_between(1, lambda x: half.append(x) or x)
    before, after = encoded(plain), encoded(view)
    x, f = kept
    torch.testing.assert_close(x, half[0])
    level = 2  # the output of layer 1
    [norm] = [view.norms(1)[1]]
    post = torch.allclose(norm(x + f), before[:, level], atol=1e-5)
    torch.testing.assert_close(before[:, level], norm(x + f) if post else x + f)
    torch.testing.assert_close(after[:, level], norm(x) if post else x)
    assert post == (family in ("bert", "roberta", "distilbert", "mpnet"))


def test_a_deep_copy_runs_its_own_branch(tiny: ModuleType) -> None:
    view = tiny.views(("image",))["image"]
    branch = nn.Bilinear(tiny.WIDTH, tiny.WIDTH, tiny.WIDTH)
    view.module.add_module("branch", branch)
    add_parallel(view, 0, branch)
    reads, image = Reads(final=True), tiny.items(("image",)).image
    before = view.encode(reads, image=image)
    other = copy.deepcopy(view)
    assert torch.equal(other.encode(reads, image=image), before)
    with torch.no_grad():
        branch.bias.add_(1)
    assert torch.equal(other.encode(reads, image=image), before)
    assert not torch.equal(view.encode(reads, image=image), before)


def test_the_bottleneck_starts_at_zero_and_follows_its_formula() -> None:
    torch.manual_seed(0)
    part, x = ParallelBottleneck(6, 4, scale=0.5).eval(), torch.randn(2, 3, 6)
    assert not part(x).any()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    up = (x @ part.down.weight.T + part.down.bias).clamp(min=0) @ part.up.weight.T + part.up.bias
    torch.testing.assert_close(part(x), 0.5 * up)


def test_the_bottleneck_drops_activations_in_training_alone() -> None:
    part, x = ParallelBottleneck(6, 4, scale=1.0, dropout=0.999), torch.ones(1, 6)
    nn.init.ones_(part.up.weight)
    nn.init.ones_(part.down.weight)
    assert not part.train()(x).any()
    assert part.eval()(x).all()

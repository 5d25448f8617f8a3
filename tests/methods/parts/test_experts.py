from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tpme.methods.parts.experts import AdapterExperts, Mixing, expert_parameters
from tpme.methods.parts.token_mask import TokenMask


def experts(mixing: Mixing, number: int = 3, mask: Tensor | None = None) -> AdapterExperts:
    """Experts of width 6 and bottleneck 4, with every parameter away from zero."""
    tokens = TokenMask()
    tokens.value = mask
    torch.manual_seed(0)
    part = AdapterExperts(6, 4, 0.5, 0.0, number, mixing, tokens)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    return part


def by_hand(part: AdapterExperts, x: Tensor, alpha: Tensor) -> Tensor:
    """Item by item, as the formulas are written."""
    results = []
    for item, shares in zip(x, alpha, strict=True):
        if part.mixing == "merge":
            down, down_bias, up, up_bias = (
                sum(share * weight for share, weight in zip(shares, weights, strict=True))
                for weights in (part.down, part.down_bias, part.up, part.up_bias)
            )
            results.append(0.5 * ((item @ down.T + down_bias).relu() @ up.T + up_bias))
        else:
            outputs = [
                (item @ part.down[e].T + part.down_bias[e]).relu() @ part.up[e].T + part.up_bias[e]
                for e in range(len(shares))
            ]
            results.append(0.5 * sum(share * out for share, out in zip(shares, outputs, strict=True)))
    return torch.stack(results)


@pytest.mark.parametrize("mixing", ["merge", "mix"])
def test_the_experts_are_weighed_by_item(mixing: Mixing) -> None:
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    part, x = experts(mixing, mask=mask), torch.randn(2, 5, 6)
    means = torch.stack([x[0].mean(0), x[1, :2].mean(0)])
    alpha = (means @ part.router.weight.T).softmax(1)
    torch.testing.assert_close(part(x), by_hand(part, x, alpha))
    part.tokens.value = None
    torch.testing.assert_close(part(x), by_hand(part, x, (x.mean(1) @ part.router.weight.T).softmax(1)))


@pytest.mark.parametrize("mixing", ["merge", "mix"])
def test_equal_experts_are_one_adapter(mixing: Mixing) -> None:
    part, x = experts(mixing), torch.randn(2, 5, 6)
    with torch.no_grad():
        for weights in (part.down, part.down_bias, part.up, part.up_bias):
            weights.copy_(weights[:1].expand_as(weights))
    one = (x @ part.down[0].T + part.down_bias[0]).relu() @ part.up[0].T + part.up_bias[0]
    torch.testing.assert_close(part(x), 0.5 * one)


@pytest.mark.parametrize("mixing", ["merge", "mix"])
def test_new_experts_give_zero_and_differ(mixing: Mixing) -> None:
    part = AdapterExperts(6, 4, 0.5, 0.1, 2, mixing, TokenMask())
    assert not part(torch.randn(2, 5, 6)).any()
    assert not torch.allclose(part.down[0], part.down[1])


def test_an_item_that_is_padding_has_finite_states() -> None:
    part = experts("merge", mask=torch.zeros(1, 5, dtype=torch.bool))
    assert part(torch.randn(1, 5, 6)).isfinite().all()


@pytest.mark.parametrize("number", [2, 3])
def test_parameters(number: int) -> None:
    assert sum(p.numel() for p in experts("mix", number).parameters()) == expert_parameters(6, 4, number)
    assert expert_parameters(6, 4, 1) == 2 * 6 * 4 + 4 + 6

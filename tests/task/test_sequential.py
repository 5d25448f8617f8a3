from __future__ import annotations

import pytest
import torch

from tpme.bench.errors import UserError
from tpme.bench.task.sequential import SequentialEncoder


def encoder(dropout: float = 0.0) -> SequentialEncoder:
    torch.manual_seed(0)
    return SequentialEncoder(8, 5, blocks=2, heads=2, dropout=dropout)


def left_padded(*lengths: int) -> torch.Tensor:
    return torch.arange(5) >= 5 - torch.tensor(lengths)[:, None]


def test_a_position_sees_only_what_came_before() -> None:
    model, vectors, mask = encoder().eval(), torch.randn(2, 5, 8), left_padded(5, 3)
    before = model(vectors, mask)
    vectors[:, 3:] = 9.0
    after = model(vectors, mask)
    torch.testing.assert_close(after[:, :3][mask[:, :3]], before[:, :3][mask[:, :3]], rtol=0, atol=0)
    assert not torch.equal(after[:, 3:], before[:, 3:])


def test_padding_has_no_influence_and_nothing_is_nan() -> None:
    model, vectors, mask = encoder().eval(), torch.randn(3, 5, 8, requires_grad=True), left_padded(2, 4, 0)
    output = model(vectors, mask)
    assert output.isfinite().all()
    other = torch.where(mask[..., None], vectors, torch.full_like(vectors, 7.0))
    torch.testing.assert_close(model(other, mask)[mask], output[mask])
    output[mask].sum().backward()
    assert vectors.grad is not None
    assert vectors.grad[~mask].eq(0).all()


def test_a_shorter_sequence_takes_the_last_positions() -> None:
    model, vectors = encoder().eval(), torch.randn(1, 3, 8)
    padded = torch.cat([torch.zeros(1, 2, 8), vectors], dim=1)
    short = model(vectors, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(short, model(padded, left_padded(3))[:, 2:])


def test_it_drops_out_in_train_mode_only() -> None:
    model, vectors, mask = encoder(dropout=0.5), torch.randn(2, 5, 8), left_padded(5, 5)
    assert not torch.equal(model.train()(vectors, mask), model(vectors, mask))
    assert torch.equal(model.eval()(vectors, mask), model(vectors, mask))


def test_parameters_at_the_papers_size() -> None:
    assert sum(p.numel() for p in SequentialEncoder(64, 10, 2, 2, 0.1).parameters()) == 100_224


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="embedding_dim 8 is not a multiple of heads 3"):
        SequentialEncoder(8, 5, blocks=1, heads=3, dropout=0.0)

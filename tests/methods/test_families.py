"""Every built-in method on every family of encoders: it works as elsewhere, or is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.errors import UserError
from tpme.bench.record import LearningRates, Modality, Training
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import ModelBuilder
from tpme.methods.base import TaskShape
from tpme.methods.registry import BUILTIN, create

WITHOUT = {"id", "popularity"}
"""They use no encoder."""
ELSEWHERE = {"context-peft", "pt-peft", "light-peft"}
"""One needs both modalities, one trains in stages, the first of which is method ``prefix``; one cuts the encoders."""
METHODS = [name for name in BUILTIN if name not in WITHOUT | ELSEWHERE]
REFUSED = {
    ("dapt", "modernbert"): "have no bias to fold a shift into",
    ("dapt", "llama"): "have no bias to fold a shift into",
    ("bitfit", "modernbert"): "has no biases",
    ("bitfit", "llama"): "has no biases",
    ("prompt", "modernbert"): "counts positions from the token ids",
    ("prefix", "mpnet"): "computes its attention itself",
    ("autopeft", "mpnet"): "computes its attention itself",
    ("fedpeptao", "mpnet"): "computes its attention itself",
}
EVERY_ROLE = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
OPTIONS: dict[str, dict[str, Any]] = {"lora": {"targets": EVERY_ROLE}, "adalora": {"rank": 8}}
"""AdaLoRA's usual rank is above the width of Llama's keys and values here."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_reads_each_item_by_itself_or_is_refused(tiny: ModuleType, name: str, family: str) -> None:
    method, modality = create(name, OPTIONS.get(name, {})), modality_of(family)
    view = EncoderView(small_encoder(family), modality)
    torch.manual_seed(3)
    training = Training(epochs=2, users_per_batch=3, embedding_dim=tiny.DIM, heads=tiny.HEADS, dropout=0.0)
    builder = ModelBuilder(method, training, tiny.data_size(), {modality: view.shape})
    if (name, family) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name, family]) as error:
            builder.build({modality: view})
        assert "\n" not in str(error.value)
        return
    model = builder.build({modality: view})
    fresh = EncoderView(small_encoder(family), modality)
    task = TaskShape(tiny.DIM, tiny.ITEMS, {modality: view.shape})
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    recommender = sum(p.numel() for p in model.sequence.parameters())
    assert trains - recommender == method.trainable_parameters(task, {modality: fresh})

    inputs = tiny.items((modality,))
    before = tiny.vectors(model, inputs)
    losses = tiny.train(method, model, 12, (modality,))
    assert losses[-1] < losses[0]
    after = tiny.vectors(model, inputs)
    assert not torch.allclose(after, before, atol=1e-3)
    assert len({tuple(vector) for vector in after.tolist()}) == len(inputs)
    _each_by_itself(tiny, model, modality)
    assert all(group["lr"] > 0 for group in method.param_groups(model, LearningRates()))


def _each_by_itself(tiny: ModuleType, model: torch.nn.Module, modality: Modality) -> None:
    """Other items of a batch and longer padding change no vector."""
    inputs = tiny.items((modality,))
    together = tiny.vectors(model, inputs)
    alone = torch.cat([tiny.vectors(model, tiny.items((modality,), [item])) for item in inputs.ids.tolist()])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)
    if inputs.tokens is not None:
        garbage = torch.full((len(inputs), 5), 9)
        longer = replace(
            inputs,
            tokens=torch.cat([inputs.tokens, garbage], dim=1),
            token_mask=torch.cat([inputs.token_mask, torch.zeros_like(garbage)], dim=1),
        )
        torch.testing.assert_close(tiny.vectors(model, longer), together, atol=1e-5, rtol=1e-4)


def test_prompts_are_not_read(tiny: ModuleType) -> None:
    """A mean over the tokens leaves them out, and ``tokens = "all"`` masks them."""
    from tpme.bench.task.items import Reads

    view = EncoderView(small_encoder("llama"), "text")
    training = Training(embedding_dim=tiny.DIM, heads=tiny.HEADS)
    method = create("prompt", {"length": 3})
    model = ModelBuilder(method, training, tiny.data_size(), {"text": view.shape}).build({"text": view}).eval()
    inputs = tiny.items(("text",))
    given = {"tokens": inputs.tokens, "token_mask": inputs.token_mask}
    every = model.views["text"].encode(Reads((1,), tokens="all"), **given)
    assert every.states.shape[2] == inputs.tokens.shape[1] + 3
    assert torch.equal(every.mask.sum(1), inputs.token_mask.sum(1))
    assert not every.mask[:, 1:4].any()
    mean = (every.states[:, 0] * every.mask[..., None]).sum(1) / every.mask.sum(1, keepdim=True)
    torch.testing.assert_close(view.encode(Reads((1,), pool="mean"), **given)[:, 0], mean)

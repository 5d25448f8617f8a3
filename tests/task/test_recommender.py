from __future__ import annotations

import copy
from collections.abc import Collection
from types import ModuleType

import pytest
import torch

from tpme.bench.record import Modality
from tpme.bench.task.items import EncoderShape, Items
from tpme.bench.task.recommender import Recommender, TokenFusion, group
from tpme.bench.task.sequential import SequentialEncoder

SHAPES: dict[Modality, EncoderShape] = {"text": EncoderShape(16, 2), "image": EncoderShape(16, 2)}


def recommender(tiny: ModuleType, *, frozen: Collection[Modality] = (), dropout: float = 0.0) -> Recommender:
    torch.manual_seed(0)
    sequence = SequentialEncoder(8, 5, 1, 2, dropout)
    return Recommender(tiny.views(dropout=dropout), TokenFusion(SHAPES, 8), sequence, frozen=frozen)


def test_image_comes_before_text() -> None:
    fusion = TokenFusion(SHAPES, 8)
    states = {modality: torch.randn(3, 1, 16) for modality in SHAPES}
    parts = [torch.nn.functional.gelu(fusion.heads[m](states[m][:, 0])) for m in ("image", "text")]
    torch.testing.assert_close(fusion(states, torch.arange(3)), fusion.fusion(torch.cat(parts, dim=1)))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_one_modality_needs_no_fusion(modality: Modality) -> None:
    fusion = TokenFusion({modality: EncoderShape(16, 2)}, 8)
    state = torch.randn(3, 1, 16)
    expected = torch.nn.functional.gelu(fusion.heads[modality](state[:, 0]))
    assert torch.equal(fusion({modality: state}, torch.arange(3)), expected)
    assert sum(p.numel() for p in fusion.parameters()) == 16 * 8 + 8


def test_encoders_arrive_frozen_and_the_rest_trains(tiny: ModuleType) -> None:
    model = recommender(tiny)
    assert not any(p.requires_grad for p in model.encoders.parameters())
    groups = model.parameter_groups()
    assert list(groups) == ["recommender"]
    trainable = {id(p) for p in (*model.sequence.parameters(), *model.item_encoder.parameters())}
    assert {id(p) for p in groups["recommender"]} == trainable


def test_groups_hold_every_trainable_parameter_once(tiny: ModuleType) -> None:
    model = recommender(tiny)
    model.encoders.requires_grad_(True)
    grouped = [id(p) for parameters in model.parameter_groups().values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_parameters_anywhere_train_in_a_named_group(tiny: ModuleType) -> None:
    model = recommender(tiny)
    model.encoders.requires_grad_(True)
    head, layer = model.item_encoder.heads["text"], model.views["text"].layers[0]
    group(model.views["text"].module, "slow")
    group(layer, "layer")
    group(head, "biases", ["bias"])
    groups = copy.deepcopy(model).parameter_groups()
    assert list(groups) == ["recommender", "biases", "slow", "layer", "image"]
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()}
    assert sizes["biases"] == head.bias.numel()
    assert sizes["layer"] == sum(p.numel() for p in layer.parameters())
    assert sizes["layer"] + sizes["slow"] == sum(p.numel() for p in model.encoders["text"].parameters())
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())


def test_frozen_encoders_run_without_gradient_and_dropout(tiny: ModuleType) -> None:
    model, items = recommender(tiny, frozen=SHAPES, dropout=0.5).train(), tiny.items()
    recording: list[bool] = []
    for view in model.views.values():
        view.layers[0].register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    states, again = model.hidden_states(items), model.hidden_states(items)
    assert all(torch.equal(states[modality], again[modality]) for modality in states)
    assert recording == [False] * 4
    assert not any(part.training for part in model.encoders.modules() if part is not model.encoders)
    assert model.sequence.training


def test_cached_states_are_used_as_they_are_in_the_models_precision(tiny: ModuleType) -> None:
    model = recommender(tiny, frozen=SHAPES)
    items = tiny.items()
    half = {modality: state.half() for modality, state in model.hidden_states(items).items()}
    cached = Recommender({}, model.item_encoder, model.sequence, frozen=SHAPES)
    vectors = cached.encode_items(Items(items.ids, states=half))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, model.encode_items(items), atol=1e-2, rtol=1e-2)


def test_one_encoder_trains_while_the_other_is_read_from_cached_states(tiny: ModuleType) -> None:
    model, items = recommender(tiny, frozen=("image",)), tiny.items()
    model.encoders.requires_grad_(True)
    states = model.hidden_states(items)
    assert (states["text"].requires_grad, states["image"].requires_grad) == (True, False)
    text_only = {"text": model.views["text"]}
    mixed = Recommender(text_only, model.item_encoder, model.sequence, frozen=("image",))
    given = Items(items.ids, items.tokens, items.token_mask, states={"image": states["image"]})
    assert torch.equal(mixed.encode_items(given), model.encode_items(items))

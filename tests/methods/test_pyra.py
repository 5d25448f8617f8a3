"""PYRA in encoders: against the layers written out, what starts how, what is read, what is refused, what it saves."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from naive_merging import naive_merge
from torch import Tensor, nn

from tpme.bench.contract.checks import run_check
from tpme.bench.contract.checks_of_items import chunks_change_nothing, padding_changes_nothing
from tpme.bench.contract.checks_of_result import deep_copy_is_independent, state_round_trip
from tpme.bench.contract.checks_of_training import (
    checkpointing_changes_nothing,
    compiled_equals_eager,
    gradients_reach_what_trains,
    trains_in_half_precision,
)
from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.contract.subject import Subject
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.encoding import item_flops
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell, MetaEncoders
from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec, LearningRates, Modality, Training
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import ModelBuilder
from tpme.methods.base import Method
from tpme.methods.parts.merging import Reactivation, TokenMerging
from tpme.methods.pyra import SharedLoRA, _image_tokens
from tpme.methods.registry import create

QKV = ("query", "key", "value")


def fresh(tiny: ModuleType, modality: Modality = "image", pool: Any = None, **changes: Any) -> EncoderView:
    """A ViT of 17 tokens, or a BERT, with four layers."""
    settings = {"num_hidden_layers": 4} | ({"patch_size": 8} if modality == "image" else {}) | changes
    return EncoderView(tiny.encoder(modality, **settings), modality, pool=pool)


def built(tiny: ModuleType, view: EncoderView, name: str = "pyra", **options: Any) -> tuple[Method, Recommender]:
    torch.manual_seed(3)
    method = create(name, {"dropout": 0.0} | options if name == "pyra" else options)
    training = Training(embedding_dim=tiny.DIM, heads=tiny.HEADS, dropout=0.0, title_tokens=tiny.TOKENS)
    builder = ModelBuilder(method, training, tiny.data_size(), {view.modality: view.shape})
    return method, builder.build({view.modality: view}).eval()


def trained(model: Recommender) -> Recommender:
    """What trains in the encoders, moved off its start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.encoders.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def states(view: EncoderView, items: Items, **reads: Any) -> Any:
    given = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
    with torch.no_grad():
        return view.encode(Reads(**({"final": True} | reads)), **given)


def naive_vit(view: EncoderView, adapted: EncoderView, items: Items, removed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Final states of a fresh ViT with the LoRA and the gates of ``adapted``: (n, T', D), and their sizes (n, T')."""
    shared: Any = adapted.module.get_submodule("shared_lora")
    merging: Any = adapted.module.get_submodule("pyra")
    x = states(view, items, levels=(0,), final=False, tokens="all").states[:, 0]
    sizes = torch.ones(x.shape[:2])
    heads, names = view.heads, view.projections(*QKV)
    for layer in range(view.shape.depth):
        before, _ = view.norms(layer)
        normed, lora = before(x), shared[layer]
        parts = []
        for name, up in zip(names[3 * layer : 3 * layer + 3], lora.up.chunk(3), strict=True):
            linear: Any = view.module.get_submodule(name)
            out = normed @ (linear.weight + up @ lora.down).T + linear.bias
            parts.append(out.view(*out.shape[:2], heads.number, heads.width).transpose(1, 2))
        query, key, value = parts
        scores = query @ key.transpose(2, 3) / math.sqrt(heads.width) + sizes.log()[:, None, None]
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + view.module.get_submodule(view.projections("attention_output")[layer])(mixed)
        if removed[layer]:
            gate, metric = merging[layer].reactivation, key.mean(1)
            items_ = [naive_merge(x[i], metric[i], sizes[i], removed[layer], 1, gate) for i in range(len(x))]
            x, sizes = (torch.stack(parts) for parts in zip(*items_, strict=True))
        x = view.halves(layer).feed_forward(x)
    assert view.final_norm is not None
    return view.final_norm(x), sizes


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [True, False], ids=["at the start", "trained"])
@pytest.mark.parametrize("removed", [(4, 3, 0, 2), (0, 5, 2, 0)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_the_layers_written_out(tiny: ModuleType, removed: tuple[int, ...], start: bool, attention: str) -> None:
    view, items = fresh(tiny), tiny.items(("image",))
    view.module.set_attn_implementation(attention)
    _, model = built(tiny, view, schedule=removed)
    if not start:
        trained(model)
    with torch.no_grad():
        expected, sizes = naive_vit(fresh(tiny), view, items, removed)
    found = states(view, items, tokens="all")
    torch.testing.assert_close(found.states[:, 0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.mask, sizes)
    assert torch.equal(sizes.sum(1), torch.full((len(sizes),), 17.0))
    if start:  # plain merging and frozen projections
        for module in model.encoders.modules():
            if isinstance(module, SharedLoRA):
                module.up.data.zero_()
            if isinstance(module, TokenMerging):
                module.reactivation = None
        torch.testing.assert_close(states(view, items, tokens="all").states[:, 0], expected)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_schedule_of_zeros_is_the_frozen_encoder(tiny: ModuleType, modality: Modality) -> None:
    view, items = fresh(tiny, modality), tiny.items((modality,))
    _, model = built(tiny, view, schedule=(0,) * 4, text_merge=(0,) * 4)
    torch.testing.assert_close(states(view, items), states(fresh(tiny, modality), items))
    assert not any(isinstance(module, Reactivation) for module in model.modules())


def test_more_tokens_than_a_layer_can_remove_are_capped(tiny: ModuleType) -> None:
    view = fresh(tiny)
    method, model = built(tiny, view, schedule=(13, 2, 0, 1))
    states(view, tiny.items(("image",)))
    counts = {"image_tokens_1": 9, "image_tokens_2": 7, "image_tokens_3": 7, "image_tokens_4": 6}
    assert method.report(model) == counts
    merging: Any = view.module.get_submodule("pyra")
    assert merging[0].reactivation.pairs.shape == (1, 8)


def test_the_gates_learn_one_after_the_other_and_the_last_layer_has_none(tiny: ModuleType) -> None:
    method, model = built(tiny, fresh(tiny), schedule=(4, 3, 2, 2))
    merging: Any = model.views["image"].module.get_submodule("pyra")
    assert [layer.reactivation is not None for layer in merging] == [True, True, True, False]
    tiny.loss_of(model, tiny.batch(("image",))).backward()
    for layer in merging[:3]:
        assert layer.reactivation.channels.grad.abs().max() > 0
        assert not layer.reactivation.pairs.grad.any()
    tiny.train(method, model, 1, ("image",))
    model.zero_grad()
    tiny.loss_of(model, tiny.batch(("image",))).backward()
    for layer in merging[:3]:
        assert all(bool(parameter.grad.any()) for parameter in layer.reactivation.parameters())


def test_the_gates_have_a_learning_rate_of_their_own(tiny: ModuleType) -> None:
    method, model = built(tiny, fresh(tiny), schedule=(4, 3, 2, 2))
    groups = {group["name"]: group for group in method.param_groups(model, LearningRates(groups={"pyra": 0.5}))}
    gates = {p for module in model.modules() if isinstance(module, Reactivation) for p in module.parameters()}
    assert set(groups["pyra"]["params"]) == gates
    assert groups["pyra"]["lr"] == 0.5
    assert set(groups["image"]["params"]) == {
        p for module in model.modules() if isinstance(module, SharedLoRA) for p in module.parameters()
    }


def test_lora_merges_into_the_weights(tiny: ModuleType) -> None:
    for modality in ("text", "image"):
        view, items = fresh(tiny, modality), tiny.items((modality,))
        method, model = built(tiny, view, schedule=(4, 3, 2, 2))
        before = tiny.vectors(trained(model), items)
        flops, _ = item_flops(model.encode_items, items)
        method.prepare_inference(model)
        torch.testing.assert_close(tiny.vectors(model, items), before, atol=1e-5, rtol=1e-4)
        assert item_flops(model.encode_items, items)[0] < flops
        lora: Any = view.module.get_submodule("shared_lora")
        lora[0].up.data.add_(1)  # no longer read
        torch.testing.assert_close(tiny.vectors(model, items), before, atol=1e-5, rtol=1e-4)


def test_q_k_and_v_share_one_dropout(tiny: ModuleType) -> None:
    view = fresh(tiny)
    built(tiny, view, schedule=(0,) * 4, dropout=0.5)
    lora: Any = view.module.get_submodule("shared_lora")
    lora[0].train()
    x, zero = torch.randn(2, 5, 16), torch.zeros(2, 5, 16)
    nn.init.normal_(lora[0].up)
    added = [lora[0](place, x, zero) for place in range(3)]
    low = [torch.linalg.lstsq(lora[0].part(place), out.flatten(0, 1).T).solution for place, out in enumerate(added)]
    torch.testing.assert_close(low[0], low[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(low[0], low[2], atol=1e-4, rtol=1e-3)
    again = lora[0](0, x, zero)
    assert not torch.allclose(again, added[0])


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_mean_is_weighted_by_size(tiny: ModuleType) -> None:
    view, items = fresh(tiny, pool="mean"), tiny.items(("image",))
    built(tiny, view, schedule=(4, 3, 2, 2))
    for level in range(5):
        every = states(view, items, levels=(level,), final=False, tokens="all")
        assert every.mask.sum(1).tolist() == [17] * len(items)
        expected = (every.states[:, 0] * every.mask[..., None]).sum(1) / 17
        found = states(view, items, levels=(level,), final=False, pool="mean")
        torch.testing.assert_close(found[:, 0], expected)
        assert level == 0 or not torch.allclose(found[:, 0], every.states[:, 0].mean(1))


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_padding_of_a_merging_text_changes_nothing(tiny: ModuleType, pool: str) -> None:
    view, items = fresh(tiny, "text", pool=pool), tiny.items(("text",))
    method, model = built(tiny, view, text_merge=(2, 1, 1, 0))
    before = tiny.vectors(trained(model), items)
    assert method.report(model) == {f"text_tokens_{i}": n for i, n in enumerate((4, 3, 2, 2), start=1)}
    sizes = states(view, items, tokens="all").mask
    assert torch.equal(sizes.sum(1), items.token_mask.sum(1).float())
    other = torch.where(items.token_mask.bool(), items.tokens, 9)
    torch.testing.assert_close(tiny.vectors(model, replace(items, tokens=other)), before)
    alone = torch.cat(
        [
            tiny.vectors(
                model,
                replace(
                    tiny.items(("text",), [i]),
                    tokens=items.tokens[i - 1 : i, : int(length)],
                    token_mask=items.token_mask[i - 1 : i, : int(length)],
                ),
            )
            for i, length in zip(items.ids.tolist(), items.token_mask.sum(1), strict=True)
        ]
    )
    torch.testing.assert_close(alone, before, atol=1e-5, rtol=1e-4)


def test_short_titles_lose_only_padding(tiny: ModuleType) -> None:
    view, items = fresh(tiny, "text"), tiny.items(("text",))
    built(tiny, view, text_merge=(2, 0, 0, 0))
    base = states(fresh(tiny, "text"), items)
    short = items.token_mask.sum(1) <= 4
    assert 0 < int(short.sum()) < len(items)
    found = states(view, items)
    torch.testing.assert_close(found[short], base[short], atol=1e-5, rtol=1e-4)
    assert not torch.isclose(found[~short], base[~short], atol=1e-3).all(dim=2).any()


CHECKS = (
    chunks_change_nothing,
    padding_changes_nothing,
    checkpointing_changes_nothing,
    gradients_reach_what_trains,
    trains_in_half_precision,
    state_round_trip,
    deep_copy_is_independent,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("pair", [("bert", "vit"), ("roberta", "siglip-image")], ids=" + ".join)
def test_contract_of_merging_titles(contract_world: Any, check: Any, pair: tuple[str, str]) -> None:
    """Titles of eight tokens: the suite's other options keep all of them."""
    subject = made(contract_world, pair)
    result = run_check(check, subject)
    assert result.status == "passed", result


SUBJECTS: dict[tuple[str, str], Subject] = {}


def made(world: Any, pair: tuple[str, str]) -> Subject:
    options = {"schedule": (2, 1), "text_merge": (3, 2), "rank": 2, "dropout": 0.2}
    return SUBJECTS.setdefault(pair, Subject(world, "pyra", options, pair=pair))


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "a schedule longer than the sequence": ("image", {"schedule": (9, 5, 2, 1)}, "removes 17 tokens, .* reads 17"),
    "a text schedule longer than a title": ("text", {"text_merge": (3, 3, 0, 0)}, "removes 6 tokens, .* reads 6"),
    "a schedule of another depth": ("image", {"schedule": (2, 2)}, "has 2 numbers, but the image encoder has 4 layers"),
    "a rank above the width": ("image", {"rank": 17}, "rank 17"),
}


@pytest.mark.parametrize(("modality", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_it_refuses(tiny: ModuleType, modality: Modality, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        built(tiny, fresh(tiny, modality), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_or_is_refused(tiny: ModuleType, family: str) -> None:
    modality = modality_of(family)
    view, items = EncoderView(small_encoder(family), modality), tiny.items((modality,))
    unsupported = family in ("modernbert", "mpnet", "llama", "clip-text", "siglip-text")
    if unsupported:
        with pytest.raises(UserError, match="cannot merge") as error:
            built(tiny, view, text_merge="high")
        assert "text_merge = 'none'" in str(error.value)
        return
    method, model = built(tiny, view, text_merge=(2, 1))
    tiny.vectors(model, items)
    tokens = states(view, items, levels=(0,), final=False, tokens="all").states.shape[2]
    if modality == "image":
        assert tokens == _image_tokens(view)
    assert list(method.report(model).values())[-1] < tokens


def test_a_last_token_that_is_read_cannot_merge(tiny: ModuleType) -> None:
    with pytest.raises(UserError, match="its last token is read"):
        built(tiny, fresh(tiny, "text", pool="last"), text_merge=(1, 0, 0, 0))


# --- what it saves --------------------------------------------------------------------------------------------------

SPECS: dict[Modality, EncoderSpec] = {
    "text": EncoderSpec(source="bert-base-uncased"),
    "image": EncoderSpec(source="google/vit-base-patch16-224"),
}


def meta_cell(encoders: MetaEncoders, name: str, modalities: tuple[Modality, ...], **options: Any) -> MetaCell:
    specs = {f"{modality}_encoder": SPECS[modality] for modality in modalities}
    cell = Cell(
        method=name,
        options=options,
        dataset="none",
        dataset_fingerprint="none",
        modalities=modalities,
        training=Training(),
        lr=LearningRates(),
        seed=1,
        **specs,
    )
    return MetaCell(cell, DataShape.assumed(), encoders)


@pytest.fixture(scope="module")
def encoders() -> MetaEncoders:
    return MetaEncoders()


@pytest.mark.parametrize(("schedule", "share", "tokens"), [("low", 0.496, 11), ("high", 0.284, 5)])
def test_flops_of_a_vit_b_fall_to_the_papers_share(
    encoders: MetaEncoders, schedule: str, share: float, tokens: int
) -> None:
    """At inference to the paper's share of MACs; in training forward and backward alike; kept activations, too."""
    lora = meta_cell(encoders, "lora", ("image",), targets=QKV)
    pyra = meta_cell(encoders, "pyra", ("image",), schedule=schedule)
    steps = [count(cell).step for cell in (pyra, lora)]
    assert pyra.method.report(pyra.model)["image_tokens_12"] == tokens
    for part in ("forward_flops", "backward_flops", "saved_bytes"):
        ratio = getattr(steps[0], part) / getattr(steps[1], part)
        assert ratio == pytest.approx(share, abs=0.05), part
    items = pyra.batch.items
    pyra.method.prepare_inference(pyra.model)
    frozen = meta_cell(encoders, "frozen", ("image",))
    ratio = (
        item_flops(pyra.model.eval().encode_items, items)[0] / item_flops(frozen.model.eval().encode_items, items)[0]
    )
    assert ratio == pytest.approx(share, abs=0.01)


@pytest.mark.alone
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_it_takes_less_time_than_lora(tiny: ModuleType, training: bool) -> None:
    """Processor time of 197 tokens; a third of LoRA's in training, two fifths at inference where this was written."""
    items = Items(torch.arange(4), image=torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8))
    seconds = {}
    for name, options in {"lora": {"targets": QKV}, "pyra": {"schedule": "high"}}.items():
        sizes = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
        _, model = built(tiny, fresh(tiny, image_size=224, **sizes | {"patch_size": 16}), name, **options)
        seconds[name] = min(_seconds(model.train(training), items) for _ in range(3))
    assert seconds["pyra"] < 0.7 * seconds["lora"], seconds


def _seconds(model: Recommender, items: Items) -> float:
    start = time.process_time()
    with torch.set_grad_enabled(model.training):
        vectors = model.encode_items(items)
    if model.training:
        vectors.square().sum().backward()
    return time.process_time() - start


@pytest.mark.slow
def test_merging_layers_compile(contract_world: Any) -> None:
    result = run_check(compiled_equals_eager, Subject(contract_world, "pyra", {}, ("image",)))
    assert result.status == "passed", result


def test_parameters_at_the_papers_shape(encoders: MetaEncoders) -> None:
    cell = meta_cell(encoders, "pyra", ("text", "image"))
    groups = {name: sum(p.numel() for p in group) for name, group in cell.model.parameter_groups().items()}
    assert (groups["text"], groups["image"], groups["pyra"]) == (294_912, 294_912, 8_624 + 16_896)

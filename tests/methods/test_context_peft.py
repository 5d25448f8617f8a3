"""Context-PEFT: the mixed sequence, and what the adaptors of each context change in it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.contract.small_encoders import small_encoder
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import run_step
from tpme.bench.counting.meta import MetaCell, MetaEncoders
from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec, Training
from tpme.bench.run.matrix import MatrixFile, PreparedDataset, expand
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import ModelBuilder
from tpme.methods.base import Method
from tpme.methods.context_peft import image_patches
from tpme.methods.parts.contexts import ContextLoRA, MixedSequence
from tpme.methods.registry import create

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = ("lora", "bitfit", "ia3")
SIX = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
ROLES = {"lora": SIX, "bitfit": SIX, "ia3": ("key", "value", "ffn_out")}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def built(tiny: ModuleType, **options: Any) -> tuple[Method, Recommender]:
    method, model = tiny.build("context-peft", options)
    return method, model.eval()


def adaptors(model: Recommender) -> nn.ModuleList:
    parts = model.encoders["text"].get_submodule("context_adaptors")
    assert isinstance(parts, nn.ModuleList)
    return parts


def by_name(model: Recommender, kind: str, *, without: str = "") -> dict[str, nn.Module]:
    """The adaptors by the name of their linear layer; ``without`` is a role that has none."""
    view = model.views["text"]
    names = [name for role in ROLES[kind] if role != without for name in view.projections(role)]
    return dict(zip(names, adaptors(model), strict=True))


def scramble(model: Recommender, seed: int = 5) -> None:
    """Move every adaptor off its start."""
    torch.manual_seed(seed)
    for parameter in adaptors(model).parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def vectors(method: Method, model: Recommender, items: Items) -> Tensor:
    return method.encode(model, items)


@torch.no_grad()
def written_out(plain: EncoderView, model: Recommender, items: Items, images: Tensor) -> Tensor:
    """Item vectors of a BERT whose input is the mixed sequence, layer by layer; ``images`` (n, P, D)."""
    words = plain.module.embeddings(input_ids=items.tokens)
    hidden = torch.cat([words[:, :1], images, words[:, 1:]], dim=1)
    seen = items.token_mask.bool()
    mask = torch.cat([seen[:, :1], torch.ones(images.shape[:2], dtype=torch.bool), seen[:, 1:]], dim=1)
    for layer in plain.layers:
        hidden = layer(hidden, mask[:, None, None, :])
    return functional.gelu(model.item_encoder.head(hidden[:, 0]))


@torch.no_grad()
def projected(tiny: ModuleType, model: Recommender, items: Items, grid: int | None = 7) -> Tensor:
    """Image tokens (n, P, D) from an unadapted ViT."""
    states = tiny.views()["image"].encode(Reads(final=True, tokens="all"), image=items.image).states[:, 0]
    patches = states[:, 1:]
    return model.item_encoder.project(patches if grid != 1 else patches.mean(1, keepdim=True))


# --- the mixed sequence ---------------------------------------------------------------------------------------------


@EACH_KIND
@pytest.mark.parametrize("grid", [7, 1])
def test_it_starts_as_the_frozen_encoder_on_the_mixed_sequence(tiny: ModuleType, kind: str, grid: int) -> None:
    method, model = built(tiny, kind=kind, grid=grid)
    items = tiny.items()
    expected = written_out(tiny.views()["text"], model, items, projected(tiny, model, items, grid))
    torch.testing.assert_close(vectors(method, model, items), expected, **CLOSE)


def test_patches_are_averaged_over_windows() -> None:
    states = torch.randn(3, 1 + 14 * 14, 5)
    square = states[:, 1:].view(3, 14, 14, 5)
    halved = (square[:, ::2, ::2] + square[:, 1::2, ::2] + square[:, ::2, 1::2] + square[:, 1::2, 1::2]) / 4
    torch.testing.assert_close(image_patches(states, 7), halved.reshape(3, 49, 5))
    assert image_patches(states, 8).shape == (3, 64, 5)
    assert torch.equal(image_patches(states, None), states[:, 1:])
    assert torch.equal(image_patches(states, 20), states[:, 1:])
    assert torch.equal(image_patches(torch.cat([states[:, :4], states], 1), None), states[:, 1:])


@pytest.mark.parametrize("tokens", [5, 6])
def test_the_report_counts_tokens(tiny: ModuleType, tokens: int) -> None:
    method, model = built(tiny, grid=1)
    items = tiny.items()
    assert method.report(model) == {}
    vectors(method, model, Items(items.ids, items.tokens[:, :tokens], items.token_mask[:, :tokens], items.image))
    patches = (tiny.SIDE // tiny.PATCH) ** 2
    assert method.report(model) == {"image_states": 1 + patches, "image_tokens": 1, "text_tokens": tokens}


def test_padding_has_no_effect(tiny: ModuleType) -> None:
    method, model = built(tiny)
    scramble(model)
    items = tiny.items()
    other = Items(items.ids, items.tokens.masked_fill(items.token_mask == 0, 9), items.token_mask, items.image)
    assert not torch.equal(other.tokens, items.tokens)
    torch.testing.assert_close(vectors(method, model, other), vectors(method, model, items), **CLOSE)


def test_vectors_depend_on_both_modalities(tiny: ModuleType) -> None:
    method, model = built(tiny)
    items, turned = tiny.items(), tiny.items(ids=list(range(tiny.ITEMS, 0, -1)))
    first = vectors(method, model, items)
    assert not torch.allclose(
        vectors(method, model, Items(items.ids, items.tokens, items.token_mask, turned.image)), first, atol=1e-3
    )
    assert not torch.allclose(
        vectors(method, model, Items(items.ids, turned.tokens, turned.token_mask, items.image)), first, atol=1e-3
    )


# --- the adaptors ---------------------------------------------------------------------------------------------------


@EACH_KIND
def test_adaptors_that_are_alike_are_the_plain_method(tiny: ModuleType, kind: str) -> None:
    """All tokens adapted alike: the frozen encoder with LoRA, biases or scales folded into its weights."""
    method, model = built(tiny, kind=kind, contexts="agnostic", rank=3)
    scramble(model)
    items, plain = tiny.items(), tiny.views()["text"]
    given = by_name(model, kind, without="key" if kind == "bitfit" else "")
    for name, part in given.items():
        linear = plain.module.get_submodule(name)
        if kind == "lora":
            linear.weight.data += part.up.data @ part.down.data
        elif kind == "bitfit":
            linear.bias.data += part.vectors.data[0]
        elif name in plain.projections("ffn_out"):
            linear.weight.data *= part.vectors.data
        else:
            linear.weight.data *= part.vectors.data.T
            linear.bias.data *= part.vectors.data[0]
    expected = written_out(plain, model, items, projected(tiny, model, items))
    torch.testing.assert_close(vectors(method, model, items), expected, **CLOSE)

    specific, twin = built(tiny, kind=kind, rank=3)
    twin.item_encoder.load_state_dict(model.item_encoder.state_dict())
    for name, part in by_name(twin, kind).items():
        for key, own in part.named_parameters() if name in given else ():
            value, side = given[name].get_parameter(key).data, 1 if key == "up" else 0
            own.data.copy_(torch.cat([value] * (own.shape[side] // value.shape[side]), dim=side))
    torch.testing.assert_close(vectors(specific, twin, items), expected, **CLOSE)


@EACH_KIND
@pytest.mark.parametrize("context", [0, 1], ids=["text", "image"])
def test_an_adaptor_changes_the_first_projections_of_its_context_alone(
    tiny: ModuleType, kind: str, context: int
) -> None:
    method, model = built(tiny, kind=kind)
    items, view = tiny.items(), model.views["text"]
    name = view.projections("value")[0]
    seen: list[Tensor] = []
    view.module.get_submodule(name).register_forward_hook(lambda _m, _a, output: seen.append(output))
    vectors(method, model, items)
    part = by_name(model, kind)[name]
    own = part.up[:, context * 8 : context * 8 + 8] if kind == "lora" else part.vectors[context]
    own.data.add_(1.0)
    vectors(method, model, items)
    changed = (seen[0] != seen[1]).any(-1).any(0)
    image = torch.zeros(changed.shape, dtype=torch.bool)
    image[1:5] = True
    assert torch.equal(changed, image if context else ~image)


def mixed(images: int, total: int) -> MixedSequence:
    sequence = MixedSequence()
    sequence.images = torch.zeros(2, images, 6)
    sequence.insert(torch.zeros(2, total - images, 6))
    return sequence


def test_one_product_is_the_sum_over_contexts_and_the_slices() -> None:
    """Three ways to the same output and gradients: as computed, the paper's einsum, and the sequence in slices."""
    torch.manual_seed(1)
    images, total, rank = 3, 8, 2
    linear, sequence = nn.Linear(6, 5), mixed(images, total)
    part = ContextLoRA(linear, 2, sequence, rank)
    nn.init.normal_(part.up)
    x, y, g = torch.randn(2, total, 6), torch.randn(2, total, 5), torch.randn(2, total, 5)

    def by_einsum() -> Tensor:
        a, b = part.down.view(2, rank, 6), part.up.view(5, 2, rank)
        context = torch.zeros(total, 2)
        context[:, 0], context[1 : 1 + images] = 1, torch.tensor([0.0, 1.0])
        return y + torch.einsum("nld,crd,ocr,lc->nlo", x, a, b, context)

    def by_slices() -> Tensor:
        (a0, a1), (b0, b1) = part.down.split(rank), part.up.split(rank, dim=1)
        text = torch.cat([x[:, :1], x[:, 1 + images :]], dim=1)
        change = functional.linear(functional.linear(text, a0), b0)
        image = functional.linear(functional.linear(x[:, 1 : 1 + images], a1), b1)
        return y + torch.cat([change[:, :1], image, change[:, 1:]], dim=1)

    found = []
    for way in (lambda: part(x, y), by_einsum, by_slices):
        part.zero_grad()
        out = way()
        out.backward(g)
        found.append((out.detach(), part.down.grad, part.up.grad))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_a_context_without_tokens_gets_no_gradient() -> None:
    part = ContextLoRA(nn.Linear(6, 5), 2, mixed(0, 4), rank=2)
    nn.init.normal_(part.up)
    part(torch.randn(2, 4, 6), torch.randn(2, 4, 5)).sum().backward()
    assert part.down.grad[2:].eq(0).all()
    assert part.up.grad[:, 2:].eq(0).all()
    assert part.down.grad[:2].any(1).all()
    assert part.up.grad[:, :2].any(0).all()


# --- counts ---------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_agnostic_adaptors_are_half_of_the_specific_ones(tiny: ModuleType, kind: str) -> None:
    """Apart from what is left out because nothing reads it."""
    specific, agnostic = (built(tiny, kind=kind, contexts=c)[1] for c in ("specific", "agnostic"))
    count = [sum(p.numel() for p in adaptors(model).parameters()) for model in (specific, agnostic)]
    width, ffn, depth, rank = tiny.WIDTH, tiny.FFN, tiny.DEPTH, 8
    unread = {"lora": rank * (4 * width + 2 * (width + ffn)), "bitfit": 3 * width + ffn, "ia3": ffn}[kind]
    keys = depth * width if kind == "bitfit" else 0
    assert count[0] + unread == 2 * (count[1] + keys)


@pytest.mark.parametrize(
    ("options", "adaptors"),
    [
        ({}, 2 * 1_327_104 - 86_016),
        ({"contexts": "agnostic"}, 1_327_104),
        ({"kind": "bitfit"}, 2 * 82_944 - 5_376),
        ({"kind": "bitfit", "contexts": "agnostic"}, 82_944 - 9_216),
        ({"kind": "ia3"}, 110_592 - 3_072),
        ({"kind": "ia3", "contexts": "agnostic"}, 55_296),
    ],
)
def test_parameters_at_the_base_shape(options: dict[str, Any], adaptors: int) -> None:
    """IA3 and LoRA as in the paper's tables, without what is left out; the projection, the head."""
    cell = base_cell(options)
    meta = MetaCell(cell, DataShape.assumed(), ENCODERS)
    trains = sum(p.numel() for p in meta.model.parameters() if p.requires_grad)
    sequence = sum(p.numel() for p in meta.model.sequence.parameters())
    assert trains - sequence == adaptors + 768 * 768 + 768 + 768 * 64 + 64


ENCODERS = MetaEncoders()


def base_cell(options: dict[str, Any], **changes: Any) -> Cell:
    return Cell(
        method="context-peft",
        options=options,
        dataset="scientific",
        dataset_fingerprint="not prepared",
        modalities=("text", "image"),
        text_encoder=EncoderSpec(source="bert-base-uncased"),
        image_encoder=EncoderSpec(source="google/vit-base-patch16-224"),
        training=Training(users_per_batch=1),
        seed=1,
        **changes,
    )


def test_cached_at_the_base_shape_saves_the_image_encoder_alone() -> None:
    metas = [MetaCell(base_cell({}, cached=cached), DataShape.assumed(), ENCODERS) for cached in (False, True)]
    uncached, cached = (run_step(meta, fused_attention=False) for meta in metas)
    items = metas[0].batch.candidates.distinct
    linear = 12 * 197 * 2 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 196 * 768 * 768
    attention = 12 * 2 * 2 * 197**2 * 768
    assert uncached.forward_flops - cached.forward_flops == items * (linear + attention)
    assert uncached.backward_flops == cached.backward_flops
    assert uncached.saved_bytes == cached.saved_bytes
    assert uncached.uncounted == cached.uncounted == ()


# --- inference and refusals -----------------------------------------------------------------------------------------


@EACH_KIND
def test_merged_adaptors_are_not_used_again(tiny: ModuleType, kind: str) -> None:
    method, model = built(tiny, kind=kind, contexts="agnostic")
    scramble(model)
    items = tiny.items()
    before = vectors(method, model, items)
    method.prepare_inference(model)
    for parameter in adaptors(model).parameters():
        parameter.data.fill_(float("nan"))
    torch.testing.assert_close(vectors(method, model, items), before, **CLOSE)


def test_adaptors_of_a_context_are_not_merged(tiny: ModuleType) -> None:
    method, model = built(tiny)
    scramble(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method.prepare_inference(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def on_family(tiny: ModuleType, text: str, **options: Any) -> tuple[Method, Recommender]:
    views = {"text": EncoderView(small_encoder(text), "text"), "image": EncoderView(small_encoder("vit"), "image")}
    method = create("context-peft", options)
    training = Training(embedding_dim=tiny.DIM, heads=tiny.HEADS)
    shapes = {modality: view.shape for modality, view in views.items()}
    return method, ModelBuilder(method, training, tiny.data_size(), shapes).build(views).eval()


@pytest.mark.parametrize("family", ["roberta", "distilbert", "mpnet", "llama", "clip-text", "siglip-text"])
def test_text_encoders_of_other_families(tiny: ModuleType, family: str) -> None:
    """Items are read by themselves, the image matters, and a bias is merged also where a layer has none."""
    method, model = on_family(tiny, family, kind="bitfit", contexts="agnostic")
    scramble(model)
    items, turned = tiny.items(), tiny.items(ids=list(range(tiny.ITEMS, 0, -1)))
    found = vectors(method, model, items)
    alone = torch.cat([vectors(method, model, tiny.items(ids=[i])) for i in items.ids.tolist()])
    torch.testing.assert_close(alone, found, **CLOSE)
    swapped = Items(items.ids, items.tokens, items.token_mask, turned.image)
    assert not torch.allclose(vectors(method, model, swapped), found, atol=1e-3)
    method.prepare_inference(model)
    torch.testing.assert_close(vectors(method, model, items), found, **CLOSE)


def test_an_encoder_without_room_for_tokens_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(UserError, match="'context-peft': ModernBertModel counts positions from the token ids"):
        on_family(tiny, "modernbert")


def test_one_modality_alone_is_refused() -> None:
    matrix = {
        "name": "m",
        "datasets": [{"name": "d", "path": "/nowhere"}],
        "encoders": [{"text": {"source": "builtin:tiny-text"}, "image": {"source": "builtin:tiny-image"}}],
        "methods": [{"name": "context-peft"}],
    }
    data = PreparedDataset(Path("/nowhere"), "f" * 64, ("text",))
    with pytest.raises(UserError, match="'context-peft' needs text and image; this matrix has no image"):
        expand(MatrixFile.model_validate(matrix), {"d": data}, device="cpu")

"""IISAN-Versa: its layers, pooling, alignment and counts, on encoders that differ in depth and width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tpme.bench.contract.small_encoders import small_encoder
from tpme.bench.counting.meta import MetaEncoders
from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Modality, Training
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import DataSize, ModelBuilder
from tpme.methods.base import TaskShape
from tpme.methods.iisan import IISAN
from tpme.methods.iisan_versa import IISANVersa, kept_layers
from tpme.methods.parts.side_network import Head, SideConfig, SideNetwork
from tpme.methods.registry import create

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def network(text: EncoderShape, image: EncoderShape, **options: object) -> SideNetwork:
    method = create("iisan-versa", {"bottleneck": 3, **options})
    assert isinstance(method, IISANVersa)
    return method.item_encoder(TaskShape(8, 10, {"text": text, "image": image}))


def scrambled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (12, (1, 3, 5, 7, 9, 11)),
        (24, (3, 7, 11, 15, 19, 23)),
        (32, (1, 7, 13, 19, 25, 31)),
        (80, (4, 19, 34, 49, 64, 79)),
        (7, (1, 2, 3, 4, 5, 6)),
        (11, (5, 6, 7, 8, 9, 10)),
        (6, (1, 3, 5)),
        (5, (0, 2, 4)),
        (2, (1,)),
        (1, (0,)),
    ],
)
def test_the_layers_that_are_kept(depth: int, layers: tuple[int, ...]) -> None:
    assert kept_layers(depth) == layers
    reads = network(EncoderShape(16, depth), EncoderShape(16, 12)).reads["text"]
    assert reads.levels == (0, *(layer + 1 for layer in layers))


# --- counts at the shapes of the paper --------------------------------------------------------------------------------

LLAMA = {"8B": (4096, 32, 14336, 32), "70B": (8192, 80, 28672, 64)}
"""Width, layers, feed-forward width and heads."""


def text_encoder(name: str, folder: Path) -> EncoderSpec:
    from transformers import BertConfig, LlamaConfig

    if name == "bert-base":
        return EncoderSpec(source="bert-base-uncased")
    if name == "bert-large":
        sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        BertConfig(**sizes).save_pretrained(folder)
    else:
        width, depth, ffn, heads = LLAMA[name]
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        sizes |= {"intermediate_size": ffn, "num_key_value_heads": 8, "vocab_size": 128_256}
        LlamaConfig(**sizes).save_pretrained(folder)
    return EncoderSpec(source=str(folder), weights="random")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("bert-base", 2_941_013), ("bert-large", 8_698_965), ("8B", 28_184_661), ("70B", 54_165_589)],
)
def test_counts_with_vit_base(tmp_path: Path, text: str, expected: int) -> None:
    encoders = MetaEncoders()
    specs = {"text": text_encoder(text, tmp_path), "image": EncoderSpec(source="google/vit-base-patch16-224")}
    views = {modality: encoders.view(spec, modality) for modality, spec in specs.items()}
    shapes = {modality: view.shape for modality, view in views.items()}
    method = create("iisan-versa", {})
    model = ModelBuilder(method, Training(epochs=1), DataSize(1, 20, 10, np.full(21, 1 / 21)), shapes).build(views)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trains == expected
    sequential = sum(p.numel() for p in model.sequence.parameters())
    assert method.trainable_parameters(TaskShape(64, 20, shapes), views) == expected - sequential
    dtl = sum(p.numel() for p in model.item_encoder.transforms.parameters())
    assert dtl == {"bert-base": 0, "bert-large": 5_510_400, "8B": 22_025_472, "70B": 44_045_568}[text]


# --- the side network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", ["text", "image"])
@pytest.mark.parametrize("deep", ["text", "image"])
def test_the_towers_written_out(wide: Modality, deep: Modality) -> None:
    """Widths 24 and 16, seven and four levels: the inter tower reads the last four of both, at width 16."""
    shapes = {m: EncoderShape(24 if m == wide else 16, 12 if m == deep else 6) for m in ("text", "image")}
    side = scrambled(network(shapes["text"], shapes["image"]))
    states = {m: torch.randn(5, 7 if m == deep else 4, shape.width) for m, shape in shapes.items()}
    assert {m: reads.count for m, reads in side.reads.items()} == {m: s.shape[1] for m, s in states.items()}

    expected = []
    for modality in ("image", "text"):
        tower, s = side.towers[modality], torch.zeros(5, shapes[modality].width)
        for k in range(states[modality].shape[1]):
            g = tower.gate_values()[k]
            s = tower.blocks[k](g * states[modality][:, k] + (1 - g) * s)
        expected.append(side.heads[modality][1](side.heads[modality][0](s)))
    inter, z = side.towers["inter"], torch.zeros(5, 16)
    assert (len(inter.blocks), set(side.transforms)) == (4, {wide})
    for k in range(4):
        level = {m: values[:, values.shape[1] - 4 + k] for m, values in states.items()}
        level[wide] = side.transforms[wide].linears[k](level[wide])
        g = inter.gate_values()[k]
        z = inter.blocks[k](z + g * level["image"] + (1 - g) * level["text"])
    expected.append(side.heads["inter"][1](side.heads["inter"][0](z)))
    torch.testing.assert_close(side(states, torch.arange(5)), side.fusion(torch.cat(expected, dim=1)), **CLOSE)


def test_heads_go_through_the_width_of_item_vectors_and_the_inter_tower_s_through_its_own() -> None:
    side = network(EncoderShape(24, 6), EncoderShape(16, 6))
    widths = {name: (head[0].in_features, head[0].out_features) for name, head in side.heads.items()}
    assert widths == {"text": (24, 8), "image": (16, 8), "inter": (16, 16)}


@pytest.mark.parametrize("hidden", [4, 16])
@pytest.mark.parametrize("items", [2, 200])
def test_the_product_of_a_head_is_its_layers(hidden: int, items: int) -> None:
    head, x = Head(16, hidden, 4), torch.randn(items, 16)
    torch.testing.assert_close(head(x), head[1](head[0](x)), **CLOSE)


def test_on_encoders_that_are_alike_its_towers_are_iisans() -> None:
    shapes = {"text": EncoderShape(16, 12), "image": EncoderShape(16, 12)}
    versa = scrambled(network(shapes["text"], shapes["image"]))
    iisan = IISAN(SideConfig(bottleneck=3)).item_encoder(TaskShape(8, 10, shapes))
    assert iisan.reads == versa.reads
    iisan.towers.load_state_dict(versa.towers.state_dict())
    states = {m: torch.randn(5, 7, 16) for m in shapes}
    for name in ("text", "image"):
        assert torch.equal(iisan.towers[name](states[name]), versa.towers[name](states[name]))
    iisan.heads["inter"].load_state_dict(versa.heads["inter"].state_dict())
    assert torch.equal(iisan.head_outputs(states)["inter"], versa.head_outputs(states)["inter"])


@pytest.mark.parametrize("modality", ["text", "image"])
def test_one_modality_is_its_intra_tower_alone(tiny: ModuleType, modality: Modality) -> None:
    _, model = tiny.build("iisan-versa", {}, (modality,))
    side, inputs = model.item_encoder, tiny.items((modality,))
    assert (set(side.towers), set(side.heads), len(side.transforms)) == ({modality}, {modality}, 0)
    states = model.hidden_states(inputs)[modality]
    expected = side.heads[modality](side.towers[modality](states))
    torch.testing.assert_close(tiny.vectors(model, inputs), expected, **CLOSE)


# --- a decoder as the text encoder ------------------------------------------------------------------------------------


def llama_states(tiny: ModuleType, **options: object) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """What is read of a Llama of 12 layers, its hidden states as transformers returns them, and the mask."""
    view = EncoderView(small_encoder("llama", depth=12), "text")
    side = network(view.shape, EncoderShape(16, 12), **options)
    inputs = tiny.items(("text",))
    given = {"tokens": inputs.tokens, "token_mask": inputs.token_mask}
    with torch.no_grad():
        output = view.module(inputs.tokens, attention_mask=inputs.token_mask, output_hidden_states=True)
        return view.encode(side.reads["text"], **given), output.hidden_states, inputs.token_mask.bool()


def test_a_decoder_is_read_at_the_mean_of_its_tokens_without_padding(tiny: ModuleType) -> None:
    states, hidden, mask = llama_states(tiny)
    assert not mask.all()
    for place, level in enumerate((0, 2, 4, 6, 8, 10, 12)):
        mean = torch.stack([item[kept].mean(0) for item, kept in zip(hidden[level], mask, strict=True)])
        torch.testing.assert_close(states[:, place], mean, **CLOSE)


def test_or_at_its_last_token(tiny: ModuleType) -> None:
    states, hidden, mask = llama_states(tiny, text_pool="last")
    last = mask.sum(1) - 1
    for place, level in enumerate((0, 2, 4, 6, 8, 10, 12)):
        torch.testing.assert_close(states[:, place], hidden[level][torch.arange(len(last)), last], **CLOSE)


def test_the_last_level_of_a_decoder_is_after_its_final_norm_and_of_a_vit_before(tiny: ModuleType) -> None:
    views = {"text": EncoderView(small_encoder("llama"), "text"), "image": EncoderView(small_encoder("vit"), "image")}
    side = network(views["text"].shape, views["image"].shape)
    inputs = tiny.items()
    given = {"tokens": inputs.tokens, "token_mask": inputs.token_mask}
    outputs: list[Tensor] = []
    handle = views["text"].final_norm.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with torch.no_grad():
        text = views["text"].encode(side.reads["text"], **given)
        image = views["image"].encode(side.reads["image"], image=inputs.image)
        final = views["image"].encode(Reads(final=True), image=inputs.image)
    handle.remove()
    mask = inputs.token_mask.bool()
    normed = torch.stack([item[kept].mean(0) for item, kept in zip(outputs[0], mask, strict=True)])
    torch.testing.assert_close(text[:, -1], normed, **CLOSE)
    torch.testing.assert_close(views["image"].final_norm(image[:, -1]), final[:, 0], **CLOSE)
    assert not torch.allclose(image[:, -1], final[:, 0], atol=1e-2)


def test_a_layer_before_the_last_has_no_final_norm() -> None:
    llama = EncoderView(small_encoder("llama", depth=4), "text").shape
    reads = network(llama, EncoderShape(16, 4), text_layers=(0, 2)).reads["text"]
    assert (reads.levels, reads.final) == ((0, 1, 3), False)
    reads = network(llama, EncoderShape(16, 4), text_layers=(0, 3)).reads["text"]
    assert (reads.levels, reads.final) == ((0, 1), True)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_layers": (1, 6)}, "text_layers names layer 6 of an encoder of 6 layers; choose from 0 to 5"),
        ({"image_layers": (12,)}, "image_layers names layer 12 of an encoder of 12 layers; choose from 0 to 11"),
        ({"text_layers": (3, 1)}, r"ascending order, each once; not \[3, 1\]"),
        ({"text_layers": ()}, "option 'text_layers'"),
        ({"bottleneck": 0}, "option 'bottleneck'"),
        ({"intra": False, "inter": False}, "intra and inter cannot both be false"),
    ],
)
def test_impossible_options(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        network(EncoderShape(16, 6), EncoderShape(16, 12), **options)
    assert "\n" not in str(error.value)


def test_a_decoder_is_not_read_at_its_first_token(tiny: ModuleType) -> None:
    shape = EncoderView(small_encoder("llama"), "text").shape
    method = create("iisan-versa", {"text_pool": "first"})
    with pytest.raises(UserError, match=r"cannot be read with pool = 'first'.*choose mean or last"):
        ModelBuilder(method, Training(), tiny.data_size(), {"text": shape})


def test_the_inter_tower_alone_needs_both_modalities(tiny: ModuleType) -> None:
    with pytest.raises(UserError, match="'iisan-versa' with intra = false needs a text and an image encoder"):
        tiny.build("iisan-versa", {"intra": False}, ("text",))

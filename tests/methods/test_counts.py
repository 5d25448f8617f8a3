"""Trainable parameters of every method, at the paper's shapes and as closed formulas."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tpme.bench.counting.meta import MetaEncoders
from tpme.bench.record import EncoderSpec, Modality, Training
from tpme.bench.task.items import Items
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.build import DataSize, ModelBuilder, used_modalities
from tpme.methods.registry import BUILTIN, create

ITEMS = 20_314
RECOMMENDER = 206_912
"""Sequential encoder 100,224, fusion 8,256, two heads of 49,216."""
PAPER: dict[str, tuple[str, dict[str, Any], int]] = {
    "fft": ("fft", {}, 194_897_216),
    "ftp": ("ftp", {}, 194_897_216),
    "ftp, last 4 layers": ("ftp", {"last": 4}, 2 * 4 * 7_087_872 + 2 * 768 + RECOMMENDER),  # norm of the ViT
    "tpgm": ("tpgm", {}, 194_897_216),
    "adapter": ("adapter", {}, 4_965_440),
    "lora": ("lora", {}, 796_736),
    "bitfit": ("bitfit", {}, 411_968),
    "iisan": ("iisan", {}, 4_113_877),
    "iisan, intra only": ("iisan", {"inter": False}, 2_776_014),
    "iisan, inter only": ("iisan", {"intra": False}, 1_438_151),
    "iisan-versa": ("iisan-versa", {}, 2_941_013),
    "lst": ("lst", {}, 2 * 1_819_497 + RECOMMENDER),
    "context-peft": ("context-peft", {}, 2_568_192 + 590_592 + 49_216 + 100_224),
    "frozen": ("frozen", {}, RECOMMENDER),
    "prompt": ("prompt", {}, 2 * 92_160 + RECOMMENDER),
    "prompt, shallow 50": ("prompt", {"length": 50, "deep": False}, 2 * 38_400 + RECOMMENDER),
    "pyra": ("pyra", {}, 2 * 294_912 + 8_624 + 16_896 + RECOMMENDER),
    "lora, six linear layers": (
        "lora",
        {"targets": ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")},
        2 * 1_327_104 + RECOMMENDER,
    ),
    "prefix": ("prefix", {}, 2 * 294_912 + RECOMMENDER),
    "prefix, through an MLP": ("prefix", {"length": 20, "reparameterised": True}, 2 * 9_864_704 + RECOMMENDER),
    "pt-peft": ("pt-peft", {"length": 20}, 2 * 368_640 + RECOMMENDER),  # in stage 1
    "fedpeptao": ("fedpeptao", {}, 2 * 184_320 + RECOMMENDER),
    "fedpeptao, all layers": ("fedpeptao", {"layer_ratio": 1.0}, 2 * 368_640 + RECOMMENDER),
    "dyt": ("dyt", {}, 2 * 1_198_860 + RECOMMENDER),
    "id": ("id", {}, 100_224 + (ITEMS + 1) * 64),
    "popularity": ("popularity", {}, 0),
    "pfeiffer-adapter": ("pfeiffer-adapter", {}, 2 * 1_189_632 + RECOMMENDER),
    "parallel-adapter": ("parallel-adapter", {}, 2 * 1_189_632 + RECOMMENDER),
    "dora": ("dora", {}, 2 * 313_344 + RECOMMENDER),
    "ia3": ("ia3", {}, 2 * 55_296 + RECOMMENDER),
    "adalora": ("adalora", {}, 2 * 442_656 + RECOMMENDER),
    "ln-tuning": ("ln-tuning", {}, 2 * 38_400 + RECOMMENDER),
    "peft": ("peft", {}, 2 * 12 * 2 * 24 * (32 * 31 // 2) + RECOMMENDER),
    "vera": ("vera", {}, 2 * 24_576 + RECOMMENDER),
    "light-peft": ("light-peft", {}, 2 * (1_327_104 + 12 * (12 + 3_072)) + RECOMMENDER),  # in the estimation
    "autopeft": ("autopeft", {}, 2 * 1_346_112 + RECOMMENDER),  # before its search
    "dapt": ("dapt", {}, 1_438_476 + 1_440_012 + RECOMMENDER),  # BERT has no final norm
}


ENCODERS: dict[Modality, EncoderSpec] = {
    "text": EncoderSpec(source="bert-base-uncased"),
    "image": EncoderSpec(source="google/vit-base-patch16-224"),
}
"""Their configurations are known without a network; another test compares them with the released ones."""


@pytest.fixture(scope="module")
def encoders() -> MetaEncoders:
    return MetaEncoders()


def paper_model(encoders: MetaEncoders, name: str, options: Mapping[str, Any]) -> Recommender:
    """The method at BERT-base + ViT-B/16 and d = 64, without memory for the weights."""
    method = create(name, options)
    views = {m: encoders.view(ENCODERS[m], m) for m in used_modalities(method, tuple(ENCODERS))}
    data = DataSize(1, ITEMS, 10, np.full(ITEMS + 1, 1 / ITEMS))
    with torch.device("meta"):
        return ModelBuilder(method, Training(epochs=1), data, {m: view.shape for m, view in views.items()}).build(views)


def trainable(model: Recommender) -> int:
    return sum(p.numel() for group in model.parameter_groups().values() for p in group)


@pytest.mark.parametrize(("name", "options", "expected"), PAPER.values(), ids=PAPER)
def test_at_the_papers_shapes(encoders: MetaEncoders, name: str, options: dict[str, Any], expected: int) -> None:
    model = paper_model(encoders, name, options)
    assert trainable(model) == expected
    assert trainable(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_method_is_counted() -> None:
    assert {name for name, *_ in PAPER.values()} == set(BUILTIN)


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_an_adapted_model_runs_on_the_meta_device(encoders: MetaEncoders, name: str) -> None:
    model = paper_model(encoders, name, {}).to("meta").eval()
    items = Items(
        ids=torch.zeros(2, dtype=torch.int64),
        tokens=torch.zeros(2, 30, dtype=torch.int64),
        token_mask=torch.ones(2, 30, dtype=torch.int64),
        image=torch.zeros(2, 3, 224, 224, dtype=torch.uint8),
    )
    vectors = model.encode_items(items.to(torch.device("meta")))
    assert (vectors.device.type, vectors.shape[0]) == ("meta", 2)


def middle(width: int) -> int:
    """A layer with two adapters and a prefix of AutoPEFT's middle size: ``floor(D / 2^k)``, 5 halvings of 768."""
    size = width >> (width.bit_length() + 1) // 2
    return 2 * (2 * width * size + size + width) + size * 2 * width


# --- closed formulas, at another shape ------------------------------------------------------------------------------


def closed_formula(name: str, options: Mapping[str, Any], tiny: ModuleType) -> int:
    """Trainable parameters of the tiny model: D wide, L deep, d = 8, both encoders."""
    width, depth, ffn, dim = tiny.WIDTH, tiny.DEPTH, tiny.FFN, tiny.DIM
    block = 4 * dim * dim + (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim) + 2 * 2 * dim
    sequence = (tiny.SLOTS - 1) * dim + 2 * dim + 2 * block
    fused = sequence + 2 * (width * dim + dim) + (2 * dim * dim + dim)
    layer = 4 * (width * width + width) + (width * ffn + ffn) + (ffn * width + width) + 2 * 2 * width
    bert = (tiny.VOCAB + 40 + 2) * width + 2 * width + depth * layer
    patches = (tiny.SIDE // tiny.PATCH) ** 2
    vit = width + (patches + 1) * width + (3 * tiny.PATCH**2 * width + width) + depth * layer + 2 * width
    bottleneck = 2 * width * options.get("bottleneck", 64) + options.get("bottleneck", 64) + width
    levels = depth // 2 + 1
    tower = levels * bottleneck + levels + (width * width + width) + (width * dim + dim)
    return {
        **dict.fromkeys(("fft", "ftp", "tpgm"), fused + bert + vit),
        "adapter": fused + 2 * depth * 2 * bottleneck,
        "lora": fused + 2 * depth * 2 * options.get("rank", 8) * 2 * width,
        "bitfit": fused + depth * 2 * (7 * width + ffn) + width + 2 * width,
        "prompt": fused + 2 * depth * options.get("length", 10) * width,
        "prefix": fused + 2 * depth * options.get("length", 16) * 2 * width,
        "pt-peft": fused + 2 * depth * options.get("length", 16) * 2 * width,  # in stage 1
        "fedpeptao": fused + 2 * (depth // 2) * options.get("length", 20) * 2 * width,
        "dyt": fused + 2 * depth * (bottleneck + width + 1),
        "iisan": sequence + 3 * tower + 3 * dim * dim + dim,
        "pyra": fused + 2 * depth * options.get("rank", 8) * 4 * width + (depth - 1) * (3 * width + 2),
        "iisan-versa": sequence
        + 3 * (tower - (width * width + width) - (width * dim + dim))
        + 2 * (width * dim + dim + dim * dim + dim)
        + (width * width + width + width * dim + dim)
        + 3 * dim * dim
        + dim,
        "lst": fused + 2 * (12 * 8 * 8 + 13 * 8 + 1 + 2 * 8 * (width + 1) + 2 * 8 + 9 * width),  # one layer, 8 wide
        "context-peft": sequence
        + (2 * depth * 8 * (4 * 2 * width + 2 * (width + ffn)) - 8 * (4 * width + 2 * (width + ffn)))
        + (width * width + width)
        + (width * dim + dim),
        "frozen": fused,
        "id": sequence + (tiny.ITEMS + 1) * dim,
        "popularity": 0,
        "pfeiffer-adapter": fused + 2 * depth * bottleneck,
        "parallel-adapter": fused + 2 * depth * bottleneck,
        "dora": fused + 2 * depth * 2 * (options.get("rank", 8) * 2 * width + width),
        "ia3": fused + 2 * depth * (2 * width + ffn),
        "adalora": fused + 2 * depth * 2 * options.get("rank", 12) * (2 * width + 1),
        "ln-tuning": fused + 2 * (2 * depth + 1) * 2 * width,
        "peft": fused + 2 * depth * 2 * (width * (width - 1) // 2),
        "vera": fused + 2 * depth * 2 * (options.get("rank", 256) + width),
        "light-peft": fused + 2 * depth * (8 * (8 * width + 2 * (width + ffn)) + tiny.HEADS + ffn),  # in the estimation
        "autopeft": fused + 2 * depth * middle(width),
        "dapt": fused
        + 2 * depth * (bottleneck + 3 * width + 1 + 2 * (7 * width + ffn))  # norm and gate; seven of D, one of F
        + 2 * 2 * (depth - 1) * width  # prompts
        + 2 * 3 * width,  # embeddings of both, final norm of the ViT
    }[name]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in sorted(BUILTIN)),
        ("adapter", {"bottleneck": 5}),
        ("lora", {"rank": 3}),
        ("pyra", {"rank": 3}),
        ("prompt", {"length": 4}),
        ("iisan", {"bottleneck": 5}),
        ("prefix", {"length": 5}),
    ],
)
def test_closed_formula(tiny: ModuleType, name: str, options: dict[str, int]) -> None:
    _, model = tiny.build(name, options)
    assert trainable(model) == closed_formula(name, options, tiny)

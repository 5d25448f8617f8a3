"""Exact counters: against closed formulas, against a real run, and the same on every machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from tpme.bench.counting.batch import (
    SCIENTIFIC_DISTINCT,
    SCIENTIFIC_ITEMS,
    SCIENTIFIC_LENGTHS,
    SCIENTIFIC_USERS,
    DataShape,
    canonical_slots,
)
from tpme.bench.counting.exact import Counts, count, run_step
from tpme.bench.counting.meta import RELEASED, MetaCell, MetaEncoders
from tpme.bench.counting.modes import Target, Tracker
from tpme.bench.record import Cell, EncoderSpec, Modality
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.items import map_tensors

USERS, TOKENS, DIM = 5, 6, 8
DATA = DataShape.assumed(users=40, items=60)
BOTH: tuple[Modality, ...] = ("text", "image")
SHAPE = {
    "model_type",
    "vocab_size",
    "type_vocab_size",
    "max_position_embeddings",
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "pad_token_id",
    "qkv_bias",
}
"""Settings of an encoder that decide its shape and its cost."""


@pytest.fixture(scope="module")
def encoders() -> MetaEncoders:
    """Encoders are built once for all tests of this file."""
    return MetaEncoders()


@pytest.fixture(scope="module")
def meta(world: Any, encoders: MetaEncoders) -> Callable[..., MetaCell]:
    """A cell on meta: ``meta("fft", modalities=..., training={...}, options=...)``."""

    def make(method: str, modalities: tuple[Modality, ...] = BOTH, **changes: Any) -> MetaCell:
        training = {"users_per_batch": USERS, "title_tokens": TOKENS, "embedding_dim": DIM, "dropout": 0.0}
        cell = Cell(
            method=method,
            dataset="small",
            dataset_fingerprint="none",
            modalities=modalities,
            text_encoder=EncoderSpec(source=str(world.text)) if "text" in modalities else None,
            image_encoder=EncoderSpec(source=str(world.image)) if "image" in modalities else None,
            training=training | changes.pop("training", {}),
            **changes,
        )
        return MetaCell(cell, DATA, encoders)

    return make


# --- the canonical batch -------------------------------------------------------------------------------------------


def test_lengths_and_repeats_of_the_canonical_batch() -> None:
    data = DataShape.assumed()
    slots = canonical_slots(data, 32)
    lengths = (slots > 0).sum(axis=1)
    assert slots.shape == (32, 11)
    assert (np.diff((slots > 0).astype(int), axis=1) >= 0).all(), "padding is on the left"
    assert abs(lengths.mean() - data.lengths.mean()) < 0.1
    assert lengths.min() == 3
    assert lengths.max() == 11
    assert len(np.unique(slots[slots > 0])) == data.distinct_items(32) == 141


def test_a_batch_is_no_larger_than_the_data_set() -> None:
    assert canonical_slots(DataShape.assumed(users=7, items=9), 32).shape == (7, 11)
    assert DataShape.assumed(users=7, items=9).distinct_items(7) == 9


def test_distinct_items_are_those_of_random_batches(world: Any) -> None:
    dataset = Dataset.open(world.data)
    shape, rng = DataShape.of(dataset), np.random.default_rng(0)
    slots = dataset.train_slots
    drawn = [
        len(np.unique(batch[batch > 0])) for _ in range(2000) for batch in [slots[rng.permutation(len(slots))[:20]]]
    ]
    assert shape.distinct_items(20) == round(float(np.mean(drawn)))
    assert shape.users == len(slots)
    assert shape.lengths.sum() == (slots > 0).sum()


def test_assumed_numbers_are_those_of_scientific(shared: Callable[..., Path]) -> None:
    golden = json.loads(shared("golden", "dataset_scientific.json").read_text())
    assert {int(length): users for length, users in golden["train_len_hist"].items()} == SCIENTIFIC_LENGTHS
    assert (golden["n_users"], golden["n_items"]) == (SCIENTIFIC_USERS, SCIENTIFIC_ITEMS)
    lines = shared("data", "amazon-scientific", "users.tsv").read_text().splitlines()
    rows = [items[-13:-2] for line in lines if len(items := line.split("\t")[1].split()) >= 5]
    number = {name: i for i, name in enumerate(sorted({name for row in rows for name in row}), start=1)}
    seen_by = np.bincount([number[name] for row in rows for name in set(row)])[1:]
    lengths = np.sort([len(row) for row in rows])
    real = DataShape(len(rows), len(seen_by), 10, np.zeros(1), lengths, seen_by, "real")
    for users, share in SCIENTIFIC_DISTINCT.items():
        if users >= 32:  # smaller batches: rounding to whole items and whole users
            assert real.distinct_items(users) / (users * lengths.mean()) == pytest.approx(share, abs=4e-3)


# --- FLOPs: closed formulas ----------------------------------------------------------------------------------------


class Formula:
    """FLOPs of one step of a text-only cell with the tests' tiny BERT, term by term (1 multiply-add = 2)."""

    def __init__(self, tiny: ModuleType, cell: MetaCell) -> None:
        n, positions = cell.batch.candidates.distinct, USERS * DATA.max_seq_len
        rows, width = n * TOKENS, tiny.WIDTH
        self.depth = tiny.DEPTH
        self.projection = 2 * rows * width * width  # one of q, k, v, o
        self.ffn = 2 * rows * width * tiny.FFN  # one of its two layers
        self.product = 2 * n * TOKENS * TOKENS * width  # q k^T, or probabilities times v
        self.lora = 2 * rows * width * 8  # one of A, B at rank 8
        self.layer = 4 * self.projection + 2 * self.ffn + 2 * self.product
        self.head = 2 * n * width * DIM
        block = 2 * positions * DIM * DIM * (4 + 8) + 2 * 2 * USERS * DATA.max_seq_len**2 * DIM
        self.logits = 2 * len(cell.batch.candidates.rows) * n * DIM
        self.rest = self.head + 2 * block + self.logits


def flops(cell: MetaCell) -> tuple[int, int]:
    step = run_step(cell, fused_attention=False)
    assert step.uncounted == ()
    return step.forward_flops, step.backward_flops


def test_fft_costs_twice_its_forward_pass_backward(meta: Any, tiny: ModuleType) -> None:
    cell = meta("fft", ("text",))
    of = Formula(tiny, cell)
    forward = of.depth * of.layer + of.rest
    assert flops(cell) == (forward, 2 * forward)


def test_frozen_encoders_have_no_backward_pass(meta: Any, tiny: ModuleType) -> None:
    cell = meta("frozen", ("text",))
    of = Formula(tiny, cell)
    # Nothing flows out of the head into the encoder: of the head only the weight's gradient remains.
    assert flops(cell) == (of.depth * of.layer + of.rest, 2 * of.rest - of.head)


def test_bitfit_needs_no_weight_gradients(meta: Any, tiny: ModuleType) -> None:
    cell = meta("bitfit", ("text",))
    of = Formula(tiny, cell)
    linears = 4 * of.projection + 2 * of.ffn
    # Biases of the embeddings' norm train, so every linear layer passes a gradient on; attention has two products.
    assert flops(cell)[1] == of.depth * (linears + 4 * of.product) + 2 * of.rest


def test_lora_needs_neither_weight_gradients_nor_any_before_layer_0(meta: Any, tiny: ModuleType) -> None:
    cell = meta("lora", ("text",))
    of = Formula(tiny, cell)
    forward, backward = flops(cell)
    assert forward == of.depth * (of.layer + 4 * of.lora) + of.rest
    later = 4 * of.projection + 2 * of.ffn + 4 * of.product + 8 * of.lora
    # Layer 0: q, k, v pass nothing on, A needs no input gradient, and q k^T none for k, which does not train.
    first = of.projection + 2 * of.ffn + 3 * of.product + 6 * of.lora
    assert backward == first + (of.depth - 1) * later + 2 * of.rest


def test_cached_costs_what_uncached_does_without_the_encoders(meta: Any, tiny: ModuleType) -> None:
    uncached, cached = (run_step(meta("iisan", ("text",), cached=c), fused_attention=False) for c in (False, True))
    of = Formula(tiny, meta("iisan", ("text",)))
    assert uncached.forward_flops - cached.forward_flops == of.depth * of.layer
    assert uncached.backward_flops == cached.backward_flops
    assert uncached.saved_bytes == cached.saved_bytes


def test_image_encoder_needs_no_gradient_of_pixels(meta: Any, tiny: ModuleType) -> None:
    forward, backward = flops(meta("fft", ("image",)))
    patches = (tiny.SIDE // tiny.PATCH) ** 2
    n = meta("fft", ("image",)).batch.candidates.distinct
    assert backward == 2 * forward - 2 * n * patches * 3 * tiny.PATCH**2 * tiny.WIDTH


def test_checkpointing_trades_memory_for_a_second_forward_pass(meta: Any, tiny: ModuleType) -> None:
    training = {"precision": "fp16"}
    plain, checkpointed = (
        run_step(meta("fft", ("text",), training=training | {"activation_checkpointing": on}), fused_attention=False)
        for on in (False, True)
    )
    of = Formula(tiny, meta("fft", ("text",)))
    assert checkpointed.forward_flops == plain.forward_flops
    again = checkpointed.backward_flops - plain.backward_flops
    # The last product of a layer is not needed again: recomputation stops when all saved tensors are there.
    assert of.depth * (of.layer - of.ffn) <= again <= of.depth * of.layer
    assert checkpointed.saved_bytes < 0.6 * plain.saved_bytes


def test_padded_slots_are_encoded_under_the_paper_protocol(meta: Any, tiny: ModuleType) -> None:
    suite, paper = (meta("frozen", ("text",), protocol=protocol) for protocol in ("suite", "paper"))
    assert len(suite.batch.items) == suite.batch.candidates.distinct
    assert len(paper.batch.items) == USERS * (DATA.max_seq_len + 1)
    assert flops(paper)[0] > flops(suite)[0]


# --- against a real run --------------------------------------------------------------------------------------------


def materialise(cell: MetaCell, device: str) -> None:
    """Turn a cell on meta into one with values, in place: the same shapes, parameters near nothing."""
    cell.model.to_empty(device=device)
    with torch.no_grad():
        for parameter in cell.model.parameters():
            parameter.fill_(0.01)
    cell.batch = map_tensors(cell.batch, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device=device))
    if cell.batch.items.tokens is not None:
        for module in cell.model.encoders.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == torch.int64:
                    setattr(module, name, torch.arange(buffer.numel(), device=device).view(buffer.shape) % 2)


@pytest.mark.parametrize("method", ["fft", "adapter", "lora", "bitfit", "prompt", "iisan", "frozen", "id"])
def test_meta_counts_what_a_real_run_does(meta: Any, tiny: ModuleType, method: str) -> None:
    counted = run_step(meta(method), fused_attention=False)
    real = meta(method)
    materialise(real, "cpu")
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*real.model.parameters(), *real.model.buffers())}
    batch: set[int] = set()
    map_tensors(real.batch, lambda tensor: (batch.add(tensor.untyped_storage().data_ptr()), tensor)[1])
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = tiny.loss_of(real.model, real.batch)
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == counted.forward_flops
    assert counter.get_total_flops() - forward == counted.backward_flops
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights | batch)
    assert kept == counted.saved_bytes
    gradients = [p.grad.nbytes for p in real.model.parameters() if p.grad is not None]
    assert sum(gradients) == counted.gradient_bytes


# --- memory --------------------------------------------------------------------------------------------------------


def test_saved_bytes_follow_the_papers_asymptotics(meta: Any) -> None:
    saved = {method: run_step(meta(method), fused_attention=False).saved_bytes for method in ("fft", "lora", "iisan")}
    assert saved["fft"] > saved["lora"] > 1.5 * saved["iisan"]


def test_what_a_cell_holds(meta: Any) -> None:
    counts: Counts = count(meta("fft"))
    parameters = sum(p.numel() for p in meta("fft").model.parameters())
    assert counts.trainable == parameters
    assert counts.optimizer_bytes == 2 * 4 * parameters
    assert counts.step.gradient_bytes == counts.stored_bytes == 4 * parameters
    assert counts.weight_bytes > 4 * parameters, "buffers are on the device too"
    assert counts.step.peak_bytes > counts.weight_bytes + counts.step.saved_bytes


def test_cache_bytes_are_those_of_the_file(meta: Any, tiny: ModuleType) -> None:
    counts = count(meta("iisan", cached=True))
    levels = 1 + tiny.DEPTH // 2
    assert counts.cache_bytes == dict.fromkeys(("text", "image"), (DATA.items + 1) * levels * tiny.WIDTH * 2)
    assert count(meta("iisan")).cache_bytes == {}


def test_popularity_trains_nothing(meta: Any) -> None:
    counts = count(meta("popularity"))
    assert (counts.trainable, counts.optimizer_bytes, counts.step.backward_flops, counts.step.saved_bytes) == (0,) * 4
    assert all(reading.value is not None for reading in counts.readings().values())


@pytest.mark.parametrize(
    ("dtype", "trains", "expected"),
    [
        (None, True, 4 * 32 * 16),  # the input; the weight is a weight
        (None, False, 0),
        (torch.float16, True, 2 * 32 * 16 + 2 * 24 * 16),  # the cast input and the cast weight
        (torch.float16, False, 2 * 24 * 16),
    ],
)
def test_what_a_linear_layer_saves(dtype: torch.dtype | None, trains: bool, expected: int) -> None:
    weight = torch.empty(24, 16, device="meta", requires_grad=trains)
    held = torch.empty(32, 16, device="meta", requires_grad=True)
    tracker = Tracker([weight, held])
    with tracker, Target(dtype, fused_attention=False), tracker.saving():
        out = functional.linear(held.mul(1), weight)
    assert tracker.saved_bytes() == expected
    assert out.dtype == (dtype or torch.float32)


def test_autocast_casts_a_trained_weight_once() -> None:
    weight, held = (torch.empty(16, 16, device="meta", requires_grad=True) for _ in range(2))
    tracker = Tracker([weight, held])
    with tracker, Target(torch.bfloat16, fused_attention=False), tracker.saving():
        first = functional.linear(held, weight)
        out = functional.layer_norm(functional.linear(first, weight), (16,))
    assert out.dtype == torch.float32, "norms run in single precision"
    # Input, weight and first output in bf16; of the norm its input in fp32, mean and deviation.
    assert tracker.saved_bytes() == 3 * 2 * 16 * 16 + 4 * 16 * 16 + 2 * 4 * 16


def test_cast_weights_are_gone_after_the_forward_pass() -> None:
    weight = torch.empty(512, 2, device="meta", requires_grad=True)
    tracker, target = Tracker([weight]), Target(torch.float16, fused_attention=False)
    with tracker:
        with target:
            out = functional.linear(torch.empty(1, 2, dtype=torch.float16, device="meta"), weight)
        target.end_forward()  # the backward pass needs the input alone
        later = torch.empty(512, device="meta")
    # Weight (4096), input (512), output (1024), and at one time either the weight's copy or ``later`` (2048).
    assert tracker.peak_bytes == 4096 + 512 + 1024 + 2048
    assert out.shape == (1, 512)
    assert later.shape == (512,)


def test_dropout_keeps_a_byte_an_element() -> None:
    held = torch.empty(100, device="meta", requires_grad=True)
    tracker = Tracker([held])
    with tracker, Target(None, fused_attention=False), tracker.saving():
        kept = functional.dropout(held, 0.5)
    assert tracker.saved_bytes() == 100
    assert kept.shape == held.shape


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_keeps_no_square_matrix(dtype: torch.dtype | None, masked: bool) -> None:
    n, heads, tokens, width = 3, 2, 128, 32
    held = torch.empty(n, heads, tokens, width, device="meta", requires_grad=True)
    mask = torch.empty(n, 1, tokens, tokens, dtype=torch.bool, device="meta") if masked else None
    saved, work = {}, {}
    for fused in (False, True):
        tracker = Tracker([held] if mask is None else [held, mask])
        with tracker:
            context = sdpa_kernel(SDPBackend.MATH) if not fused else nullcontext()
            with context, Target(dtype, fused_attention=fused), tracker.saving():
                out = functional.scaled_dot_product_attention(held.mul(1), held.mul(1), held.mul(1), attn_mask=mask)
            saved[fused], work[fused] = tracker.saved_bytes(), tracker.flops
        assert out.shape == held.shape
    assert work[False] == work[True] == 2 * 2 * n * heads * tokens**2 * width
    size = 2 if dtype else 4
    bias = size * n * tokens * tokens if masked else 0
    assert saved[True] <= 4 * held.numel() * size + 4 * n * heads * tokens + bias + 64
    assert saved[False] >= size * n * heads * tokens**2


def test_the_peak_is_the_most_alive_at_one_time() -> None:
    held = torch.empty(256, device="meta")  # 1024 bytes
    tracker = Tracker([held])
    with tracker:
        a = held + 1
        b = a + 1
        del a
        c = b + 1
        del b, c
        tiny_one = torch.empty(1, device="meta") + 1
    assert tracker.peak_bytes == 3 * 1024
    assert tiny_one is not None


def test_operators_without_a_formula_are_named() -> None:
    tracker = Tracker()
    with tracker:
        torch.linalg.svd(torch.empty(4, 4, device="meta"))
    assert tracker.uncounted == {"aten._linalg_svd"}


# --- the same everywhere -------------------------------------------------------------------------------------------


def test_counters_do_not_depend_on_run_or_threads(meta: Any) -> None:
    threads = torch.get_num_threads()
    try:
        counts = []
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            torch.manual_seed(number)
            counts.append(count(meta("lora", training={"precision": "bf16"})))
    finally:
        torch.set_num_threads(threads)
    assert counts[0] == counts[1] == counts[2]


def test_records_hold_the_counters(card_run: Any) -> None:
    _, _, results = card_run
    exact = {"forward_flops", "backward_flops", "saved_bytes", "gradient_bytes", "weight_bytes", "optimizer_bytes"}
    for label, result in results.items():
        assert exact <= set(result.counters), label
        assert result.counters["trainable_parameters"].value == result.parameters.trainable
        assert result.counters["stored_bytes"].value == result.parameters.stored_bytes
        assert "distinct items" in result.counters["forward_flops"].source
        assert [phase.kind for phase in result.phases][-1] == "count", "outside everything that is measured"
        if label != "popularity":
            assert 0 < result.counters["mfu"].value < 1
    assert results["iisan (cached)"].counters["cache_bytes"].value > 0


def test_a_method_that_needs_values_loses_its_counters_not_its_record(
    world: Any, harness: ModuleType, tmp_path: Path
) -> None:
    body = """
    def losses(self, outputs):
        return {"task": outputs["task"].loss if float(outputs["task"].loss) < 1e9 else None}
    """
    harness.write_method(tmp_path / "methods", "needy", body)
    matrix = world.matrix(["needy"])
    [result] = world.run(matrix, tmp_path / "run", methods_path=[tmp_path / "methods"])
    assert result.status == "ok"
    assert result.counters["forward_flops"].value is None
    assert "meta" in result.counters["forward_flops"].reason
    assert "noise_time_ratio" in result.counters, "the noise floor does not hang on them"


def test_utilisation_is_doubtful_where_work_is_not_counted(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    body = """
    def losses(self, outputs):
        logits = outputs["task"].logits[:3, :3]
        return {"task": outputs["task"].loss, "spectrum": 0 * torch.linalg.svdvals(logits).sum()}
    """
    harness.write_method(tmp_path / "methods", "spectral", body)
    [result] = world.run(world.matrix(["spectral"]), tmp_path / "run", methods_path=[tmp_path / "methods"])
    assert result.counters["mfu"].value > 0
    for name in ("forward_flops", "backward_flops", "mfu"):
        assert not result.counters[name].valid
        assert result.counters[name].reason == "no FLOP formula for aten._linalg_svd"


# --- full shape ----------------------------------------------------------------------------------------------------


def full_shape(method: str, **changes: Any) -> Cell:
    return Cell(
        method=method,
        dataset="scientific",
        dataset_fingerprint="none",
        modalities=BOTH,
        text_encoder=EncoderSpec(source="bert-base-uncased"),
        image_encoder=EncoderSpec(source="google/vit-base-patch16-224"),
        **changes,
    )


def test_known_shapes_are_those_of_the_released_configurations(shared: Callable[..., Path]) -> None:
    for name, folder in (
        ("bert-base-uncased", "bert-base-uncased"),
        ("google/vit-base-patch16-224", "vit-base-patch16-224"),
    ):
        released = json.loads((shared("pretrained", folder) / "config.json").read_text())
        planned = AutoConfig.for_model(RELEASED[name]).to_dict()
        assert {key: released.get(key, planned[key]) for key in SHAPE if key in planned} == {
            key: planned[key] for key in SHAPE if key in planned
        }


def test_full_shape_without_network_or_weights(encoders: MetaEncoders) -> None:
    cell = MetaCell(full_shape("fft"), DataShape.assumed(), encoders)
    counts = count(cell)
    assert counts.trainable == 194_897_216
    assert counts.optimizer_bytes == 8 * 194_897_216
    macs = cell.batch.candidates.distinct * (17.45e9 + 2.56e9)  # ViT-B/16 at 197 tokens, BERT-base at 30
    assert counts.step.forward_flops == pytest.approx(2 * macs, rel=0.01)
    assert counts.step.backward_flops == pytest.approx(2 * counts.step.forward_flops, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["fft", "lora", "iisan"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_planned_peak_is_what_a_gpu_allocates(tiny: ModuleType, method: str, precision: str) -> None:
    cell = MetaCell(full_shape(method, training={"precision": precision, "users_per_batch": 8}), DataShape.assumed())
    planned = run_step(cell, fused_attention=True).peak_bytes
    cell.model.zero_grad(set_to_none=True)
    materialise(cell, "cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", dtype=torch.float16, enabled=precision == "fp16"):
            loss = tiny.loss_of(cell.model, cell.batch)
        loss.backward()
        cell.model.zero_grad(set_to_none=True)
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)

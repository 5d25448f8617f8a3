"""A training step of base-width encoders, written the plain way and as the suite runs it: what each change brought.

    python scripts/step_ways.py --docs docs/lab/step.md

The plain way: eager attention, every slot encoded, an update per parameter, the C allocator as it comes. The other rows
add one change each; the last encodes distinct items (protocol ``suite``). Rows have a process of their own and take
turns, method by method; shares are those of the median step. All rows start from equal weights and see equal batches,
and the script fails unless their losses are equal. ``--attention`` times attention alone. About ten minutes on two
idle cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert.modeling_bert import eager_attention_forward
from workload import ENCODERS, TITLE_TOKENS, Encoders, Size, in_turns, put, say, synthetic_data, take_turns

from tpme.bench.counting.batch import SCIENTIFIC_LENGTHS
from tpme.bench.counting.modes import Tracker
from tpme.bench.measure.environment import cpu_model
from tpme.bench.measure.host import keep_free_memory, parse_status
from tpme.bench.record import LearningRates, Modality, Protocol, Training
from tpme.bench.task.batches import ItemStore, build_batch, log_popularity
from tpme.bench.task.blocked_attention import attend
from tpme.bench.task.tokens import TokenTable
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import DataSize, ModelBuilder
from tpme.bench.train.step import total_loss
from tpme.methods.registry import create

METHODS = ("fft", "adapter", "lora", "bitfit", "prompt")


@dataclass(frozen=True)
class Way:
    """How a step is run. attention: ``None`` is the suite's choice. fused: one kernel updates all parameters."""

    attention: str | None
    fused: bool = False
    keeps_memory: bool = False
    protocol: Protocol = "paper"


PLAIN, BLOCKED, KEPT = "plain", "blocked attention", "freed memory is kept"
WAYS = {
    PLAIN: Way("eager"),
    "torch's attention, fused Adam": Way("sdpa", fused=True),
    BLOCKED: Way(None, fused=True),
    KEPT: Way(None, fused=True, keeps_memory=True),
    "distinct items": Way(None, fused=True, keeps_memory=True, protocol="suite"),
}
COUNTED = (WAYS[PLAIN], *list(WAYS.values())[-2:])
"""Ways whose activations are counted; with the others they are the same."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Let the ways take turns for every method, and print or document the shares."""
    parser = argparse.ArgumentParser(description="A training step, the plain way and the suite's.")
    parser.add_argument("--encoders", choices=list(ENCODERS), default="wide")
    parser.add_argument("--depth", type=int, default=2, help="layers of both encoders")
    parser.add_argument("--users", type=int, default=8, help="of the batch")
    parser.add_argument("--turns", type=int, default=3, help="measured steps of each row")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this one; may be repeated")
    parser.add_argument("--attention", action="store_true", help="time attention alone")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = Encoders(ENCODERS[options.encoders].width, options.depth, ENCODERS[options.encoders].side)
    if options.way:
        take_part(options.method[0], WAYS[options.way], shape, options.users)
        return 0
    if options.attention:
        text = attention_table()
        if options.docs is None:
            sys.stdout.write(f"{text}\n")
        else:
            put(text, options.docs, "attention")
        return 0
    given = ["--encoders", options.encoders, "--depth", str(options.depth), "--users", str(options.users)]
    found = {}
    for method in options.method or METHODS:
        commands = {way: [sys.executable, __file__, "--method", method, "--way", way, *given] for way in WAYS}
        found[method] = in_turns(commands, options.turns)
        check(method, found[method][1])
    text = report(found, shape, options.users)
    if options.docs is None:
        sys.stdout.write(f"{text}\n")
    else:
        put(text, options.docs, "step-ways")
    return 0


def take_part(name: str, way: Way, shape: Encoders, users: int) -> None:
    """One way: its turns, then its losses. What it says first is the peak of a step's activations, in bytes."""
    if way.keeps_memory:
        keep_free_memory()
    with tempfile.TemporaryDirectory(prefix="tpme-step-") as folder:
        size = Size(name, encoders="wide", users=users, items=64 * users)
        # Lengths at the quantiles of Scientific's, so that a small batch has the shares of a large one.
        lengths = np.repeat(list(SCIENTIFIC_LENGTHS), list(SCIENTIFIC_LENGTHS.values()))
        picked = lengths[((np.arange(users) + 0.5) / users * len(lengths)).astype(int)]
        data = synthetic_data(size, Path(folder), lengths=picked, side=shape.side)
        rng = np.random.default_rng(0)
        ids = rng.integers(1000, 30_000, (size.items + 1, TITLE_TOKENS), dtype=np.int32)
        tokens = TokenTable(ids, rng.integers(12, TITLE_TOKENS + 1, size.items + 1).astype(np.int32))
        store = ItemStore(data, tokens=tokens, images=True)
        batch = build_batch(data.train_slots, log_popularity(data), store, way.protocol)
        views = encoders(shape, way.attention)
        method = create(name, {})
        torch.manual_seed(1)
        training = Training(embedding_dim=64, dropout=0.0, epochs=1)
        model = ModelBuilder(method, training, DataSize.of(data), {m: v.shape for m, v in views.items()}).build(views)
        model.train()
        optimizer = method.optimizer(method.param_groups(model, LearningRates()), fused=way.fused)
        losses: list[float] = []

        def peak_bytes() -> int:
            with Tracker([*model.parameters(), *model.buffers()]) as tracker:
                held = tracker.peak_bytes
                with tracker.saving():
                    loss = total_loss(method, model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            return tracker.peak_bytes - held

        def step() -> float:
            started = time.perf_counter()
            loss = total_loss(method, model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            return time.perf_counter() - started

        take_turns(peak_bytes if way in COUNTED else lambda: None, step)
        resident = parse_status(Path("/proc/self/status").read_bytes())
        say([losses, resident.peak if resident else 0])


def encoders(shape: Encoders, attention: str | None) -> dict[Modality, EncoderView]:
    """BERT and ViT with random weights, without dropout."""
    common: dict[str, Any] = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    text = BertModel(BertConfig(**common), add_pooling_layer=False).eval()
    image = ViTModel(ViTConfig(**common, image_size=shape.side, patch_size=shape.patch), add_pooling_layer=False).eval()
    return {
        "text": EncoderView(text, "text", attention=attention),
        "image": EncoderView(image, "image", attention=attention),
    }


def attention_table(calls: int = 9) -> str:
    """Milliseconds of attention, forward and backward, as the encoders of transformers call it; median of the calls."""
    keep_free_memory()
    ways = {"eager": eager_attention_forward, "torch's (sdpa)": sdpa_attention_forward, "the suite's": attend}
    module, heads, width = nn.Module(), 12, 64
    module.is_causal = False  # type: ignore[assignment]
    lines = [f"| items x tokens | {' | '.join(ways)} |", f"|---|{'---:|' * len(ways)}"]
    for items, tokens in ((44, 30), (44, 197), (8, 577)):
        given = [torch.randn(items, tokens, heads * width, requires_grad=True) for _ in range(3)]
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(calls):
            for name, attention in ways.items():
                query, key, value = (one.view(items, tokens, heads, width).transpose(1, 2) for one in given)
                started = time.perf_counter()
                out = attention(module, query, key, value, None, scaling=width**-0.5, dropout=0.0)[0]
                between = time.perf_counter()
                torch.autograd.grad(out, given, torch.ones_like(out))
                taken[name].append((between - started, time.perf_counter() - between))
        cells = [
            " + ".join(f"{1e3 * median(part):.3g}" for part in zip(*times, strict=True)) for times in taken.values()
        ]
        lines.append(f"| {items} x {tokens} | {' | '.join(cells)} |")
    return "\n".join(
        [f"{cpu_model()}, {torch.get_num_threads()} threads; 12 heads, 64 wide; ms, forward + backward.", "", *lines]
    )


def check(method: str, said: Mapping[str, list[Any]]) -> None:
    """Raise ValueError unless all ways had equal losses in their first steps, updates included."""
    for way, (_, (losses, _)) in said.items():
        for k, (ours, plain) in enumerate(zip(losses[:3], said[PLAIN][1][0], strict=False)):
            if not math.isclose(ours, plain, rel_tol=(1e-4, 1e-3, 1e-2)[k]):
                raise ValueError(f"{method}, {way}: the loss of step {k + 1} is {ours}, the plain way's {plain}")


def report(
    found: Mapping[str, tuple[dict[str, list[float]], dict[str, list[Any]]]], shape: Encoders, users: int
) -> str:
    """Shares of the plain way's time and activations as a Markdown table."""
    lines = [
        f"{cpu_model()}, {torch.get_num_threads()} threads; encoders of {shape.depth} layers, {shape.width} wide; "
        f"{TITLE_TOKENS} tokens a title, {shape.tokens} an image; {users} users, {11 * users} slots, fp32.",
        "",
        f"| method | plain, s a step | {' | '.join(list(WAYS)[1:])} | activations, paper | activations, suite | "
        "resident, freed memory kept or not |",
        f"|---|{'---:|' * (len(WAYS) + 3)}",
    ]
    for method, (seconds, said) in found.items():
        plain_s = median(seconds[PLAIN])
        shares = [f"{median(seconds[way]) / plain_s:.2f}" for way in list(WAYS)[1:]]
        peaks = [f"{said[way][0] / said[PLAIN][0]:.2f}" for way in list(WAYS)[-2:]]
        resident = {way: said[way][1][1] for way in (BLOCKED, KEPT)}
        peaks.append(f"{resident[KEPT] / resident[BLOCKED]:.2f}")
        lines.append(f"| {method} | {plain_s:.2f} | {' | '.join([*shares, *peaks])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

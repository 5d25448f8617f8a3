"""A training step of one cell on two ranks of one thread each, against one rank of one thread, on two cores.

Both sides are processes that wait for their turn, so they never run beside each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ranked import Turns
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from tpme.bench.task.dataset import Dataset
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate

WIDTH, DEPTH, SIDE = 128, 4, 96
TURNS, MOST_TURNS, STEPS = 5, 15, 2
"""A machine that somebody else uses may hide it: more turns are taken then."""
LEAST = 1.7
"""Speed-up of a step by the second rank."""
SETTINGS = {"users_per_batch": 64, "embedding_dim": 64, "dropout": 0.1, "max_steps_per_epoch": None, "title_tokens": 16}


@pytest.fixture(scope="module")
def wide_world(tmp_path_factory: pytest.TempPathFactory, harness: ModuleType) -> SimpleNamespace:
    """Encoders of width 128 and a synthetic catalogue."""
    root = tmp_path_factory.mktemp("wide")
    prepare(generate(Synthetic(users=2000, items=1000)), root / "data", image_size=SIDE, workers=1)
    titles = Dataset.open(root / "data").titles
    assert titles is not None
    shape = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}
    BertModel(BertConfig(**shape, vocab_size=2000), add_pooling_layer=False).save_pretrained(root / "text")
    vit = ViTConfig(**shape, image_size=SIDE, patch_size=16)
    ViTModel(vit, add_pooling_layer=False).save_pretrained(root / "image")
    harness.save_tokenizer(root / "text", list(titles), 2000)
    return SimpleNamespace(data=root / "data", text=root / "text", image=root / "image", store=root / "store")


@pytest.fixture
def speed_up(wide_world: Any, tmp_path: Path, benchmark: Any, say: Any, note: Any) -> Callable[..., float]:
    """Measures what the second rank gains, by the fastest turn of each side, and writes it into the table."""

    def measure(case: dict[str, Any], least: float | None) -> float:
        taken: list[list[tuple[float, float]]] = []
        with Turns(wide_world, tmp_path / "one", case, 1) as one, Turns(wide_world, tmp_path / "two", case, 2) as two:
            while True:
                taken.append([one.run(STEPS), two.run(STEPS)])
                alone, pair = (min(turns) for turns in zip(*taken, strict=True))
                ratio = alone[0] / pair[0]
                if len(taken) >= TURNS and (ratio >= (least or 0) or len(taken) == MOST_TURNS):
                    break
        benchmark.pedantic(lambda: taken, rounds=1)
        times = ", ".join(
            f"{name} {1e3 * wall:.0f} ms, of a processor {1e3 * cpu:.0f} ms"
            for name, (wall, cpu) in (("one", alone), ("two", pair))
        )
        row = f"{case['method']}{' (cached)' if case.get('cached') else ''}"
        say(f"{row}: {times}, {ratio:.2f}x")
        aim = "reported" if least is None else f"{least:g}x"
        note(
            f"training step on two ranks of a thread, {row}",
            aim,
            f"{ratio:.2f}x ({1e3 * alone[0]:.0f} ms / {1e3 * pair[0]:.0f} ms)",
        )
        return ratio

    return measure


@pytest.mark.parametrize("method", ["fft", "lora"])
def test_two_ranks_take_little_more_than_half_the_time(speed_up: Any, method: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    assert speed_up({"method": method} | SETTINGS, LEAST) >= LEAST


def test_cached_steps_are_reported(speed_up: Any) -> None:
    """Without encoders a step is short, and bound by small operators that every rank starts: no bound is asserted."""
    assert speed_up({"method": "iisan", "cached": True} | SETTINGS, None) > 0

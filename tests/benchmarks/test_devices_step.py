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
TURNS, STEPS = 5, 2
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
def seconds(wide_world: Any, tmp_path: Path) -> Callable[[dict[str, Any]], tuple[float, float]]:
    """Measures the seconds of a step on one rank and on two: the fastest turn of each."""

    def measure(case: dict[str, Any]) -> tuple[float, float]:
        with Turns(wide_world, tmp_path / "one", case, 1) as one, Turns(wide_world, tmp_path / "two", case, 2) as two:
            taken = [(one.run(STEPS), two.run(STEPS)) for _ in range(TURNS)]
        alone, pair = (min(turns) for turns in zip(*taken, strict=True))
        for name, (wall, cpu) in (("one rank", alone), ("two ranks", pair)):
            print(f"\n{case['method']} on {name}: {1e3 * wall:.0f} ms, {1e3 * cpu:.0f} ms of a processor")
        return alone[0], pair[0]

    return measure


@pytest.mark.parametrize("method", ["fft", "lora"])
def test_two_ranks_take_little_more_than_half_the_time(seconds: Any, method: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    alone, pair = seconds({"method": method} | SETTINGS)
    assert alone / pair >= LEAST


def test_cached_steps_are_reported(seconds: Any) -> None:
    """Without encoders a step is short, and bound by what the ranks send: no bound is asserted."""
    assert min(seconds({"method": "iisan", "cached": True} | SETTINGS)) > 0

"""Building the feature cache: nearly all of the time belongs to the encoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig

from tpme.bench.record import EncoderSpec
from tpme.bench.task.features import FeatureJob, build, planned_bytes
from tpme.bench.task.items import Reads
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate
from tpme.bench.task.view import EncoderView

ITEMS, SIDE, WIDTH, DEPTH = 1024, 96, 256, 12


def test_nearly_all_of_the_time_is_the_encoders(
    benchmark: Any,
    say: Callable[[str], None],
    note: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = prepare(generate(Synthetic(users=60, items=ITEMS)), tmp_path / "data", max_seq_len=10, image_size=SIDE)
    config = ViTConfig(hidden_size=WIDTH, num_hidden_layers=DEPTH, intermediate_size=4 * WIDTH, num_attention_heads=4)
    config.image_size = SIDE
    config.save_pretrained(tmp_path / "vit")
    levels = tuple(range(0, DEPTH + 1, 2))
    job = FeatureJob(
        dataset=tmp_path / "data",
        store=tmp_path / "store",
        modality="image",
        encoder=EncoderSpec(source=str(tmp_path / "vit"), weights="random"),
        reads=Reads(levels),
        title_tokens=30,
        device="cpu",
        seed=1,
        limit_bytes=2**40,
    )
    inside, ends = [0.0], []
    encode = EncoderView.encode

    def timed(view: EncoderView, reads: Reads, **inputs: Any) -> Any:
        start = time.perf_counter()
        try:
            return encode(view, reads, **inputs)
        finally:
            inside.append(time.perf_counter() - start)

    monkeypatch.setattr(EncoderView, "encode", timed)
    # From the end of the first chunk, when libraries and weights are there, to the finished, checksummed cache. Before
    # it item 0 was encoded, for the size of a row.
    manifest = benchmark.pedantic(build, (job, lambda _share: ends.append(time.perf_counter())), rounds=1)
    share = sum(inside[3:]) / (time.perf_counter() - ends[0])
    say(f"encoder's share of building: {share:.1%} of {manifest.build_s:.1f} s for {manifest.items} items")
    assert manifest.dtype == "float16"
    assert manifest.bytes == planned_bytes(data.items, torch.empty(1, len(levels), WIDTH, dtype=torch.float16))
    note("building the feature cache, share inside the encoder's forward pass", "90%", f"{share:.1%}")
    assert share >= 0.9

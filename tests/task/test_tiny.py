"""The shipped encoders: they load offline, are small, and say where they come from."""

from __future__ import annotations

import json

import pytest

from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.task.builtin import BUILTIN, builtin_folder
from tpme.bench.task.encoders import load_encoder


@pytest.mark.parametrize(("source", "modality"), [("builtin:tiny-text", "text"), ("builtin:tiny-image", "image")])
def test_they_load_offline(source: str, modality: Modality, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = load_encoder(EncoderSpec(source=source), modality).facts
    assert (facts.width, facts.depth) == (64, 4)


def test_they_are_small_and_carry_their_provenance() -> None:
    folders = [builtin_folder(source) for source in BUILTIN]
    assert sum((folder / "model.safetensors").stat().st_size for folder in folders) < 2.2e6
    for folder in folders:
        told = json.loads((folder / "pretraining.json").read_text())
        assert told["command"] == "python -m tpme.bench.task.tiny.pretrain"
        assert all(loss > 0 for loss in told["losses"].values())

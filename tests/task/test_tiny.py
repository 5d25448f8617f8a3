"""The shipped encoders: they load offline, are small, know their attributes, and can be made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.task.builtin import BUILTIN, builtin_folder
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.sources.synthetic import Catalogue, make_catalogue, make_world
from tpme.bench.task.tiny import pretrain

TEXT, IMAGE = builtin_folder("builtin:tiny-text"), builtin_folder("builtin:tiny-image")
QUICK = ["--text-steps", "3", "--image-steps", "3", "--items-per-world", "2", "--batch", "4"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back what the script sets for its whole process."""
    from transformers.utils import logging

    before, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(before)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    """Items of a world that the encoders never saw."""
    return make_catalogue(make_world(1), np.random.default_rng(0), 1500)


@pytest.fixture(scope="module")
def token_0(catalogue: Catalogue) -> tuple[list[Tensor], list[Tensor]]:
    """Token 0 of every entry of ``hidden_states``, text and image: (items, width) each."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(TEXT)(catalogue.titles, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.stack([picture(pretrain.IMAGE) for picture in catalogue.pictures])) / 127.5 - 1
    with torch.no_grad():
        text = AutoModel.from_pretrained(TEXT).eval()(**tokens, output_hidden_states=True).hidden_states
        image = AutoModel.from_pretrained(IMAGE).eval()(pixels, output_hidden_states=True).hidden_states
    return [state[:, 0] for state in text], [state[:, 0] for state in image]


@pytest.mark.parametrize(("source", "modality"), [("builtin:tiny-text", "text"), ("builtin:tiny-image", "image")])
def test_they_load_offline(source: str, modality: Modality) -> None:
    facts = load_encoder(EncoderSpec(source=source), modality).facts
    assert (facts.width, facts.depth) == (64, 4)


def test_they_are_small_and_carry_their_provenance() -> None:
    folders = [builtin_folder(source) for source in BUILTIN]
    assert sum((folder / "model.safetensors").stat().st_size for folder in folders) < 2.2e6
    for folder in folders:
        provenance = json.loads((folder / "pretraining.json").read_text())
        assert provenance["command"] == "python -m tpme.bench.task.tiny.pretrain"
        assert provenance["settings"] == pretrain.Pretraining().model_dump(), (
            "the script's defaults are not what was shipped"
        )
        assert set(provenance["versions"]) == {"python", "machine", "numpy", "torch", "transformers"}
        assert all(loss > 0 for loss in provenance["losses"].values())


def test_the_demo_is_no_world_of_the_pretraining() -> None:
    from tpme.bench.task.sources.synthetic import Synthetic

    assert Synthetic().world < pretrain.FIRST_WORLD
    met = {
        brand
        for world in range(pretrain.Pretraining().worlds)
        for brand in make_world(pretrain.FIRST_WORLD + world).brands
    }
    assert len(met & set(make_world(1).brands)) < 4


def test_titles_fit_and_nothing_in_them_is_unknown(catalogue: Catalogue) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEXT)
    rows = tokenizer(catalogue.titles)["input_ids"]
    assert max(map(len, rows)) <= pretrain.TOKENS
    assert all(tokenizer.unk_token_id not in row for row in rows)
    assert tokenizer.unk_token_id not in tokenizer("A title nobody planned, at 50% off!")["input_ids"]
    assert tokenizer.tokenize(make_world(1).brands[0])[1].startswith("##")


def test_token_0_knows_most_half_way_and_nothing_at_the_embeddings(
    catalogue: Catalogue, token_0: tuple[list[Tensor], list[Tensor]]
) -> None:
    """A linear probe on items of another world than those learned from; chance is one over the number of kinds."""
    text, image = token_0
    for states in (text, image):
        assert torch.equal(states[0], states[0][:1].expand_as(states[0]))
    results = {
        attribute: [_probe(state, getattr(catalogue, attribute)) for state in states[1:]]
        for states, attributes in ((text, ("category", "style")), (image, ("shape", "colour", "texture")))
        for attribute in attributes
    }
    for attribute, accuracies in results.items():
        assert accuracies[pretrain.HALF_WAY - 1] > 0.7, (attribute, accuracies)


def test_the_last_token_0_leans_towards_the_coarse_classes(
    catalogue: Catalogue, token_0: tuple[list[Tensor], list[Tensor]]
) -> None:
    """What the coarse class tells is a larger share of the last state's variance than of that half-way."""
    text, image = token_0
    for states, coarse in (
        (text, catalogue.category % pretrain.DEPARTMENTS),
        (image, catalogue.colour * pretrain.COLOUR_FAMILIES // 8),
    ):
        assert _explained(states[-1], coarse) > 1.5 * _explained(states[pretrain.HALF_WAY], coarse)


@pytest.mark.usefixtures("threads")
def test_the_script_writes_whole_folders_that_load_and_the_same_ones_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main(["--out", str(tmp_path / "one"), *QUICK])
    assert "text 3/3  masked_words" in capsys.readouterr().err
    pretrain.main(["--out", str(tmp_path / "two"), *QUICK])
    pretrain.main(["--out", str(tmp_path / "two"), *QUICK, "--seed", "1"])  # replaces what is there
    pretrain.main(["--out", str(tmp_path / "three"), *QUICK])
    for modality, shipped in (("text", TEXT), ("image", IMAGE)):
        one, two, three = (tmp_path / name / modality for name in ("one", "two", "three"))
        assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in shipped.iterdir())
        assert (one / "config.json").read_bytes() == (shipped / "config.json").read_bytes()
        weights = [(folder / "model.safetensors").read_bytes() for folder in (one, two, three)]
        assert weights[0] == weights[2]
        assert weights[0] != weights[1]
        assert "--seed 1 " in json.loads((two / "pretraining.json").read_text())["command"]
        load_encoder(EncoderSpec(source=str(one)), modality)
        assert not list(one.parent.glob(".*")), "left-overs"


def test_the_shipped_vocabulary_is_the_script_s() -> None:
    model = json.loads((TEXT / "tokenizer.json").read_text())["model"]
    assert sorted(model["vocab"], key=model["vocab"].__getitem__) == pretrain.vocabulary()


def _probe(state: Tensor, kinds: np.ndarray) -> float:
    """Accuracy of a ridge classifier that learned on the first two thirds of the items, on the others."""
    target, learned = torch.from_numpy(kinds), 2 * len(kinds) // 3
    state = (state - state[:learned].mean(0)) / (state[:learned].std(0) + 1e-6)
    x = torch.cat([state, torch.ones(len(state), 1)], dim=1)
    y = torch.nn.functional.one_hot(target).float()
    gram = x[:learned].T @ x[:learned] + 3 * torch.eye(x.shape[1])
    guess = (x[learned:] @ torch.linalg.solve(gram, x[:learned].T @ y[:learned])).argmax(1)
    return float((guess == target[learned:]).float().mean())


def _explained(state: Tensor, kinds: np.ndarray) -> float:
    """Share of the variance of (items, width) that lies between the kinds."""
    classes = torch.from_numpy(kinds)
    means = torch.stack([state[classes == kind].mean(0) for kind in range(int(classes.max()) + 1)])
    return float((means[classes] - state.mean(0)).square().sum() / (state - state.mean(0)).square().sum())

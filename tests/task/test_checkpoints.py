"""Options of an encoder, on checkpoints as transformers saves them, and encoders read from disk as they run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel

from tpme.bench.contract.small_encoders import FAMILIES, SIDE, modality_of, small_config, small_encoder
from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.task.encoders import encoder_digest, encoder_shape, image_size, load_encoder, pin_revision
from tpme.bench.task.items import Reads
from tpme.bench.task.view import EncoderView

TOWERS: dict[str, tuple[Any, Any]] = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}
BOTH: tuple[Modality, ...] = ("text", "image")


def inputs(modality: Modality) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if modality == "image":
        return {"image": torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)}
    mask = (torch.arange(6) < torch.tensor([6, 2, 4])[:, None]).long()
    return {"tokens": torch.randint(3, 50, (3, 6), generator=generator) * mask, "token_mask": mask}


def states_of(view: EncoderView) -> Tensor:
    reads = Reads((0, 1), final=True, pool=view.shape.pool)
    states: Tensor = view.encode(reads, **inputs(view.modality)).detach()
    return states


def save(module: PreTrainedModel, folder: Path) -> Path:
    module.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TOWERS)
def two_towers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint with both towers, and the model that it was saved from."""
    name = request.param
    config, model = TOWERS[name]
    parts = {
        f"{part}_config": small_config(f"{name}-{kind}").to_dict()
        for part, kind in (("text", "text"), ("vision", "image"))
    }
    torch.manual_seed(5)
    module = model(config(**parts)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return save(module, tmp_path_factory.mktemp(name)), module


def refused(source: EncoderSpec, modality: Modality, match: str) -> None:
    for load in (load_encoder, encoder_shape):
        with pytest.raises(UserError, match=match) as error:
            load(source, modality)
        assert "\n" not in str(error.value)
        assert str(error.value).count(source.source) == 1


# --- towers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", BOTH)
def test_one_tower_of_two_is_loaded(two_towers: tuple[Path, Any], modality: Modality) -> None:
    folder, whole = two_towers
    encoder = load_encoder(EncoderSpec(source=str(folder)), modality)
    tower = whole.text_model if modality == "text" else whole.vision_model
    torch.testing.assert_close(states_of(encoder.view), states_of(EncoderView(tower, modality)))
    assert encoder.facts.architecture == type(tower).__name__
    assert encoder.facts.parameters == sum(p.numel() for p in encoder.view.module.parameters())
    assert encoder_shape(EncoderSpec(source=str(folder)), modality) == encoder.view.shape
    named = load_encoder(EncoderSpec(source=str(folder), tower=modality), modality)
    assert torch.equal(states_of(named.view), states_of(encoder.view))
    for settings in ({"weights": "random"}, {}):
        meta = load_encoder(EncoderSpec(source=str(folder), **settings), modality, device="meta")
        assert meta.facts.parameters == encoder.facts.parameters


def test_the_other_tower_is_refused(two_towers: tuple[Path, Any]) -> None:
    folder, _ = two_towers
    assert image_size(EncoderSpec(source=str(folder))) == SIDE
    refused(EncoderSpec(source=str(folder), tower="image"), "text", "its input is image, so it cannot be the text")
    refused(EncoderSpec(source=str(folder), tower="text"), "image", "its input is text, so it cannot be the image")


def test_an_encoder_without_two_towers_has_none(tmp_path: Path) -> None:
    folder = save(small_encoder("bert"), tmp_path)
    refused(EncoderSpec(source=str(folder), tower="text"), "text", "does not have two towers; leave out tower")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_as_it_was_saved(tmp_path: Path, family: str) -> None:
    modality, module = modality_of(family), small_encoder(family)
    folder = save(module, tmp_path)
    expected = states_of(EncoderView(module, modality))
    spec = EncoderSpec(source=str(folder))
    encoder = load_encoder(spec, modality)
    assert torch.equal(states_of(encoder.view), expected)
    assert encoder.view.shape == encoder_shape(spec, modality)
    assert encoder.facts.parameters == load_encoder(spec, modality, device="meta").facts.parameters
    assert (encoder.facts.pool, encoder.facts.dtype) == (encoder.view.shape.pool, "float32")
    assert load_encoder(EncoderSpec(source=str(folder), weights="random"), modality).facts.weights == "random"


def test_texts_without_a_mask_are_padded_as_the_tokenizer_pads(harness: ModuleType, tmp_path: Path) -> None:
    """A SigLIP 2 pads with token 0, and its configuration says 1, the default of SigLIP."""
    module = small_encoder("siglip-text")
    expected = states_of(EncoderView(module, "text"))
    module.config.pad_token_id = 1
    spec = EncoderSpec(source=str(save(module, tmp_path)))
    assert not torch.allclose(states_of(load_encoder(spec, "text").view), expected)
    harness.save_tokenizer(tmp_path, ["any words"], 50)
    assert torch.equal(states_of(load_encoder(spec, "text").view), expected)


# --- pooling --------------------------------------------------------------------------------------------------------


def write_pooling(folder: Path, settings: object) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))


def sentence_folder(tmp_path: Path, settings: object) -> Path:
    folder = save(small_encoder("bert"), tmp_path)
    write_pooling(folder, settings)
    return folder


FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")


@pytest.mark.parametrize(
    ("flag", "mode", "pool"),
    [("cls_token", "cls", "first"), ("mean_tokens", "mean", "mean"), ("lasttoken", "lasttoken", "last")],
)
def test_sentence_transformers_say_how_they_pool(tmp_path: Path, flag: str, mode: str, pool: str) -> None:
    """With a key for each mode, and with one key for all of them."""
    folder = save(small_encoder("bert"), tmp_path)
    spec, other = EncoderSpec(source=str(folder)), EncoderSpec(source=str(folder), pool="mean")
    assert encoder_shape(spec, "text").pool == "first"  # without its configuration
    for settings in ({f"pooling_mode_{name}": name == flag for name in FLAGS}, {"pooling_mode": mode}):
        write_pooling(folder, settings | {"include_prompt": True})
        assert encoder_shape(spec, "text").pool == load_encoder(spec, "text").view.shape.pool == pool
        assert encoder_shape(other, "text").pool == load_encoder(other, "text").facts.pool == "mean"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"pooling_mode_max_tokens": True}, r"pools in a way that is not supported \(max\); set pool"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, r"not supported \(mean_sqrt_len\); set pool"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"supported \(cls, mean\); set pool"),
        ({"pooling_mode": ["mean", "max"]}, r"not supported \(mean, max\); set pool"),
        ({}, r"not supported \(\); set pool"),
        ([1], "1_Pooling/config.json is not usable"),
    ],
)
def test_a_pooling_that_there_is_not_here(tmp_path: Path, settings: object, match: str) -> None:
    folder = sentence_folder(tmp_path, settings)
    refused(EncoderSpec(source=str(folder)), "text", match)
    assert encoder_shape(EncoderSpec(source=str(folder), pool="first"), "text").pool == "first"


def test_the_pooling_of_a_folder_is_part_of_its_digest(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, {"pooling_mode_cls_token": True})
    spec = EncoderSpec(source=str(folder))
    before = encoder_digest(spec)
    write_pooling(folder, {"pooling_mode_mean_tokens": True})
    assert encoder_digest(spec) != before
    assert pin_revision(spec).revision == encoder_digest(spec)[:12]


# --- dtype and attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_weights_have_the_type_that_is_asked_for(tmp_path: Path, weights: str, device: str) -> None:
    folder = save(small_encoder("llama").to(torch.float16), tmp_path)
    for dtype, name in {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "auto": "float16"}.items():
        spec = EncoderSpec(source=str(folder), weights=weights, dtype=dtype)
        encoder = load_encoder(spec, "text", device=device)
        assert {str(p.dtype) for p in encoder.view.module.parameters()} == {f"torch.{name}"}
        assert encoder.facts.dtype == name
        # Rotary angles are exact in every type, as transformers loads them.
        assert {b.dtype for b in encoder.view.module.buffers()} == {torch.float32}


@pytest.mark.parametrize("modality", BOTH)
def test_the_type_of_a_checkpoint_is_that_of_both_towers(two_towers: tuple[Path, Any], modality: Modality) -> None:
    folder, module = two_towers
    settings = json.loads((folder / "config.json").read_text())
    assert "dtype" not in settings["text_config"]
    half = save(copy.deepcopy(module).bfloat16(), folder / "half")
    for device in ("cpu", "meta"):
        encoder = load_encoder(EncoderSpec(source=str(half), dtype="auto"), modality, device=device)
        assert encoder.facts.dtype == "bfloat16"


def test_attention_is_the_one_that_is_asked_for(tmp_path: Path) -> None:
    folder = save(small_encoder("llama"), tmp_path)
    states = []
    for attention in ("eager", "sdpa"):
        for device in ("cpu", "meta"):
            spec = EncoderSpec(source=str(folder), attention=attention)
            encoder = load_encoder(spec, "text", device=device)
            assert encoder.facts.attention == encoder.view.config._attn_implementation == attention
            if device == "cpu":
                states.append(states_of(encoder.view))
    torch.testing.assert_close(*states)
    for device in ("cpu", "meta"):
        for name in ("nonsense", "flash_attention_2"):  # which is not installed here
            with pytest.raises(UserError, match=r"^encoder '") as error:
                load_encoder(EncoderSpec(source=str(folder), attention=name), "text", device=device)
            assert "\n" not in str(error.value)
            assert name in str(error.value) or "flash" in str(error.value).lower()


# --- layer by layer from disk ---------------------------------------------------------------------------------------


def whole_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "modernbert", "vit", "clip-image"])
def test_what_does_not_fit_is_read_layer_by_layer(tmp_path: Path, family: str, saved: torch.dtype) -> None:
    """With the same states, and at no time with more than a part of the weights in memory."""
    modality, module = modality_of(family), small_encoder(family, width=64, depth=8)
    folder = save(module.to(saved), tmp_path)
    spec = EncoderSpec(source=str(folder))
    whole = load_encoder(spec, modality)
    size = whole_bytes(whole.view.module)
    assert load_encoder(spec, modality, max_host_bytes=size).view.module.device.type == "cpu"
    encoder = load_encoder(spec, modality, max_host_bytes=size - 1)
    assert encoder.facts == whole.facts
    peaks = []

    def count(*_: object) -> None:
        here = encoder.view.module.parameters()
        peaks.append(sum(p.numel() * p.element_size() for p in here if p.device.type != "meta"))

    for part in encoder.view.module.modules():
        if isinstance(part, nn.Linear):
            part.forward = _counted(part.forward, count)
    torch.testing.assert_close(states_of(encoder.view), states_of(whole.view))
    assert len(peaks) > 8
    assert max(peaks) < 0.4 * size
    count()
    assert peaks[-1] <= min(peaks)  # nothing of the layers is left


def _counted(forward: Any, count: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        count()
        return forward(*args, **kwargs)

    return run


RESIDENT = """
import sys, psutil, torch
from tpme.bench.record import EncoderSpec
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.items import Reads
import transformers, accelerate
from transformers import LlamaModel
torch.set_num_threads(1)
folder, limit = sys.argv[1], int(sys.argv[2])
tokens = torch.full((2, 6), 7)
def rss():
    info = psutil.Process().memory_full_info()
    return info.uss
load_encoder(EncoderSpec(source=folder, weights="random"), "text", device="meta")
before, peak = rss(), 0
view = load_encoder(EncoderSpec(source=folder), "text", max_host_bytes=limit).view
def watch(*_):
    global peak
    peak = max(peak, rss())
for layer in view.layers:
    layer.register_forward_hook(watch)
    layer.register_forward_pre_hook(watch)
watch()
with torch.no_grad():
    view.encode(Reads(final=True, pool="mean"), tokens=tokens, token_mask=torch.ones_like(tokens))
print(peak - before)
"""


@pytest.mark.slow
def test_the_resident_memory_of_the_process_stays_below_the_whole_models(tmp_path: Path) -> None:
    module = small_encoder("llama", width=1024, depth=16)
    size = whole_bytes(module)
    assert size > 400e6
    folder = save(module, tmp_path)
    del module
    held = {}
    for limit in (0, size):
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT, str(folder), str(limit)], capture_output=True, text=True, check=True
        )
        held[limit] = int(done.stdout.split()[-1])
    assert held[0] < 0.5 * size < 0.9 * size < held[size]

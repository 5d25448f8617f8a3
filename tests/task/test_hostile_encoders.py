"""Encoder folders that are broken or hostile: one line that names the encoder, and no code of theirs runs."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.task.encoders import encoder_digest, encoder_shape, load_encoder
from tpme.bench.task.tokens import load_tokenizer

CODE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Model: pass\n"


@pytest.fixture(scope="module")
def originals(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[Modality, Path]:
    from transformers import BertModel

    root = tmp_path_factory.mktemp("encoders")
    BertModel(tiny.bert_config()).save_pretrained(root / "text")
    tiny.encoder("image").save_pretrained(root / "image")
    return {"text": root / "text", "image": root / "image"}


@pytest.fixture
def folder(originals: dict[Modality, Path], tmp_path: Path) -> Callable[[Modality], Path]:
    return lambda modality: Path(shutil.copytree(originals[modality], tmp_path / modality))


def configured(**changes: Any) -> Callable[[Path], None]:
    """Changes settings of ``config.json``."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def holding(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)

    return change


def pickled(folder: Path) -> None:
    """Weights in the format of torch.save alone."""
    torch.save(load_state(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_shards(folder: Path) -> None:
    """An index of safetensors that names pickled shards."""
    state = load_state(folder)
    torch.save(state, folder / "shard.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "shard.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def shards_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_names(folder.parent), "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def load_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "outside.safetensors", "pt") as file:
        return list(file.keys())


def remote(folder: Path) -> None:
    """A model of its own, whose code lies beside it."""
    (folder / "modeling.py").write_text(CODE)
    configured(model_type="mine", auto_map={"AutoConfig": "modeling.Model", "AutoModel": "modeling.Model"})(folder)


def pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def header(text: str) -> Callable[[Path], None]:
    """Weights with this JSON as the header of their file."""
    return holding("model.safetensors", struct.pack("<Q", len(text)) + text.encode())


HOSTILE: dict[str, tuple[Modality, Callable[[Path], None]]] = {
    "no heads": ("text", configured(num_attention_heads=0)),
    "heads that do not divide the width": ("text", configured(num_attention_heads=7)),
    "negative heads": ("text", configured(num_attention_heads=-4)),
    "heads in quotes": ("text", configured(num_attention_heads="4")),
    "heads that are true": ("text", configured(num_attention_heads=True)),
    "negative width": ("text", configured(hidden_size=-32)),
    "no width": ("text", configured(hidden_size=0)),
    "width null": ("text", configured(hidden_size=None)),
    "width as a list": ("text", configured(hidden_size=[32])),
    "width 10^12": ("text", configured(hidden_size=10**12)),
    "no layers": ("text", configured(num_hidden_layers=0)),
    "10^9 layers": ("text", configured(num_hidden_layers=10**9)),
    "negative layers": ("text", configured(num_hidden_layers=-1)),
    "negative inner width": ("text", configured(intermediate_size=-1)),
    "negative vocabulary": ("text", configured(vocab_size=-5)),
    "unknown activation": ("text", configured(hidden_act="swosh")),
    "activation that is a number": ("text", configured(hidden_act=3)),
    "unknown type of weights": ("text", configured(dtype="float31")),
    "type of weights that is a function": ("text", configured(dtype="load")),
    "quantised": ("text", configured(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})),
    "quantised in an unknown way": ("text", configured(quantization_config={"quant_method": "mine"})),
    "quantised by a word": ("text", configured(quantization_config="int8")),
    "configuration nested 10^5 deep": ("text", holding("config.json", b'{"a":' * 10**5)),
    "integer of 10^4 digits": (
        "text",
        holding("config.json", b'{"model_type": "bert", "hidden_size": ' + b"9" * 10**4),
    ),
    "configuration not UTF-8": ("text", holding("config.json", b"\xff\xfe{}")),
    "configuration of NUL": ("text", holding("config.json", bytes(100))),
    "code of its own": ("text", remote),
    "adapter": ("text", holding("adapter_config.json", b'{"base_model_name_or_path": "/somewhere"}')),
    "pickled weights": ("text", pickled),
    "pickled shards": ("text", pickled_shards),
    "shards elsewhere": ("text", shards_elsewhere),
    "index that is a list": ("text", lambda f: (pickled(f), holding("model.safetensors.index.json", b"[1]")(f))[0]),
    "no weights": ("text", lambda f: (f / "model.safetensors").unlink()),
    "weights of NUL": ("text", holding("model.safetensors", bytes(1000))),
    "weights with a header of 2^60 bytes": ("text", holding("model.safetensors", struct.pack("<Q", 2**60) + b"{}")),
    "weights with offsets beyond their end": (
        "text",
        header('{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    ),
    "weights with a header nested 10^5 deep": ("text", header('{"a":' * 10**5)),
    "weights that are a pipe": ("text", pipe("model.safetensors")),
    "configuration that is a pipe": ("text", pipe("config.json")),
    "vocabulary that is a pipe": ("text", pipe("vocab.txt")),
    "mean NaN": ("image", holding("preprocessor_config.json", b'{"image_mean": [NaN, 0.5, 0.5]}')),
    "mean in words": ("image", holding("preprocessor_config.json", b'{"image_mean": ["a", "b", "c"]}')),
    "mean of two": ("image", holding("preprocessor_config.json", b'{"image_mean": [0.5, 0.5]}')),
    "deviation 0": ("image", holding("preprocessor_config.json", b'{"image_std": [0, 0.5, 0.5]}')),
    "deviation infinite": ("image", holding("preprocessor_config.json", b'{"image_std": [1e999, 0.5, 0.5]}')),
    "deviation negative": ("image", holding("preprocessor_config.json", b'{"image_std": [-0.5, 0.5, 0.5]}')),
    "preprocessor as a list": ("image", holding("preprocessor_config.json", b"[]")),
    "preprocessor nested 10^5 deep": ("image", holding("preprocessor_config.json", b"[" * 10**5)),
    "patches of 0": ("image", configured(patch_size=0)),
    "images of no size": ("image", configured(image_size=0)),
    "negative images": ("image", configured(image_size=-32)),
    "images in quotes": ("image", configured(image_size="32")),
    "no channels": ("image", configured(num_channels=-3)),
    "pooling in an unknown way": ("text", holding("1_Pooling/config.json", b'{"pooling_mode": 7}')),
    "pooling nested 10^5 deep": ("text", holding("1_Pooling/config.json", b"[" * 10**5)),
}


def read_encoder(spec: EncoderSpec, modality: Modality) -> None:
    """Everything that a run reads of an encoder, in its order."""
    encoder_digest(spec)
    encoder_shape(spec, modality)
    load_encoder(spec, modality, device="meta")
    load_encoder(spec, modality)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_encoder_is_one_line_that_names_it(folder: Callable[[Modality], Path], name: str) -> None:
    modality, spoil = HOSTILE[name]
    place = folder(modality)
    spoil(place)
    spec = EncoderSpec(source=str(place))
    with pytest.raises(UserError) as error:
        read_encoder(spec, modality)
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(place.parent.rglob("ran"))


def test_attention_that_is_code_on_the_hub_is_not_loaded(folder: Callable[[Modality], Path]) -> None:
    place = folder("text")
    configured(attn_implementation="someone/attention", _attn_implementation="someone/attention")(place)
    loaded = load_encoder(EncoderSpec(source=str(place)), "text")
    assert "someone" not in str(loaded.facts.attention)
    with pytest.raises(UserError, match="'someone/attention' is code on the hub, which is not run"):
        load_encoder(EncoderSpec(source=str(place), attention="someone/attention"), "text")


TOKENIZERS: dict[str, tuple[str, bytes]] = {
    "not JSON": ("tokenizer.json", b"{"),
    "nested 10^5 deep": ("tokenizer.json", b"[" * 10**5),
    "of another model": ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Mine"}}'),
    "settings that are a list": ("tokenizer_config.json", b"[]"),
    "code of its own": (
        "tokenizer_config.json",
        b'{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tok.Mine", null]}}',
    ),
    "length in words": ("tokenizer_config.json", b'{"model_max_length": "many"}'),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_one_line_that_names_it(world: Any, tmp_path: Path, name: str) -> None:
    place = Path(shutil.copytree(world.text, tmp_path / "encoder"))
    (place / "tok.py").write_text(CODE)
    file, content = TOKENIZERS[name]
    (place / file).write_bytes(content)
    message = None
    try:
        load_tokenizer(str(place), None)
    except UserError as error:
        message = str(error)
    if message is None:
        assert file == "tokenizer_config.json", "the tokens come from tokenizer.json"
    else:
        assert str(place) in message
        assert "\n" not in message
    assert not list(place.rglob("ran"))


@pytest.mark.parametrize("name", ["no heads", "pickled shards", "quantised", "mean NaN"])
@pytest.mark.parametrize("command", ["run", "plan"])
def test_run_and_plan_refuse_it_before_the_first_cell(
    world: Any, harness: ModuleType, folder: Callable[[Modality], Path], tmp_path: Path, name: str, command: str
) -> None:
    modality, spoil = HOSTILE[name]
    place = folder(modality)
    pair = {"text": {"source": str(world.text)}, "image": {"source": str(world.image)}}
    if modality == "image":
        shutil.copytree(world.image, place, dirs_exist_ok=True)
    else:
        shutil.copytree(world.text, place, dirs_exist_ok=True)
    spoil(place)
    pair[modality] = {"source": str(place)}
    file = world.write(tmp_path / "m.toml", world.matrix(["lora"], encoders=[pair]))
    options = ["--out", str(tmp_path / "run"), "--device", "cpu"] if command == "run" else []
    ended = harness.tpme_here(command, str(file), "--store", str(world.store), *options, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert str(place) in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("cells"))

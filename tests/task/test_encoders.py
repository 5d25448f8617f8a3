from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, BertConfig, BertForMaskedLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.task.checkpoints import encoder_source
from tpme.bench.task.encoders import (
    encoder_digest,
    encoder_shape,
    image_size,
    load_encoder,
)
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.masks import unread_masks

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folders(tiny: ModuleType, tmp_path: Path) -> dict[Modality, Path]:
    """A BERT and a ViT as save_pretrained leaves them, pooler included for the BERT."""
    from transformers import BertModel

    result: dict[Modality, Path] = {"text": tmp_path / "bert", "image": tmp_path / "vit"}
    torch.manual_seed(1)
    BertModel(tiny.bert_config()).save_pretrained(result["text"])
    tiny.encoder("image").save_pretrained(result["image"])
    return result


def spec(folder: Path | str, **settings: str) -> EncoderSpec:
    return EncoderSpec(source=str(folder), **settings)


def refused(source: EncoderSpec, modality: Modality, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_encoder(source, modality)
    message = str(error.value)
    assert "\n" not in message
    assert source.source in message


def change(path: Path, **changes: object) -> None:
    settings = json.loads(path.read_text())
    settings.update(changes)
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


# --- what is loaded -------------------------------------------------------------------------------------------------


def test_a_saved_encoder(tiny: ModuleType, folders: dict[Modality, Path]) -> None:
    encoder = load_encoder(spec(folders["image"]), "image")
    items = tiny.items(("image",))
    expected = tiny.views(("image",))["image"].encode(Reads(final=True), image=items.image)
    torch.testing.assert_close(encoder.view.encode(Reads(final=True), image=items.image), expected)
    facts = encoder.facts
    assert (facts.architecture, facts.weights, facts.revision) == ("ViTModel", "pretrained", None)
    assert (facts.width, facts.depth) == (tiny.WIDTH, tiny.DEPTH)
    assert facts.parameters == sum(p.numel() for p in tiny.encoder("image").parameters())


def test_without_pooler_in_eval_mode_and_float32(tiny: ModuleType, folders: dict[Modality, Path]) -> None:
    for weights in ("pretrained", "random"):
        change(folders["text"] / "config.json", dtype="float16")
        encoder = load_encoder(spec(folders["text"], weights=weights), "text")
        module = encoder.view.module
        assert module.pooler is None
        assert not any("pooler" in name for name, _ in module.named_parameters())
        assert encoder.facts.parameters == sum(p.numel() for p in tiny.encoder("text").parameters())
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_checkpoint_with_a_head_of_its_own(
    tiny: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """bert-base-uncased is one: it has a language-model head and no pooler."""
    model = BertForMaskedLM(tiny.bert_config())
    model.save_pretrained(tmp_path / "mlm")
    capfd.readouterr()
    encoder = load_encoder(spec(tmp_path / "mlm"), "text")
    assert capfd.readouterr() == ("", "")
    weights = dict(model.bert.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in encoder.view.module.named_parameters())


def test_a_vit_with_the_names_of_transformers_4(tiny: ModuleType, tmp_path: Path) -> None:
    model = tiny.encoder("image")
    tiny.save_old_vit(model, tmp_path / "old")
    loaded = load_encoder(spec(tmp_path / "old"), "image").view.module
    weights = dict(model.named_parameters())
    assert dict(loaded.named_parameters()).keys() == weights.keys()
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


def test_random_weights_need_the_configuration_alone(folders: dict[Modality, Path]) -> None:
    (folders["text"] / "model.safetensors").unlink()

    def load(seed: int) -> torch.Tensor:
        return next(load_encoder(spec(folders["text"], weights="random"), "text", seed=seed).view.module.parameters())

    before = torch.get_rng_state()
    assert torch.equal(load(1), load(1))
    assert not torch.equal(load(1), load(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert load_encoder(spec(folders["text"], weights="random"), "text").facts.weights == "random"


def test_on_the_meta_device_no_weights_are_read(folders: dict[Modality, Path]) -> None:
    (folders["text"] / "model.safetensors").unlink()
    encoder = load_encoder(spec(folders["text"]), "text", device="meta")
    assert {p.device.type for p in encoder.view.module.parameters()} == {"meta"}


def test_configuration_alone_gives_shape_and_image_size(tiny: ModuleType, folders: dict[Modality, Path]) -> None:
    for modality, folder in folders.items():
        assert encoder_shape(spec(folder), modality) == load_encoder(spec(folder), modality).view.shape
    assert encoder_shape(spec(folders["text"]), "text") == EncoderShape(tiny.WIDTH, tiny.DEPTH, heads=tiny.HEADS)
    assert image_size(spec(folders["image"])) == tiny.SIDE
    with pytest.raises(UserError, match="cannot be the image encoder"):
        image_size(spec(folders["text"]))
    change(folders["image"] / "config.json", image_size=[32, 64])
    with pytest.raises(UserError, match="no square image size"):
        image_size(spec(folders["image"]))


def test_the_digest_is_of_all_that_decides_the_states(folders: dict[Modality, Path]) -> None:
    folder, digests = folders["image"], []
    digests.append(encoder_digest(spec(folder)))
    assert encoder_digest(spec(folder)) == digests[0]
    change(folder / "config.json", layer_norm_eps=1e-3)
    digests.append(encoder_digest(spec(folder)))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    digests.append(encoder_digest(spec(folder)))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    digests.append(encoder_digest(spec(folder)))
    assert len(set(digests)) == 4


# --- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        (None, 0.5, 0.5),
        ({"image_mean": [0.1, 0.1, 0.1], "image_std": [0.2, 0.2, 0.2]}, 0.1, 0.2),
        ({"image_mean": None, "image_std": None}, 0.5, 0.5),
        ({"do_normalize": False, "image_mean": [0.1, 0.1, 0.1]}, 0.0, 1.0),
    ],
)
def test_images_are_normalised_as_the_encoder_says(
    tiny: ModuleType, folders: dict[Modality, Path], settings: dict[str, object] | None, mean: float, std: float
) -> None:
    if settings is not None:
        (folders["image"] / "preprocessor_config.json").write_text(json.dumps(settings))
    view, image = load_encoder(spec(folders["image"]), "image").view, tiny.items(("image",)).image
    expected = view.module(pixel_values=(image / 255 - mean) / std).last_hidden_state[:, :1]
    torch.testing.assert_close(view.encode(Reads(final=True), image=image), expected, atol=1e-5, rtol=1e-5)


# --- what is refused, in one line -----------------------------------------------------------------------------------


def test_only_safetensors_are_read(tiny: ModuleType, folders: dict[Modality, Path]) -> None:
    (folders["text"] / "model.safetensors").unlink()
    torch.save(tiny.encoder("text").state_dict(), folders["text"] / "pytorch_model.bin")
    refused(spec(folders["text"]), "text", "no model.safetensors there.*save_pretrained")


def test_the_wrong_modality(folders: dict[Modality, Path]) -> None:
    refused(spec(folders["image"]), "text", "its input is image, so it cannot be the text encoder")
    refused(spec(folders["text"]), "image", "its input is text, so it cannot be the image encoder")


def test_weights_that_lack_parameters(folders: dict[Modality, Path]) -> None:
    change(folders["text"] / "config.json", num_hidden_layers=3)
    refused(spec(folders["text"]), "text", r"16 parameters of BertModel .*first: encoder\.layer\.2\.attention")


def test_weights_of_another_shape(folders: dict[Modality, Path]) -> None:
    change(folders["text"] / "config.json", intermediate_size=48)
    refused(spec(folders["text"]), "text", r" 6 parameters.*another shape \(first: encoder\.layer\.0\.intermediate")


def test_truncated_weights(folders: dict[Modality, Path]) -> None:
    path = folders["text"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(spec(folders["text"]), "text", "its weights cannot be read")


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": "nonsense"}', "{}"])
def test_a_broken_configuration(folders: dict[Modality, Path], content: str) -> None:
    (folders["text"] / "config.json").write_text(content)
    refused(spec(folders["text"]), "text", "its config.json is not usable")


def test_a_configuration_that_builds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    BertConfig(hidden_size=18, num_attention_heads=4).save_pretrained(folder)
    refused(spec(folder, weights="random"), "text", "no encoder can be built from its configuration")


@pytest.mark.parametrize(("model_type", "modality"), [("gpt2", "text"), ("beit", "image"), ("flava", "text")])
def test_an_encoder_of_another_family(tmp_path: Path, model_type: str, modality: Modality) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    refused(spec(tmp_path, weights="random"), modality, f"model type '{model_type}' are not supported; choose one of ")
    with pytest.raises(UserError, match="not supported"):
        encoder_shape(spec(tmp_path), modality)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = SMALL | {"vocab_size": 100, "max_position_embeddings": 40}
PIXELS = SMALL | {"image_size": 32, "patch_size": 16}
FAMILIES: dict[str, tuple[Modality, dict[str, Any]]] = {
    **dict.fromkeys(("roberta", "xlm-roberta", "electra", "mpnet", "deberta-v2"), ("text", WORDS)),
    "distilbert": ("text", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 100}),
    **dict.fromkeys(("deit", "dinov2", "dinov3_vit", "clip_vision_model"), ("image", PIXELS)),
}


def rarely(*families: str) -> list[Any]:
    """Parameters of which all but RoBERTa and DeiT are left to the slow tests."""
    return [name if name in ("roberta", "deit") else pytest.param(name, marks=pytest.mark.slow) for name in families]


@pytest.mark.parametrize("family", rarely(*FAMILIES))
def test_relatives_of_bert_and_vit_have_all_parts(tmp_path: Path, family: str) -> None:
    modality, settings = FAMILIES[family]
    AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    view = load_encoder(spec(tmp_path, weights="random"), modality).view
    assert len(view.projections("query", "key", "value", "attention_output", "ffn_in", "ffn_out")) == 2 * 6
    assert len({part for layer in range(2) for part in view.sublayer_outputs(layer)}) == 2 * 2
    words, pixels = torch.full((3, 6), 7), torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    inputs = {"tokens": words, "token_mask": torch.ones_like(words)} if modality == "text" else {"image": pixels}
    assert view.encode(Reads((0, 2), final=True), **inputs).shape == (3, 3, 32)


TEXT_FAMILIES = [family for family, (modality, _) in FAMILIES.items() if modality == "text"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", *rarely(*TEXT_FAMILIES, "modernbert")])
def test_a_mask_is_what_it_was_without_being_read(tmp_path: Path, family: str, implementation: str) -> None:
    """Also where it is not padding alone (ModernBERT's windows), and where nothing is masked."""
    settings = FAMILIES.get(family, ("text", WORDS))[1] | {"pad_token_id": 0}
    windows = {"local_attention": 4, "global_attn_every_n_layers": 2} if family == "modernbert" else {}
    AutoConfig.for_model(family, **settings, **windows).save_pretrained(tmp_path)
    view = load_encoder(spec(tmp_path, weights="random"), "text").view
    view.module.set_attn_implementation(implementation)  # some have but eager
    words = torch.randint(3, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    for lengths in ([12, 5, 1], [12, 12, 12]):
        mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
        with torch.no_grad():
            expected = view.module(input_ids=words, attention_mask=mask).last_hidden_state[:, 0]
            with Reading() as reading:
                result = view.encode(Reads(final=True), tokens=words, token_mask=mask)[:, 0]
        assert torch.allclose(result, expected, atol=1e-6), lengths
        assert not reading.detected
    short = view.encode(Reads(final=True), tokens=words[2:, :1], token_mask=torch.ones(1, 1, dtype=torch.int64))
    alone = view.encode(Reads(final=True), tokens=words[2:], token_mask=torch.tensor([[1] + [0] * 11]))
    assert torch.allclose(short, alone, atol=1e-5)  # the mask does mask


def test_masks_within_masks_and_beside_them() -> None:
    """An encoder in an encoder, and encoders in two threads, of which the first ends first."""
    before = dict(FUNCTIONS)
    for _ in range(2):
        first, second = ExitStack(), ExitStack()
        first.enter_context(unread_masks())
        second.enter_context(unread_masks())
        first.close()
        assert FUNCTIONS["sdpa"] is not before["sdpa"]
        second.close()
        assert dict(FUNCTIONS) == before
    with pytest.raises(ZeroDivisionError), unread_masks():
        raise ZeroDivisionError
    assert dict(FUNCTIONS) == before


class Reading(TorchDispatchMode):
    """Whether the value of a tensor is read."""

    detected = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.detected |= func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["llama", "clip_text_model"])
def test_a_causal_encoder_is_not_read_at_its_first_token(tmp_path: Path, model_type: str) -> None:
    """It sees nothing but itself there: every item whose title begins alike would get the same vector."""
    AutoConfig.for_model(model_type, **WORDS).save_pretrained(tmp_path)
    refused(spec(tmp_path, weights="random", pool="first"), "text", "cannot be read with pool = 'first'")
    with pytest.raises(UserError, match=r"choose .*mean"):
        encoder_shape(spec(tmp_path, pool="first"), "text")
    view = load_encoder(spec(tmp_path, weights="random"), "text").view
    words = torch.full((2, 3), 7)
    with pytest.raises(UserError, match="cannot be read with pool = 'first'"):
        view.encode(Reads(final=True), tokens=words, token_mask=torch.ones_like(words))


def test_a_bert_that_is_a_decoder_is_refused(tmp_path: Path) -> None:
    BertConfig(**WORDS, is_decoder=True).save_pretrained(tmp_path)
    refused(spec(tmp_path, weights="random"), "text", "its attention is causal")


def test_images_are_normalised_as_the_processor_of_both_towers_says(folders: dict[Modality, Path]) -> None:
    """Since transformers 5 a processor of texts and images is saved as one file."""
    settings = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}}
    (folders["image"] / "processor_config.json").write_text(json.dumps(settings))
    image = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
    normalised = load_encoder(spec(folders["image"]), "image").view._normalise(image)
    torch.testing.assert_close(normalised.flatten(), torch.tensor([0.1 / 0.4, 0.0, -0.1 / 0.6]))


@pytest.mark.parametrize("content", ["{", "[1]", '{"image_mean": ["x"]}'])
def test_a_broken_image_processor(folders: dict[Modality, Path], content: str) -> None:
    (folders["image"] / "preprocessor_config.json").write_text(content)
    refused(spec(folders["image"]), "image", "its preprocessor_config.json is not usable")


def test_a_path_without_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(spec(tmp_path / "nothing"), "text", "it has no config.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    refused(spec("models/mine"), "text", "it has no config.json")
    refused(spec("./elsewhere"), "text", "it has no config.json")


def test_built_in_names(tmp_path: Path) -> None:
    assert Path(encoder_source("builtin:tiny-text")).parts[-2:] == ("tiny", "text")
    refused(spec("builtin:nothing"), "text", "no such built-in encoder; known: builtin:tiny-image, builtin:tiny-text")


# --- hub ids: the cache, and no network -----------------------------------------------------------------------------


def put_into_cache(cache: Path, folder: Path, repository: str, *, absent: tuple[str, ...] = ()) -> None:
    """Lay ``folder`` into a Hugging Face cache as a download of ``repository`` would."""
    home = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for name in absent:  # the hub's cache also remembers what a repository does not have
        (home / ".no_exist" / COMMIT).mkdir(parents=True, exist_ok=True)
        (home / ".no_exist" / COMMIT / name).touch()


NOWHERE = "http://127.0.0.1:9"
CHILD = """
import sys
from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec
from tpme.bench.task.encoders import load_encoder
try:
    load_encoder(EncoderSpec(source="someone/model"), "text")
except UserError as error:
    sys.exit(f"tpme: {error}")
"""


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Have this process use the hub at an address, with a cache of its own."""
    from huggingface_hub import constants

    def use(endpoint: str, cache: Path) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return use


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}])
def test_a_hub_id_without_network_and_cache(tmp_path: Path, environment: dict[str, str]) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=kept | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 1
    assert child.stderr.startswith("tpme: encoder 'someone/model': no such folder, its config.json is not in the local")
    assert len(child.stderr.splitlines()) == 1  # transformers alone tells of each of its tries, for half a minute


def test_a_hub_id_from_the_cache_records_its_revision(
    folders: dict[Modality, Path], tmp_path: Path, use_hub: Callable[[str, Path], None]
) -> None:
    put_into_cache(tmp_path / "cache", folders["text"], "someone/model")
    use_hub(NOWHERE, tmp_path / "cache")
    assert load_encoder(spec("someone/model"), "text").facts.revision == COMMIT
    assert load_encoder(spec("someone/model", revision=COMMIT), "text").facts.revision == COMMIT
    assert encoder_digest(spec("someone/model")) == f"someone/model@{COMMIT}"
    refused(spec("someone/model", revision="other"), "text", "its config.json is not in the local cache")


def test_an_image_processor_that_may_exist_is_not_guessed(
    folders: dict[Modality, Path], tmp_path: Path, use_hub: Callable[[str, Path], None]
) -> None:
    put_into_cache(tmp_path / "cache", folders["image"], "someone/model")
    use_hub(NOWHERE, tmp_path / "cache")
    refused(spec("someone/model"), "image", "its preprocessor_config.json is not in the local cache")
    put_into_cache(tmp_path / "other", folders["image"], "someone/model", absent=PROCESSORS)
    use_hub(NOWHERE, tmp_path / "other")
    load_encoder(spec("someone/model"), "image")


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download needs: files of one repository, and which commit they are of."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        _, _, here = self.path.partition("/someone/model/resolve/")
        revision, _, name = here.partition("/")
        path = self.folder / name
        known = revision in ("main", COMMIT) and path.is_file()
        if name:  # the client also asks about itself
            self.asked.append(name)
        content = path.read_bytes() if known else b""
        self.send_response(200 if known else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if not known:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], str]]:
    handler = type("OneHub", (Hub,), {"folder": tmp_path, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_is_fetched_once_with_its_shards(
    tiny: ModuleType, tmp_path: Path, hub: tuple[type[Hub], str], use_hub: Callable[[str, Path], None]
) -> None:
    handler, endpoint = hub
    handler.folder = tmp_path / "repository"
    model = tiny.encoder("image")
    model.save_pretrained(handler.folder, max_shard_size="10KB")
    shards = sorted(path.name for path in handler.folder.glob("model-*.safetensors"))
    assert len(shards) > 1

    use_hub(endpoint, tmp_path / "cache")
    facts = load_encoder(spec("someone/model"), "image").facts
    assert (facts.revision, facts.parameters) == (COMMIT, sum(p.numel() for p in model.parameters()))
    wanted = {"config.json", "model.safetensors", "model.safetensors.index.json", *PROCESSORS, *shards}
    assert set(handler.asked) == wanted

    handler.asked.clear()
    load_encoder(spec("someone/model"), "image")
    assert handler.asked == []


# --- the paper's encoders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modality", "architecture", "parameters"),
    [
        ("bert-base-uncased", "text", "BertModel", 108_891_648),
        ("vit-base-patch16-224", "image", "ViTModel", 85_798_656),
    ],
)
def test_the_papers_encoders(
    shared: Callable[..., Path], name: str, modality: Modality, architecture: str, parameters: int
) -> None:
    source = spec(shared("pretrained", name), weights="random")
    facts = load_encoder(source, modality, device="meta").facts
    assert (facts.architecture, facts.parameters) == (architecture, parameters)
    assert (facts.width, facts.depth) == (768, 12)
    if modality == "image":
        assert image_size(source) == 224

"""Loads the foundation encoders: any Hugging Face text or image encoder, by hub id, folder or built-in name.

Only safetensors are read and no remote code runs. ``weights = "random"`` builds an encoder from its configuration
alone, without weights and, for a local folder, without a network; such rows are flagged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderFacts, EncoderSpec, Modality
from tpme.bench.task.builtin import builtin_folder
from tpme.bench.task.hub import first_line, repository_file
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.precomputed import StatesFile, is_precomputed, states_path
from tpme.bench.task.view import EncoderView

_KINDS = {"input_ids": "text", "pixel_values": "image"}
_HALF = (0.5, 0.5, 0.5)
_WEIGHTS = "model.safetensors"
_PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Encoder:
    """One loaded encoder: its parts by role, and its facts for the record."""

    view: EncoderView
    facts: EncoderFacts


def encoder_source(source: str) -> str:
    """Resolve ``source`` for transformers: the folder of a built-in name, else ``source`` itself.

    Raises UserError for an unknown built-in name and for a path that is not an encoder's folder.
    """
    if source.startswith("builtin:"):
        return str(builtin_folder(source))
    folder = Path(source).expanduser()
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or folder.is_dir()
    if looks_like_path and not (folder / "config.json").is_file():
        raise UserError(f"encoder '{source}': it has no config.json; pass a folder saved by transformers or a hub id")
    return str(folder) if looks_like_path else source


def load_encoder(
    spec: EncoderSpec, modality: Modality, *, device: torch.device | str = "cpu", seed: int = 0
) -> Encoder:
    """Load one encoder in eval mode, in float32, without its pooler.

    Args:
        spec: its source, revision, and whether its weights are pretrained or random.
        modality: ``text`` or ``image``.
        device: where to build it; ``meta`` builds shapes only and needs no weights.
        seed: of random weights.

    Raises:
        UserError: it is neither in the cache nor on the hub, not an encoder of that modality, or without safetensors.
    """
    folder, commit = _folder(spec)
    meta = torch.device(device).type == "meta"
    from_weights = spec.weights == "pretrained" and not meta
    module = _from_weights(spec, folder, commit) if from_weights else _from_config(spec, folder, seed, meta=meta)
    # The task never uses the pooler: it would be counted but never trained.
    if getattr(module, "pooler", None) is not None:
        module.pooler = None
    kind = _KINDS.get(module.main_input_name, module.main_input_name)
    if kind != modality:
        raise UserError(f"encoder '{spec.source}': its input is {kind}, so it cannot be the {modality} encoder")
    mean, std = _normalisation(spec, folder, commit) if modality == "image" else (_HALF, _HALF)
    module.float().eval()
    try:
        view = EncoderView(module if meta else module.to(device), modality, mean, std)
    except UserError as error:
        raise UserError(f"encoder '{spec.source}': {error}") from None
    facts = EncoderFacts(
        source=spec.source,
        revision=commit,
        architecture=type(module).__name__,
        weights=spec.weights,
        width=view.shape.width,
        depth=view.shape.depth,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
    return Encoder(view, facts)


def image_size(spec: EncoderSpec) -> int:
    """Side of an image encoder's square input, in pixels. Raises UserError if its configuration has none."""
    size = getattr(_config(spec, _folder(spec)[0]), "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise UserError(f"encoder '{spec.source}': its configuration has no square image size; choose a ViT")
    return int(sides.pop())


def encoder_shape(spec: EncoderSpec) -> EncoderShape:
    """Width and depth of an encoder, from its configuration or the header of its precomputed states."""
    if is_precomputed(spec):
        return StatesFile.open(spec).shape
    config = _config(spec, _folder(spec)[0])
    try:
        return EncoderShape(width=int(config.hidden_size), depth=int(config.num_hidden_layers))
    except AttributeError as error:
        raise UserError(f"encoder '{spec.source}': {error}; choose an encoder of the BERT or ViT family") from None


def encoder_digest(spec: EncoderSpec) -> str:
    """Digest of an encoder's content: the hub commit, or SHA-256 of a folder's settings, vocabulary and weights.

    Of precomputed states, that of their file.
    """
    if is_precomputed(spec):
        with states_path(spec).open("rb") as states:
            return hashlib.file_digest(states, "sha256").hexdigest()
    folder, commit = _folder(spec)
    if commit is not None:
        return f"{spec.source}@{commit}"
    digest = hashlib.sha256()
    patterns = ("*.json", "*.txt", "*.model", *(("*.safetensors",) if spec.weights == "pretrained" else ()))
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def pin_revision(spec: EncoderSpec) -> EncoderSpec:
    """Return ``spec`` with a digest of a local source's content as its revision: other weights make another cell."""
    if not is_precomputed(spec) and not Path(encoder_source(spec.source)).is_dir():
        return spec
    return spec.model_copy(update={"revision": encoder_digest(spec)[:12]})


# --- where the files are --------------------------------------------------------------------------------------------


def _folder(spec: EncoderSpec) -> tuple[Path, str | None]:
    """The folder with the encoder's configuration and, if it is a hub repository in the local cache, its commit."""
    source = encoder_source(spec.source)
    if Path(source).is_dir():
        return Path(source), None
    path = repository_file(source, "config.json", spec.revision, f"encoder '{spec.source}'")
    if path is None:
        raise UserError(f"encoder '{spec.source}': the hub repository has no config.json; it is not an encoder")
    return path.parent, path.parent.name


def _fetch_weights(spec: EncoderSpec, commit: str) -> None:
    """Fetch the weights of a hub repository, all shards included, into the local cache."""

    def fetch(name: str) -> Path | None:
        return repository_file(spec.source, name, commit, f"encoder '{spec.source}'")

    if fetch(_WEIGHTS) is None:
        index = fetch(f"{_WEIGHTS}.index.json")
        for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index else ():
            fetch(shard)


# --- building -------------------------------------------------------------------------------------------------------


def _config(spec: EncoderSpec, folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        with _quiet_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:  # TypeError: older versions, for a JSON list
        raise UserError(f"encoder '{spec.source}': its config.json is not usable ({first_line(error)})") from None


def _from_config(spec: EncoderSpec, folder: Path, seed: int, *, meta: bool) -> Any:
    from transformers import AutoModel

    config = _config(spec, folder)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            torch.manual_seed(seed)
            return AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        message = f"encoder '{spec.source}': no encoder can be built from its configuration ({first_line(error)})"
        raise UserError(message) from None


def _from_weights(spec: EncoderSpec, folder: Path, commit: str | None) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModel

    if commit is not None:
        _fetch_weights(spec, commit)
    if not any((folder / name).is_file() for name in (_WEIGHTS, f"{_WEIGHTS}.index.json")):
        raise UserError(
            f"encoder '{spec.source}': no {_WEIGHTS} there; other formats can run code and are not read: load it with "
            "transformers and save it again with save_pretrained"
        )
    _config(spec, folder)
    try:
        with _quiet_transformers():
            module, loading = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # refused below, in a one-line message
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"encoder '{spec.source}': its weights cannot be read ({first_line(error)})") from None
    mismatched = [name for name, *_ in loading["mismatched_keys"]]
    lacking = [name for name in (*loading["missing_keys"], *mismatched) if not name.startswith("pooler.")]
    if lacking:
        raise UserError(
            f"encoder '{spec.source}': {len(lacking)} parameters of {type(module).__name__} are missing from its "
            f"weights or have another shape (first: {min(lacking)}); they would stay random"
        )
    return module


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bar and the report of unused heads; missing weights are checked here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _normalisation(spec: EncoderSpec, folder: Path, commit: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of the encoder's image processor; ViT's 0.5 if there is none."""
    path: Path | None = folder / _PROCESSOR
    if commit is not None:
        path = repository_file(spec.source, _PROCESSOR, commit, f"encoder '{spec.source}'")
    if path is None or not path.is_file():
        return _HALF, _HALF
    try:
        settings = json.loads(path.read_bytes())
        if not settings.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = (tuple(float(v) for v in settings.get(key) or _HALF) for key in ("image_mean", "image_std"))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"encoder '{spec.source}': its {_PROCESSOR} is not usable ({error})") from None
    return mean, std

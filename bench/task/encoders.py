"""Loading the foundation encoders: any Hugging Face text or image encoder, by hub id, folder or built-in name.

Only safetensors are read and no remote code runs. ``weights = "random"`` builds an encoder from its configuration
alone, which needs no weights and, for a local folder, no network; such rows are flagged.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderFacts, EncoderSpec, Modality
from tpme.bench.task.builtin import builtin_folder
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.view import EncoderView


@dataclass(frozen=True)
class Encoder:
    """One loaded encoder: its parts by role, and the facts a record keeps."""

    view: EncoderView
    facts: EncoderFacts


def encoder_source(source: str) -> str:
    """Where transformers finds ``source``: a folder for built-in names, else ``source`` itself.

    Raises UserError for an unknown built-in name and for a path that is no folder.
    """
    if source.startswith("builtin:"):
        return str(builtin_folder(source))
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        folder = Path(source).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"encoder '{source}': no config.json there; give a folder saved by transformers or a hub id"
            )
        return str(folder)
    return source


def load_encoder(
    spec: EncoderSpec, modality: Modality, *, device: torch.device | str = "cpu", seed: int = 0
) -> Encoder:
    """Load one encoder, in eval mode, float32, without its pooler.

    Args:
        spec: where it is, which revision, pretrained or random weights.
        modality: ``text`` or ``image``.
        device: where to build it; ``meta`` builds the shape alone and needs no weights.
        seed: of random weights.

    Raises:
        UserError: neither network nor cache has it, it is no encoder of that modality, or it has no safetensors.
    """
    source = encoder_source(spec.source)
    meta = torch.device(device).type == "meta"
    module, revision = _build(source, spec, seed, meta=meta)
    # The pooler is in no forward path of the task: it would only be counted, never trained.
    if getattr(module, "pooler", None) is not None:
        module.pooler = None
    kind = "image" if hasattr(module.config, "image_size") else "text"
    if kind != modality:
        raise UserError(f"encoder '{spec.source}': it is a {kind} encoder, used as the {modality} encoder")
    mean, std = _normalisation(source, spec.revision) if modality == "image" else ((0.5,) * 3, (0.5,) * 3)
    module.eval()
    view = EncoderView(module if meta else module.to(device), modality, mean, std)
    facts = EncoderFacts(
        source=spec.source,
        revision=revision,
        architecture=type(module).__name__,
        weights=spec.weights,
        width=view.shape.width,
        depth=view.shape.depth,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
    )
    return Encoder(view, facts)


def image_size(spec: EncoderSpec) -> int:
    """Side of the square images that an image encoder expects, in pixels."""
    config = _config(encoder_source(spec.source), spec)
    return int(config.image_size)


def _build(source: str, spec: EncoderSpec, seed: int, *, meta: bool) -> tuple[Any, str | None]:
    from transformers import AutoModel

    config = _config(source, spec)
    revision = getattr(config, "_commit_hash", None)
    if meta:
        with torch.device("meta"):
            return AutoModel.from_config(config), revision
    if spec.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModel.from_config(config), revision
    try:
        module, loading = AutoModel.from_pretrained(
            source, revision=spec.revision, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(_not_loadable(spec, error)) from None
    missing = [name for name in loading["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise UserError(
            f"encoder '{spec.source}': its weights lack {len(missing)} parameters of {type(module).__name__} "
            f"(first: {missing[0]}); they would stay random"
        )
    return module.float(), revision


def _config(source: str, spec: EncoderSpec) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, revision=spec.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(_not_loadable(spec, error)) from None


def _not_loadable(spec: EncoderSpec, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"encoder '{spec.source}': not to be had from the local cache, the network or a folder of that name ({first}); "
        "give a local folder with config.json and model.safetensors"
    )


def _normalisation(source: str, revision: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the encoder's image processor, per channel; ViT's 0.5 where it ships none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(source, "preprocessor_config.json", revision=revision)
    except (OSError, ValueError):
        path = None
    settings = json.loads(Path(path).read_text()) if path else {}
    half = (0.5, 0.5, 0.5)
    return tuple(settings.get("image_mean", half)), tuple(settings.get("image_std", half))


def encoder_digest(spec: EncoderSpec) -> str:
    """Identity of an encoder's content: SHA-256 of a folder's configuration and weights, or the hub commit."""
    source = encoder_source(spec.source)
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(_config(source, spec), "_commit_hash", None)
        return f"{source}@{commit or spec.revision}"
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors")) if spec.weights == "pretrained" else []
    for path in (folder / "config.json", *weights):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def encoder_shape(spec: EncoderSpec) -> EncoderShape:
    """Width and depth of an encoder, from its configuration alone."""
    config = _config(encoder_source(spec.source), spec)
    return EncoderShape(width=int(config.hidden_size), depth=int(config.num_hidden_layers))

"""Loads the foundation encoders: supported Hugging Face encoders, by hub id, folder or built-in name."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tpme.bench.errors import UserError
from tpme.bench.parsing import read_json
from tpme.bench.record import EncoderFacts, EncoderSpec, Modality, Pool
from tpme.bench.task.blocked_attention import BLOCKED, attention_on, register
from tpme.bench.task.checkpoints import (
    POOLING,
    checkpoint_folder,
    encoder_source,
    from_config,
    from_weights,
    read_config,
    sentence_pool,
    streamed,
)
from tpme.bench.task.families import family_of
from tpme.bench.task.fingerprint import sha256_of
from tpme.bench.task.hub import refusals, repository_file
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.precomputed import StatesFile
from tpme.bench.task.tokens import load_tokenizer
from tpme.bench.task.view import EncoderView

_HALF = (0.5, 0.5, 0.5)
_PROCESSORS = {"preprocessor_config.json": None, "processor_config.json": "image_processor"}
"""Where the settings of an image processor are: name of the file, and key in it (two towers, since transformers 5)."""


@dataclass(frozen=True)
class Encoder:
    """One loaded encoder: its parts by role, and its facts for the record."""

    view: EncoderView
    facts: EncoderFacts

    def facts_on(self, device: str) -> EncoderFacts:
        """Its facts once it has moved to ``device`` (``cpu`` or ``cuda``), where another attention may run."""
        return self.facts.model_copy(update={"attention": attention_on(device, self.facts.attention)})


def load_encoder(
    spec: EncoderSpec,
    modality: Modality,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    max_host_bytes: int | None = None,
) -> Encoder:
    """Load one encoder in eval mode, without what no hidden state depends on.

    Args:
        spec: its source, revision and options, and whether its weights are pretrained or random.
        modality: ``text`` or ``image``.
        device: where to build it; ``meta`` builds shapes only and needs no weights.
        seed: of random weights.
        max_host_bytes: an encoder whose pretrained weights take more is read from disk layer by layer whenever it
            runs. It gives the same states and cannot be adapted; for the builder of feature caches.

    Raises:
        UserError: it is neither in the cache nor on the hub, not a supported encoder of that modality, or without
            safetensors.
    """
    folder, commit = checkpoint_folder(spec)
    config = read_config(spec, folder, modality)
    if spec.attention == BLOCKED:
        register()
    mean, std = _normalisation(spec, folder, commit) if modality == "image" else (_HALF, _HALF)
    device = torch.device(device)
    if spec.weights == "random" or device.type == "meta":
        module = from_config(spec, config, seed, meta=device.type == "meta").to(device)
    elif max_host_bytes is not None and _host_bytes(spec, config) > max_host_bytes:
        module = streamed(spec, folder, commit, config, device)
    else:
        module = from_weights(spec, folder, commit, config).to(device)
    pool = _pool(spec, folder, commit, modality)
    padding = None if device.type == "meta" else _padding(spec, config)
    try:
        with refusals("no encoder can be built from its configuration"):
            view = EncoderView(module.eval(), modality, mean, std, pool=pool, padding=padding, attention=spec.attention)
    except UserError as error:
        raise UserError(f"encoder '{spec.source}': {error}") from None
    return Encoder(view, _facts(spec, commit, view))


def _host_bytes(spec: EncoderSpec, config: Any) -> int:
    """Size of an encoder's parameters once loaded."""
    return sum(p.numel() * p.element_size() for p in from_config(spec, config, 0, meta=True).parameters())


def _pool(spec: EncoderSpec, folder: Path, commit: str | None, modality: Modality) -> Pool | None:
    return spec.pool or (sentence_pool(spec, folder, commit) if modality == "text" else None)


def _padding(spec: EncoderSpec, config: Any) -> int | None:
    """The tokenizer's padding, which the configuration of SigLIP 2 does not hold; ``None`` where it is masked."""
    if not family_of(config.model_type).whole:
        return None
    try:
        padding: int | None = load_tokenizer(spec.source, spec.revision).pad_token_id
    except UserError:  # saved without a tokenizer; where titles are read, that is refused
        return None
    return padding


def _facts(spec: EncoderSpec, commit: str | None, view: EncoderView) -> EncoderFacts:
    return EncoderFacts(
        source=spec.source,
        revision=commit,
        architecture=type(view.module).__name__,
        weights=spec.weights,
        width=view.shape.width,
        depth=view.shape.depth,
        parameters=sum(parameter.numel() for parameter in view.module.parameters()),
        pool=view.shape.pool,
        dtype=str(next(view.module.parameters()).dtype).removeprefix("torch."),
        attention=view.config._attn_implementation,
    )


def image_size(spec: EncoderSpec) -> int:
    """Side of an image encoder's square input, in pixels. Raises UserError if its configuration has none."""
    size = getattr(read_config(spec, checkpoint_folder(spec)[0], "image"), "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise UserError(f"encoder '{spec.source}': its configuration has no square image size; choose a ViT")
    return int(sides.pop())


def encoder_shape(spec: EncoderSpec, modality: Modality) -> EncoderShape:
    """Width, depth, pooling and final norm of an encoder, from its configuration; those of a file, from its header.

    Raises UserError as ``load_encoder`` does.
    """
    if spec.precomputed:
        return StatesFile.open(spec).shape
    folder, commit = checkpoint_folder(spec)
    config = read_config(spec, folder, modality)
    family = family_of(config.model_type)
    pool = _pool(spec, folder, commit, modality) or family.pools[0]
    shape = EncoderShape(
        int(config.hidden_size),
        int(config.num_hidden_layers),
        pool,
        family.pools,
        final_norm=family.norm is not None,
        heads=int(config.num_attention_heads),
    )
    shape.check(Reads(pool=pool), f"encoder '{spec.source}'")
    return shape


def encoder_digest(spec: EncoderSpec) -> str:
    """Digest of an encoder's content: the hub commit, or SHA-256 of a folder's settings, vocabulary and weights.

    Of precomputed states, that of their file.
    """
    if spec.precomputed:
        return StatesFile.open(spec).digest()
    folder, commit = checkpoint_folder(spec)
    if commit is not None:
        return f"{spec.source}@{commit}"
    digest = hashlib.sha256()
    for path in content_files(spec, folder):
        with refusals(f"encoder '{spec.source}': {path.name} cannot be read"):
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def content_files(spec: EncoderSpec, folder: Path) -> list[Path]:
    """The files of an encoder's folder that loading it reads, in order: settings, vocabulary and weights."""
    patterns = ("*.json", "*.txt", "*.model", POOLING, *(("*.safetensors",) if spec.weights == "pretrained" else ()))
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def pin_revision(spec: EncoderSpec) -> EncoderSpec:
    """Return ``spec`` with a digest of a local source's content as its revision: other weights make another cell."""
    if not spec.precomputed and not Path(encoder_source(spec.source)).is_dir():
        return spec
    return spec.model_copy(update={"revision": encoder_digest(spec)[:12]})


def _normalisation(spec: EncoderSpec, folder: Path, commit: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of the encoder's image processor; ViT's 0.5 if there is none."""
    for name, part in _PROCESSORS.items():
        path: Path | None = folder / name
        if commit is not None:
            path = repository_file(spec.source, name, commit, f"encoder '{spec.source}'")
        if path is None or not path.is_file():
            continue
        try:
            settings = read_json(path)
            return _mean_and_std(settings.get(part, {}) if part else settings)
        except (UserError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"encoder '{spec.source}': its {name} is not usable ({error})") from None
    return _HALF, _HALF


def _mean_and_std(settings: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = (tuple(float(v) for v in settings.get(key) or _HALF) for key in ("image_mean", "image_std"))
    if not len(mean) == len(std) == 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError("image_mean and image_std must be three numbers each, those of image_std above 0")
    return mean, std

"""Loading the foundation encoders: any Hugging Face text or image encoder, by hub id, folder or built-in name.

Only safetensors are read and no remote code runs. ``weights = "random"`` builds an encoder from its configuration
alone, which needs no weights and, for a local folder, no network; such rows are flagged.
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
from tpme.bench.task.hub import obtain
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.view import EncoderView

_KINDS = {"input_ids": "text", "pixel_values": "image"}
_HALF = (0.5, 0.5, 0.5)


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
    folder = Path(source).expanduser()
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or folder.is_dir()
    if looks_like_path and not (folder / "config.json").is_file():
        raise UserError(f"encoder '{source}': no config.json there; give a folder saved by transformers or a hub id")
    return str(folder) if looks_like_path else source


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
    config = _config(source, spec)
    commit = getattr(config, "_commit_hash", None)
    meta = torch.device(device).type == "meta"
    module = (
        _from_weights(source, spec, commit)
        if spec.weights == "pretrained" and not meta
        else _from_config(spec, config, seed, meta=meta)
    )
    # The pooler is in no forward path of the task: it would only be counted, never trained.
    if getattr(module, "pooler", None) is not None:
        module.pooler = None
    kind = _KINDS.get(module.main_input_name, module.main_input_name)
    if kind != modality:
        raise UserError(f"encoder '{spec.source}': its kind is {kind}, but it is used as the {modality} encoder")
    mean, std = _normalisation(source, spec, commit) if modality == "image" else (_HALF, _HALF)
    module.float().eval()
    view = EncoderView(module if meta else module.to(device), modality, mean, std)
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
    """Side of the square images that an image encoder expects, in pixels. Raises UserError where it states none."""
    size = getattr(_config(encoder_source(spec.source), spec), "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise UserError(f"encoder '{spec.source}': its configuration states no square image size; it is no ViT")
    return int(sides.pop())


def encoder_shape(spec: EncoderSpec) -> EncoderShape:
    """Width and depth of an encoder, from its configuration alone."""
    config = _config(encoder_source(spec.source), spec)
    try:
        return EncoderShape(width=int(config.hidden_size), depth=int(config.num_hidden_layers))
    except AttributeError as error:
        raise UserError(f"encoder '{spec.source}': {error}; choose an encoder of the BERT or ViT family") from None


def encoder_digest(spec: EncoderSpec) -> str:
    """Identity of an encoder's content: SHA-256 of a folder's configuration and weights, or the hub commit."""
    source = encoder_source(spec.source)
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(_config(source, spec), "_commit_hash", None)
        return f"{source}@{commit or spec.revision}"
    digest = hashlib.sha256()
    weights = sorted(folder.glob("*.safetensors")) if spec.weights == "pretrained" else []
    processor = [path for path in (folder / "preprocessor_config.json",) if path.is_file()]
    for path in (folder / "config.json", *processor, *weights):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _config(source: str, spec: EncoderSpec) -> Any:
    from transformers import AutoConfig

    def load(local_only: bool) -> Any:
        return AutoConfig.from_pretrained(
            source, revision=spec.revision, trust_remote_code=False, local_files_only=local_only
        )

    return obtain(source, f"encoder '{spec.source}'", spec.revision, load)


def _from_config(spec: EncoderSpec, config: Any, seed: int, *, meta: bool) -> Any:
    from transformers import AutoModel

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            torch.manual_seed(seed)
            return AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"encoder '{spec.source}': its configuration builds no encoder ({error})") from None


def _from_weights(source: str, spec: EncoderSpec, commit: str | None) -> Any:
    from transformers import AutoModel

    if Path(source).is_dir() and not any(Path(source).glob("*.safetensors")):
        raise UserError(
            f"encoder '{spec.source}': no model.safetensors there, and other formats are never read, because they can "
            "run code; load it with transformers and save it again with save_pretrained"
        )

    def load(local_only: bool) -> Any:
        with _quiet_transformers():
            return AutoModel.from_pretrained(
                source,
                revision=commit or spec.revision,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=local_only,
                ignore_mismatched_sizes=True,  # refused below, in one line
                output_loading_info=True,
            )

    module, loading = obtain(source, f"encoder '{spec.source}'", commit or spec.revision, load)
    mismatched = [name for name, *_ in loading["mismatched_keys"]]
    lacking = [name for name in (*loading["missing_keys"], *mismatched) if not name.startswith("pooler.")]
    if lacking:
        raise UserError(
            f"encoder '{spec.source}': its weights lack {len(lacking)} parameters of {type(module).__name__}, or have "
            f"them in another shape (first: {min(lacking)}); they would stay random"
        )
    return module


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bar and the report of unused heads: what matters of them is checked here."""
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


def _normalisation(source: str, spec: EncoderSpec, commit: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the encoder's image processor, per channel; ViT's 0.5 where it ships none."""
    path = _processor_file(source, spec, commit)
    if path is None:
        return _HALF, _HALF
    try:
        settings = json.loads(path.read_bytes())
        if not settings.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = (tuple(float(v) for v in settings.get(key) or _HALF) for key in ("image_mean", "image_std"))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"encoder '{spec.source}': {path.name} is not readable ({error})") from None
    return mean, std


def _processor_file(source: str, spec: EncoderSpec, commit: str | None) -> Path | None:
    """The image processor's settings; ``None`` where the encoder has none, which is not the same as unreachable."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    name = "preprocessor_config.json"
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None

    def load(local_only: bool) -> Path | None:
        try:
            return Path(hf_hub_download(source, name, revision=commit, local_files_only=local_only))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    return obtain(source, f"encoder '{spec.source}', {name}", commit, load)

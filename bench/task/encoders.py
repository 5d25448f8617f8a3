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
from tpme.bench.task.hub import first_line, repository_file
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.view import EncoderView

_KINDS = {"input_ids": "text", "pixel_values": "image"}
_HALF = (0.5, 0.5, 0.5)
_WEIGHTS = "model.safetensors"
_PROCESSOR = "preprocessor_config.json"


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
    folder, commit = _folder(spec)
    meta = torch.device(device).type == "meta"
    from_weights = spec.weights == "pretrained" and not meta
    module = _from_weights(spec, folder, commit) if from_weights else _from_config(spec, folder, seed, meta=meta)
    # The pooler is in no forward path of the task: it would only be counted, never trained.
    if getattr(module, "pooler", None) is not None:
        module.pooler = None
    kind = _KINDS.get(module.main_input_name, module.main_input_name)
    if kind != modality:
        raise UserError(f"encoder '{spec.source}': its kind is {kind}, but it is used as the {modality} encoder")
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
    """Side of the square images that an image encoder expects, in pixels. Raises UserError where it states none."""
    size = getattr(_config(spec, _folder(spec)[0]), "image_size", None)
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise UserError(f"encoder '{spec.source}': its configuration states no square image size; it is no ViT")
    return int(sides.pop())


def encoder_shape(spec: EncoderSpec) -> EncoderShape:
    """Width and depth of an encoder, from its configuration alone."""
    config = _config(spec, _folder(spec)[0])
    try:
        return EncoderShape(width=int(config.hidden_size), depth=int(config.num_hidden_layers))
    except AttributeError as error:
        raise UserError(f"encoder '{spec.source}': {error}; choose an encoder of the BERT or ViT family") from None


def encoder_digest(spec: EncoderSpec) -> str:
    """Identity of an encoder's content: the hub commit, or SHA-256 of a folder's settings, vocabulary and weights."""
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
    """Return ``spec`` with a digest of a folder's content as its revision, so that other weights make another cell."""
    if not Path(encoder_source(spec.source)).is_dir():
        return spec
    return spec.model_copy(update={"revision": encoder_digest(spec)[:12]})


# --- where the files are --------------------------------------------------------------------------------------------


def _folder(spec: EncoderSpec) -> tuple[Path, str | None]:
    """The folder with the encoder's configuration; the commit where it is a hub repository's, in the local cache."""
    source = encoder_source(spec.source)
    if Path(source).is_dir():
        return Path(source), None
    path = repository_file(source, "config.json", spec.revision, f"encoder '{spec.source}'")
    if path is None:
        raise UserError(f"encoder '{spec.source}': the hub repository has no config.json, so it is no encoder")
    return path.parent, path.parent.name


def _bring_weights(spec: EncoderSpec, commit: str) -> None:
    """Have the weights of a hub repository beside its configuration, shard by shard where they are sharded."""

    def bring(name: str) -> Path | None:
        return repository_file(spec.source, name, commit, f"encoder '{spec.source}'")

    if bring(_WEIGHTS) is None:
        index = bring(f"{_WEIGHTS}.index.json")
        for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index else ():
            bring(shard)


# --- building -------------------------------------------------------------------------------------------------------


def _config(spec: EncoderSpec, folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        with _quiet_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:  # the last: what older versions say of a file that holds a list
        raise UserError(f"encoder '{spec.source}': its config.json is not usable ({first_line(error)})") from None


def _from_config(spec: EncoderSpec, folder: Path, seed: int, *, meta: bool) -> Any:
    from transformers import AutoModel

    config = _config(spec, folder)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            torch.manual_seed(seed)
            return AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"encoder '{spec.source}': its configuration builds no encoder ({first_line(error)})") from None


def _from_weights(spec: EncoderSpec, folder: Path, commit: str | None) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModel

    if commit is not None:
        _bring_weights(spec, commit)
    if not any((folder / name).is_file() for name in (_WEIGHTS, f"{_WEIGHTS}.index.json")):
        raise UserError(
            f"encoder '{spec.source}': no {_WEIGHTS} there, and other formats are never read, because they can run "
            "code; load it with transformers and save it again with save_pretrained"
        )
    _config(spec, folder)
    try:
        with _quiet_transformers():
            module, loading = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # refused below, in one line
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"encoder '{spec.source}': its weights cannot be read ({first_line(error)})") from None
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


def _normalisation(spec: EncoderSpec, folder: Path, commit: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of the encoder's image processor, per channel; ViT's 0.5 where it ships none."""
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

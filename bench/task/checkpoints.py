"""Reads checkpoints of encoders: where their files are, their configurations, and their weights.

Only safetensors are read and no remote code runs. ``weights = "random"`` builds an encoder from its configuration
alone, without weights and, for a local folder, without a network; such rows are flagged.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpme.bench.claims import scratch_folder
from tpme.bench.errors import UserError
from tpme.bench.limits import expanded
from tpme.bench.parsing import open_regular, read_json
from tpme.bench.record import EncoderSpec, Modality, Pool
from tpme.bench.task.builtin import builtin_folder
from tpme.bench.task.families import TOWERS, family_of
from tpme.bench.task.hub import refusals, repository_file

MOST_LAYERS = 1000
_WEIGHTS = "model.safetensors"
POOLING = "1_Pooling/config.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SENTENCE_POOLS: dict[str, Pool] = {"cls": "first", "mean": "mean", "lasttoken": "last"}


def encoder_source(source: str) -> str:
    """Resolve ``source`` for transformers: the folder of a built-in name, else ``source`` itself.

    Raises UserError for an unknown built-in name and for a path that is not an encoder's folder.
    """
    if source.startswith("builtin:"):
        return str(builtin_folder(source))
    folder = expanded(Path(source))
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or folder.is_dir()
    if looks_like_path and not (folder / "config.json").is_file():
        raise UserError(f"encoder '{source}': it has no config.json; pass a folder saved by transformers or a hub id")
    return str(folder) if looks_like_path else source


def checkpoint_folder(spec: EncoderSpec) -> tuple[Path, str | None]:
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
        for shard in sorted(set(read_json(index)["weight_map"].values())) if index else ():
            fetch(shard)


def read_config(spec: EncoderSpec, folder: Path, modality: Modality) -> Any:
    """The configuration of an encoder; of a checkpoint with two towers, that of the tower for ``modality``.

    Raises UserError where it is not usable, of a family that is not supported, or of another modality.
    """
    from transformers import AutoConfig

    with refusals(f"encoder '{spec.source}': its config.json is not usable"), quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised; choose a checkpoint with weights in full or half precision")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"encoder '{spec.source}': it is an adapter (adapter_config.json); merge it into its model and save that"
        )
    towers = TOWERS.get(config.model_type)
    if towers is not None:
        dtype, config = config.dtype, getattr(config, towers[spec.tower or modality])
        config.dtype = config.dtype or dtype  # saved once for both
    elif spec.tower is not None:
        raise UserError(f"encoder '{spec.source}': it does not have two towers; leave out tower = '{spec.tower}'")
    try:
        kind = family_of(config.model_type).modality
    except UserError as error:
        raise UserError(f"encoder '{spec.source}': {error}") from None
    if kind != modality:
        raise UserError(f"encoder '{spec.source}': its input is {kind}, so it cannot be the {modality} encoder")
    with refusals(f"encoder '{spec.source}': its config.json is not usable"):
        _check_sizes(config)
    if "/" in (spec.attention or ""):
        raise UserError(
            f"encoder '{spec.source}', attention: '{spec.attention}' is code on the hub, which is not run; choose one "
            "of transformers, such as 'eager' or 'sdpa'"
        )
    config._attn_implementation = spec.attention  # its own may name code on the hub
    return config


def _check_sizes(config: Any) -> None:
    """Raise ValueError for sizes that no encoder has; a layer takes time to build even without values."""
    sizes = {"num_hidden_layers": MOST_LAYERS, "hidden_size": 2**20, "num_attention_heads": 2**20, "image_size": 2**14}
    for name, most in sizes.items():
        value = getattr(config, name, None) if name == "image_size" else getattr(config, name)
        for size in value if isinstance(value, list | tuple) else [value]:
            if (type(size) is not int or not 1 <= size <= most) and (name, size) != ("image_size", None):
                raise ValueError(f"{name} is {size!r}; it must be a whole number from 1 to {most:,}")


def weights_dtype(spec: EncoderSpec, config: Any) -> torch.dtype:
    """The type of the weights once loaded; ``auto`` is that of the checkpoint."""
    own = getattr(config, "dtype", None)
    return (own if isinstance(own, torch.dtype) else torch.float32) if spec.dtype == "auto" else _DTYPES[spec.dtype]


def sentence_pool(spec: EncoderSpec, folder: Path, commit: str | None) -> Pool | None:
    """How a sentence-transformers checkpoint pools its tokens; ``None`` for other checkpoints.

    Raises UserError for a pooling that is not supported; the matrix must then set one.
    """
    path: Path | None = folder / POOLING
    if commit is not None:
        try:
            path = repository_file(spec.source, POOLING, commit, f"encoder '{spec.source}'")
        except UserError:  # offline and not in the cache: the encoder was fetched without this file
            path = None
    if path is None or not path.is_file():
        return None
    try:
        modes = _sentence_modes(read_json(path))
    except (UserError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"encoder '{spec.source}': its {POOLING} is not usable ({error})") from None
    if len(modes) != 1 or modes[0] not in _SENTENCE_POOLS:
        raise UserError(
            f"encoder '{spec.source}': its {POOLING} pools in a way that is not supported "
            f"({', '.join(modes)}); set pool"
        )
    return _SENTENCE_POOLS[modes[0]]


def _sentence_modes(settings: dict[str, Any]) -> list[str]:
    """Names of the poolings that a sentence-transformers configuration asks for; older ones have a key for each."""
    named = settings.get("pooling_mode")
    if named is not None:
        return [named] if isinstance(named, str) else list(named)
    flags = {key.removeprefix("pooling_mode_"): on for key, on in settings.items() if key.startswith("pooling_mode_")}
    return [name.removesuffix("_token").removesuffix("_tokens") for name, on in flags.items() if on]


# --- weights --------------------------------------------------------------------------------------------------------


def from_config(spec: EncoderSpec, config: Any, seed: int, *, meta: bool) -> Any:
    """An encoder with random weights, or on ``meta`` without any. Raises UserError where none can be built."""
    import transformers

    name = family_of(config.model_type).model
    make = getattr(transformers, name) if name else transformers.AutoModel.from_config
    with (
        refusals(f"encoder '{spec.source}': no encoder can be built from its configuration"),
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if meta else "cpu"),
    ):
        torch.manual_seed(seed)
        module = make(config)
    for parameter in module.parameters():
        # As loading does: buffers keep their type, because angles of rotary positions are inexact in half precision.
        parameter.data = parameter.data.to(weights_dtype(spec, config))
    return module


def check_weights(spec: EncoderSpec, folder: Path) -> None:
    """Raise UserError where the weights in the folder of an encoder are not whole safetensors files beside each other.

    An index may name any file as a shard, pickled ones too, which transformers would unpickle.
    """
    from safetensors import safe_open

    index = folder / f"{_WEIGHTS}.index.json"
    if not any(path.is_file() for path in (folder / _WEIGHTS, index)):
        raise UserError(
            f"encoder '{spec.source}': no {_WEIGHTS} there; other formats can run code and are not read: load it with "
            "transformers and save it again with save_pretrained"
        )
    with refusals(f"encoder '{spec.source}': its weights cannot be read"):
        names = {_WEIGHTS} if (folder / _WEIGHTS).is_file() else set(read_json(index)["weight_map"].values())
        for name in sorted(names):
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise ValueError(f"{index.name} names '{name}', which is no .safetensors file beside it")
            open_regular(folder / name).close()
            with safe_open(folder / name, "pt"):  # checks sizes and offsets
                pass


def from_weights(spec: EncoderSpec, folder: Path, commit: str | None, config: Any, **placement: Any) -> Any:
    """An encoder with the weights of a checkpoint.

    Args:
        placement: where transformers puts them (``device_map``, ``offload_folder``); by default in host memory.

    Raises UserError where they cannot be read or do not fit the configuration.
    """
    import transformers

    if commit is not None:
        _fetch_weights(spec, commit)
    check_weights(spec, folder)
    family = family_of(config.model_type)
    with refusals(f"encoder '{spec.source}': its weights cannot be read"), quiet_transformers():
        module, loading = getattr(transformers, family.model or "AutoModel").from_pretrained(
            folder,
            config=config,
            dtype=weights_dtype(spec, config),
            attn_implementation=spec.attention,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # refused below, in a one-line message
            output_loading_info=True,
            **placement,
        )
    mismatched = [name for name, *_ in loading["mismatched_keys"]]
    lacking = [name for name in (*loading["missing_keys"], *mismatched) if not name.startswith(family.unread or " ")]
    if lacking:
        raise UserError(
            f"encoder '{spec.source}': {len(lacking)} parameters of {type(module).__name__} are missing from its "
            f"weights or have another shape (first: {min(lacking)}); they would stay random"
        )
    return module


def streamed(spec: EncoderSpec, folder: Path, commit: str | None, config: Any, device: torch.device) -> Any:
    """An encoder whose layers stay on disk; each is read when it runs and dropped after it (accelerate's offloading).

    Everything outside the layers is on ``device``. Results equal those of the whole encoder. It can be run, but not
    adapted.
    """
    family = family_of(config.model_type)
    blocks = _blocks(from_config(spec, config, 0, meta=True), family.layers)
    place = {name: "disk" if name.startswith(f"{family.layers}.") else str(device) for name in blocks}
    with ExitStack() as stack:
        copies, _ = stack.enter_context(scratch_folder("layers"))  # weights that are not stored as they are used
        module = from_weights(spec, folder, commit, config, device_map=place, offload_folder=str(copies))
        weakref.finalize(module, stack.pop_all().close)
    return module


def _blocks(module: nn.Module, layers: str, above: str = "") -> Iterator[str]:
    """Names of the layers below ``layers``, and of the largest modules that hold none of them."""
    for name, child in module.named_children():
        path = f"{above}{name}"
        if f"{layers}.".startswith(f"{path}."):
            yield from _blocks(child, layers, f"{path}.")
        else:
            yield path


@contextmanager
def quiet_transformers() -> Iterator[None]:
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

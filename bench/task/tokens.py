"""Titles as token ids of a text encoder's tokenizer, computed once and stored on disk.

The tokenizer comes from a folder, the local Hugging Face cache, or the hub. No remote code runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpme.bench.archives import read_arrays
from tpme.bench.errors import UserError
from tpme.bench.task.dataset import Dataset, Titles
from tpme.bench.task.hub import reach, refusals
from tpme.bench.writing import write_atomically

_TITLES_PER_CALL = 4096


@dataclass(frozen=True)
class TokenTable:
    """The tokens of all titles by item id; row 0, the padding item, is zero.

    ids: int32 (N + 1, T), with special tokens, truncated to T, padded on the right with the tokenizer's padding token.
    lengths: int32 (N + 1,), number of real tokens: the attention mask is ``arange(T) < length``.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]

    @property
    def sha256(self) -> NDArray[np.uint8]:
        """Checksum of both, (32,)."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids).data)
        digest.update(np.ascontiguousarray(self.lengths).data)
        return np.frombuffer(digest.digest(), np.uint8)


def tokenise(
    dataset: Dataset, tokenizer_source: str, revision: str | None, title_tokens: int, store: Path | None
) -> TokenTable:
    """The tokens of all titles of ``dataset``, read from ``store`` if present.

    Args:
        dataset: a data set with titles.
        tokenizer_source: folder, hub id or built-in name of the text encoder.
        revision: of the hub repository.
        title_tokens: T, maximum number of tokens per title.
        store: folder of stored tables, one per data set, tokenizer and T; ``None`` stores nothing.

    Raises:
        UserError: the data set has no titles, T leaves no room for text or is more than the encoder reads, or the
            tokenizer cannot be loaded.
    """
    if dataset.titles is None:
        raise UserError(f"{dataset.path}: prepared without titles; prepare it again with --modalities text,image")
    tokenizer = load_tokenizer(tokenizer_source, revision)
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if title_tokens <= special:
        raise UserError(
            f"title_tokens is {title_tokens}, but '{tokenizer_source}' needs {special} for its special tokens alone"
        )
    if title_tokens > tokenizer.model_max_length:
        raise UserError(
            f"title_tokens is {title_tokens}, but '{tokenizer_source}' reads at most {tokenizer.model_max_length}"
        )
    if store is None:
        return _tokenise(dataset.titles, tokenizer, title_tokens)
    content = f"sha256\n{dataset.manifest.fingerprint}\n{title_tokens}\n{_content(tokenizer)}"
    path = store / f"tokens-{hashlib.sha256(content.encode()).hexdigest()[:16]}.npz"
    try:
        return _read(path, (len(dataset.titles), title_tokens))
    except FileNotFoundError:
        pass
    except UserError as error:
        sys.stderr.write(f"tpme: {error}; the titles are tokenised again\n")
    table = _tokenise(dataset.titles, tokenizer, title_tokens)
    buffer = io.BytesIO()
    np.savez(buffer, ids=table.ids, lengths=table.lengths, sha256=table.sha256)
    write_atomically(path, buffer.getbuffer())
    return table


def load_tokenizer(source: str, revision: str | None) -> Any:
    """The tokenizer of ``source``; if it is not in the local cache, the hub is queried once, without retries.

    Raises:
        UserError: it cannot be loaded.
    """
    from tpme.bench.task.checkpoints import encoder_source

    place = encoder_source(source)
    label = f"tokenizer '{source}'"
    try:
        return _load(label, place, revision, local_files_only=True)
    except UserError:
        if Path(place).is_dir():
            raise
    reach(place, "tokenizer_config.json", revision, label)
    return _load(label, place, revision, local_files_only=False)


def _load(label: str, place: str, revision: str | None, *, local_files_only: bool) -> Any:
    from transformers import AutoTokenizer

    with refusals(f"{label}: cannot be loaded from there"):
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=revision, trust_remote_code=False, local_files_only=local_files_only
        )
        # With files missing, transformers may build a tokenizer that maps every word to "unknown".
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty; is tokenizer.json there?")
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length is {tokenizer.model_max_length!r}")
    return tokenizer


def _content(tokenizer: Any) -> str:
    """Everything that determines the tokens of a title, independent of where the tokenizer was loaded from."""
    from transformers import __version__

    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())})
    return f"{type(tokenizer).__name__} {__version__}\n{special}\n{state}"


def _tokenise(titles: Titles, tokenizer: Any, title_tokens: int) -> TokenTable:
    padding = tokenizer.pad_token_id or 0
    ids = np.full((len(titles), title_tokens), padding, np.int32)
    ids[0] = 0
    lengths = np.zeros(len(titles), np.int32)
    for start in range(1, len(titles), _TITLES_PER_CALL):
        with refusals(f"tokenizer '{tokenizer.name_or_path}': a title cannot be tokenised"):
            batch = tokenizer(
                titles[start : start + _TITLES_PER_CALL], truncation=True, max_length=title_tokens, padding=False
            )
        for row, tokens in enumerate(batch["input_ids"], start=start):
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
    return TokenTable(ids, lengths)


def _read(path: Path, shape: tuple[int, int]) -> TokenTable:
    """The stored table. Raises FileNotFoundError where there is none, UserError where it is not what was stored."""
    path.stat()
    arrays = read_arrays(path, ("ids", "lengths", "sha256"), 4 * shape[0] * (shape[1] + 1) + 2**16)
    table = TokenTable(arrays["ids"], arrays["lengths"])
    if table.ids.shape != shape or not np.array_equal(table.sha256, arrays["sha256"]):
        raise UserError(f"{path}: it is not the table that was stored there")
    return table

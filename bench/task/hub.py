"""Files of encoders and tokenizers: from a folder, else the local Hugging Face cache, else the hub.

transformers alone asks the hub first and, without a network, tries again for half a minute. Here the cache comes
first, and the hub is asked once before anything is fetched from it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tpme.bench.errors import UserError

_TIMEOUT_S = 5.0

T = TypeVar("T")


def obtain(place: str, what: str, revision: str | None, load: Callable[[bool], T]) -> T:
    """What ``load`` returns.

    Args:
        place: folder or hub id.
        what: what is loaded, as errors call it.
        revision: of the hub repository.
        load: called with true to read local files only; raises OSError, ValueError or SafetensorError.

    Raises:
        UserError: it is not to be had, or not readable.
    """
    from safetensors import SafetensorError

    unreadable = (OSError, ValueError, SafetensorError)
    try:
        return load(True)
    except unreadable as error:
        if Path(place).is_dir():
            raise UserError(f"{what}: cannot be loaded from that folder ({first_line(error)})") from None
    reach(place, what, revision)
    try:
        return load(False)
    except unreadable as error:
        raise UserError(f"{what}: cannot be loaded from the hub ({first_line(error)})") from None


def reach(repository: str, what: str, revision: str | None) -> None:
    """Ask the hub once for a file. Raises UserError where it does not answer or has no such repository."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=revision), timeout=_TIMEOUT_S)
    except EntryNotFoundError:
        return
    except Exception as error:  # every HTTP library has exceptions of its own, and hub versions changed theirs
        raise UserError(
            f"{what}: no such folder, not in the local cache, and the hub does not give it ({first_line(error)}); "
            "give a folder saved by transformers, or fetch it where there is a network"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

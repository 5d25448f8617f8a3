"""Files of a Hugging Face repository, from the local cache or else from the hub.

transformers queries the hub first, for every possible file, and without a network retries each for half a minute.
This module looks in the cache first and queries the hub once before fetching; the files are then loaded as a folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpme.bench.errors import UserError, one_line

_TIMEOUT_S = 5.0


def repository_file(repository: str, name: str, revision: str | None, label: str) -> Path | None:
    """Local path of file ``name`` of ``repository``; ``None`` if the repository has no such file.

    Args:
        revision: commit, branch or tag; ``None`` is the main branch.
        label: name of the loaded object in error messages.

    Raises:
        UserError: it is not in the cache and cannot be fetched from the hub.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    cached = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # the cache knows that there is no such file
        return None
    reach(repository, name, revision, label)
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except EntryNotFoundError:
        return None
    except Exception as error:  # the exceptions depend on the HTTP library and the hub's version
        raise UserError(f"{label}: cannot be fetched from the hub ({first_line(error)})") from None


def reach(repository: str, name: str, revision: str | None, label: str) -> None:
    """Query the hub once for a file. Raises UserError if it does not answer or has no such repository."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=_TIMEOUT_S)
    except EntryNotFoundError:
        return
    except Exception as error:
        raise UserError(
            f"{label}: no such folder, its {name} is not in the local cache, and the hub does not provide it "
            f"({first_line(error)}); pass a folder saved by transformers, or fetch it where there is a network"
        ) from None


@contextmanager
def refusals(message: str) -> Iterator[None]:
    """Turn whatever a library raises over somebody's files into ``message (reason)``, a UserError.

    Libraries raise what they run into: divisions by zero, missing keys, panics of Rust, which are no Exceptions. Lack
    of memory is no fault of the files and stays what it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        unrelated = not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        if unrelated or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise
        reason = one_line(error)
        if isinstance(error, OSError | ValueError):
            reason = reason.removeprefix(f"{type(error).__name__}: ")
        raise UserError(f"{message} ({reason})") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""Files of a Hugging Face repository: from the local cache, else from the hub.

transformers itself asks the hub first, for every file it might find, and without a network tries each again for half
a minute. Here the cache comes first, the hub is asked once before anything is fetched, and what lies on the disk is
then loaded as a folder.
"""

from __future__ import annotations

from pathlib import Path

from tpme.bench.errors import UserError

_TIMEOUT_S = 5.0


def repository_file(repository: str, name: str, revision: str | None, what: str) -> Path | None:
    """Where file ``name`` of ``repository`` lies on this machine; ``None`` where the repository has no such file.

    Args:
        revision: commit, branch or tag; ``None`` is the main branch.
        what: what is loaded, as errors call it.

    Raises:
        UserError: it is not in the cache, and the hub does not give it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    found = try_to_load_from_cache(repository, name, revision=revision)
    if isinstance(found, str):
        return Path(found)
    if found is not None:  # the cache remembers that there is no such file
        return None
    reach(repository, name, revision, what)
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except EntryNotFoundError:
        return None
    except Exception as error:  # every HTTP library has exceptions of its own, and hub versions changed theirs
        raise UserError(f"{what}: cannot be fetched from the hub ({first_line(error)})") from None


def reach(repository: str, name: str, revision: str | None, what: str) -> None:
    """Ask the hub once for a file. Raises UserError where it does not answer or has no such repository."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=_TIMEOUT_S)
    except EntryNotFoundError:
        return
    except Exception as error:
        raise UserError(
            f"{what}: no such folder, its {name} is not in the local cache, and the hub does not give it "
            f"({first_line(error)}); give a folder saved by transformers, or fetch it where there is a network"
        ) from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""The exception for mistakes of the user, and other errors in one line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tpme.bench.redact import without_credentials

if TYPE_CHECKING:
    from pydantic import ValidationError


LONGEST_MESSAGE = 400
"""Characters of the message of a failed cell."""
_MOST_QUOTED = 2000
"""Characters at the beginning, and at the end, of a message that are looked through for credentials."""
SYNONYMS = {
    "amp": "precision",
    "batch": "users_per_batch",
    "batch_size": "users_per_batch",
    "cache_limit": "cache_limit_bytes",
    "d_model": "embedding_dim",
    "dim": "embedding_dim",
    "early_stopping": "patience",
    "fp16": "precision",
    "gradient_checkpointing": "activation_checkpointing",
    "hidden_size": "embedding_dim",
    "layers": "blocks",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "max_length": "title_tokens",
    "max_steps": "max_steps_per_epoch",
    "mixed_precision": "precision",
    "model": "encoders",
    "n_heads": "heads",
    "n_layers": "blocks",
    "num_epochs": "epochs",
    "num_heads": "heads",
    "num_layers": "blocks",
    "num_virtual_tokens": "length",
    "r": "rank",
    "random_seed": "seeds",
    "reduction_factor": "reduction",
    "target_modules": "targets",
    "timeout": "time_limit_s",
}
"""What other tools of the field call the settings of a matrix and the options of methods."""


class UserError(Exception):
    """Bad input. The command line prints the message alone, without a traceback, and exits with code 2.

    Credentials in what the message quotes are cut out, and the middle of what is longer than any message.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > 2 * _MOST_QUOTED:
            text = f"{text[:_MOST_QUOTED]}...{text[-_MOST_QUOTED:]}"
        return without_credentials(text)


class FieldProblem(NamedTuple):
    """What is wrong with a field."""

    field: str
    """Dotted path; empty for the whole."""
    message: str
    kind: str
    """Pydantic's name of the problem."""


def first_problem(error: ValidationError) -> FieldProblem:
    """The first field that ``error`` complains about; of a union, the alternative that fits furthest."""
    found = error.errors()
    # Pydantic puts the name of an alternative, such as ``tuple[int, ...]``, into the path.
    alternative = next((place for place, part in enumerate(found[0]["loc"]) if "[" in str(part)), None)
    alike = (
        found[:1]
        if alternative is None
        else [e for e in found if e["loc"][:alternative] == found[0]["loc"][:alternative]]
    )
    first = max(alike, key=lambda each: len(each["loc"]))
    field = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    return FieldProblem(field, first["msg"].removeprefix("Value error, "), first["type"])


def one_line(error: BaseException, length: int = 200) -> str:
    """Kind and message of an error, the message cut to ``length``."""
    try:
        message = without_credentials(" ".join(str(error).split())[:_MOST_QUOTED])
    except Exception:  # of a plug-in, whose own code says what it is
        message = ""
    return f"{type(error).__name__}: {message[:length]}".removesuffix(": ")


def nearest(word: str, known: Collection[str]) -> str | None:
    """The name in ``known`` that ``word`` may stand for: what other tools call so, else the nearest in spelling."""
    if SYNONYMS.get(word) in known:
        return SYNONYMS[word]
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def missing_extra(what: str, package: str, extra: str) -> UserError:
    """The error where ``what`` needs a package of an optional dependency: it names the command that installs it."""
    return UserError(f"{what} needs {package}: {install_command(extra)}")


def install_command(extra: str) -> str:
    """The command of pip that adds an extra: from the clone that this package was installed from, else by its name."""
    origin = json.loads(distribution("tpme-bench").read_text("direct_url.json") or "{}")
    clone = Path(url2pathname(urlsplit(origin.get("url", "")).path))
    if "dir_info" not in origin or not (clone / "pyproject.toml").is_file():
        return f"pip install 'tpme-bench[{extra}]'"
    place = "." if clone == Path.cwd() else str(clone)
    return f"pip install {'-e ' if origin['dir_info'].get('editable') else ''}'{place}[{extra}]'"

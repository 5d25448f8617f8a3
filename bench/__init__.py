"""``from tpme.bench import Recorder`` records any training loop; nothing else is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpme.bench.recorder.recording import Recorder

__all__ = ["Recorder"]


def __getattr__(name: str) -> Any:
    if name == "Recorder":
        return import_module("tpme.bench.recorder.recording").Recorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

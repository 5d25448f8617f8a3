"""The contract suite's subjects: every built-in method, some of their variants, and methods from elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tpme.methods import registry

OWN_METHODS = "TPME_METHODS_PATH"
"""Environment variable: folders (joined like PATH) whose methods go through the contract suite as well."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adapter": [{"bottleneck": 4, "activation": "gelu"}],
    "lora": [{"rank": 2, "alpha": 4, "targets": ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")}],
    "prompt": [{"length": 3, "deep": False}],
    "iisan": [{"inter": False, "activation": "gelu"}, {"intra": False}],
}


@dataclass(frozen=True)
class Subject:
    """A method with options, on the modalities it is tried with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = ("text", "image")

    def __str__(self) -> str:
        options = "".join(f",{key}={value}" for key, value in self.options.items() if key != "targets")
        return f"{self.name}{options}{'' if len(self.modalities) == 2 else f'-{self.modalities[0]}'}"


def folders() -> tuple[Path, ...]:
    return tuple(Path(part) for part in os.environ.get(OWN_METHODS, "").split(os.pathsep) if part)


def subjects() -> list[Subject]:
    """Every method with its defaults, every variant, and every method on each modality alone."""
    results = []
    for name in sorted({*registry.BUILTIN, *registry.available(folders())}):
        results += [Subject(name, options) for options in ({}, *VARIANTS.get(name, []))]
        method = registry.method_class(name, folders())
        if method.modalities is None:
            results += [Subject(name, {}, (m,)) for m in ("text", "image") if set(method.needs) <= {m}]
    return results


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        metafunc.parametrize("subject", subjects(), ids=str)


@pytest.fixture
def methods_path() -> tuple[Path, ...]:
    return folders()

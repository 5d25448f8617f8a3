"""The contract suite's subjects: every built-in method, some of their variants, and correct methods from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tpme.methods import registry

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adapter": [{"bottleneck": 4, "activation": "gelu"}],
    "lora": [{"rank": 2, "alpha": 4, "targets": ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")}],
    "prompt": [{"length": 3, "deep": False}],
    "iisan": [{"inter": False, "activation": "gelu"}, {"intra": False}],
}
CORRECT = Path(__file__).with_name("correct")
BOTH = ("text", "image")


@dataclass(frozen=True)
class Tried:
    """A method with options, on the modalities it is tried with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = BOTH

    def __str__(self) -> str:
        options = "".join(f",{key}={value}" for key, value in self.options.items() if key != "targets")
        return f"{self.name}{options}{'' if len(self.modalities) == 2 else f'-{self.modalities[0]}'}"


def names() -> list[str]:
    return sorted({*registry.available([CORRECT])})


def tried() -> list[Tried]:
    """Every method with its defaults, every variant, and every method on each modality alone."""
    results = []
    for name in names():
        results += [Tried(name, options) for options in ({}, *VARIANTS.get(name, []))]
        method = registry.method_class(name, [CORRECT])
        if method.modalities is None:
            results += [Tried(name, {}, (m,)) for m in BOTH if set(method.needs) <= {m}]
    return results


@pytest.fixture(scope="session")
def contract_world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data and encoders of the contract suite."""
    from tpme.bench.contract.world import World

    return World(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="session")
def subject_of(contract_world: Any) -> Callable[..., Any]:
    """The subject of a ``Tried``, the same one whenever it is asked for: its training is shared by the checks."""
    from tpme.bench.contract.subject import Subject
    from tpme.bench.contract.world import PAIRS

    made: dict[str, Subject] = {}

    def make(of: Tried, pair: tuple[str, str] = PAIRS[0]) -> Subject:
        key = f"{of} {pair}"
        if key not in made:
            made[key] = Subject(contract_world, of.name, of.options, of.modalities, pair, (CORRECT,))
        return made[key]

    return make

"""What every method must keep, whoever wrote it: the checks of ``bench/contract`` over the built-in methods.

The correct methods in ``correct`` go through it as well: what they do must not be taken for a mistake.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tpme.bench.contract.checks import CHECKS, SLOW_CHECKS, Check, run_check
from tpme.bench.contract.small_encoders import FAMILIES, modality_of
from tpme.bench.contract.subject import Subject
from tpme.bench.contract.world import PAIRS
from tpme.methods import registry
from tpme.methods.autopeft import BUDGETS, Budget

CORRECT = Path(__file__).with_name("correct")
BOTH = ("text", "image")
DEFAULTS: dict[str, dict[str, Any]] = {"autopeft": {"budget": "smoke", "engine": "random"}}
"""What stands for the defaults, which need a package that may be missing."""
COMPILED = {"autopeft": {"configuration": {"text": {"serial": 3, "parallel": 2, "prefix": 2}}}}
"""Without its search, which would compile every trial."""
SLOW = ("autopeft", "dora", "fedpeptao", "iisan-versa", "light-peft", "parallel-adapter", "tpgm")
"""Their defaults are as slow as variants are: another method stands for them, or tests of their own do."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adapter": [{"bottleneck": 4, "activation": "gelu"}],
    "lora": [{"rank": 2, "alpha": 4, "targets": ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")}],
    "prompt": [{"length": 3, "deep": False}],
    "pyra": [{"rank": 2, "dropout": 0.0, "schedule": "high", "text_merge": "high"}],
    "context-peft": [
        {"kind": "bitfit", "grid": 1},
        {"kind": "ia3", "dropout": 0.0},
        *({"kind": kind, "contexts": "agnostic", "rank": 2} for kind in ("lora", "bitfit", "ia3")),
    ],
    "prefix": [{"length": 3, "reparameterised": True, "hidden": 5}],
    "pt-peft": [
        {"length": 3, "reparameterised": True, "hidden": 5, "then": "adapter", "bottleneck": 4},
        {"length": 4, "then": "all", "share": 0.4},
    ],
    "fedpeptao": [
        {"length": 3, "clients": 4, "sample": 0.5, "local_epochs": 1, "ratio_from": "spectrum", "partition": "iid"},
        {"clients": 3, "sample": 1.0, "rounds": 3, "algorithm": "fedavg", "client_optimizer": "persist"},
    ],
    "lst": [{"reduction": 2, "dropped": (1,), "temperature": 0.5, "dropout": 0.0, "init": "random"}],
    "dyt": [
        {"rate": 0.8, "bottleneck": 4, "scale": 1.0, "experts": 3, "complete_loss": False},
        {"experts": 2, "mixing": "mix", "bottleneck": 4, "dispatch_encoders": "image", "distill": False},
    ],
    "iisan": [{"inter": False, "activation": "gelu"}, {"intra": False}],
    "autopeft": [
        {"budget": "smoke", "engine": "random", "kinds": ("prefix", "serial"), "shared": True, "tolerance": 0.5},
        {"configuration": {"text": {"serial": 3, "prefix": 2, "layers": (1,)}, "image": {"parallel": 2}}},
        {"configuration": {"image": {"serial": 3, "layers": (0,)}}},
    ],
    "pfeiffer-adapter": [{"bottleneck": 4, "activation": "gelu"}],
    "parallel-adapter": [{"bottleneck": 4, "scale": 1.0, "dropout": 0.1}],
    "dapt": [
        {"bottleneck": 4, "dropout": 0.0, "prompt_norm": False, "gate_bias": 2.0, "tfts_noise": 0.1},
        {"prompts": False, "tfts_noise": 0.0},
    ],
    "iisan-versa": [
        {"text_layers": (1,), "bottleneck": 4, "text_pool": "last", "activation": "gelu"},
        {"image_layers": (0, 1), "text_layers": (0,), "intra": False},
    ],
    "dora": [{"rank": 2, "alpha": 4, "targets": ("key", "ffn_out")}],
    "adalora": [
        {"rank": 6, "target_rank": 2, "alpha": 4, "final": 0.0, "interval": 2, "targets": ("key", "ffn_in", "ffn_out")}
    ],
    "light-peft": [
        {"heads": 0.5, "rank": 4, "dropout": 0.0, "targets": ("query", "ffn_out"), "modules": 0.0},
        {"heads": 0.5, "units": 0.5, "unit_scope": "layerwise", "round_units_to": 8, "estimation": 1.0},
    ],
    "vera": [{"rank": 20, "scale": 0.5, "matrices_seed": 3, "targets": ("key", "ffn_in", "ffn_out")}],
}


@dataclass(frozen=True)
class Tried:
    """A method with options, on the modalities and the encoders that it is tried with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = BOTH
    pair: tuple[str, str] = PAIRS[0]

    def __str__(self) -> str:
        options = "".join(f",{key}={value}" for key, value in self.options.items() if key != "targets")
        return f"{self.name}{options}{'' if len(self.modalities) == 2 else f'-{self.modalities[0]}'}"


NAMES = sorted(registry.available([CORRECT]))
TEXT, IMAGE = ([family for family in FAMILIES if modality_of(family) == modality] for modality in BOTH)
FAMILY_PAIRS = [pair for pair in zip(TEXT, itertools.cycle(IMAGE), strict=False) if pair not in PAIRS]
"""Pairs of encoders in which every family occurs."""


def tried() -> list[Tried]:
    """Every method with its defaults, every variant, and every built-in method on each modality alone."""
    results = []
    for name in NAMES:
        usual = DEFAULTS.get(name, {})
        results += [Tried(name, options) for options in (usual, *VARIANTS.get(name, []))]
        method = registry.method_class(name, [CORRECT])
        if name in registry.BUILTIN and method.modalities is None:
            results += [Tried(name, usual, (m,)) for m in BOTH if set(method.needs) <= {m}]
    return results


@pytest.fixture(scope="module", autouse=True)
def _short_searches() -> Iterator[None]:
    """Three trials show what eight do."""
    with patch.dict(BUDGETS, smoke=Budget(random=2, trials=3)):
        yield


@pytest.fixture(scope="module")
def conclude(contract_world: Any) -> Callable[[Check, Tried], None]:
    """Run a check; a subject's training is shared by its checks."""
    made: dict[str, Subject] = {}

    def run(check: Check, of: Tried) -> None:
        key = f"{of} {of.pair}"
        if key not in made:
            made[key] = Subject(contract_world, of.name, of.options, of.modalities, of.pair, (CORRECT,))
        result = run_check(check, made[key])
        if result.status == "skipped":
            pytest.skip(result.message)
        assert result.status == "passed", result

    return run


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(
    "of",
    [
        pytest.param(
            of,
            id=str(of),
            marks=() if of == Tried(of.name, DEFAULTS.get(of.name, {})) and of.name not in SLOW else pytest.mark.slow,
        )
        for of in tried()
    ],
)
def test_contract(conclude: Callable[[Check, Tried], None], check: Check, of: Tried) -> None:
    conclude(check, of)


@pytest.mark.slow
@pytest.mark.parametrize("check", SLOW_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_contract_of_compiled_models(conclude: Callable[[Check, Tried], None], check: Check, name: str) -> None:
    """With the text encoder alone, where the method can do without images: compiling takes a minute."""
    conclude(check, Tried(name, COMPILED.get(name, {}), registry.method_class(name, [CORRECT]).needs or ("text",)))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("pair", PAIRS[1:], ids=" + ".join)
@pytest.mark.parametrize("name", NAMES)
def test_contract_on_other_encoders(
    conclude: Callable[[Check, Tried], None], check: Check, name: str, pair: tuple[str, str]
) -> None:
    conclude(check, Tried(name, DEFAULTS.get(name, {}), pair=pair))


@pytest.mark.slow
@pytest.mark.parametrize("pair", FAMILY_PAIRS, ids=" + ".join)
@pytest.mark.parametrize("name", ["adapter", "bitfit", "fft", "iisan", "iisan-versa", "lora", "prompt"])
def test_contract_on_every_family(contract_world: Any, name: str, pair: tuple[str, str]) -> None:
    subject = Subject(contract_world, name, pair=pair)
    if subject.refusal is not None:
        pytest.skip(subject.refusal)
    results = [run_check(check, subject) for check in CHECKS]
    assert [str(result) for result in results if result.status == "failed"] == []

"""The module ``peft``: every type of the installed peft keeps the contract, or is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from tpme.bench.contract.checks import CHECKS, run_check
from tpme.bench.contract.subject import Subject
from tpme.bench.errors import UserError
from tpme.bench.task.items import Reads
from tpme.methods.base import TaskShape
from tpme.methods.peft import UNSUPPORTED, supported_types
from tpme.methods.registry import create

SMALL: dict[str, dict[str, Any]] = {
    "BONE": {"r": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
}
"""Options for encoders of width 16, where a type's defaults need wider ones."""
MATRIX_PAGE = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"


def options_of(kind: str) -> dict[str, Any]:
    return {"type": kind, **SMALL.get(kind, {})}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "BOFT" else pytest.mark.slow) for kind in supported_types()]
)
def test_contract_of_every_type(contract_world: Any, kind: str) -> None:
    subject = Subject(contract_world, "peft", options_of(kind))
    assert subject.refusal is None
    results = [run_check(check, subject) for check in CHECKS]
    assert [str(result) for result in results if result.status == "failed"] == []


@pytest.mark.parametrize("kind", supported_types())
def test_the_count_is_that_of_the_adapted_model(tiny: ModuleType, kind: str) -> None:
    """It is taken on ``meta``, where peft builds some types in another way."""
    method, model = tiny.build("peft", options_of(kind))
    encoders = tiny.views()
    task = TaskShape(tiny.DIM, tiny.ITEMS, {modality: view.shape for modality, view in encoders.items()})
    counted = sum(
        p.numel() for part in (model.encoders, model.item_encoder) for p in part.parameters() if p.requires_grad
    )
    assert method.trainable_parameters(task, encoders) == counted
    assert all(not parameter.is_meta for view in encoders.values() for parameter in view.module.parameters())


LINEARS, D, F = 2, 16, 32
"""Adapted in each layer by default, the width, and the feed-forward width of the small encoders."""
FORMULAS: dict[str, int] = {
    "LORA": LINEARS * 8 * 2 * D,
    "IA3": 2 * D + F,
    "VERA": LINEARS * (256 + D),
    "LOHA": LINEARS * 2 * 8 * 2 * D,
    "HRA": LINEARS * 8 * D,
    "OFT": LINEARS * D * (D - 1) // 2,
    "BOFT": LINEARS * (D // 4 * 4**2 + D),
    "FOURIERFT": LINEARS * 20,
    "LN_TUNING": LINEARS * 2 * D,
}
"""Parameters of a layer, from the papers."""


@pytest.mark.parametrize("kind", FORMULAS)
def test_known_formulas(tiny: ModuleType, kind: str) -> None:
    _, model = tiny.build("peft", options_of(kind))
    outside = 2 * D if kind == "LN_TUNING" else 0  # the norm of BERT's embeddings, the final norm of ViT
    for encoder in model.encoders.values():
        assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == tiny.DEPTH * FORMULAS[kind] + outside


@pytest.mark.parametrize(
    ("kind", "name"), [("LORA", "lora"), ("IA3", "ia3"), ("VERA", "vera"), ("LN_TUNING", "ln-tuning")]
)
def test_a_type_with_a_method_of_its_own_is_that_method(tiny: ModuleType, kind: str, name: str) -> None:
    _, generic = tiny.build("peft", options_of(kind))
    _, own = tiny.build(name)
    shapes = [sorted(tuple(p.shape) for p in m.parameters() if p.requires_grad) for m in (generic, own)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", sorted(set(supported_types()) - {"C3A", "FOURIERFT", "UNILORA"}))
def test_most_types_start_as_the_frozen_encoders(tiny: ModuleType, kind: str) -> None:
    """The other three start at a random update by default."""
    _, model = tiny.build("peft", options_of(kind))
    items, reads = tiny.items(), Reads(final=True)
    model.eval()
    for modality, plain in tiny.views().items():
        inputs = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
        with torch.no_grad():
            torch.testing.assert_close(
                model.views[modality].encode(reads, **inputs), plain.encode(reads, **inputs), atol=1e-5, rtol=1e-4
            )


def test_targets_are_roles_or_names(tiny: ModuleType) -> None:
    def adapted(**options: Any) -> set[str]:
        _, model = tiny.build("peft", {"type": "LOHA", **options}, ("text",))
        names = [name for name, p in model.encoders["text"].named_parameters() if p.requires_grad]
        return {name.split(".hada_")[0] for name in names}

    view = tiny.views(("text",))["text"]
    assert adapted() == set(view.projections("query", "value"))
    assert adapted(targets=("ffn_in",)) == set(view.projections("ffn_in"))
    assert adapted(target_modules=["self.key"]) == set(view.projections("key"))
    assert adapted(target_modules=r".*layer\.0\.attention\.self\.key") == {view.projections("key")[0]}
    assert adapted(target_modules=["key"], layers_to_transform=[1]) == {view.projections("key")[1]}


def test_options_reach_peft(tiny: ModuleType) -> None:
    _, model = tiny.build("peft", {"type": "LOHA", "r": 3})
    ranks = {p.shape[0] for name, p in model.named_parameters() if name.endswith("hada_w1_b.default")}
    assert ranks == {3}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "BOFFT"}, "has no type 'BOFFT'; did you mean 'BOFT'?"),
        ({"type": "boft"}, "has no type 'boft'; did you mean 'BOFT'?"),
        ({"type": "nothing"}, "has no type 'nothing'; known: "),
        ({"type": "BOFT", "boft_blok_size": 4}, "BOFT has no option 'boft_blok_size'; did you mean 'boft_block_size'?"),
        ({"type": "LOHA", "inference_mode": True}, "LOHA has no option 'inference_mode'"),
        ({"type": "LORA", "modules_to_save": ["x"]}, "LORA has no option 'modules_to_save'"),
        ({"type": "LORA", "layer_replication": [[0, 1], [0, 2]]}, "LORA has no option 'layer_replication'"),
        ({"type": "LOHA", "layers_to_transform": [0]}, "layers_to_transform chooses among target_modules"),
        ({"type": "LORA", "init_lora_weights": "eva"}, "init_lora_weights = 'eva' is computed from data"),
        ({"type": "LORA", "init_lora_weights": "pissa_niter_4"}, "changes the pretrained weights at random"),
        ({"targets": ("query",), "target_modules": ["query"]}, "targets and target_modules both name what is adapted"),
        ({"targets": ("nothing",)}, "option 'targets"),
    ],
)
def test_options_that_peft_does_not_have_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as error:
        create("peft", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "BOFT", "boft_block_size": 4, "boft_block_num": 4}, "BOFT refuses its options"),
        ({"type": "LOHA", "r": -1}, "LOHA with these options does not fit BertModel (text encoder)"),
        ({"type": "C3A"}, "The block size should be a factor of the input size"),
        ({"type": "LORA", "r": 17}, "rank 17 is above the smaller side"),
        ({"type": "LOHA", "r": 17}, "rank 17 is above the smaller side"),
        ({"type": "LORA", "r": "many"}, "LORA with these options does not fit BertModel (text encoder)"),
        ({"type": "OFT", "r": 17, "oft_block_size": 0}, "OFT with these options trains nothing of BertModel"),
        ({"type": "LOHA", "target_modules": ["nowhere"]}, "LOHA with these options does not fit"),
        ({"type": "LOHA", "targets": ("ffn_gate",)}, "it has no 'ffn_gate'"),
    ],
)
def test_options_that_do_not_fit_the_encoder_are_refused(tiny: ModuleType, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as error:
        tiny.build("peft", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", sorted(set(UNSUPPORTED) & {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}))
def test_a_type_that_cannot_be_used_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{kind} cannot adapt these encoders: it {UNSUPPORTED[kind]}")):
        create("peft", {"type": kind})


def test_every_type_that_wraps_no_layers_is_listed() -> None:
    others = {kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if not issubclass(tuner, BaseTuner)}
    assert others <= set(UNSUPPORTED)


def test_the_documents_list_the_same_types() -> None:
    page = MATRIX_PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.+) \|$", page, re.MULTILINE))
    assert rows == UNSUPPORTED

"""PT-PEFT: what trains in each stage, the switch between them, and states of both."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from tpme.bench.contract.checks import run_check
from tpme.bench.contract.checks_of_training import compiled_equals_eager
from tpme.bench.contract.subject import Subject
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec
from tpme.bench.task.recommender import Recommender
from tpme.methods.base import Method, StepState
from tpme.methods.registry import create

SECOND = ("lora", "adapter", "all")
FORMS: dict[str, dict[str, Any]] = {
    "direct": {"length": 3},
    "mlp": {"length": 3, "reparameterised": True, "hidden": 5},
}
EVERY = [(then, form) for then in SECOND for form in FORMS]
ADDED = {"lora": "lora_", "adapter": "adapters."}


def build(tiny: ModuleType, then: str, form: str = "mlp", **settings: Any) -> tuple[Method, Recommender]:
    method, model = tiny.build("pt-peft", {"then": then, "bottleneck": 4, **FORMS[form]}, **settings)
    return method, model


def enter(method: Method, model: Recommender, tiny: ModuleType, stage: int) -> None:
    method.begin_stage(StepState(model, tiny.schedule(), stage=method.stages()[stage]))


def trained(tiny: ModuleType, then: str, form: str = "mlp") -> tuple[Method, Recommender]:
    """Two steps of each stage."""
    method, model = build(tiny, then, form)
    for stage in range(2):
        enter(method, model, tiny, stage)
        tiny.train(method, model, 2)
    return method, model


def training(model: Recommender) -> set[str]:
    return {name for name, value in model.encoders.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(("then", "form"), EVERY)
def test_the_prefix_trains_alone_and_then_together_with_the_rest(tiny: ModuleType, then: str, form: str) -> None:
    """With a gradient for each; peft would freeze the prefix when it adds LoRA."""
    method, model = build(tiny, then, form)
    enter(method, model, tiny, 0)
    prefix = {name for name, _ in model.encoders.named_parameters() if ".prefix." in name}
    assert training(model) == prefix
    tiny.train(method, model, 2)
    assert tiny.gradients(model.encoders).keys() == prefix
    enter(method, model, tiny, 1)
    own = {name for name, _ in model.encoders.named_parameters() if then == "all" or ADDED[then] in name}
    assert own
    assert training(model) == prefix | own
    tiny.train(method, model, 2)  # an up-projection of zero hides what is before it in the first step
    gradients = tiny.gradients(model.encoders)
    assert gradients.keys() == prefix | own
    biases = {name for name in own if "key.bias" in name or "k_proj.bias" in name}  # adds the same to all scores
    unused = {name for name in own if "word_embeddings" in name or "position_embeddings" in name}
    reached = {name for name, value in gradients.items() if value.abs().max() > 0}
    assert reached >= gradients.keys() - biases - unused


@pytest.mark.parametrize("then", SECOND)
def test_the_switch_changes_no_vector_and_keeps_the_prefix(tiny: ModuleType, then: str) -> None:
    method, model = build(tiny, then)
    enter(method, model, tiny, 0)
    tiny.train(method, model, 3)
    items, before, state = tiny.items(), tiny.vectors(model, tiny.items()), method.state(model)
    enter(method, model, tiny, 1)
    assert torch.equal(tiny.vectors(model, items), before)
    after = method.state(model)
    prefix = {name for name in after if ".prefix." in name}
    assert prefix == {name for name in state if ".prefix." in name}
    assert all(torch.equal(after[name], state[name]) for name in prefix)
    tiny.train(method, model, 2)
    assert not torch.allclose(tiny.vectors(model, items), before, atol=1e-3)


@pytest.mark.parametrize(("then", "form"), EVERY)
@pytest.mark.parametrize("stage", [0, 1])
def test_the_state_of_either_stage_loads_into_a_fresh_model(tiny: ModuleType, then: str, form: str, stage: int) -> None:
    """The best epoch may lie in stage 1. A fresh model is in none."""
    method, model = build(tiny, then, form)
    for entered in range(stage + 1):
        enter(method, model, tiny, entered)
        tiny.train(method, model, 2)
    fresh_method, fresh = build(tiny, then, form, seed=5)
    fresh_method.load_state(fresh, method.state(model))
    assert torch.equal(tiny.vectors(fresh, tiny.items()), tiny.vectors(model, tiny.items()))
    assert training(fresh) == {name.removeprefix("encoders.") for name in method.state(model) if "encoders" in name}


def test_stage_2_refuses_a_state_without_its_part(tiny: ModuleType) -> None:
    method, model = build(tiny, "lora")
    first = method.state(model)
    enter(method, model, tiny, 1)
    with pytest.raises(KeyError, match="lora_"):
        method.load_state(model, first)


@pytest.mark.parametrize("then", SECOND)
def test_inference_runs_merged_and_without_the_mlp(tiny: ModuleType, then: str) -> None:
    method, model = trained(tiny, then)
    before = tiny.vectors(model, tiny.items())
    method.prepare_inference(model)
    torch.testing.assert_close(tiny.vectors(model, tiny.items()), before, atol=1e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        assert "prefix.encoder" not in name
        if "lora_" in name:
            parameter.data.fill_(float("nan"))
    assert tiny.vectors(model, tiny.items()).isfinite().all()


def test_shares_of_the_epochs_and_the_prefixs_own_rate(tiny: ModuleType) -> None:
    method, model = tiny.build("pt-peft", {"share": 0.4, "then": "adapter", **FORMS["mlp"]})
    assert [(stage.name, stage.share) for stage in method.stages()] == [("prefix", 0.4), ("adapter", 0.6)]
    enter(method, model, tiny, 1)
    groups = model.parameter_groups()
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names[id(value)].split(".")[2] for value in groups["prefix"]} == {"prefix"}
    assert {names[id(value)].split(".")[2] for value in groups["text"]} == {"adapters"}


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.0}, {"then": "ia3"}, {"length": 0}, {"rank": 0}])
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        create("pt-peft", options)


@pytest.mark.parametrize(("then", "second"), [("lora", 2 * 294_912), ("adapter", 2 * 2_379_264), ("all", 194_690_304)])
def test_numbers_of_the_last_stage_at_the_base_shape(then: str, second: int) -> None:
    cell = Cell(
        method="pt-peft",
        options={"then": then},
        dataset="synthetic",
        dataset_fingerprint="0",
        modalities=("text", "image"),
        text_encoder=EncoderSpec(source="bert-base-uncased"),
        image_encoder=EncoderSpec(source="google/vit-base-patch16-224"),
    )
    model = MetaCell(cell, DataShape.assumed()).model
    trains = sum(value.numel() for value in model.encoders.parameters() if value.requires_grad)
    assert trains == 2 * 294_912 + second


def test_a_rank_above_the_width_is_refused_before_stage_1(tiny: ModuleType) -> None:
    with pytest.raises(UserError, match=r"method 'pt-peft': rank 17 .* choose at most 16"):
        tiny.build("pt-peft", {"rank": 17})
    tiny.build("pt-peft", {"rank": 17, "then": "adapter"})


@pytest.mark.slow  # it compiles
def test_compiled_layers_run_what_stage_2_adds(contract_world: Any) -> None:
    """torch.compile does not guard the hooks of adapters: without a reset their layers would run without them."""
    options = {"then": "adapter", "bottleneck": 4, "length": 3}
    result = run_check(compiled_equals_eager, Subject(contract_world, "pt-peft", options, ("text",)))
    assert result.status == "passed", result

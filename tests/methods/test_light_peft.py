"""Light-PEFT: the cut against masks in every family, importances and choices by hand, and the whole procedure."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, SiglipTextModel

from tpme.bench.contract.small_encoders import FAMILIES, SIDE, modality_of, small_config
from tpme.bench.contract.subject import Subject, Trained
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, Training
from tpme.bench.task.families import FAMILIES as TABLE
from tpme.bench.task.items import Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import ModelBuilder
from tpme.bench.train.delta import read_delta
from tpme.methods.base import PassOutput, StepState, TaskShape
from tpme.methods.light_peft import LightPEFT, LightPEFTConfig, left, top
from tpme.methods.parts.cutting import Structure, parts
from tpme.methods.parts.scored_low_rank import MaskedInput, ScoredLowRank
from tpme.methods.parts.token_mask import TokenMask
from tpme.methods.registry import create

WIDTH, HEADS, FFN, DEPTH = 32, 4, 48, 2
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": FFN}
TEXT = SMALL | {"vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2}
IMAGE = SMALL | {"image_size": SIDE, "patch_size": 16, "initializer_range": 0.2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "xlm-roberta": ("xlm-roberta", TEXT),
    "electra": ("electra", TEXT | {"embedding_size": 8}),
    "deberta-v2": ("deberta-v2", TEXT | RELATIVE),
    "deberta-v3": ("deberta-v2", TEXT | RELATIVE | {"share_att_key": True}),
    "llama, grouped queries": ("llama", TEXT | {"num_key_value_heads": 2}),
    "dinov2, gated": ("dinov2", IMAGE | {"use_swiglu_ffn": True}),
    "dinov3_vit": ("dinov3_vit", IMAGE),
    "dinov3_vit, gated": ("dinov3_vit", IMAGE | {"use_gated_mlp": True}),
}
"""What the contract's small encoders do not have."""
NAMES = (*FAMILIES, *FURTHER)


def encoder(name: str) -> EncoderView:
    """An encoder with four heads, biases that are not zero and norms that are not one."""
    if name in FURTHER:
        config = AutoConfig.for_model(FURTHER[name][0], **FURTHER[name][1])
        modality = "image" if "image_size" in FURTHER[name][1] else "text"
    else:
        config, modality = small_config(name, width=WIDTH), modality_of(name)
        config.num_attention_heads = HEADS
        if name == "llama":
            config.head_dim = WIDTH // HEADS
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        module = (SiglipTextModel if name == "siglip-text" else AutoModel.from_config)(config)
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return EncoderView(module.eval(), modality)


def build(tiny: ModuleType, name: str, **options: Any) -> tuple[LightPEFT, Recommender, EncoderView]:
    """The method on one encoder; its updates are not zero."""
    method, view = create("light-peft", options), encoder(name)
    assert isinstance(method, LightPEFT)
    torch.manual_seed(3)
    training = Training(epochs=2, users_per_batch=3, embedding_dim=tiny.DIM, heads=tiny.HEADS, dropout=0.0)
    builder = ModelBuilder(method, training, tiny.data_size(), {view.modality: view.shape})
    model = builder.build({view.modality: view}).eval()
    for update in updates(view):
        nn.init.normal_(update.up, std=0.05)
    return method, model, view


def updates(view: EncoderView) -> list[ScoredLowRank]:
    return [part for part in view.module.modules() if isinstance(part, ScoredLowRank)]


def masks(view: EncoderView, role: Any) -> list[MaskedInput]:
    return [part for _, part in parts(view, (role,))]


def random_structure(method: LightPEFT, view: EncoderView) -> Structure:
    """A choice by random scores, of other units and ranks in every layer."""
    config, draw = method.config, torch.Generator().manual_seed(11)
    heads, units = ([len(part.mask) for part in masks(view, role)] for role in ("attention_output", "ffn_out"))
    sizes = (DEPTH, heads[0]), (DEPTH, units[0]), (DEPTH, len(config.targets), 1 + config.rank)
    return config.structure(*(torch.rand(size, generator=draw) for size in sizes))


@torch.no_grad()
def states(tiny: ModuleType, view: EncoderView) -> Tensor:
    """The final states of every token that is an item's."""
    items = tiny.items((view.modality,))
    every = view.encode(
        Reads((1,), final=True, tokens="all"), tokens=items.tokens, token_mask=items.token_mask, image=items.image
    )
    return every.states.transpose(1, 2)[every.mask]


# --- the cut ----------------------------------------------------------------------------------------------------------


def test_every_family_is_tried() -> None:
    assert {encoder(name).config.model_type for name in NAMES} == set(TABLE)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_encoder_gives_what_masks_give(tiny: ModuleType, name: str) -> None:
    """Masks of 0 and 1, and ranks set to zero; then merged, and loaded into a fresh model."""
    options = {"heads": 0.5, "units": 0.4, "modules": 0.4, "ranks": 0.3, "rank": 4}
    method, model, view = build(tiny, name, **options)
    kept = random_structure(method, view)
    with torch.no_grad():
        for role, chosen in (("attention_output", kept.heads), ("ffn_out", kept.units)):
            for part, row in zip(masks(view, role), chosen, strict=True):
                part.mask.copy_(row)
        for update, ranks in zip(method._updates_of(view), kept.ranks.flatten(0, 1), strict=True):
            update.up.mul_(ranks)
    masked, size = states(tiny, view), sum(p.numel() for p in view.module.parameters())
    method._cut(view, kept)
    torch.testing.assert_close(states(tiny, view), masked, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in view.module.parameters()) < size
    assert len(updates(view)) == int(kept.ranks.any(2).sum())
    if name != "llama":  # its queries share one head of keys and values
        assert kept.heads.sum(1).tolist() == [kept.heads.shape[1] // 2] * DEPTH

    fresh_method, fresh, fresh_view = build(tiny, name, **options)
    fresh_method.load_state(fresh, {key: value.clone() for key, value in method.state(model).items()})
    assert torch.equal(states(tiny, fresh_view), states(tiny, view))

    method.prepare_inference(model)
    torch.testing.assert_close(states(tiny, view), masked, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(p, nn.Parameter) and p.requires_grad for p in view.module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_encoder_trains_all_that_is_left(tiny: ModuleType, name: str) -> None:
    method, model, view = build(tiny, name, modules=0.5, dropout=0.0)
    method._cut(view, random_structure(method, view))
    losses = tiny.train(method, model, 8, (view.modality,))
    assert losses[-1] < losses[0]
    assert all(float(update.down.grad.norm()) > 0 for update in updates(view))


def test_without_cuts_it_is_lora_at_six_projections(tiny: ModuleType) -> None:
    """Masks of 1 change nothing, nor does a cut of nothing; and it trains as LoRA does."""
    roles = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
    options = {"heads": 0, "units": 0, "modules": 0, "ranks": 0, "dropout": 0.0}
    method, model = tiny.build("light-peft", options)
    other, lora = tiny.build("lora", {"alpha": 16, "targets": roles})
    items = tiny.items()
    for modality, view in model.views.items():
        own = (part.inner if isinstance(part, MaskedInput) else part for _, part in parts(view, roles))
        for update, (_, layer) in zip(own, parts(lora.views[modality], roles), strict=True):
            nn.init.normal_(update.up, std=0.1)
            layer.lora_A["default"].weight.data.copy_(update.down)
            layer.lora_B["default"].weight.data.copy_(update.up)
    expected = tiny.vectors(lora, items)
    estimated = tiny.vectors(model, items)
    torch.testing.assert_close(estimated, expected, atol=1e-5, rtol=1e-5)
    for view in model.views.values():
        method._cut(view, random_structure(method, view))
    assert torch.equal(tiny.vectors(model, items), estimated)
    assert tiny.train(method, model, 6) == pytest.approx(tiny.train(other, lora, 6), abs=1e-4)


def test_a_state_of_another_structure_is_refused(tiny: ModuleType) -> None:
    method, model, view = build(tiny, "bert")
    method._cut(view, random_structure(method, view))
    state = method.state(model)
    prefix = "encoders.text.light_peft"
    for change, error in (
        ({f"{prefix}.units": None}, KeyError),
        ({f"{prefix}.units": torch.ones(3, 5, dtype=torch.bool)}, ValueError),
        ({f"{prefix}.ranks": ~state[f"{prefix}.ranks"]}, KeyError),
    ):
        wrong = {key: value for key, value in (state | change).items() if value is not None}
        fresh_method, fresh, _ = build(tiny, "bert")
        with pytest.raises(error, match="state of another structure"):
            fresh_method.load_state(fresh, wrong)
    changed = state | {f"{prefix}.units": ~state[f"{prefix}.units"]}
    with pytest.raises(ValueError, match=r"'encoders\.text\.light_peft\.units' differs"):
        method.load_state(model, changed)


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (12, 1 / 3, 8),
        (72, 0.75, 18),
        (36_864, 1 / 3, 24_576),
        (2, 0.9, 1),
        (2, 1 / 3, 2),
        (1, 0.9, 1),
        (5, 0.0, 5),
        (10, 0.3, 7),
    ],
)
def test_how_many_are_left(count: int, share: float, expected: int) -> None:
    assert left(count, share) == expected


def test_of_equal_scores_the_earlier_are_kept() -> None:
    """Masks that no gradient has reached are all exactly 1."""
    assert top(torch.ones(5), 2).tolist() == [True, True, False, False, False]
    assert top(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [False, True, True, True]
    assert top(torch.tensor([-9.0, 0.1]), 1).tolist() == [False, True], "a negative mask is unimportant"


def test_units_of_all_layers_compete_and_no_layer_loses_all() -> None:
    scores = torch.stack([torch.linspace(5, 6, 8), torch.linspace(0, 1, 8)])
    config = LightPEFTConfig(units=0.5, round_units_to=1)
    assert config.unit_counts(scores) == [8, 1]
    assert LightPEFTConfig(units=0.5, unit_scope="layerwise", round_units_to=1).unit_counts(scores) == [4, 4]
    assert LightPEFTConfig(units=0.5).unit_counts(scores) == [8, 8], "by default a multiple of 8"
    assert LightPEFTConfig(units=0.5, round_units_to=8).unit_counts(torch.rand(3, 40)) == pytest.approx(
        [20] * 3, abs=12
    )
    assert all(n % 8 == 0 for n in LightPEFTConfig(round_units_to=8).unit_counts(torch.rand(4, 40)))
    assert LightPEFTConfig(round_units_to=64).unit_counts(torch.rand(2, 40)) == [40, 40]
    kept = config.structure(torch.ones(2, 4), scores, torch.rand(2, 6, 9))
    assert kept.units[1].nonzero().tolist() == [[7]]


def test_updates_go_first_and_then_ranks_of_those_left() -> None:
    importance = torch.tensor([[[5.0, 1, 2], [1, 9, 9]], [[4.0, 3, 0], [2, 9, 9]]])  # (L, roles, 1 + r)
    config = LightPEFTConfig(rank=2, targets=("query", "value"), modules=0.5, ranks=0.25)
    kept = config.structure(torch.ones(2, 4), torch.ones(2, 4), importance)
    assert kept.ranks.tolist() == [[[True, True], [False, False]], [[True, False], [False, False]]]
    fewer = config.model_copy(update={"ranks": 0.75}).structure(torch.ones(2, 4), torch.ones(2, 4), importance)
    assert fewer.ranks.any(2).tolist() == [[False, False], [True, False]], "an update without ranks goes, too"


# --- importances ------------------------------------------------------------------------------------------------------


def test_importances_by_hand() -> None:
    linear = nn.Linear(2, 2)
    update, tokens = None, TokenMask()
    tokens.value = torch.tensor([[True, False], [True, True]])
    update = ScoredLowRank(linear, 2, 0.5, 0.0, tokens).train()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        linear.bias.copy_(torch.tensor([0.0, 1.0]))
        update.down.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        update.up.copy_(torch.tensor([[1.0, 0.0], [2.0, 4.0]]))
    x = torch.tensor([[[3.0, 4.0], [50.0, 60.0]], [[1.0, 0.0], [0.0, 1.0]]])
    update.scored = True
    update(x).sum().backward()
    out, change = x @ linear.weight.T + linear.bias, 0.5 * x @ update.down.T @ update.up.T
    ratio = (change.norm(dim=2) / out.norm(dim=2))[tokens.value].mean()
    update.down.grad = torch.tensor([[2.0, -3.0], [1.0, 1.0]])
    update.up.grad = torch.tensor([[-1.0, 5.0], [3.0, 0.5]])
    update.observe()
    update.observe()
    # Rank 0: |mean(2, -6)| + |mean(-1, 6)| = 2 + 2.5; rank 1: |mean(3, -1)| + |mean(0, 2)| = 1 + 1.
    torch.testing.assert_close(update.importance(), 2 * torch.stack([ratio.detach(), *torch.tensor([4.5, 2.0])]))
    assert update.scored is False


def test_a_gradient_that_is_not_finite_counts_as_nothing() -> None:
    update = ScoredLowRank(nn.Linear(2, 2), 2, 1.0, 0.0, TokenMask()).train()
    update.scored = True
    update(torch.randn(1, 3, 2)).sum().backward()
    update.up.grad.fill_(float("inf"))
    update.down.grad[1] = float("nan")
    update.observe()
    assert update.importance()[1:].tolist() == [0.0, 0.0]


def test_masks_are_sparse_by_their_l1_norm(tiny: ModuleType) -> None:
    method, model = tiny.build("light-peft", {"sparsity": 0.01})
    method._masks = [part for part in model.modules() if isinstance(part, MaskedInput)]
    assert len(method._masks) == 2 * 2 * tiny.DEPTH
    for part in method._masks:
        nn.init.normal_(part.mask)
    output = PassOutput(torch.tensor(2.0), torch.zeros(1), torch.zeros(1))
    terms = method.losses({"task": output})
    assert terms["task"] is output.loss
    terms["masks"].backward()
    for part in method._masks:
        torch.testing.assert_close(part.mask.grad, 0.01 * part.mask.sign())
    method._masks = []
    assert method.losses({"task": output}).keys() == {"task"}


def test_the_score_of_an_encoder_with_relative_positions_is_that_of_its_tokens(tiny: ModuleType) -> None:
    """DeBERTa projects embeddings of positions with the queries' and keys' weights, after the tokens."""
    method, _, view = build(tiny, "deberta-v3", dropout=0.0)
    query, value = (method._updates_of(view)[place] for place in (0, 2))
    for update in (query, value):
        update.scored = True
    view.module.train()
    seen: list[Tensor] = []
    query.register_forward_hook(lambda _module, _args, out: seen.append(out))
    items = tiny.items(("text",))
    view.encode(Reads(final=True), tokens=items.tokens, token_mask=items.token_mask)
    assert len(seen) == 2
    assert seen[1].shape[:2] != items.tokens.shape
    with torch.no_grad():
        hidden = view.encode(Reads((0,), tokens="all"), tokens=items.tokens, token_mask=items.token_mask).states[:, 0]
        change = 2 * hidden @ query.down.T @ query.up.T
        ratio = change.norm(dim=2) / query.linear(hidden).norm(dim=2)
    torch.testing.assert_close(query._ratio, ratio[items.token_mask.bool()].mean(), atol=1e-4, rtol=1e-4)


# --- the procedure ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(contract_world: Any) -> Subject:
    return Subject(contract_world, "light-peft", {"heads": 0.5})


@pytest.fixture(scope="module")
def trained(subject: Subject) -> Trained:
    return subject.train(epochs=3)


def test_the_estimation_is_a_phase_of_its_own(trained: Trained) -> None:
    trainer = trained.trainer
    kinds = [(phase.kind, phase.name) for phase in trainer.phases.phases if phase.kind in ("estimate", "train")]
    assert kinds == [
        ("estimate", "masks and scores"),
        ("estimate", "cut"),
        *(("train", f"epoch {n}") for n in (1, 2, 3)),
    ]
    assert [set(epoch.losses) for epoch in trainer.outcome.epochs] == [{"task"}] * 3
    assert trainer.state.step == 4 * trainer.state.schedule.steps_per_epoch


def test_scores_are_those_of_the_second_half(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    observe = ScoredLowRank.observe
    trainer = subject.trainer(max_steps_per_epoch=3, epochs=40)
    monkeypatch.setattr(
        ScoredLowRank, "observe", lambda self: (steps.append(trainer.state.step), observe(self), None)[2]
    )
    trainer.method._estimate(trainer)
    assert sorted(set(steps)) == [3, 4, 5], "of two epochs, 5 % of 40"


def test_after_the_cut_only_what_is_left_is_held(trained: Trained) -> None:
    model, method = trained.trainer.model, trained.trainer.method
    optimizer = trained.trainer.optimizer()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert not any(isinstance(part, MaskedInput) for part in model.modules())
    assert method._updates == method._masks == []
    counts = method.report(model)
    for modality, view in model.views.items():
        left_over = updates(view)
        assert counts[f"{modality}_modules_kept"] == len(left_over) == 3, "a quarter of twelve"
        assert counts[f"{modality}_ranks_kept"] == sum(len(update.down) for update in left_over) == 12
        assert counts[f"{modality}_heads_kept"] == 2, "one of the two heads of each layer"
        inner = [view.module.get_submodule(name) for name in view.projections("ffn_in")]
        widths = [(part.linear if isinstance(part, ScoredLowRank) else part).out_features for part in inner]
        assert counts[f"{modality}_units_kept"] == sum(widths)
        assert {width % 8 for width in widths} == {0}
        assert sum(widths) == pytest.approx(64 * 2 / 3, abs=8)


def test_the_counters_are_those_of_the_cut_model(subject: Subject, trained: Trained) -> None:
    fresh = subject.trainer()
    data = DataShape.of(fresh.dataset)
    before, after = (count(MetaCell.trained(one, data)) for one in (fresh, trained.trainer))
    model = trained.trainer.model
    assert after.weight_bytes == sum(v.numel() * v.element_size() for v in (*model.parameters(), *model.buffers()))
    assert after.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    structure = sum(2 * (2 + 32 + 6 * 8) for _ in model.views)  # a byte a head, a unit and a rank of two layers
    assert after.stored_bytes == 4 * after.trainable + structure
    assert after.weight_bytes < before.weight_bytes
    assert after.step.forward_flops < before.step.forward_flops
    assert after.step.saved_bytes < before.step.saved_bytes
    assert after.optimizer_bytes == 8 * after.trainable


def test_a_plan_cuts_every_layer_alike(tiny: ModuleType) -> None:
    method, model = tiny.build("light-peft")
    method.begin_stage(StepState(model, tiny.schedule()))
    fresh = tiny.views()
    task = TaskShape(tiny.DIM, tiny.ITEMS, {modality: view.shape for modality, view in fresh.items()})
    sequence = sum(p.numel() for p in model.sequence.parameters())
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trains - sequence == method.trainable_parameters(task, fresh)
    for view in model.views.values():
        assert view.module.light_peft.units.sum(1).tolist() == [24, 24]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["heads", "units", "modules", "ranks", "dropout"])
@pytest.mark.parametrize("value", [1.0, -0.1])
def test_shares_outside_their_range_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"option '{option}'") as error:
        create("light-peft", {option: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimation": 0.0}, "option 'estimation'"),
        ({"estimation": 1.5}, "option 'estimation'"),
        ({"round_units_to": 3}, "option 'round_units_to'"),
        ({"targets": ()}, "option 'targets'"),
        ({"targets": ("query", "query")}, "option 'targets': .*name every projection once"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        create("light-peft", options)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_the_encoder_is_refused(tiny: ModuleType) -> None:
    with pytest.raises(UserError, match="method 'light-peft': rank 17 is above the smaller side"):
        tiny.build("light-peft", {"rank": tiny.WIDTH + 1})
    with pytest.raises(UserError, match="it has no 'ffn_gate'"):
        tiny.build("light-peft", {"targets": ("ffn_gate",)})


# --- kill -9 ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal
from tpme.methods.light_peft import LightPEFT

class Killed(LightPEFT):
    def before_step(self, state):
        super().before_step(state)
        if os.environ.get("KILL") == ("estimation" if self._estimating else "training") and state.step % 2:
            os.kill(os.getpid(), signal.SIGKILL)

METHOD = Killed
"""


@pytest.mark.slow
def test_kill_9_changes_neither_the_cut_nor_the_ranks(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the estimation, then after the cut; then as if nobody had killed it."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "killed.py").write_text(KILLED)
    methods = [tmp_path / "methods"]
    matrix = world.matrix([{"name": "killed", "options": {"heads": 0.5}}], training={"users_per_batch": 8})

    def attempt(folder: str) -> CellResult:
        [result] = world.run(matrix, tmp_path / folder, methods_path=methods, save_adapters=True)
        return result

    for part in ("estimation", "training"):
        monkeypatch.setenv("KILL", part)
        assert attempt("run").status == "killed"
    monkeypatch.delenv("KILL")
    resumed, whole = attempt("run"), attempt("other")
    assert (resumed.failure, resumed.attempt, whole.failure) == (None, 3, None)
    assert [phase.name for phase in resumed.phases if phase.kind == "estimate"] == ["cut"]
    assert "s of it in earlier attempts" in resumed.all_in_s.source

    def files(folder: str, result: CellResult, kind: str) -> Path:
        [path] = (tmp_path / folder).glob(f"cells/*/{result.files[kind]}")
        return path

    first, second = (read_delta(files(*of, "adapter"))[1] for of in (("run", resumed), ("other", whole)))
    assert first.keys() == second.keys()
    assert {"encoders.text.light_peft.units", "encoders.image.light_peft.ranks"} < first.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    ranks, again = (np.load(files(*of, "ranks"))["rank"] for of in (("run", resumed), ("other", whole)))
    assert np.array_equal(ranks, again)

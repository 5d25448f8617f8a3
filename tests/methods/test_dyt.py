"""DyT: masks, losses and the gather, against their formulas."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.counting.encoding import item_flops
from tpme.bench.errors import UserError
from tpme.bench.record import Modality, Training
from tpme.bench.task.dealing import WholeBatch
from tpme.bench.task.items import Items, Reads
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import ModelBuilder
from tpme.bench.train.step import forward, loss_terms, total_loss
from tpme.methods.base import Method
from tpme.methods.dyt import RATE_WEIGHT, AdapterBeside, TokenDispatch
from tpme.methods.parts.token_mask import TokenMask
from tpme.methods.registry import create

SMALL = {"bottleneck": 4, "scale": 1.0, "dropout": 0.0}


def parts_of(model: Recommender) -> dict[Modality, list[Any]]:
    """The branches of every encoder, by layer."""
    return {modality: list(view.module.get_submodule("dyt").children()) for modality, view in model.views.items()}


def every(model: Recommender) -> list[Any]:
    return [part for parts in parts_of(model).values() for part in parts]


def moved(model: Recommender, spread: float = 0.5) -> Recommender:
    """The model with adapters that are not zero and dispatchers that are not undecided, as after training."""
    with torch.no_grad():
        for part in every(model):
            for parameter in part.parameters():
                parameter.add_(spread * torch.randn_like(parameter))
    return model


def states_of(model: Recommender, items: Items) -> dict[Modality, Tensor]:
    """Every hidden state, (n, L + 2, T, D), of each encoder."""
    found = {}
    for modality, view in model.views.items():
        reads = Reads(levels=tuple(range(view.shape.depth + 1)), final=True, tokens="all")
        given = {"tokens": items.tokens, "token_mask": items.token_mask, "image": items.image}
        found[modality] = view.encode(reads, **given).states
    return found


def masks_of(part: TokenDispatch, x: Tensor) -> Tensor:
    """m of the states x: a new adapter gives zero, and f = 1."""
    return part(x, torch.ones_like(x))[..., 0]


def dispatch(width: int = 8, mask: Tensor | None = None, *, last: bool = False, tau: float = 5.0) -> TokenDispatch:
    tokens = TokenMask()
    tokens.value = mask
    part = TokenDispatch(width, nn.Linear(width, width), tokens, WholeBatch(), last=last, temperature=tau)
    nn.init.zeros_(part.adapter.weight)
    nn.init.zeros_(part.adapter.bias)
    nn.init.normal_(part.dispatcher.weight)
    return part


# --- the mask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_masks_are_bits_and_the_items_token_passes_and_padding_does_not(training: bool, last: bool) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([9, 4, 1])
    mask = torch.arange(9) < lengths[:, None]
    part, x = dispatch(mask=mask, last=last).train(training), torch.randn(3, 9, 8)
    found = masks_of(part, x)
    assert set(found.flatten().tolist()) == {0.0, 1.0}
    read = lengths - 1 if last else torch.zeros(3, dtype=torch.int64)
    assert (found[torch.arange(3), read] == 1).all()
    assert not found[~mask].any()
    free = mask.clone()
    free[torch.arange(3), read] = False
    assert 0 < found[free].mean() < 1
    if not training:
        assert torch.equal(found[free], (part.dispatcher(x)[..., 0] > 0).float()[free])


@pytest.mark.parametrize("last", [True, False])
def test_all_tokens_of_an_image_are_decided_on_but_the_one_that_is_read(last: bool) -> None:
    part = dispatch(last=last).eval()
    nn.init.constant_(part.dispatcher.bias, -100.0)
    x = torch.randn(2, 5, 8)
    assert masks_of(part, x).tolist() == [[0.0, 0, 0, 0, 1] if last else [1.0, 0, 0, 0, 0]] * 2
    nn.init.constant_(part.dispatcher.bias, 100.0)
    assert masks_of(part, x).all()


def test_a_token_passes_with_the_probability_of_its_logit() -> None:
    torch.manual_seed(0)
    part = dispatch()
    nn.init.zeros_(part.dispatcher.weight)
    for logit in (-1.0, 0.0, 2.0):
        nn.init.constant_(part.dispatcher.bias, logit)
        share = masks_of(part, torch.randn(10, 4001, 8))[:, 1:].mean().item()
        assert share == pytest.approx(1 / (1 + torch.tensor(-logit).exp().item()), abs=0.01)


def test_the_temperature_changes_the_gradient_and_no_decision() -> None:
    """The gradient of m is that of sigmoid((s + noise) / tau)."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8)
    masks, gradients = [], []
    for tau in (0.5, 5.0):
        part = dispatch(tau=tau)
        torch.manual_seed(1)
        nn.init.normal_(part.dispatcher.weight)
        torch.manual_seed(2)
        mask = masks_of(part, x)
        mask.sum().backward()
        torch.manual_seed(2)
        logits = part.dispatcher(x)[..., 0].detach().requires_grad_()
        ((logits + torch.rand(3, 6).logit(eps=1e-6)) / tau).sigmoid()[:, 1:].sum().backward()
        torch.testing.assert_close(part.dispatcher.bias.grad, logits.grad.sum()[None])
        masks.append(mask.detach())
        gradients.append(part.dispatcher.weight.grad)
    assert torch.equal(*masks)
    assert not torch.allclose(*gradients)


def test_evaluation_is_deterministic_and_training_is_not(tiny: ModuleType) -> None:
    _, model = tiny.build("dyt", SMALL)
    moved(model)
    items = tiny.items()
    first, second = (states_of(model.eval(), items) for _ in range(2))
    for modality in first:
        assert torch.equal(first[modality], second[modality])
    one, other = (states_of(model.train(), items) for _ in range(2))
    assert not torch.equal(one["image"], other["image"])
    assert first["image"].shape[1] == tiny.DEPTH + 2, "every hidden state is still there"


# --- the layer ----------------------------------------------------------------------------------------------------


def test_the_complete_pass_starts_as_the_frozen_encoders(tiny: ModuleType) -> None:
    _, model = tiny.build("dyt")
    _, frozen = tiny.build("frozen")
    items = tiny.items()
    for part in every(model.train()):
        part.complete = True
    expected = states_of(frozen.eval(), items)
    for modality, states in states_of(model, items).items():
        torch.testing.assert_close(states, expected[modality], atol=1e-5, rtol=0)
    for part in every(model):
        part.complete = False
    assert not torch.allclose(states_of(model, items)["image"], expected["image"], atol=1e-2)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_a_layer_is_its_formula(tiny: ModuleType, modality: Modality) -> None:
    """Pre-norm ViT: y = x + m FFN(LN x) + A(x). Post-norm BERT: y = LN(x + m FFN(x) + A(x))."""
    torch.manual_seed(0)
    _, model = tiny.build("dyt", SMALL | {"scale": 0.7}, (modality,))
    view, part = moved(model.eval()).views[modality], every(model)[0]
    layer: Any = tiny.views((modality,))[modality].layers[0]
    inputs = []
    view.insert_between(0, lambda x: inputs.append(x) or x)
    items = tiny.items((modality,))
    found = states_of(model, items)[modality][:, 1]
    [x] = inputs
    real = items.token_mask.bool() if modality == "text" else torch.ones(x.shape[:2], dtype=torch.bool)
    m = ((x @ part.dispatcher.weight[0] + part.dispatcher.bias > 0) & real).float()
    m[:, 0] = 1
    adapter = part.adapter
    a = 0.7 * ((x @ adapter.down.weight.T + adapter.down.bias).relu() @ adapter.up.weight.T + adapter.up.bias)
    if modality == "image":
        expected = x + m[..., None] * layer.mlp(layer.layernorm_after(x)) + a
    else:
        f = layer.output.dense(layer.intermediate(x))
        expected = layer.output.LayerNorm(x + m[..., None] * f + a)
    assert 0 < m[:, 1:].mean() < 1
    torch.testing.assert_close(found, expected)


def model_on(tiny: ModuleType, family: str, options: dict[str, Any]) -> Recommender:
    """The method on one small encoder of ``family``."""
    torch.manual_seed(0)
    modality = modality_of(family)
    view = EncoderView(small_encoder(family), modality)
    training = Training(epochs=2, users_per_batch=3, embedding_dim=tiny.DIM, heads=tiny.HEADS, dropout=0.0)
    builder = ModelBuilder(create("dyt", options), training, tiny.data_size(), {modality: view.shape})
    return builder.build({modality: view})


@pytest.mark.parametrize("options", [SMALL, SMALL | {"experts": 3}], ids=["one adapter", "experts"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_gathering_changes_no_state_and_computes_the_chosen_tokens_alone(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    model = moved(model_on(tiny, family, options).eval())
    [view], items = model.views.values(), tiny.items()
    computed: list[int] = []
    view.module.get_submodule(view.projections("ffn_out")[1]).register_forward_pre_hook(
        lambda _module, args: computed.append(args[0].shape[:-1].numel())
    )
    [gathered] = states_of(model, items).values()
    report = create("dyt", {}).report(model)
    monkeypatch.setattr(TokenDispatch, "choose", lambda _part, x: x)
    [masked] = states_of(moved(model_on(tiny, family, options).eval()), items).values()
    torch.testing.assert_close(gathered, masked)
    [chosen] = computed
    n, _, tokens, _ = gathered.shape
    real = items.token_mask.sum().item() if view.modality == "text" and not view.family.whole else n * tokens
    share = report[f"{view.modality}_tokens_passed_layer_1"]
    assert chosen == round(share * (real - n)) + n < real


@torch.no_grad()
def test_flops_of_an_item_are_those_of_the_recorded_masks(tiny: ModuleType) -> None:
    """4 D F of the feed-forward a chosen token, 4 D b + 2 D of adapter and dispatcher every token."""
    torch.manual_seed(0)
    d, f, b, depth = tiny.WIDTH, tiny.FFN, SMALL["bottleneck"], tiny.DEPTH
    method, model = tiny.build("dyt", SMALL, ("image",))
    _, plain = tiny.build("frozen", modalities=("image",))
    moved(model.eval())
    items = tiny.items(("image",))
    n, tokens = len(items), (tiny.SIDE // tiny.PATCH) ** 2 + 1
    frozen, _ = item_flops(plain.eval().encode_items, items)
    found, uncounted = item_flops(model.encode_items, items)
    assert uncounted == ()
    always = depth * tokens * (4 * d * b + 2 * d)
    skipped = (1 - method.report(model)["image_tokens_passed"]) * depth * (tokens - 1)
    assert 0 < skipped < depth * (tokens - 1)
    assert found == pytest.approx(frozen + always - skipped * 4 * d * f)
    for part in every(model):
        nn.init.constant_(part.dispatcher.bias, 1e4)
    assert item_flops(model.encode_items, items)[0] == frozen + always
    assert len({item_flops(model.encode_items, tiny.items(("image",), [k]))[0] for k in range(1, n + 1)}) == 1


# --- the losses -----------------------------------------------------------------------------------------------------


def test_the_terms_of_the_loss_are_those_of_the_paper(tiny: ModuleType) -> None:
    """CE(z) + CE(z_c) + KL(softmax(z_c) || softmax(z)) + 2 (mean(m) - r)^2 for each encoder."""
    method, model = tiny.build("dyt", SMALL | {"rate": 0.3})
    moved(model.train())
    batch = tiny.batch()
    outputs, masks = record_passes(method, model, batch)
    terms = method.losses(outputs)
    z, z_c = outputs["dynamic"].logits, outputs["complete"].logits
    target = outputs["dynamic"].target
    torch.testing.assert_close(terms["dynamic"], functional.cross_entropy(z, target))
    torch.testing.assert_close(terms["complete"], functional.cross_entropy(z_c, target))
    p = z_c.softmax(1)
    torch.testing.assert_close(terms["distill"], (p * (p / z.softmax(1)).log()).nansum(1).mean())
    for modality in ("text", "image"):
        rate = torch.cat([m.flatten() for m in masks[modality]]).mean()
        torch.testing.assert_close(terms[f"{modality}_rate"], 2 * (rate - 0.3) ** 2)
    assert terms.keys() == {"dynamic", "complete", "distill", "text_rate", "image_rate"}


def record_passes(
    method: Method, model: Recommender, batch: Any
) -> tuple[dict[str, Any], dict[Modality, list[Tensor]]]:
    """The outputs of the passes, and the decisions of the dynamic one on real tokens other than the first."""
    masks: dict[Modality, list[Tensor]] = {"text": [], "image": []}
    plain = TokenDispatch._mask

    def watched(part: TokenDispatch, x: Tensor) -> Tensor:
        mask = plain(part, x)
        [modality] = [name for name, parts in parts_of(model).items() if part in parts]
        real = part.tokens.value[:, 1:] if part.tokens.value is not None else torch.ones_like(mask[:, 1:]).bool()
        masks[modality].append(mask.detach()[:, 1:][real])
        return mask

    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenDispatch, "_mask", watched)
        for name in method.passes():
            method.begin_pass(name, model)
            outputs[name] = forward(method, model, batch)
    assert {len(of) for of in masks.values()} == {model.views["text"].shape.depth}, "the complete pass decides nothing"
    return outputs, masks


def test_distillation_teaches_the_dynamic_pass_alone(tiny: ModuleType) -> None:
    method, model = tiny.build("dyt", SMALL)
    outputs, _ = record_passes(method, moved(model.train()), tiny.batch())
    for output in outputs.values():
        output.logits.retain_grad()
    method.losses(outputs)["distill"].backward()
    assert outputs["dynamic"].logits.grad.abs().sum() > 0
    assert outputs["complete"].logits.grad is None


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({"complete_loss": False}, {"dynamic"}),
        ({"distill": False}, {"dynamic", "complete"}),
        ({"complete_loss": False, "dispatch_encoders": "image"}, {"dynamic"}),
    ],
)
def test_terms_can_be_left_out(tiny: ModuleType, options: dict[str, Any], terms: set[str]) -> None:
    method, model = tiny.build("dyt", SMALL | options)
    rates = {"text_rate", "image_rate"} if "dispatch_encoders" not in options else {"image_rate"}
    assert loss_terms(method, model.train(), tiny.batch()).keys() == terms | rates
    assert len(method.passes()) == len(terms)


def test_the_rate_weighs_tokens_and_not_calls(tiny: ModuleType) -> None:
    """Items encoded in several calls of one pass count as in a single one; earlier steps do not count."""
    method, model = tiny.build("dyt", SMALL | {"rate": 0.5}, ("image",))
    for part, bias in zip(every(model.train()), (1e4, -1e4), strict=True):
        nn.init.constant_(part.dispatcher.bias, bias)
    for sizes in ([4], [1, 3], [5, 2]):
        method.begin_pass("dynamic", model)
        start = 1
        for size in sizes:
            states_of(model, tiny.items(("image",), range(start, start + size)))
            start += size
            nn.init.constant_(every(model)[0].dispatcher.bias, -1e4)  # only the first call's tokens pass, in layer 0
        rate = sizes[0] / sum(sizes) / 2
        assert method.losses({})["image_rate"].item() == pytest.approx(RATE_WEIGHT * (rate - 0.5) ** 2)
        nn.init.constant_(every(model)[0].dispatcher.bias, 1e4)


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_the_rate_reaches_its_target(tiny: ModuleType, rate: float) -> None:
    """By its own term alone, in 200 steps."""
    method, model = tiny.build("dyt", SMALL | {"rate": rate})
    items = tiny.items(ids=[*range(1, 13)] * 10)
    optimizer = torch.optim.Adam([p for part in every(model.train()) for p in part.dispatcher.parameters()], lr=1e-2)
    shares = []
    for _ in range(200):
        optimizer.zero_grad()
        method.begin_pass("dynamic", model)
        states_of(model, items)
        shares.append([_share_of(parts) for parts in parts_of(model).values()])
        terms = method.losses({})
        (terms["text_rate"] + terms["image_rate"]).backward()
        optimizer.step()
    assert abs(shares[0][0] - rate) > 0.1
    for share in torch.tensor(shares)[-20:].mean(0).tolist():
        assert share == pytest.approx(rate, abs=0.02)


def _share_of(parts: list[Any]) -> float:
    passed, seen = torch.stack([counts for part in parts for counts in part.decided]).sum(0).tolist()
    return passed / seen


def test_gradients_reach_dispatchers_and_adapters_of_all_layers_and_nothing_else(tiny: ModuleType) -> None:
    method, model = tiny.build("dyt", SMALL)
    total_loss(method, moved(model.train()), tiny.batch()).backward()
    branches = {name: p.grad for name, p in model.encoders.named_parameters() if ".dyt." in name}
    assert len(branches) == 2 * tiny.DEPTH * 6
    assert [name for name, gradient in branches.items() if gradient is None or not gradient.any()] == []
    assert [n for n, p in model.encoders.named_parameters() if ".dyt." not in n and p.grad is not None] == []


def test_dispatchers_learn_from_the_task_too(tiny: ModuleType) -> None:
    """Not only from the rate: all of them but those of the last layer, which leave the token that is read alone."""
    method, model = tiny.build("dyt", SMALL | {"complete_loss": False})
    loss_terms(method, moved(model.train()), tiny.batch())["dynamic"].backward()
    for parts in parts_of(model).values():
        *earlier, last = (part.dispatcher.weight.grad for part in parts)
        assert all(gradient.any() for gradient in earlier)
        assert not last.any()


def test_nothing_of_a_step_is_kept(tiny: ModuleType) -> None:
    method, model = tiny.build("dyt", SMALL)
    total_loss(method, model.train(), tiny.batch())
    for part in every(model):
        assert (part.complete, part.decided, part._chosen) == (False, None, None)


# --- encoders, counters, options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dispatched", ["text", "image"])
@torch.no_grad()
def test_the_other_encoder_has_adapters_alone(tiny: ModuleType, dispatched: Modality) -> None:
    _, model = tiny.build("dyt", SMALL | {"dispatch_encoders": dispatched})
    types = {modality: {type(part) for part in parts} for modality, parts in parts_of(model).items()}
    other: Modality = "image" if dispatched == "text" else "text"
    assert types == {dispatched: {TokenDispatch}, other: {AdapterBeside}}
    _, frozen = tiny.build("frozen")
    items = tiny.items()
    expected, found = (states_of(each.eval(), items) for each in (frozen, model))
    torch.testing.assert_close(found[other], expected[other])
    assert not torch.allclose(found[dispatched], expected[dispatched], atol=1e-2)


@torch.no_grad()
def test_the_report_is_of_the_evaluations_since_the_last_step(tiny: ModuleType) -> None:
    method, model = tiny.build("dyt", SMALL, ("text",))
    assert method.report(model) == {}
    layers = [f"text_tokens_passed_layer_{layer}" for layer in range(tiny.DEPTH)]
    for part, bias in zip(every(model), (1e4, -1e4), strict=True):
        nn.init.constant_(part.dispatcher.bias, bias)
    states_of(model.eval(), tiny.items(("text",)))
    assert method.report(model) == {"text_tokens_passed": 0.5} | dict(zip(layers, (1.0, 0.0), strict=True))
    loss_terms(method, model.train(), tiny.batch(("text",)))
    assert method.report(model) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "option 'rate'"),
        ({"rate": 1.5}, "option 'rate'"),
        ({"bottleneck": 0}, "option 'bottleneck'"),
        ({"experts": 0}, "option 'experts'"),
        ({"temperature": 0}, "option 'temperature'"),
        ({"dispatch_encoders": "audio"}, "option 'dispatch_encoders'"),
        ({"dispatch_encoders": "image"}, "dispatch_encoders = 'image', but this row has no image encoder; choose"),
    ],
)
def test_bad_options_are_refused_in_one_line(tiny: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        tiny.build("dyt", options, ("text",))
    assert str(error.value).startswith(f"method 'dyt'{',' if 'option' in message[:6] else ':'} {message}")
    assert "\n" not in str(error.value)


def test_a_row_says_that_its_flops_are_by_the_data_and_fewer(world: Any, tmp_path: Any) -> None:
    """With r < 1 an item costs less than with the frozen encoders, as counted on real items in the record."""
    frozen, dyt = (
        world.tell(world.matrix([{"name": name, "options": options}]), tmp_path / name)
        for name, options in {"frozen": {}, "dyt": {"rate": 0.1, "bottleneck": 1}}.items()
    )
    passed = {name: dyt.counters[f"{name}_tokens_passed"].value for name in ("text", "image")}
    assert 0 < min(passed.values()) <= max(passed.values()) < 0.9
    assert dyt.inference.flops_by_data
    assert not frozen.inference.flops_by_data
    assert dyt.inference.flops_per_item.valid
    assert dyt.inference.flops_per_item.value < 0.95 * frozen.inference.flops_per_item.value
    assert dyt.epochs[0].losses.keys() == {"dynamic", "complete", "distill", "text_rate", "image_rate"}

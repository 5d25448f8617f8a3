"""The supported families of encoders: where the parts of each are, and how its items are read.

One entry per model type of transformers. Paths start at the encoder or at one of its layers; where versions of
transformers differ, the first path that exists counts. An encoder of another model type is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpme.bench.errors import UserError
from tpme.bench.record import Modality, Pool

Role = Literal["query", "key", "value", "attention_output", "ffn_in", "ffn_gate", "ffn_out"]
Paths = tuple[str, ...]


@dataclass(frozen=True)
class Halves:
    """The two parts of a layer, residuals and norms included: ``feed_forward(attention(x, ...)) == layer(x, ...)``.

    attention: takes what the layer takes, hidden states (n, T, width) first. feed_forward: takes its result.
    """

    attention: Callable[..., Tensor]
    feed_forward: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerPlan:
    """Where the parts of one layer are.

    outputs: of the attention and the feed-forward sub-layer, just before the residual is added. norms: one a
    sub-layer. fused: linears that hold several projections, with the names of those.
    """

    roles: dict[Role, Paths]
    outputs: tuple[Paths, Paths]
    norms: tuple[str, str]
    halves: Callable[[nn.Module], Halves]
    fused: Mapping[str, Paths] = field(default_factory=dict)
    tuples: bool = False
    """A layer returns its hidden states as the first entry of a tuple."""


@dataclass(frozen=True)
class Family:
    """One family of encoders.

    pools: the supported poolings, the default first. A first token under causal attention and a single patch are not
        among them, because they do not represent the item.
    layers, embeddings: the list of layers, and the module whose output the first of them reads.
    norm: the final norm; ``norm_outside``: the encoder does not apply it to ``last_hidden_state`` itself.
    unread: modules and parameters that no hidden state depends on; they are dropped.
    """

    modality: Modality
    layer: LayerPlan
    layers: str
    pools: tuple[Pool, ...]
    embeddings: Paths = ("embeddings",)
    norm: str | None = None
    norm_outside: bool = False
    unread: Paths = ()
    whole: bool = False
    """Texts are padded to the last position and not masked (SigLIP was trained so)."""
    model: str | None = None
    """The class in transformers; ``None``: the one that ``AutoModel`` chooses."""
    prompts: bool = True
    """Tokens may be inserted after the embeddings (not where positions are counted from the ids)."""


# --- the two parts of a layer ---------------------------------------------------------------------------------------


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _residual(
    layer: nn.Module, norm: str, part: str, after: Paths, hidden: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """``x + after(part(norm(x)))``."""
    result = _hidden(layer.get_submodule(part)(layer.get_submodule(norm)(hidden), *args, **kwargs))
    for path in after:
        result = layer.get_submodule(path)(result)
    return hidden + result


def _pre_norm(attention: tuple[str, str, Paths], feed_forward: tuple[str, str, Paths]) -> Callable[[nn.Module], Halves]:
    """Both halves as norm, part and what follows it before the residual is added."""
    return lambda layer: Halves(partial(_residual, layer, *attention), partial(_residual, layer, *feed_forward))


def _bert_attention(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _hidden(layer.attention(hidden, *args, **kwargs))


def _bert_feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    result: Tensor = layer.output(layer.intermediate(hidden), hidden)
    return result


def _bert_halves(layer: nn.Module) -> Halves:
    return Halves(partial(_bert_attention, layer), partial(_bert_feed_forward, layer))


def _distilbert_attention(layer: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = layer.sa_layer_norm(_hidden(layer.attention(hidden, *args, **kwargs)) + hidden)
    return result


def _distilbert_feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    result: Tensor = layer.output_layer_norm(layer.ffn(hidden) + hidden)
    return result


def _distilbert_halves(layer: nn.Module) -> Halves:
    return Halves(partial(_distilbert_attention, layer), partial(_distilbert_feed_forward, layer))


# --- layers ---------------------------------------------------------------------------------------------------------


def _roles(
    attention: str, names: tuple[str, str, str, str], ffn_in: str, ffn_out: str, gate: str | None = None
) -> dict[Role, Paths]:
    """Paths of query, key, value and output below ``attention``, and of the feed-forward linears."""
    query, key, value, output = (f"{attention}.{name}" for name in names)
    roles: dict[Role, Paths] = {"query": (query,), "key": (key,), "value": (value,), "attention_output": (output,)}
    roles |= {"ffn_in": (ffn_in,), "ffn_out": (ffn_out,)}
    return roles | {"ffn_gate": (gate,)} if gate else roles


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_BERT = LayerPlan(
    roles=_roles(
        "attention", ("self.query", "self.key", "self.value", "output.dense"), "intermediate.dense", "output.dense"
    ),
    # BERT applies dropout before it adds and normalises: after it an adapter is where Houlsby et al. put it.
    outputs=(("attention.output.dropout",), ("output.dropout",)),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    halves=_bert_halves,
)
_DEBERTA = replace(
    _BERT,
    roles=_BERT.roles | {r: (f"attention.self.{r}_proj",) for r in ("query", "key", "value")},
    tuples=True,
)
_MPNET = replace(
    _BERT,
    roles=_roles("attention.attn", ("q", "k", "v", "o"), "intermediate.dense", "output.dense"),
    outputs=(("attention.dropout",), ("output.dropout",)),
    norms=("attention.LayerNorm", "output.LayerNorm"),
    tuples=True,
)
_DISTILBERT = LayerPlan(
    roles=_roles("attention", ("q_lin", "k_lin", "v_lin", "out_lin"), "ffn.lin1", "ffn.lin2"),
    outputs=(("attention.out_lin",), ("ffn",)),
    norms=("sa_layer_norm", "output_layer_norm"),
    halves=_distilbert_halves,
)
_MODERNBERT = LayerPlan(
    roles=_roles("attn", ("Wqkv.query", "Wqkv.key", "Wqkv.value", "Wo"), "mlp.Wi.up", "mlp.Wo", gate="mlp.Wi.gate"),
    outputs=(("attn.out_drop",), ("mlp.Wo",)),
    norms=("attn_norm", "mlp_norm"),
    halves=_pre_norm(("attn_norm", "attn", ()), ("mlp_norm", "mlp", ())),
    fused={"attn.Wqkv": ("query", "key", "value"), "mlp.Wi": ("gate", "up")},
)
_LLAMA = LayerPlan(
    roles=_roles("self_attn", _PROJECTIONS, "mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj"),
    outputs=(("self_attn.o_proj",), ("mlp.down_proj",)),
    norms=("input_layernorm", "post_attention_layernorm"),
    halves=_pre_norm(("input_layernorm", "self_attn", ()), ("post_attention_layernorm", "mlp", ())),
)
_CLIP = LayerPlan(
    roles=_roles("self_attn", (*_PROJECTIONS[:3], "out_proj"), "mlp.fc1", "mlp.fc2"),
    outputs=(("self_attn.out_proj",), ("mlp.fc2",)),
    norms=("layer_norm1", "layer_norm2"),
    halves=_pre_norm(("layer_norm1", "self_attn", ()), ("layer_norm2", "mlp", ())),
)
_VIT = LayerPlan(
    roles=_roles("attention", _PROJECTIONS, "mlp.fc1", "mlp.fc2"),
    outputs=(("attention.o_proj",), ("mlp.fc2",)),
    norms=("layernorm_before", "layernorm_after"),
    halves=_pre_norm(("layernorm_before", "attention", ("dropout",)), ("layernorm_after", "mlp", ("dropout",))),
)
# Until transformers 5.17 DINOv2 had the names of ViT in transformers 4; gated in its largest size, there as one linear.
_DINO = LayerPlan(
    roles={
        "query": ("attention.q_proj", "attention.attention.query"),
        "key": ("attention.k_proj", "attention.attention.key"),
        "value": ("attention.v_proj", "attention.attention.value"),
        "attention_output": ("attention.o_proj", "attention.output.dense"),
        "ffn_in": ("mlp.fc1", "mlp.up_proj", "mlp.weights_in.up"),
        "ffn_gate": ("mlp.gate_proj", "mlp.weights_in.gate"),
        "ffn_out": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out"),
    },
    outputs=(("layer_scale1",), ("layer_scale2",)),
    norms=("norm1", "norm2"),
    halves=_pre_norm(
        ("norm1", "attention", ("layer_scale1", "drop_path")), ("norm2", "mlp", ("layer_scale2", "drop_path"))
    ),
    fused={"mlp.weights_in": ("gate", "up")},
)

# --- encoders -------------------------------------------------------------------------------------------------------

_FIRST: tuple[Pool, ...] = ("first", "mean", "last")
_BERT_LIKE = Family("text", _BERT, "encoder.layer", _FIRST, unread=("pooler",))
_VIT_LIKE = Family("image", _VIT, "layers", ("first", "mean"), norm="layernorm", unread=("pooler",))
_CLIP_TEXT = Family("text", _CLIP, "encoder.layers", ("last", "mean"), norm="final_layer_norm", model="CLIPTextModel")
_CLIP_IMAGE = replace(_VIT_LIKE, layer=_CLIP, layers="encoder.layers", norm="post_layernorm")

FAMILIES: dict[str, Family] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE,
    "xlm-roberta": _BERT_LIKE,
    "electra": replace(_BERT_LIKE, embeddings=("embeddings_project", "embeddings")),
    "deberta-v2": replace(_BERT_LIKE, layer=_DEBERTA),
    "mpnet": replace(_BERT_LIKE, layer=_MPNET, pools=("mean", "first", "last")),
    "distilbert": replace(_BERT_LIKE, layer=_DISTILBERT, layers="transformer.layer"),
    "modernbert": Family("text", _MODERNBERT, "layers", _FIRST, norm="final_norm", prompts=False),
    "llama": Family("text", _LLAMA, "layers", ("mean", "last"), ("embed_tokens",), norm="norm"),
    "clip_text_model": _CLIP_TEXT,
    "siglip_text_model": replace(_CLIP_TEXT, unread=("head",), whole=True, model="SiglipTextModel"),
    "vit": _VIT_LIKE,
    "deit": replace(_VIT_LIKE, unread=("pooler", "embeddings.mask_token")),
    "dinov2": replace(_VIT_LIKE, layer=_DINO, layers="encoder.layer", unread=("embeddings.mask_token",)),
    "dinov3_vit": replace(_VIT_LIKE, layer=_DINO, layers="model.layer", norm="norm", unread=("embeddings.mask_token",)),
    "clip_vision_model": replace(
        _CLIP_IMAGE, embeddings=("pre_layrnorm",), norm_outside=True, unread=(), model="CLIPVisionModel"
    ),
    "siglip_vision_model": replace(_CLIP_IMAGE, pools=("mean",), unread=("head",), model="SiglipVisionModel"),
}

TOWERS: dict[str, dict[Modality, str]] = {
    name: {"text": "text_config", "image": "vision_config"} for name in ("clip", "siglip")
}
"""Checkpoints with two towers, by model type: where each tower's configuration is. One tower is loaded alone."""


def family_of(model_type: str | None) -> Family:
    """The family of a model type. Raises UserError, without naming the encoder, for one that is not supported."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted({*FAMILIES, *TOWERS}))
        raise UserError(f"encoders of model type '{model_type}' are not supported; choose one of {known}")
    return FAMILIES[model_type]


# --- preparing an encoder --------------------------------------------------------------------------------------------


class SplitLinear(nn.Module):
    """A linear layer that holds several projections, as one linear layer each: (..., D) -> (..., sum of widths)."""

    def __init__(self, fused: nn.Linear, names: Paths) -> None:
        super().__init__()
        weights, width = fused.weight.chunk(len(names)), fused.out_features // len(names)
        biases = fused.bias.chunk(len(names)) if fused.bias is not None else [None] * len(names)
        for name, weight, bias in zip(names, weights, biases, strict=True):
            part = nn.Linear(fused.in_features, width, bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.detach().clone(), requires_grad=fused.weight.requires_grad)
            if bias is not None:
                part.bias = nn.Parameter(bias.detach().clone(), requires_grad=fused.weight.requires_grad)
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """The projections side by side, in the order of the fused layer."""
        return torch.cat([part(x) for part in self.children()], dim=-1)


def drop_unread(module: nn.Module, family: Family) -> None:
    """Drop what no hidden state depends on: it would be counted and stored, and no gradient would reach it."""
    for path in family.unread:
        parent, _, name = path.rpartition(".")
        owner: Any = module.get_submodule(parent)
        if getattr(owner, name, None) is not None:
            setattr(owner, name, nn.Identity() if name == "head" else None)  # a head is called in any case


def split_fused(module: nn.Module, family: Family) -> None:
    """Split the fused projections of every layer, so that each role is a linear layer of its own."""
    for layer in module.get_submodule(family.layers).children():
        for path, names in family.layer.fused.items():
            parent, _, name = path.rpartition(".")
            owner: Any = layer.get_submodule(parent)
            fused = getattr(owner, name, None)  # not in every size and version
            streamed = hasattr(fused, "_hf_hook")  # its weights are on disk while it does not run
            if isinstance(fused, nn.Linear) and not streamed:
                setattr(owner, name, SplitLinear(fused, names))

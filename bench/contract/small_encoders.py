"""Small encoders of every supported family, built from a configuration: what the contract suite runs methods on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from tpme.bench.record import Modality

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY, POSITIONS, SIDE, PATCH = 50, 64, 32, 16
"""Token ids are 0 to 49; a text has at most 62 tokens (RoBERTa's positions begin at 2); an image has 4 patches."""


class _Family(NamedTuple):
    """Model type of transformers, modality, and what differs from the settings that all share."""

    model_type: str
    modality: Modality
    settings: dict[str, Any] = {}


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_FAMILIES: dict[str, _Family] = {
    "bert": _Family("bert", "text"),
    "roberta": _Family("roberta", "text"),
    "distilbert": _Family("distilbert", "text"),
    "modernbert": _Family("modernbert", "text", {"local_attention": 4, "global_attn_every_n_layers": 2}),
    "mpnet": _Family("mpnet", "text"),
    "llama": _Family("llama", "text", {"num_key_value_heads": 1}),
    "clip-text": _Family("clip_text_model", "text", {"eos_token_id": VOCABULARY - 1}),
    "siglip-text": _Family("siglip_text_model", "text"),
    "vit": _Family("vit", "image"),
    "deit": _Family("deit", "image"),
    "dinov2": _Family("dinov2", "image", {"mlp_ratio": 2, "layerscale_value": 0.5}),
    "clip-image": _Family("clip_vision_model", "image"),
    "siglip-image": _Family("siglip_vision_model", "image"),
}
_DROPOUT_NAMES: dict[str, tuple[str, ...]] = {
    "distilbert": ("dropout", "attention_dropout"),
    "modernbert": ("embedding_dropout", "attention_dropout", "mlp_dropout"),
    **dict.fromkeys(("llama", "clip-text", "siglip-text", "clip-image", "siglip-image"), ("attention_dropout",)),
}
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def modality_of(family: str) -> Modality:
    """The item input that encoders of ``family`` read."""
    return _FAMILIES[family].modality


def small_config(family: str, *, dropout: float = 0.0, width: int = 16, depth: int = 2) -> Any:
    """A configuration of ``family``: ``width`` wide, ``depth`` layers, two heads, feed-forward width 2 x ``width``."""
    from transformers import AutoConfig

    model_type, modality, own = _FAMILIES[family]
    settings: dict[str, Any] = {
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "hidden_size": width,
        "initializer_range": 0.2,  # with the usual 0.02, an encoder this small hardly distinguishes items
        **dict.fromkeys(_DROPOUT_NAMES.get(family, _DROPOUT), dropout),
    }
    if family == "distilbert":
        settings |= {"dim": width, "hidden_dim": 2 * width, "n_layers": depth, "n_heads": 2}
    elif family != "dinov2":  # its feed-forward width is a ratio
        settings["intermediate_size"] = 2 * width
    if modality == "text":
        settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, **_SPECIAL}
    else:
        settings |= {"image_size": SIDE, "patch_size": PATCH}
    return AutoConfig.for_model(model_type, **(settings | own))


def small_encoder(
    family: str, *, dropout: float = 0.0, seed: int = 7, width: int = 16, depth: int = 2
) -> PreTrainedModel:
    """A seeded encoder of ``family`` in eval mode, as transformers builds it.

    Every parameter is moved off its initial value, so biases are not zero and norms not one, as after pretraining.

    Args:
        family: one of ``FAMILIES``. dropout: of its layers, where the family has any. width, depth: of its layers.
    """
    from transformers import AutoModel, SiglipTextModel

    config = small_config(family, dropout=dropout, width=width, depth=depth)
    build = SiglipTextModel if family == "siglip-text" else AutoModel.from_config  # AutoModel does not know it
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module: PreTrainedModel = build(config)
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()

"""Masks of every registered attention function, causal ones and a method's own included, without a value being read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from tpme.bench.contract.small_encoders import FAMILIES, modality_of, small_encoder
from tpme.bench.task.items import Reads
from tpme.bench.task.masks import unread_masks
from tpme.bench.task.view import EncoderView

TEXTS = [family for family in FAMILIES if modality_of(family) == "text"]
NO_REGISTRY = ("mpnet",)
"""Families that compute their attention themselves."""


class Detector(TorchDispatchMode):
    """Whether the value of a tensor is read."""

    detected = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.detected |= func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def with_prefix(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """Two further keys, of zeros, before all others: what a prefix method does."""
    prefix = torch.zeros_like(key[:, :, :1]).expand(-1, -1, 2, -1)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (2, 0), value=True)
    return sdpa_attention_forward(
        module, query, torch.cat([prefix, key], 2), torch.cat([prefix, value], 2), mask, **options
    )


@pytest.fixture
def prefix_attention() -> Iterator[str]:
    AttentionInterface.register("tpme-test-prefix", with_prefix)
    AttentionMaskInterface.register("tpme-test-prefix", sdpa_mask)
    yield "tpme-test-prefix"
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping["tpme-test-prefix"]


def inputs(lengths: list[int], device: str = "cpu") -> dict[str, Tensor]:
    tokens = torch.randint(3, 50, (len(lengths), 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).long()
    return {"tokens": tokens.to(device), "token_mask": mask.to(device)}


def expected(view: EncoderView, given: dict[str, Tensor]) -> Tensor:
    """What transformers gives with its own masks, of every token."""
    output = view.module(input_ids=given["tokens"], attention_mask=given["token_mask"])
    states: Tensor = output.last_hidden_state
    return states


@pytest.mark.parametrize("lengths", [[12, 5, 1], [12, 12, 12]])
@pytest.mark.parametrize("family", [family for family in TEXTS if family != "siglip-text"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_masks_are_what_they_were_without_being_read(attention: str, family: str, lengths: list[int]) -> None:
    """Also causal ones (Llama, CLIP), windows (ModernBERT), and where nothing is masked."""
    view = EncoderView(small_encoder(family), "text")
    if family not in NO_REGISTRY:
        view.module.set_attn_implementation(attention)
    given = inputs(lengths)
    states = expected(view, given)
    with Detector() as detector:
        every = view.encode(Reads(final=True, tokens="all"), **given)
    assert not detector.detected
    torch.testing.assert_close(every.states[:, 0][every.mask], states[every.mask], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", [family for family in TEXTS if family not in NO_REGISTRY])
@torch.no_grad()
def test_an_attention_that_a_method_registers_has_masks_too(family: str, prefix_attention: str) -> None:
    """It runs on ``meta``, where transformers would fail to read the mask, and its mask is not read on the host."""
    view = EncoderView(small_encoder(family), "text")
    reads, given = Reads(final=True, pool=view.shape.pool), inputs([12, 5, 1])
    without = view.encode(reads, **given)
    view.module.set_attn_implementation(prefix_attention)
    with Detector() as detector:
        states = view.encode(reads, **given)
    assert not detector.detected
    assert not torch.allclose(states, without, atol=1e-4)
    alone = view.encode(reads, tokens=given["tokens"][1:2, :5], token_mask=given["token_mask"][1:2, :5])
    torch.testing.assert_close(alone, states[1:2], atol=1e-5, rtol=1e-5)  # padding is masked
    view.module.to("meta")
    assert view.encode(reads, **inputs([12, 5, 1], "meta")).shape == states.shape


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_family_runs_on_meta(attention: str, family: str) -> None:
    view = EncoderView(small_encoder(family).to("meta"), modality_of(family))
    if family not in NO_REGISTRY:
        view.module.set_attn_implementation(attention)
    given = inputs([12, 5, 1], "meta")
    if modality_of(family) == "image":
        given = {"image": torch.empty(3, 3, 32, 32, dtype=torch.uint8, device="meta")}
    assert view.encode(Reads((0, 1), final=True, pool=view.shape.pool), **given).shape == (3, 3, 16)


def test_the_mask_of_flash_attention_is_passed_on_without_being_read() -> None:
    """Its own function looks whether anything is masked."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    with unread_masks(), Detector() as detector:
        given = FUNCTIONS["flash_attention_2"](mask_function=None, attention_mask=mask, **sizes)
    assert torch.equal(given, mask)
    assert not detector.detected


@pytest.mark.slow  # it compiles
@torch.no_grad()
def test_the_mask_of_flex_attention_is_built_without_being_read() -> None:
    view, given = EncoderView(small_encoder("bert"), "text"), inputs([12, 5, 1])
    states = view.encode(Reads(final=True), **given)
    sizes = {"batch_size": 3, "q_length": 12, "kv_length": 12, "device": "cpu"}
    with unread_masks(), Detector() as detector:
        FUNCTIONS["flex_attention"](
            mask_function=bidirectional_mask_function, attention_mask=given["token_mask"].bool(), **sizes
        )
    assert not detector.detected
    view.module.set_attn_implementation("flex_attention")
    torch.testing.assert_close(view.encode(Reads(final=True), **given), states, atol=1e-5, rtol=1e-4)


def test_what_is_registered_meanwhile_is_overlaid_and_everything_is_put_back(prefix_attention: str) -> None:
    before = dict(FUNCTIONS)
    outer = ExitStack()
    outer.enter_context(unread_masks())
    AttentionMaskInterface.register("tpme-test-later", sdpa_mask)
    try:
        with unread_masks():
            assert FUNCTIONS["tpme-test-later"] is not sdpa_mask
            assert FUNCTIONS[prefix_attention] is not sdpa_mask
        outer.close()
        assert FUNCTIONS["tpme-test-later"] is sdpa_mask
    finally:
        del AttentionMaskInterface._global_mapping["tpme-test-later"]
    assert dict(FUNCTIONS) == before

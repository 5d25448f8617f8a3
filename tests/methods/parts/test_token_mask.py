from __future__ import annotations

import copy
from types import ModuleType

import torch

from tpme.bench.task.items import Reads
from tpme.methods.parts.token_mask import TokenMask

READS = Reads(final=True)


def test_the_mask_is_that_of_the_running_pass(tiny: ModuleType) -> None:
    view = tiny.views(("text",))["text"]
    mask = TokenMask.of(view)
    assert mask.value is None
    seen = []
    view.layers[0].register_forward_pre_hook(lambda *_: seen.append(mask.value))
    for ids in ([1, 2, 3], [4, 5]):
        items = tiny.items(("text",), ids)
        view.encode(READS, tokens=items.tokens, token_mask=items.token_mask)
        assert seen[-1].dtype == torch.bool
        assert torch.equal(seen[-1], items.token_mask.bool())
    assert not seen[0].all()


def test_images_have_no_mask(tiny: ModuleType) -> None:
    view = tiny.views(("image",))["image"]
    mask = TokenMask.of(view)
    view.encode(READS, image=tiny.items(("image",)).image)
    assert mask.value is None


def test_there_is_one_for_an_encoder_and_a_copy_has_its_own(tiny: ModuleType) -> None:
    view = tiny.views(("text",))["text"]
    mask = TokenMask.of(view)
    assert TokenMask.of(view) is mask
    items = tiny.items(("text",))
    inputs = {"tokens": items.tokens, "token_mask": items.token_mask}
    view.encode(READS, **inputs)
    before = mask.value
    other = copy.deepcopy(view)
    TokenMask.of(other).value = None
    other.encode(READS, **inputs)
    assert mask.value is before
    assert torch.equal(TokenMask.of(other).value, before)

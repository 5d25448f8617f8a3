"""Attention masks of text encoders, made where they are used without asking what is in them.

transformers asks of every batch whether it masks anything at all, to leave the mask out where it does not. The answer
is a value on the device, so the host would wait for it at the start of every forward pass. Batches of real titles are
never of one length: the mask is made without asking, which changes no result. On ``meta`` nothing could be asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

_lock, _users = threading.Lock(), 0


@contextmanager
def unread_masks() -> Iterator[None]:
    """Under it, every encoder that lets transformers make its mask of (n, T) gets one, and no value of it is read."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS
    from transformers.masking_utils import bidirectional_mask_function

    global _users
    with _lock:
        if not _users:  # Items of this mapping lie over what is registered, until they are deleted.
            FUNCTIONS["sdpa"] = partial(_expanded, bidirectional_mask_function, FUNCTIONS["sdpa"])
            FUNCTIONS["eager"] = partial(_made, FUNCTIONS["eager"])
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:  # the last one out, for there is one mapping for all threads
                del FUNCTIONS["sdpa"], FUNCTIONS["eager"]


def _expanded(
    plain: object, make: Callable[..., Any], *, mask_function: object, attention_mask: Tensor | None, **how: Any
) -> Any:
    """Where only padding is masked, a view (n, 1, Q, T) of the mask (n, T); else (windows) as transformers does."""
    if attention_mask is not None and mask_function is plain:
        return attention_mask[:, None, None, :].expand(-1, 1, how["q_length"], -1)
    return _made(make, mask_function=mask_function, attention_mask=attention_mask, **how)


def _made(make: Callable[..., Any], *, attention_mask: Tensor | None, **how: Any) -> Any:
    # Without a mask there is nothing to read, and leaving it out (images) is what fast attention needs.
    if attention_mask is not None:
        how["allow_is_bidirectional_skip"] = False
    return make(attention_mask=attention_mask, **how)

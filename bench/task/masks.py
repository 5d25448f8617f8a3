"""Attention masks of text encoders, built without reading their values on the host.

For every batch, transformers checks whether the mask masks anything, to skip it otherwise. That value is on the device,
so the host would wait for it at the start of every forward pass. Titles in a batch differ in length, so the check is
skipped, which changes no result. On ``meta`` there are no values to check.
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
    """Within this context, transformers builds masks from (n, T) without reading any of their values."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS
    from transformers.masking_utils import bidirectional_mask_function

    global _users
    with _lock:
        if not _users:  # Items of this mapping override the registered ones until they are deleted.
            FUNCTIONS["sdpa"] = partial(_expanded_mask, bidirectional_mask_function, FUNCTIONS["sdpa"])
            FUNCTIONS["eager"] = partial(_unskipped_mask, FUNCTIONS["eager"])
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:  # all threads share one mapping
                del FUNCTIONS["sdpa"], FUNCTIONS["eager"]


def _expanded_mask(
    plain: object, make: Callable[..., Any], *, mask_function: object, attention_mask: Tensor | None, **options: Any
) -> Any:
    """A view (n, 1, Q, T) of the mask (n, T) if only padding is masked; else (windows) the mask of transformers."""
    if attention_mask is not None and mask_function is plain:
        return attention_mask[:, None, None, :].expand(-1, 1, options["q_length"], -1)
    return _unskipped_mask(make, mask_function=mask_function, attention_mask=attention_mask, **options)


def _unskipped_mask(make: Callable[..., Any], *, attention_mask: Tensor | None, **options: Any) -> Any:
    # Without a mask (images) there is nothing to read, and the fast attention kernels need none.
    if attention_mask is not None:
        options["allow_is_bidirectional_skip"] = False
    return make(attention_mask=attention_mask, **options)

"""Attention masks of encoders, built without reading their values on the host.

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
_overlaid: set[str] = set()


@contextmanager
def unread_masks() -> Iterator[None]:
    """Within this context, transformers builds masks from (n, T) without reading any of their values.

    That holds for every attention function that has a mask function, also for one that a method registered.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as FUNCTIONS

    global _users
    with _lock:
        # Items of this mapping override the registered functions until they are deleted.
        for name in set(FUNCTIONS) - _overlaid:
            FUNCTIONS[name] = partial(_unread, FUNCTIONS[name])
            _overlaid.add(name)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:  # all threads share one mapping
                for name in _overlaid:
                    del FUNCTIONS[name]
                _overlaid.clear()


def _unread(
    make: Callable[..., Any], *, mask_function: Callable[..., Any], attention_mask: Tensor | None, **options: Any
) -> Any:
    """The mask that ``make`` builds, without its checks of what is masked."""
    from transformers import masking_utils as library

    # Without a mask (images) there is nothing to read, and the fast attention kernels need none.
    if attention_mask is None:
        return make(mask_function=mask_function, attention_mask=None, **options)
    if make is library.sdpa_mask and mask_function is library.bidirectional_mask_function:
        # Only padding is masked: a view (n, 1, Q, T) of the mask (n, T).
        return attention_mask[:, None, None, :].expand(-1, 1, options["q_length"], -1)
    if make is library.flash_attention_mask:
        return attention_mask[:, -options["kv_length"] :]
    if make is library.flex_attention_mask:
        padding = library.padding_mask_function(attention_mask)
        return make(mask_function=library.and_masks(mask_function, padding), attention_mask=None, **options)
    read = [name for name in options if name.startswith("allow_is_")]  # reading the mask, to skip building it
    return make(mask_function=mask_function, attention_mask=attention_mask, **options | dict.fromkeys(read, False))

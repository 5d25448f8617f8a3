"""``compile = true``: torch.compile for the parts of a model that all methods share."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from tpme.bench.errors import UserError
from tpme.bench.task.recommender import Recommender

COMPILERS = ("c++", "g++", "clang++")


def compile_model(model: Recommender) -> bool:
    """Compile, in place, every encoder layer, the item encoder and the sequential encoder of an adapted model.

    Encoders are compiled layer by layer: the hooks that read hidden states sit on whole layers and stay outside.
    Shapes are dynamic, because the numbers of items and positions change with every batch, so no CUDA graph is
    recorded. Random numbers are drawn as without compilation: dropout stays the same.

    Returns whether there is anything to compile: a model without trainable parameters is left as it is.
    Raises UserError where there is no C++ compiler.
    """
    if not model.parameter_groups():
        return False
    if sys.platform != "win32" and not any(map(shutil.which, COMPILERS)):
        raise UserError(f"compile = true needs a C++ compiler ({', '.join(COMPILERS)}); install one or turn it off")
    import torch._inductor.config as inductor

    inductor.fallback_random = True
    layers = [layer for view in model.views.values() for layer in view.layers]
    for part in (*layers, model.item_encoder, model.sequence):
        # forward, not the module: hooks that are set and removed with each call must not be compiled in.
        part.forward = CompiledForward(part.forward)
    return True


class CompiledForward:
    """A compiled ``forward``. A deep copy of its module runs its own, uncompiled."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.compiled = torch.compile(plain, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the compiled function."""
        return self.compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """The copied module's own ``forward``: what torch compiled is bound to the module of the original."""
        return copy.deepcopy(self.plain, memo)

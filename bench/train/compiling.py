"""``compile = true``: torch.compile for the parts of a model that all methods share."""

from __future__ import annotations

import shutil
import sys

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
        part.forward = torch.compile(part.forward, dynamic=True)
    return True

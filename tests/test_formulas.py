"""FLOPs of operators: those that torch has no formula for, and everything that peft's tuners use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.boft import layer as boft

from tpme.bench.counting.modes import Tracker

B, N, K = 3, 8, 5


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


CLOSED: dict[str, tuple[Callable[[], Any], float]] = {
    "inverse": (lambda: torch.linalg.inv(empty(B, N, N)), 2 * B * N**3),
    "solution": (lambda: torch.linalg.solve(empty(B, N, N), empty(B, N, K)), B * (2 / 3 * N**3 + 2 * N * N * K)),
    "factors": (lambda: torch.linalg.lu_factor(empty(N, N)), 2 / 3 * N**3),
    "triangular": (
        lambda: torch.linalg.solve_triangular(empty(N, N), empty(N, K), upper=True),
        N * N * K,
    ),
    "Cholesky": (lambda: torch.linalg.cholesky(empty(N, N)), N**3 / 3),
    "matrix times vector": (lambda: torch.mv(empty(N, K), empty(K)), 2 * N * K),
    "bias and matrix times vector": (lambda: torch.addmv(empty(N), empty(N, K), empty(K)), 2 * N * K),
    "inner product": (lambda: torch.dot(empty(N), empty(N)), 2 * N),
    "Fourier": (lambda: torch.fft.fft2(empty(B, N, N, dtype=torch.complex64)), 5 * B * N * N * math.log2(N * N)),
    "from real": (lambda: torch.fft.rfft(empty(B, N)), 2.5 * B * N * math.log2(N)),
    "to real": (lambda: torch.fft.irfft(empty(B, N // 2 + 1, dtype=torch.complex64)), 2.5 * B * N * math.log2(N)),
    "norm": (lambda: torch.linalg.vector_norm(empty(N, N), dim=1), 0),
    "masked in place": (lambda: empty(N).masked_fill_(empty(N, dtype=torch.bool), 0.0), 0),
    "repeated": (lambda: empty(N).repeat(3), 0),
}


@pytest.mark.parametrize("name", CLOSED)
def test_operators_cost_what_their_formulas_say(name: str) -> None:
    call, expected = CLOSED[name]
    with Tracker() as tracker:
        call()
    assert tracker.uncounted == set()
    assert tracker.flops == round(expected)


LINEAR = ["query", "value", "intermediate.dense"]
TUNERS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4},
    "DORA": {"r": 4, "use_dora": True},
    "RSLORA": {"r": 4, "use_rslora": True},
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 10},
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 10},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["intermediate.dense"]},
    "LN_TUNING": {"target_modules": ["LayerNorm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"r": 0, "oft_block_size": 4},
    "RANDLORA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["word_embeddings"]},
    "VERA": {"r": 4, "target_modules": ["query", "value"]},
    # Of later versions of peft.
    "DELORA": {"r": 4},
    "GRALORA": {},
    "HIRA": {},
    "OSF": {},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "TINYLORA": {},
    "UNILORA": {},
}
VARIANTS = {"DORA": "LORA", "RSLORA": "LORA"}


@pytest.mark.parametrize("name", TUNERS)
def test_nothing_that_a_tuner_of_peft_computes_is_uncounted(
    tiny: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrapped around real weights and counted on meta, as a trained structure is."""
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: None)  # compiles a kernel, which runs nowhere but on a GPU
    kind = getattr(PeftType, VARIANTS.get(name, name), None)
    if kind is None:
        pytest.skip("not in this version of peft")
    encoder = tiny.encoder("text").requires_grad_(False)
    plain, _ = cost(copy.deepcopy(encoder).to("meta"))
    settings = PEFT_TYPE_TO_CONFIG_MAPPING[kind](**({"target_modules": LINEAR} | TUNERS[name]))
    adapted = get_peft_model(encoder, settings).to("meta").train()
    forward, tracker = cost(adapted)
    assert tracker.uncounted == set()
    assert forward >= plain
    assert tracker.flops > forward, "it trains"


def cost(module: Any) -> tuple[int, Tracker]:
    """FLOPs of a forward pass, and what its backward pass has added to."""
    tokens = torch.zeros(3, 6, dtype=torch.int64, device="meta")
    with Tracker() as tracker:
        loss = module(input_ids=tokens).last_hidden_state.square().mean()
        forward = tracker.flops
        if loss.requires_grad:
            torch.autograd.backward(loss, inputs=[p for p in module.parameters() if p.requires_grad])
    return forward, tracker

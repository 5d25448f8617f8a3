"""Which layers of an encoder carry prompts: scores of its hidden states, and their number by the prompts' Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.attention
from torch import Tensor

from tpme.bench.task.items import Reads, TokenStates
from tpme.bench.task.view import EncoderView

EPSILON = 1e-5
LANCZOS_STEPS = 50


def layer_score(states: Tensor) -> float:
    """``sum_i ln(lam_i + 1e-5) + 1 / (lam_i + 1e-5)`` over the eigenvalues of the cosine similarities of B inputs.

    About B where the inputs are orthogonal, and very large where they are alike.

    Args:
        states: (B, ...), one of each input.
    """
    rows = torch.nn.functional.normalize(states.flatten(1).double(), dim=1)
    shifted = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0.0) + EPSILON
    return float((shifted.log() + 1 / shifted).sum())


def layer_scores(view: EncoderView, **inputs: Tensor | None) -> list[float]:
    """``layer_score`` after every layer of an encoder without prompts; that of the last layer is 0, as published.

    Args:
        inputs: of ``EncoderView.encode``, of B items. States of padding tokens count as 0.
    """
    levels = tuple(range(1, view.shape.depth))
    if not levels:
        return [0.0]
    with torch.no_grad():
        read = view.encode(Reads(levels=levels, tokens="all"), **inputs)
    assert isinstance(read, TokenStates)
    states = read.states * read.mask[:, None, :, None]
    return [layer_score(states[:, level]) for level in range(len(levels))] + [0.0]


def best_layers(scores: Sequence[float], ratio: float) -> list[int]:
    """The ``kept(ratio)`` layers with the highest scores, in ascending order; of equal ones the lower."""
    ranked = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
    return sorted(ranked[: kept(ratio, len(scores))])


def kept(ratio: float, depth: int) -> int:
    """Number of layers that carry prompts: ``ratio L``, rounded, at least 1."""
    return max(1, round(ratio * depth))


# --- the spectrum of the Hessian --------------------------------------------------------------------------------------


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """The map ``v -> H v``, v flat (n,) in float64, H the Hessian of ``loss`` with respect to ``parameters``."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(flat @ vector.to(flat.dtype), parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in found]).double()

    return product


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int = LANCZOS_STEPS) -> tuple[Tensor, Tensor]:
    """Nodes and weights (k,) of the spectral density of a symmetric matrix, as seen from ``start``; weights sum to 1.

    Lanczos' iteration with full re-orthogonalisation, k = min(steps, n) or fewer where the Krylov space ends. The nodes
    are the eigenvalues of its tridiagonal matrix, the weights the squared first entries of its eigenvectors (Golub and
    Meurant, 2010).

    Args:
        product: the matrix-vector product. start: (n,) float64, such as random signs.
    """
    basis = [start / start.norm()]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(min(steps, len(start))):
        vector = product(basis[-1])
        alphas.append(vector @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):
            vector = vector - known.T @ (known @ vector)
        beta = vector.norm()
        if float(beta) < 1e-10 * max(1.0, float(alphas[0].abs())):
            break
        betas.append(beta)
        basis.append(vector / beta)
    matrix = torch.diag(torch.stack(alphas))
    if len(alphas) > 1:
        off = torch.stack(betas[: len(alphas) - 1])
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes.cpu(), vectors[0].square().cpu()


def mass_above(nodes: Tensor, weights: Tensor, bound: float) -> float:
    """Share of the spectral density above ``bound``: nodes smoothed by a Gaussian, sigma^2 = 1e-5 max(1, range)."""
    sigma = math.sqrt(EPSILON * max(1.0, float(nodes.max() - nodes.min())))
    return float((weights * torch.special.ndtr((nodes - bound) / sigma)).sum() / weights.sum())


def plateau(ratio: Callable[[float], float], step: float = 0.1) -> float:
    """Value of a falling ``ratio(t)`` where it first stays level: three changes below 0.005 in a row, from t = 0 on.

    Where it falls below half of ``ratio(0)`` before, the scan begins anew with half the step. So the result lies
    between half of ``ratio(0)`` and ``ratio(0)``, whatever the spectrum is.
    """
    first = ratio(0.0)
    while True:
        value, level, bound = first, 0, 0.0
        while level < 3 and value >= first / 2:
            bound += step
            before, value = value, ratio(bound)
            level = level + 1 if abs(value - before) < 0.005 else 0
        if value >= first / 2:
            return value
        step /= 2


def hessian_ratios(loss: Callable[[], Tensor], groups: Sequence[Sequence[Tensor]]) -> list[float]:
    """The ``plateau`` of the Hessian's spectral density for each group of parameters.

    Second derivatives need attention that is written out, and layers that are not compiled. The density is that of one
    vector of random signs, of the generator of torch.

    Args:
        loss: computes a scalar with its graph.
    """
    found = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        for group in groups:
            product = hessian_product(loss(), group)
            signs = 2.0 * torch.randint(0, 2, (sum(value.numel() for value in group),)) - 1
            nodes, weights = lanczos(product, signs.double().to(group[0].device))
            found.append(plateau(partial(mass_above, nodes, weights)))
    return found

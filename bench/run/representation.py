"""The representation space of a trained model, beside that of the unadapted encoders on the same items.

Fine-tuning may lower the rank of the hidden states ("representation space collapse", Kim et al., EMNLP Findings 2024),
rotate their space, or neither. Ranks show the first; the overlap of the leading subspaces and CKA, which no rotation
changes, show the second. Which rank these authors used is not known, so there are three.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpme.bench.errors import one_line
from tpme.bench.record import EncoderSpec, Modality, Pool, Representation, SpaceFacts, Spectrum
from tpme.bench.run.inputs import item_store
from tpme.bench.run.job import Job
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.evaluate import ITEMS_PER_CHUNK
from tpme.bench.task.features import weight_budget
from tpme.bench.task.items import Items, Reads, TokenStates
from tpme.bench.task.pooling import pool_tokens
from tpme.bench.task.precomputed import StatesFile
from tpme.bench.task.view import EncoderView
from tpme.bench.train.build import encoder_specs
from tpme.bench.train.loop import Trainer

SUBSPACES = (8, 32, 128)
"""Dimensions k of the leading subspaces that are compared, where both spaces have more than k."""
ITEM_VECTORS = "items"


@torch.no_grad()
def measure_representation(job: Job, trainer: Trainer, probe_items: int) -> Representation:
    """Measure every encoder that the method uses, and the item vectors, in eval mode and full precision.

    The items are spread evenly over the catalogue, so they are the same for every method. An encoder that stays frozen
    is its own unadapted encoder and is run once. A space that cannot be measured is missing with its reason.
    """
    catalogue = trainer.dataset.manifest.items
    ids = np.linspace(1, catalogue, min(probe_items, catalogue)).round().astype(np.int64)
    spaces: dict[str, SpaceFacts] = {}
    reasons: dict[str, str] = {}
    read: list[Tensor] = []
    trainer.model.eval()
    with trainer.phases.phase("probe"):
        for modality, spec in encoder_specs(job.cell, trainer.method).items():
            trainer.progress(f"probe {modality}", 0.0)
            try:
                before, after = _both(job, trainer, modality, spec, ids)
                read.append(_unit(next(iter(before.values()))))
                spaces |= {name: compare(after[name], before[name]) for name in before}
            except Exception as error:
                reasons[modality] = one_line(error)
        trainer.progress("probe items", 0.0)
        try:
            vectors = torch.cat([trainer.encode(items) for items in _chunks(trainer.store, ids, trainer.device)])
            spaces[ITEM_VECTORS] = describe(vectors.double(), torch.cat(read, dim=1) if read else None)
        except Exception as error:
            reasons[ITEM_VECTORS] = one_line(error)
    return Representation(probe_items=probe_items, items=len(ids), spaces=spaces, reasons=reasons)


# --- states -----------------------------------------------------------------------------------------------------------


def _both(
    job: Job, trainer: Trainer, modality: Modality, spec: EncoderSpec, ids: NDArray[np.int64]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Final states (n, D) of items ``ids`` (n,), by space: those of the unadapted encoder, and as trained."""
    device = trainer.device
    if spec.precomputed:
        table = StatesFile.open(spec).read(Reads(final=True), trainer.dataset.item_names)
        states = {str(modality): table.take(ids)[:, 0].to(device, torch.float64)}
        return states, states
    fresh = load_encoder(spec, modality, device=device, seed=job.cell.seed, max_host_bytes=weight_budget(device)).view
    store = item_store(job, trainer.dataset, {modality: spec}, {})
    before = _final_states(fresh, store, ids, device)
    if modality in trainer.model.frozen or modality not in trainer.model.views:
        return before, before
    return before, _final_states(trainer.model.views[modality], store, ids, device)


def _final_states(
    view: EncoderView, store: ItemStore, ids: NDArray[np.int64], device: torch.device
) -> dict[str, Tensor]:
    """Final states (n, D) in float64: as the encoder is read, and, if that differs, at the mean of its tokens."""
    modality = view.modality
    pools: dict[str, Pool] = {modality: view.shape.pool}
    if view.shape.pool != "mean":
        pools[f"{modality}-mean"] = "mean"
    parts: dict[str, list[Tensor]] = {name: [] for name in pools}
    for items in _chunks(store, ids, device):
        every = view.encode(
            Reads(final=True, tokens="all"), tokens=items.tokens, token_mask=items.token_mask, image=items.image
        )
        assert isinstance(every, TokenStates)
        for name, pool in pools.items():
            parts[name].append(pool_tokens(every.states[:, 0], every.mask, pool).double())
    return {name: torch.cat(states) for name, states in parts.items()}


def _chunks(store: ItemStore, ids: NDArray[np.int64], device: torch.device) -> Iterator[Items]:
    for start in range(0, len(ids), ITEMS_PER_CHUNK):
        yield store.gather(ids[start : start + ITEMS_PER_CHUNK]).to(device)


# --- the measure ------------------------------------------------------------------------------------------------------


class Spectral(NamedTuple):
    """A matrix (n, D) of rank r: its squared singular values (r,), falling, and right singular vectors (D, r)."""

    squares: Tensor
    vectors: Tensor


def describe(states: Tensor, reference: Tensor | None) -> SpaceFacts:
    """Ranks of states (n, D) in float64, and their CKA with a ``reference`` (n, D') of any width."""
    return _facts(states, decompose(states), decompose(centre(states)), reference)


def compare(after: Tensor, before: Tensor) -> SpaceFacts:
    """Ranks of two spaces, (n, D) in float64, and how their leading subspaces relate."""
    raw, centred = decompose(after), decompose(centre(after))
    raw_before, centred_before = (raw, centred) if before is after else (decompose(before), decompose(centre(before)))
    known = min(len(centred.squares), len(centred_before.squares), after.shape[1] - 1)
    angles = {
        k: torch.linalg.svdvals(centred.vectors[:, :k].T @ centred_before.vectors[:, :k]).clamp(max=1)
        for k in SUBSPACES
        if k <= known
    }
    return _facts(after, raw, centred, before).model_copy(
        update={
            "unadapted_raw": spectrum(raw_before.squares),
            "unadapted_centred": spectrum(centred_before.squares),
            "overlap": {k: float(cosines.square().sum()) / k for k, cosines in angles.items()},
            "cosine": {k: float(cosines.sum()) / k for k, cosines in angles.items()},
        }
    )


def _facts(states: Tensor, raw: Spectral, centred: Spectral, reference: Tensor | None) -> SpaceFacts:
    return SpaceFacts(
        width=states.shape[1],
        raw=spectrum(raw.squares),
        centred=spectrum(centred.squares),
        cka=None if reference is None else linear_cka(states, reference),
    )


def spectrum(squares: Tensor) -> Spectrum:
    """The ranks of a matrix from the squares of its singular values (r,), falling; 0 for a zero matrix."""
    if not len(squares):
        return Spectrum(effective_rank=0.0, energy_rank_90=0, energy_rank_99=0, stable_rank=0.0)
    values, energy = squares.sqrt(), squares.cumsum(0)
    share = values / values.sum()
    ranks = [int((energy < part * energy[-1]).sum()) + 1 for part in (0.9, 0.99)]
    return Spectrum(
        effective_rank=float((-(share * share.log()).sum()).exp()),
        energy_rank_90=ranks[0],
        energy_rank_99=ranks[1],
        stable_rank=float(energy[-1] / squares[0]),
    )


def linear_cka(states: Tensor, other: Tensor) -> float | None:
    """``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` of centred X (n, D), Y (n, D'); Kornblith et al., ICML 2019.

    ``None`` where one of them is the same for all items.
    """
    x, y = _unit(states), _unit(other)
    norms = torch.linalg.matrix_norm(x.T @ x) * torch.linalg.matrix_norm(y.T @ y)
    return min(1.0, float((y.T @ x).square().sum() / norms)) if norms else None


def centre(states: Tensor) -> Tensor:
    """States (n, D) without their mean; exactly 0 in columns that differ by rounding alone."""
    centred = states - states.mean(0)
    rounding = centred.abs().amax(0) <= 1e-12 * states.abs().amax(0)
    return centred.masked_fill(rounding, 0.0)


def _unit(states: Tensor) -> Tensor:
    """Centred states of Frobenius norm 1, or 0 where all items have the same."""
    centred = centre(states)
    norm = torch.linalg.matrix_norm(centred)
    return centred / norm if norm else centred


def decompose(states: Tensor) -> Spectral:
    """Singular values and right singular vectors of states (n, D) in float64.

    From the eigenvalues of ``H^T H``, (D, D), which is far cheaper than a decomposition of H. Those that rounding alone
    could have made count as 0.

    Raises ArithmeticError for a state that is not finite.
    """
    if not states.isfinite().all():
        raise ArithmeticError("a state is not finite")
    squares, vectors = torch.linalg.eigh(states.T @ states)
    squares, vectors = squares.flip(0), vectors.flip(1)
    rank = int((squares > len(squares) * torch.finfo(squares.dtype).eps * squares[0]).sum())
    return Spectral(squares[:rank], vectors[:, :rank])

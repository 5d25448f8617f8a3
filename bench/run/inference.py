"""What it costs to serve a model that its method has prepared for inference.

Item vectors are made ahead of time and in batches, or one by one as items arrive; a user is served from the vectors.
Both are timed, after training, on inputs that are on the device already.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tpme.bench.counting.encoding import item_flops
from tpme.bench.errors import one_line
from tpme.bench.measure.clock import now
from tpme.bench.record import Inference, Reading, Timings
from tpme.bench.task.evaluate import ITEMS_PER_CHUNK
from tpme.bench.task.items import Items, map_tensors, size_bytes
from tpme.bench.task.placement import table_bytes
from tpme.bench.train.loop import Trainer

TOP = 10
"""Items that a user is shown."""
SINGLES, USERS, COMPARED = 32, 256, 4
"""Items that are timed one by one, users that are served in turn, and items whose FLOPs are compared."""
FEWEST, MOST = 7, 25
"""Bounds of the number of runs; with seven against seven a rank test can detect a change (``tpme check``)."""
SHARE, LEAST_S, MOST_S = 0.03, 0.1, 1.0
"""Time of all runs of one work: a share of the training time, but at least ``LEAST_S`` seconds; where a run has several
passes, at most ``MOST_S``. The fewest runs are done in any case."""


@torch.no_grad()
def measure_inference(trainer: Trainer) -> Inference:
    """Time, memory and FLOPs of the prepared model; a timing or count that fails makes only its own reading missing."""
    model, phases = trainer.model, trainer.phases
    model.eval()
    encode = trainer.encode
    with phases.phase("inference"), trainer.autocast():
        trainer.progress("inference", 0.0)
        items = _measured_items(trainer)
        singles = [_part(items, place) for place in range(min(SINGLES, len(items)))]
        batch = _timed(trainer, lambda _: encode(items), len(items))
        single = _timed(trainer, lambda turn: encode(singles[turn % len(singles)]), 1)
        if batch.run_s:
            user = _timed(trainer, _service(trainer, items), 1)
        else:
            user = Timings(size=1, reason=f"there are no item vectors: {batch.reason}")
    memory = phases.phases[-1].memory
    with phases.phase("count", "inference FLOPs"), trainer.autocast():
        flops, by_data = _flops(encode, items)
    return Inference(
        flops_per_item=flops,
        flops_by_data=by_data,
        single=single,
        batch=batch,
        user=user,
        memory=memory,
        loaded_bytes=_loaded_bytes(trainer),
        looked_up=tuple(trainer.store.states),
    )


def _measured_items(trainer: Trainer) -> Items:
    """The first items of the catalogue, on the device."""
    ids = np.arange(1, 1 + min(trainer.dataset.manifest.items, ITEMS_PER_CHUNK), dtype=np.int64)
    return trainer.store.gather(ids).to(trainer.device)


def _part(items: Items, place: int) -> Items:
    return map_tensors(items, lambda tensor: tensor[place : place + 1])


def _service(trainer: Trainer, items: Items) -> Callable[[int], Tensor]:
    """A function that serves one user: the ids (1, 10) of the best items that are not in the history.

    The catalogue has its real size, and the vectors of ``items`` over and over.
    """
    model, inputs = trainer.model, trainer.dataset.test.inputs[:USERS].astype(np.int64)
    slots = torch.from_numpy(inputs).to(trainer.device)
    catalogue = trainer.dataset.manifest.items
    vectors = trainer.encode(items).float()
    vectors = vectors[torch.arange(catalogue + 1, device=trainer.device) % len(items)]
    precise = torch.autocast(trainer.device.type, enabled=False)

    def serve(turn: int) -> Tensor:
        history = slots[turn % len(slots)][None]  # (1, L)
        user = model.user_vectors(vectors[history], history > 0)[:, -1].float()
        with precise:
            scores = user @ vectors.T  # (1, N + 1)
        scores[:, 0] = -torch.inf
        scores.scatter_(1, history, -torch.inf)
        return scores.topk(min(TOP, catalogue)).indices

    return serve


def _timed(trainer: Trainer, work: Callable[[int], object], size: int) -> Timings:
    """Repeat ``work``, which is given the number of the pass; the first pass is not timed."""
    device = trainer.device
    budget_s = max(SHARE * sum(trainer.outcome.step_s), LEAST_S)

    def run(first: int, passes: int) -> float:
        start = now(device)
        for turn in range(first, first + passes):
            work(turn)
            end = now(device)
        return (end - start) / passes

    try:
        work(0)
        first_s = run(1, 1)
        passes = max(1, int(min(budget_s, MOST_S) / MOST / first_s))
        seconds = [first_s] if passes == 1 else []
        while len(seconds) < FEWEST or (len(seconds) < MOST and passes * sum(seconds) < budget_s):
            seconds.append(run(2 + passes * len(seconds), passes))
    except Exception as error:
        return Timings(size=size, reason=one_line(error))
    return Timings(size=size, run_s=tuple(seconds), passes=passes)


def _flops(encode: Callable[[Items], Tensor], items: Items) -> tuple[Reading, bool]:
    """FLOPs an item, and whether they depend on the data: single items are compared, because larger sets even out."""
    source = f"1 multiply-add = 2 FLOPs, one pass over {len(items)} items, math attention"
    if items.states is not None:
        source += f"; from stored states, so without the encoders of {' and '.join(items.states)}"
    try:
        flops, uncounted = item_flops(encode, items)
        places = {round(place) for place in np.linspace(0, len(items) - 1, COMPARED)}
        single = sorted(item_flops(encode, _part(items, place))[0] for place in places)
    except Exception as error:
        return Reading.missing(source, one_line(error)), False
    by_data = single[0] < single[-1]
    if by_data:
        source += f"; they differ with the data, {single[0]:.4g} to {single[-1]:.4g} for {len(single)} single items"
    lacking = f"no FLOP formula for {', '.join(uncounted)}" if uncounted else None
    return Reading(value=flops, source=source, valid=not lacking, reason=lacking), by_data


def _loaded_bytes(trainer: Trainer) -> Reading:
    """Bytes of the prepared model and of the tables of hidden states that it reads."""
    tables = trainer.store.states
    size = sum(size_bytes(tensor) for tensor in (*trainer.model.parameters(), *trainer.model.buffers()))
    size += sum(map(table_bytes, tables.values()))
    source = "all parameters and buffers of the prepared model"
    return Reading(value=size, source=source + (f", states of {' and '.join(tables)}" if tables else ""))

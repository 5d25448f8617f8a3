"""Steps as CUDA graphs: they compute what a step computes, and the reason is given where a step cannot be recorded."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tpme.bench.measure.phases import measuring
from tpme.bench.record import LearningRates, Modality, Training
from tpme.bench.run.cell import CellRun
from tpme.bench.task.batches import Batch, ItemStore, build_batch, log_popularity
from tpme.bench.task.items import Reads, States, TokenStates, map_tensors
from tpme.bench.task.recommender import ItemEncoder, Recommender
from tpme.bench.train.graphs import GraphedLoss, PaddedLoss, unsupported_reason
from tpme.bench.train.step import total_loss
from tpme.methods.base import Method, MethodConfig, TaskShape
from tpme.methods.bitfit import BitFit
from tpme.methods.iisan import IISAN

USERS = 7


def without_encoders(tiny: ModuleType, name: str, dropout: float = 0.0) -> tuple[Method, Recommender]:
    method, model = tiny.build(name, with_views=False, dropout=dropout)
    return method, model.train()


def table(items: int, reads: Reads, width: int) -> States:
    """Cached states of all items; five tokens of each where every token is read, the first one real."""
    if reads.tokens == "pooled":
        return torch.randn(items + 1, reads.count, width).half()
    mask = torch.rand(items + 1, 5) < 0.5
    mask[:, 0] = True
    return TokenStates(torch.randn(items + 1, reads.count, 5, width).half(), mask)


def batches(tiny: ModuleType, model: Recommender, protocol: str = "suite") -> list[Batch]:
    """Batches of the same users in number, with ever fewer items."""
    result = []
    for seed, items in enumerate((tiny.ITEMS, 4, 3)):
        data = tiny.catalogue(USERS, items, seed)
        reads = model.item_encoder.reads
        states = {modality: table(items, read, tiny.WIDTH) for modality, read in reads.items()}
        store = ItemStore(data, states=states) if states else ItemStore(data)
        result.append(build_batch(data.train_slots, log_popularity(data), store, protocol))  # type: ignore[arg-type]
    return result


class Attention(ItemEncoder):
    """Attention over every token of the last state, under its mask."""

    def __init__(self, task: TaskShape) -> None:
        super().__init__({modality: Reads(final=True, tokens="all") for modality in task.encoders})
        self.score = nn.Linear(16, 1)
        self.project = nn.Linear(16 * len(task.encoders), task.dim)

    def forward(self, states: Mapping[Modality, TokenStates], ids: Tensor) -> Tensor:
        """Map states and masks to item vectors (n, d)."""
        kept = []
        for found in states.values():
            scores = self.score(found.states[:, 0])[..., 0].masked_fill(~found.mask, -torch.inf)
            kept.append((scores.softmax(dim=1)[..., None] * found.states[:, 0]).sum(dim=1))
        return self.project(torch.cat(kept, dim=1))


class EveryToken(Method):
    """Reads every token of frozen encoders."""

    decoupled = True

    def item_encoder(self, task: TaskShape) -> Attention:
        """The attention."""
        return Attention(task)


@pytest.mark.parametrize("protocol", ["suite", "paper"])
@pytest.mark.parametrize("name", ["iisan", "id", "frozen", "every token"])
def test_room_that_is_not_filled_changes_nothing(tiny: ModuleType, name: str, protocol: str) -> None:
    if name == "every token":
        method = EveryToken(MethodConfig())
        model = tiny.recommender(method, with_views=False, dropout=0.1).train()
    else:
        method, model = without_encoders(tiny, name, dropout=0.1)
    given = batches(tiny, model, protocol)
    assert len({len(batch.candidates.rows) for batch in given}) > 1
    padded = PaddedLoss(model, given[0])
    places = [tensor.data_ptr() for tensor in padded.inputs]
    for batch in given:  # what an earlier, larger one leaves behind must not count
        results = {}
        for way in ("plain", "padded"):
            torch.manual_seed(3)
            model.zero_grad()
            loss = total_loss(method, model, batch) if way == "plain" else padded(*padded.fill(batch))
            loss.backward()
            results[way] = (loss.detach(), tiny.gradients(model))
        assert float(results["padded"][0]) == pytest.approx(float(results["plain"][0]), rel=1e-6)
        assert results["padded"][1].keys() == results["plain"][1].keys()
        for key, gradient in results["plain"][1].items():
            assert torch.allclose(results["padded"][1][key], gradient, atol=1e-6), key
    assert [tensor.data_ptr() for tensor in padded.inputs] == places


class Scheduled(IISAN):
    """Changes something before each step."""

    def before_step(self, state: Any) -> None:
        pass


def test_the_reason_why_steps_cannot_be_recorded(tiny: ModuleType) -> None:
    assert unsupported_reason(*without_encoders(tiny, "iisan")) is None
    assert unsupported_reason(*without_encoders(tiny, "id")) is None
    assert unsupported_reason(*tiny.build("iisan")) == "encoders run in every step, so kernel launches do not limit it"
    assert unsupported_reason(*tiny.build("bitfit")) is not None
    assert unsupported_reason(*without_encoders(tiny, "popularity")) == "nothing trains"
    method, model = without_encoders(tiny, "iisan")
    assert "before_step()" in (unsupported_reason(Scheduled(method.config), model) or "")
    assert BitFit.before_step is Method.before_step  # else the test above would say nothing


def test_compiled_and_recorded_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Training(compile=True, cuda_graphs=True)


def test_a_cpu_cannot_replay_graphs(world: Any, tmp_path: Any) -> None:
    matrix = world.matrix([{"name": "id"}], training={"epochs": 1, "cuda_graphs": True})
    result = world.tell(matrix, tmp_path)
    assert result.status == "error"
    assert result.cell.training.cuda_graphs
    assert "cuda_graphs = true needs a CUDA device" in result.failure.message


def test_a_row_that_cannot_be_recorded_says_so_and_trains_as_ever(world: Any, tmp_path: Any) -> None:
    flags = {}
    for name in ("id", "fft", "popularity"):
        job = world.job(world.matrix([name]), tmp_path)
        with measuring("cpu") as phases:
            cell_run = CellRun(job, phases, lambda _what, _share: None)
            trainer = cell_run.prepare()
        trainer.device = torch.device("cuda")  # nothing is recorded before the first step
        cell_run._replay_graphs(trainer)
        flags[name] = {flag.code: flag.message for flag in cell_run.facts.flags}
        assert isinstance(trainer.terms_of, GraphedLoss) == (name == "id")
    assert "no-cuda-graphs" not in flags["id"]
    assert flags["fft"]["no-cuda-graphs"].endswith("encoders run in every step, so kernel launches do not limit it")
    assert flags["popularity"]["no-cuda-graphs"] == "steps are not recorded as CUDA graphs: nothing trains"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["iisan", "id"])
def test_graphs_train_as_plain_steps_do(tiny: ModuleType, name: str, precision: torch.dtype | None) -> None:
    device, losses = torch.device("cuda"), {}
    for way in ("plain", "graphs"):
        method, model = without_encoders(tiny, name, dropout=0.1)
        given = [map_tensors(batch, lambda tensor: tensor.to(device)) for batch in batches(tiny, model)]
        model.to(device)
        graphed = GraphedLoss(method, model, USERS)
        optimizer = method.optimizer(method.param_groups(model, LearningRates()), fused=True)
        # A scale at which these gradients do not overflow: every step counts.
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, enabled=precision is torch.float16)
        torch.manual_seed(5)
        losses[way] = []
        for batch in given * 3:
            with torch.autocast("cuda", dtype=precision, enabled=precision is not None):
                loss = graphed(batch)["task"] if way == "graphs" else total_loss(method, model, batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses[way].append(float(loss.detach()))
    assert np.allclose(losses["plain"], losses["graphs"], rtol=1e-5 if precision is None else 1e-2)
    assert losses["plain"][0] != losses["plain"][3]

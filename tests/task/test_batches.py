from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tpme.bench.record import Protocol, Training
from tpme.bench.task.batches import ItemStore, TrainBatches, build_batch, log_popularity
from tpme.bench.task.items import Items, TokenStates
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.build import steps_per_epoch

SLOTS = np.array([[0, 0, 5, 2, 5, 9], [0, 2, 9, 9, 1, 4], [7, 5, 3, 1, 2, 6]], dtype=np.int32)


def loader(tiny: ModuleType, **changes: Any) -> TrainBatches:
    data = tiny.catalogue(users=10)
    settings = {"users_per_batch": 4, "protocol": "suite", "seed": 1, "steps": 3, "device": torch.device("cpu")}
    return TrainBatches(data, tiny.store(data), **(settings | changes))


# --- what a batch holds ---------------------------------------------------------------------------------------------


def test_only_distinct_real_items_are_encoded(tiny: ModuleType) -> None:
    data = tiny.catalogue()
    batch = build_batch(SLOTS, log_popularity(data), tiny.store(data), "suite")
    assert batch.items.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 9]
    assert batch.items.ids[batch.slot[torch.from_numpy(SLOTS > 0)]].tolist() == SLOTS[SLOTS > 0].tolist()
    assert batch.mask.tolist() == (SLOTS[:, :-1] > 0).tolist()


def test_the_paper_encodes_every_slot(tiny: ModuleType) -> None:
    data = tiny.catalogue()
    batch = build_batch(SLOTS, log_popularity(data), tiny.store(data), "paper")
    assert batch.items.ids.tolist() == SLOTS.reshape(-1).tolist()
    assert batch.slot.tolist() == np.arange(SLOTS.size).reshape(SLOTS.shape).tolist()


@pytest.mark.parametrize("protocol", ["suite", "paper"])
def test_every_position_predicts_the_next_slot(tiny: ModuleType, protocol: Protocol) -> None:
    data = tiny.catalogue()
    batch = build_batch(SLOTS, log_popularity(data), tiny.store(data), protocol)
    pairs = zip(batch.candidates.rows.tolist(), batch.candidates.target.tolist(), strict=True)
    result = [(divmod(row, SLOTS.shape[1] - 1), int(batch.items.ids[target])) for row, target in pairs]
    expected = [
        ((b, position), int(row[position + 1]))
        for b, row in enumerate(SLOTS)
        for position in range(SLOTS.shape[1] - 1)
        if row[position]
    ]
    assert result == expected


def test_counts_and_popularity_of_the_candidates(tiny: ModuleType) -> None:
    data = tiny.catalogue()
    columns = build_batch(SLOTS, log_popularity(data), tiny.store(data), "suite").candidates
    assert torch.exp(columns.log_count).round().int().tolist() == [2, 3, 1, 1, 3, 1, 1, 3]
    with np.errstate(divide="ignore"):
        expected = np.where(data.popularity > 0, np.log(data.popularity), 0.0)
    np.testing.assert_allclose(columns.log_p.numpy(), expected[[1, 2, 3, 4, 5, 6, 7, 9]], rtol=1e-6)


def test_inputs_of_items(tiny: ModuleType) -> None:
    data, table = tiny.catalogue(), tiny.tokens()
    items = ItemStore(data, tokens=table, images=True).gather(np.array([3, 0, 11]))
    assert items.tokens is not None
    assert items.token_mask is not None
    assert items.image is not None
    assert items.tokens.tolist() == table.ids[[3, 0, 11]].tolist()
    assert items.token_mask.sum(dim=1).tolist() == [table.lengths[3], 1, table.lengths[11]]
    assert items.image.dtype == torch.uint8
    assert np.array_equal(items.image.numpy(), data.images[[3, 0, 11]])


def test_states_of_one_encoder_beside_the_inputs_of_the_other(tiny: ModuleType) -> None:
    states, ids = {"image": torch.arange(26.0).reshape(13, 1, 2)}, np.array([4, 1])
    items = ItemStore(tiny.catalogue(), tokens=tiny.tokens(), states=states).gather(ids)
    assert items.image is None
    assert items.tokens.tolist() == tiny.tokens().ids[ids].tolist()
    assert items.states["image"].tolist() == [[[8.0, 9.0]], [[2.0, 3.0]]]


def test_states_of_every_token_come_with_their_mask(tiny: ModuleType) -> None:
    table = TokenStates(torch.arange(78.0).reshape(13, 1, 3, 2), torch.arange(39).reshape(13, 3) % 2 == 0)
    found = ItemStore(tiny.catalogue(), states={"text": table}).gather(np.array([4, 1])).states["text"]
    assert torch.equal(found.states, table.states[[4, 1]])
    assert torch.equal(found.mask, table.mask[[4, 1]])


def test_items_are_encoded_in_smaller_chunks_where_they_are_more_than_vectors(tiny: ModuleType) -> None:
    data, vectors = tiny.catalogue(), torch.zeros(13, 1, 2)
    whole = TokenStates(torch.zeros(13, 1, 3, 2), torch.ones(13, 3, dtype=torch.bool))
    assert not ItemStore(data).every_token
    assert not ItemStore(data, states={"text": vectors}).every_token
    assert ItemStore(data, tokens=tiny.tokens(), states={"image": vectors}).every_token
    assert ItemStore(data, states={"text": whole}).every_token


def test_states_on_a_device_stay_there_until_the_batch_has_come(tiny: ModuleType) -> None:
    """The thread that assembles batches queues nothing on the device."""
    data = tiny.catalogue()
    store = ItemStore(data, states={"text": torch.zeros(13, 3, 2, dtype=torch.float16, device="meta")})
    batch = build_batch(data.train_slots, log_popularity(data), store, "suite")
    assert (batch.items.states, batch.items.ids.device.type) == (None, "cpu")
    moved = batch.to(torch.device("meta")).items
    assert moved.tables is None
    assert moved.states is not None
    assert moved.states["text"].shape == (len(batch.items), 3, 2)


# --- what comes of it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [("text", "image"), ("text",), ("image",)], ids="-".join)
@pytest.mark.parametrize("method", ["fft", "lora", "iisan", "id"])
def test_distinct_items_give_loss_and_gradients_of_all_slots(
    tiny: ModuleType, method: str, modalities: tuple[str, ...]
) -> None:
    results = []
    for protocol in ("suite", "paper"):
        _, model = tiny.build(method, modalities=modalities)
        model.eval()  # dropout off: it would draw other masks for other batches
        loss = tiny.loss_of(model, tiny.batch(modalities, protocol))
        loss.backward()
        results.append((loss.detach(), tiny.gradients(model)))
    (loss, gradients), (slot_loss, slot_gradients) = results
    torch.testing.assert_close(loss, slot_loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == slot_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, slot_gradients[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_padding_never_reaches_an_encoder(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    encode = Recommender.hidden_states

    def watched(self: Recommender, items: Items) -> dict[str, torch.Tensor]:
        seen.extend(items.ids.tolist())
        return encode(self, items)

    monkeypatch.setattr(Recommender, "hidden_states", watched)
    method, model = tiny.build("frozen")
    tiny.train(method, model, steps=1)
    assert 0 not in seen
    assert len(seen) == len(set(seen))


# --- order ----------------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_user_once(tiny: ModuleType) -> None:
    data = tiny.catalogue(users=10)
    batches = list(loader(tiny).epoch(0))
    assert [len(batch.mask) for batch in batches] == [4, 4, 2]
    rows = [
        tuple(batch.items.ids[slot] * used)
        for batch in batches
        for slot, used in zip(batch.slot, _used(batch), strict=True)
    ]
    result = sorted(tuple(int(item) for item in row) for row in rows)
    assert result == sorted(tuple(int(item) for item in row) for row in data.train_slots)


def _used(batch: Any) -> torch.Tensor:
    """(B, S): which slots hold an item; the last one always does."""
    return torch.cat([batch.mask, torch.ones(len(batch.mask), 1, dtype=torch.bool)], dim=1)


def order(batches: TrainBatches, epoch: int) -> list[list[list[bool]]]:
    return [[batch.mask.tolist(), batch.candidates.target.tolist()] for batch in batches.epoch(epoch)]


def test_the_order_depends_on_seed_and_epoch_alone(tiny: ModuleType) -> None:
    first = order(loader(tiny), 3)
    again = loader(tiny)
    order(again, 0)
    assert order(again, 3) == first
    assert order(loader(tiny, seed=2), 3) != first
    assert order(loader(tiny), 4) != first


def test_the_order_is_the_same_for_every_store(tiny: ModuleType) -> None:
    data = tiny.catalogue(users=10)
    cached = ItemStore(data, states={"text": torch.zeros(13, 1, 2)})
    stores = [tiny.store(data), tiny.store(data, ("text",)), ItemStore(data), cached]
    torch.manual_seed(5)  # nor does the state of torch's own generator matter
    orders = [
        order(
            TrainBatches(data, store, users_per_batch=4, protocol="suite", seed=1, steps=3, device=torch.device("cpu")),
            0,
        )
        for store in stores
    ]
    assert all(result == orders[0] for result in orders)


def test_fewer_steps_cut_the_epoch(tiny: ModuleType) -> None:
    steps = [steps_per_epoch(10, Training(users_per_batch=4, max_steps_per_epoch=most)) for most in (None, 2, 99)]
    assert steps == [3, 2, 3]
    whole, cut = loader(tiny, steps=steps[0]), loader(tiny, steps=steps[1])
    assert (len(whole), len(cut)) == (3, 2)
    assert order(cut, 0) == order(whole, 0)[:2]


def test_an_error_in_the_thread_reaches_the_training(tiny: ModuleType) -> None:
    data = tiny.catalogue(users=10)
    broken = ItemStore(data, tokens=tiny.tokens(items=1))  # has no row for most items
    batches = loader(tiny)
    batches.store = broken
    with pytest.raises(IndexError):
        list(batches.epoch(0))


def test_an_epoch_may_be_left_early(tiny: ModuleType) -> None:
    assert len(list(itertools.islice(loader(tiny).epoch(0), 1))) == 1

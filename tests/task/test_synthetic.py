"""The built-in catalogue: the same for the same settings, and content that predicts the next item."""

from __future__ import annotations

import numpy as np

from tpme.bench.task.sources.synthetic import Synthetic, generate

SMALL = Synthetic(users=300, items=120)


def test_equal_settings_give_equal_data_and_another_seed_does_not() -> None:
    one, two, other = generate(SMALL), generate(SMALL), generate(Synthetic(users=300, items=120, seed=1))
    assert one.titles == two.titles
    assert all(np.array_equal(a, b) for a, b in zip(one.histories, two.histories, strict=True))
    assert one.titles != other.titles


def test_every_user_can_be_split_and_every_item_exists() -> None:
    raw = generate(SMALL)
    assert len(raw.users) == 300
    assert all(5 <= len(history) <= 13 for history in raw.histories)
    assert all(history.min() >= 0 and history.max() < len(raw.items) for history in raw.histories)


def test_pictures_are_images_that_differ() -> None:
    raw = generate(SMALL)
    assert raw.pictures is not None
    images = np.stack([picture(32) for picture in raw.pictures[:20]])
    assert images.shape == (20, 3, 32, 32)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(20, -1), axis=0)) == 20
    assert np.array_equal(images[0], raw.pictures[0](32))


def test_the_next_item_depends_on_the_one_before() -> None:
    """Pairs of consecutive items recur far more often than when every history is shuffled."""
    histories = generate(Synthetic(users=1000, items=60)).histories
    rng = np.random.default_rng(0)

    def recurring(sequences: list[np.ndarray]) -> float:
        pairs = np.concatenate([np.stack([s[:-1], s[1:]], axis=1) for s in sequences])
        return float((np.unique(pairs, axis=0, return_counts=True)[1] ** 2).sum())

    assert recurring(histories) > 1.2 * recurring([rng.permutation(history) for history in histories])

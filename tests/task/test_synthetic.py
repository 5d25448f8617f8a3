"""The built-in catalogue: the same for the same settings, valid, and with what is planted really to be found in it."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources import synthetic_histories
from tpme.bench.task.sources.synthetic import Catalogue, Synthetic, World, generate, make_catalogue, make_world
from tpme.bench.task.sources.synthetic_images import COLOURS, SHAPES, TEXTURES, draw
from tpme.bench.task.sources.synthetic_titles import CATEGORIES, STYLES

SMALL = Synthetic(users=300, items=120)
MANY = Synthetic(users=1000, items=400)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(MANY.world)


@pytest.fixture(scope="module")
def catalogue(world: World) -> Catalogue:
    """The items behind ``histories``: the draw that ``generate`` makes."""
    return make_catalogue(world, np.random.default_rng((MANY.seed, 1)), MANY.items)


@pytest.fixture(scope="module", params=["all items", "candidates"])
def histories(catalogue: Catalogue, request: pytest.FixtureRequest) -> list[NDArray[np.int32]]:
    """Histories drawn in each of the two ways."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "candidates":
            patch.setattr(synthetic_histories, "DENSE_PAIRS", 0)
        raw = generate(MANY)
    assert raw.titles == catalogue.titles
    return list(raw.histories)


def plain_histories(config: Synthetic, world: World, catalogue: Catalogue) -> list[NDArray[np.int32]]:
    """All users and items in one array, as long as records name data that was drawn so."""
    rng = np.random.default_rng((config.seed, 2))
    users, items = config.users, config.items
    lengths = config.shortest_history - 1 + rng.geometric(max(1 - config.continues, 1e-9), users)
    lengths = np.minimum(lengths, config.longest_history)
    known = np.where(rng.random(items) < config.newest_share, -np.inf, 0.0)
    appeal, liked = 0.5 * rng.normal(size=items), np.zeros((users, items))
    for attribute, kinds, count, strength in (
        (catalogue.style, len(STYLES), 2, 3.0),
        (catalogue.texture, len(TEXTURES), 2, 2.0),
        (catalogue.brand, 24, 3, 2.0),
    ):
        order = np.argsort(rng.random((users, kinds)), axis=1)[:, :count]
        likes = np.zeros((users, kinds))
        np.put_along_axis(likes, order, strength, axis=1)
        liked += likes[:, attribute]
    category, shape, colour = catalogue.category, catalogue.shape, catalogue.colour
    distance = np.abs(colour[:, None] - colour[None, :])
    follows = (
        4.0 * world.category_follows[category[:, None], category[None, :]]
        + 3.0 * (world.shape_follows[shape][:, None] == shape[None, :])
        + 3.0 * np.maximum(0, 1 - np.minimum(distance, len(COLOURS) - distance) / 2)
    )
    taken = np.zeros((users, config.longest_history), np.int32)
    for step in range(config.longest_history):
        chance = appeal + liked
        if step > 0:
            chance += follows[taken[:, step - 1]]
            np.put_along_axis(chance, taken[:, :step], -np.inf, axis=1)
        chance += np.where((step < lengths - 2)[:, None], known, 0.0)
        taken[:, step] = np.argmax(chance + rng.gumbel(size=chance.shape), axis=1)
    return [row[:length] for row, length in zip(taken, lengths, strict=True)]


@pytest.mark.parametrize("pairs", [1, 120 * 7, 2**22])
def test_histories_in_parts_are_those_drawn_at_once(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints in records, of this data and of all that was drawn before there were parts, stay what they are."""
    monkeypatch.setattr(synthetic_histories, "CHUNK_PAIRS", pairs)
    world = make_world(SMALL.world)
    catalogue = make_catalogue(world, np.random.default_rng((SMALL.seed, 1)), SMALL.items)
    expected, drawn = plain_histories(SMALL, world, catalogue), generate(SMALL).histories
    assert [history.tolist() for history in drawn] == [history.tolist() for history in expected]


def test_candidates_are_drawn_where_all_items_would_take_days(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_histories, "DENSE_PAIRS", 300 * 120)
    exact = generate(SMALL).histories
    monkeypatch.setattr(synthetic_histories, "DENSE_PAIRS", 300 * 120 - 1)
    one, two = generate(SMALL).histories, generate(SMALL).histories
    assert [history.tolist() for history in one] == [history.tolist() for history in two]
    assert [history.tolist() for history in one] != [history.tolist() for history in exact]
    assert [len(np.unique(history)) for history in one] == [len(history) for history in one]
    assert max(history.max() for history in one) < 120
    # Where nearly every item is taken in a history, others than those that follow are drawn.
    all_of_them = Synthetic(users=20, items=40, shortest_history=39, longest_history=39, newest_share=0.0)
    assert min(len(np.unique(history)) for history in generate(all_of_them).histories) > 35
    none_known = Synthetic(users=20, items=40, newest_share=0.999)
    assert len(generate(none_known).histories) == 20


def test_what_is_not_asked_for_is_not_drawn_and_changes_nothing() -> None:
    both, titles, pictures = (generate(SMALL, only) for only in (("text", "image"), ("text",), ("image",)))
    assert titles.pictures is None
    assert pictures.titles is None
    assert (titles.titles, pictures.pictures) == (both.titles, both.pictures)


@pytest.mark.slow
def test_the_memory_of_drawing_and_preparing_is_that_of_a_few_bytes_an_interaction(tmp_path: Path) -> None:
    """Two sizes, so that what is there whatever the size cancels out."""
    peaks, interactions = [], []
    for users in (50_000, 250_000):
        tracemalloc.start()
        raw = generate(Synthetic(users=users, items=10_000), ("text",))
        interactions.append(prepare(raw, tmp_path / str(users)).interactions)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (interactions[1] - interactions[0]) < 40


def test_equal_settings_give_equal_data() -> None:
    first, two = generate(SMALL), generate(SMALL)
    assert first.titles == two.titles
    assert first.pictures == two.pictures
    assert all(np.array_equal(a, b) for a, b in zip(first.histories, two.histories, strict=True))


@pytest.mark.parametrize("change", [{"seed": 1}, {"world": 2}])
def test_another_seed_or_world_gives_other_data(change: dict[str, int]) -> None:
    first, other = generate(SMALL), generate(SMALL.model_copy(update=change))
    assert first.titles != other.titles
    assert not all(np.array_equal(a, b) for a, b in zip(first.histories, other.histories, strict=True))


def test_another_world_has_other_brands_and_another_order() -> None:
    first, other = make_world(1), make_world(2)
    assert len(set(first.brands) & set(other.brands)) < 4
    assert not np.array_equal(first.category_follows, other.category_follows)


def test_every_user_can_be_split_and_every_item_exists() -> None:
    raw = generate(SMALL)
    assert raw.titles is not None
    assert raw.pictures is not None
    assert len(raw.users) == len(set(raw.users)) == len(raw.histories) == 300
    assert len(raw.items) == len(set(raw.items)) == len(raw.titles) == len(raw.pictures) == 120
    for history in raw.histories:
        assert history.dtype == np.int32
        assert 5 <= len(history) <= 13
        assert len(np.unique(history)) == len(history)
        assert history.min() >= 0
        assert history.max() < 120


def test_lengths_are_geometric_between_their_limits(histories: list[NDArray[np.int32]]) -> None:
    lengths = np.array([len(history) for history in histories])
    for length in (5, 6, 7):
        assert np.mean(lengths[lengths >= length] == length) == pytest.approx(0.25, abs=0.06)
    always = Synthetic(users=20, items=60, continues=1.0, longest_history=9)
    assert {len(history) for history in generate(always).histories} == {9}


@pytest.mark.parametrize("wrong", [{"shortest_history": 9, "longest_history": 8}, {"continues": 1.5}, {"size": 3}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Synthetic.model_validate(wrong)


# --- what users take ------------------------------------------------------------------------------------------


def test_what_comes_next_depends_on_what_was_just_taken(
    world: World, catalogue: Catalogue, histories: list[NDArray[np.int32]]
) -> None:
    """Each planted transition is met far more often in consecutive pairs than in pairs of a shuffled history."""

    def followed(before: NDArray[np.int32], after: NDArray[np.int32]) -> list[float]:
        apart = np.abs(catalogue.colour[before] - catalogue.colour[after])
        return [
            float(np.mean(world.category_follows[catalogue.category[before], catalogue.category[after]] > 0)),
            float(np.mean(world.shape_follows[catalogue.shape[before]] == catalogue.shape[after])),
            float(np.mean(np.minimum(apart, len(COLOURS) - apart) <= 1)),
        ]

    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(history) for history in histories]
    real = followed(np.concatenate([h[:-1] for h in histories]), np.concatenate([h[1:] for h in histories]))
    chance = followed(np.concatenate([h[:-1] for h in shuffled]), np.concatenate([h[1:] for h in shuffled]))
    category, shape, colour = np.array(real) / np.array(chance)
    assert category > 2
    assert shape > 2
    assert colour > 1.1  # neighbours stay together over a whole history, so shuffling keeps much of it
    assert real[2] > 2 * 3 / len(COLOURS)


def test_users_have_tastes(catalogue: Catalogue, histories: list[NDArray[np.int32]]) -> None:
    """Two items of one user share style, texture and brand more often than two items of different users."""
    firsts, lasts = np.array([h[0] for h in histories]), np.array([h[4] for h in histories])
    for attribute in (catalogue.style, catalogue.texture, catalogue.brand):
        together = np.mean(attribute[firsts] == attribute[lasts])
        apart = np.mean(attribute[firsts] == attribute[np.roll(lasts, 1)])
        assert together > 1.3 * apart


def test_popularity_is_skewed_but_weak(histories: list[NDArray[np.int32]]) -> None:
    trained = np.bincount(np.concatenate([history[:-2] for history in histories]), minlength=MANY.items)
    met = trained[trained > 0]
    assert met.std() > 1.9 * np.sqrt(met.mean()), "no more skewed than attributes alone make it"
    top = np.argsort(-trained)[:10]
    hits = np.mean(np.isin([history[-1] for history in histories], top))
    assert 10 / MANY.items < hits < 0.15


def test_the_newest_items_are_met_in_the_last_two_interactions_only(histories: list[NDArray[np.int32]]) -> None:
    early = np.unique(np.concatenate([history[:-2] for history in histories]))
    targets = np.array([history[-1] for history in histories])
    assert np.mean(~np.isin(targets, early)) == pytest.approx(MANY.newest_share, abs=0.08)
    none_new = generate(MANY.model_copy(update={"newest_share": 0.0})).histories
    early = np.unique(np.concatenate([history[:-2] for history in none_new]))
    assert np.mean(~np.isin([history[-1] for history in none_new], early)) < 0.03


# --- what items look and read like ----------------------------------------------------------------------------


def test_titles_tell_brand_category_and_style_and_never_the_shape(world: World, catalogue: Catalogue) -> None:
    second_categories = 0
    for i, title in enumerate(catalogue.titles):
        words = title.split()
        assert len(words) <= 11
        assert world.brands[catalogue.brand[i]] in words
        assert set(words) & set(STYLES[catalogue.style[i]])
        assert set(words) & set(CATEGORIES[catalogue.category[i]])
        assert not set(words) & set(SHAPES)
        second_categories += sum(bool(set(words) & set(synonyms)) for synonyms in CATEGORIES) - 1
    assert 0.2 < second_categories / len(catalogue.titles) < 0.4


@pytest.mark.parametrize("size", [16, 32, 65])
def test_a_picture_is_an_rgb_image_of_any_size(catalogue: Catalogue, size: int) -> None:
    picture = catalogue.pictures[0]
    image = picture(size)
    assert image.shape == (3, size, size)
    assert image.dtype == np.uint8
    assert image.std() > 10
    assert np.array_equal(pickle.loads(pickle.dumps(picture))(size), image)


@pytest.mark.parametrize(("attribute", "kinds"), [("shape", SHAPES), ("colour", tuple(COLOURS)), ("texture", TEXTURES)])
def test_every_value_of_an_attribute_can_be_seen(attribute: str, kinds: tuple[str, ...]) -> None:
    """With everything else equal, noise included, two values differ plainly in a good part of the pixels."""
    plain = draw(np.random.default_rng(3), shape=1, colour=5, texture=1)
    images = [replace(plain, **{attribute: kind})(32).astype(float) for kind in range(len(kinds))]
    for i, first in enumerate(images):
        for other in images[:i]:
            assert np.mean(np.abs(first - other).max(axis=0) > 25) > 0.05


def test_the_colour_is_that_of_its_name() -> None:
    is_strongest: dict[str, Callable[[NDArray[np.float64]], bool]] = {
        "red": lambda rgb: rgb[0] > 2 * max(rgb[1], rgb[2]),
        "green": lambda rgb: rgb[1] > 1.5 * max(rgb[0], rgb[2]),
        "blue": lambda rgb: rgb[2] > 1.5 * max(rgb[0], rgb[1]),
    }
    for name, check in is_strongest.items():
        picture = draw(np.random.default_rng(0), shape=0, colour=list(COLOURS).index(name), texture=0)
        assert check(picture(32)[:, 14:18, 14:18].mean(axis=(1, 2)))


def test_equal_attributes_never_give_equal_pixels() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([draw(rng, 3, 3, 3)(32).ravel() for _ in range(10)])
    assert len(np.unique(images, axis=0)) == 10

"""Histories of the built-in data set: the odds of the next item, and two ways to draw from them.

Up to ``DENSE_PAIRS`` pairs of a user and an item, every step of every user draws from the odds of *all* items, in time
users x items. Beyond that the time would be days, and a step draws from ``CANDIDATES`` items instead: their kinds
(category, shape and colour) come from the odds after the item before, and of the candidates one is taken by popularity
and the user's taste. With many candidates that is the same draw (sampling importance resampling, Rubin, 1987); with
these few, tastes are weaker. The time is linear in the interactions.

Both work on a few thousand users at a time. What they draw for given settings never changes: records name data by its
content.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tpme.bench.task.sources.raw import Histories, offsets_of
from tpme.bench.task.sources.synthetic_images import COLOURS, SHAPES, TEXTURES
from tpme.bench.task.sources.synthetic_titles import BRANDS, CATEGORIES, STYLES
from tpme.bench.task.sources.synthetic_world import Catalogue, Synthetic, World

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

DENSE_PAIRS = 4 * 10**8
"""The most users x items that are drawn from the odds of all items."""
CHUNK_PAIRS = 2**16
"""Users x items that are worked on at one time: they keep to the cache."""
CHUNK_USERS = 2**12
"""Users whose candidates are worked on at one time. This and what follows is part of what the data is."""
CANDIDATES = 32
QUANTILES = 2**12
"""Draws of a kind are this fine."""
ROUNDS = 20
"""Draws of candidates until one is not taken yet; after that an item comes twice."""

# Contributions to the log odds of the next item.
CATEGORY_FOLLOWS = 4.0
SHAPE_FOLLOWS = 3.0
COLOUR_STAYS = 3.0
BRAND_LIKED = 2.0
STYLE_LIKED = 3.0
TEXTURE_LIKED = 2.0
POPULARITY = 0.5

_LIKED = ((len(STYLES), 2, STYLE_LIKED), (len(TEXTURES), 2, TEXTURE_LIKED), (BRANDS, 3, BRAND_LIKED))
"""Styles, textures and brands: how many there are, how many a user likes, and how much."""
_KINDS = len(CATEGORIES), len(SHAPES), len(COLOURS)
_KIND_COUNT = len(CATEGORIES) * len(SHAPES) * len(COLOURS)


def make_histories(config: Synthetic, world: World, catalogue: Catalogue) -> Histories:
    """The history of every user, oldest first, without repeated items as long as others are left."""
    if config.users * config.items <= DENSE_PAIRS:
        return _dense(config, world, catalogue, np.random.default_rng((config.seed, 2)))
    return _from_candidates(config, world, catalogue, np.random.default_rng((config.seed, 3)))


def _lengths(config: Synthetic, rng: np.random.Generator) -> Ints:
    lengths = config.shortest_history - 1 + rng.geometric(max(1 - config.continues, 1e-9), config.users)
    return np.minimum(lengths, config.longest_history)


def _kinds(catalogue: Catalogue) -> Ints:
    """The kind of every item, (items,): its category, shape and colour in one number."""
    return np.ravel_multi_index((catalogue.category, catalogue.shape, catalogue.colour), _KINDS).astype(np.int64)


def _transitions(world: World) -> Floats:
    """(kinds, kinds): contribution of the kind of the previous item (row) to the odds of the next (column)."""
    category, shape, colour = np.unravel_index(np.arange(_KIND_COUNT), _KINDS)
    distance = np.abs(colour[:, None] - colour[None, :])
    distance = np.minimum(distance, len(COLOURS) - distance)
    log_odds: Floats = (
        CATEGORY_FOLLOWS * world.category_follows[category[:, None], category[None, :]]
        + SHAPE_FOLLOWS * (world.shape_follows[shape][:, None] == shape[None, :])
        + COLOUR_STAYS * np.maximum(0, 1 - distance / 2)
    )
    return log_odds


def _preferences(rng: np.random.Generator, users: int) -> list[Floats]:
    """Styles, textures and brands that users like, (users, kinds) each: the strength of each liked kind, else 0."""
    preferences = []
    for kinds, count, strength in _LIKED:
        order = np.argsort(rng.random((users, kinds)), axis=1)[:, :count]
        likes = np.zeros((users, kinds))
        np.put_along_axis(likes, order, strength, axis=1)
        preferences.append(likes)
    return preferences


# --- every step from the odds of all items ------------------------------------------------------------------------


def _dense(config: Synthetic, world: World, catalogue: Catalogue, rng: np.random.Generator) -> Histories:
    users, items = config.users, config.items
    lengths = _lengths(config, rng)
    known = np.where(rng.random(items) < config.newest_share, -np.inf, 0.0)
    popularity = POPULARITY * rng.normal(size=items)
    liked = list(zip(_preferences(rng, users), (catalogue.style, catalogue.texture, catalogue.brand), strict=True))
    kind, follows = _kinds(catalogue), _transitions(world)
    chunk = max(1, CHUNK_PAIRS // items)

    @lru_cache(maxsize=1)  # where all users are one chunk, it serves all steps
    def appeal(start: int) -> Floats:
        preferences = np.zeros((min(chunk, users - start), items))
        for likes, attribute in liked:
            preferences += np.take(likes[start : start + chunk], attribute, axis=1)
        return popularity + preferences

    taken = np.zeros((users, config.longest_history), np.int32)
    for step in range(config.longest_history):
        for start in range(0, users, chunk):
            part = slice(start, start + chunk)
            chance = appeal(start).copy()
            if step > 0:
                chance += np.take(follows[kind[taken[part, step - 1]]], kind, axis=1)
                np.put_along_axis(chance, taken[part, :step], -np.inf, axis=1)
            chance += np.where((step < lengths[part] - 2)[:, None], known, 0.0)
            taken[part, step] = np.argmax(chance + rng.gumbel(size=chance.shape), axis=1)
    return Histories(taken[np.arange(config.longest_history) < lengths[:, None]], offsets_of(lengths))


# --- every step from a few candidates -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shelves:
    """Items by kind and, within a kind, the newest last; a *place* is in this order.

    item: (items,) item at each place. kind: (items,) its kind. first: (kinds,) first place of each kind. sizes: (2,
    kinds) items of each kind, without the newest and with them. taste: (items,) bits of its style, texture and brand.
    popularity: (items,). following: (2, kinds + 1, QUANTILES) kinds to draw from after each kind, and, in the last row,
    for the first item of a history; without the newest items and with them.
    """

    item: NDArray[np.int32]
    kind: Ints
    first: Ints
    sizes: Ints
    taste: Ints
    popularity: NDArray[np.float32]
    following: NDArray[np.int16]


def _from_candidates(config: Synthetic, world: World, catalogue: Catalogue, rng: np.random.Generator) -> Histories:
    lengths = _lengths(config, rng)
    shelves = _shelves(config, world, catalogue, rng)
    offsets = offsets_of(lengths)
    flat = np.empty(offsets[-1], np.int32)
    for start in range(0, config.users, CHUNK_USERS):
        part = lengths[start : start + CHUNK_USERS]
        places = _places(shelves, part, rng)
        filled = places[np.arange(places.shape[1]) < part[:, None]]
        flat[offsets[start] : offsets[start + len(part)]] = shelves.item[filled]
    return Histories(flat, offsets)


def _shelves(config: Synthetic, world: World, catalogue: Catalogue, rng: np.random.Generator) -> _Shelves:
    new = rng.random(config.items) < config.newest_share
    new &= not new.all()
    popularity = np.exp(POPULARITY * rng.normal(size=config.items))
    kind = _kinds(catalogue)
    order = np.lexsort((new, kind))
    sizes = np.stack([np.bincount(kind[~new], minlength=_KIND_COUNT), np.bincount(kind, minlength=_KIND_COUNT)])
    follows = np.exp(np.concatenate([_transitions(world), np.zeros((1, _KIND_COUNT))]))
    taste = np.int64(1) << catalogue.style
    taste |= np.int64(1) << (len(STYLES) + catalogue.texture)
    taste |= np.int64(1) << (len(STYLES) + len(TEXTURES) + catalogue.brand)
    return _Shelves(
        item=order.astype(np.int32),
        kind=kind[order],
        first=np.cumsum(sizes[1]) - sizes[1],
        sizes=sizes,
        taste=taste[order],
        popularity=popularity[order].astype(np.float32),
        following=np.stack([_quantiles(follows * size) for size in sizes]),
    )


def _quantiles(weights: Floats) -> NDArray[np.int16]:
    """(n, QUANTILES): in each row the columns of ``weights`` (n, kinds), each as often as its share of the row says."""
    cumulative = np.cumsum(weights, axis=1)
    middle = (np.arange(QUANTILES) + 0.5) / QUANTILES
    rows = [np.searchsorted(row / row[-1], middle, side="right") for row in cumulative]
    return np.stack(rows).astype(np.int16)


def _places(shelves: _Shelves, lengths: Ints, rng: np.random.Generator) -> Ints:
    """Places of the items that these users take, (users, longest); behind the end of a history whatever."""
    preferences = np.concatenate(_preferences(rng, len(lengths)), axis=1) > 0
    likes = preferences @ (np.int64(1) << np.arange(preferences.shape[1]))
    places = np.zeros((len(lengths), lengths.max()), np.int64)
    for step in range(places.shape[1]):
        rows = np.flatnonzero(lengths > step)
        after = shelves.kind[places[rows, step - 1]] if step else np.full(len(rows), _KIND_COUNT)
        newest = (step >= lengths[rows] - 2).astype(np.int64)
        places[rows, step] = _next(shelves, after, newest, likes[rows], places[rows, :step], rng)
    return places


def _next(shelves: _Shelves, after: Ints, newest: Ints, likes: Ints, taken: Ints, rng: np.random.Generator) -> Ints:
    """The next place of n users, (n,).

    after: (n,) kind of the last item. newest: (n,) 1 where the newest items are met. likes: (n,) bits of what the user
    likes. taken: (n, steps) places so far.
    """
    chosen, rows = np.zeros_like(after), np.arange(len(after))
    for _ in range(ROUNDS):
        size = len(rows), CANDIDATES
        met = newest[rows][:, None]
        kind = shelves.following[met, after[rows][:, None], rng.integers(QUANTILES, size=size, dtype=np.uint16)]
        count = shelves.sizes[met, kind]
        within = (rng.random(size, np.float32) * count.astype(np.float32)).astype(np.int64)
        places = shelves.first[kind] + np.minimum(within, count - 1)
        # The first of exponential waiting times at rates w is that of candidate i with probability w_i / sum w.
        waits = rng.standard_exponential(size, np.float32)
        waits /= shelves.popularity[places] * _liking(shelves.taste[places] & likes[rows][:, None])
        for before in taken[rows].T:
            waits[places == before[:, None]] = np.inf
        best = waits.argmin(axis=1)[:, None]
        chosen[rows] = np.take_along_axis(places, best, axis=1)[:, 0]
        rows = rows[np.isinf(np.take_along_axis(waits, best, axis=1)[:, 0])]
        if not len(rows):
            break
        after = np.full_like(after, _KIND_COUNT)  # what follows may be used up
    return chosen


def _liking(shared: Ints) -> NDArray[np.float32]:
    """How much more likely each candidate is for its user, from the bits that it shares with what the user likes."""
    factor, first = np.ones(shared.shape, np.float32), 0
    for kinds, _, strength in _LIKED:
        mask = ((1 << kinds) - 1) << first
        factor *= np.where(shared & mask, np.float32(np.exp(strength)), np.float32(1))
        first += kinds
    return factor

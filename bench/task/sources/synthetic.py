"""The built-in catalogue: invented items and users whose behaviour follows what the items look and read like.

What is planted. An item has a category, style and brand (in its title) and a colour, shape and texture (in its image),
so either modality alone tells half. What a user takes next depends on the item before (a category leads to certain
others, a shape to the next one, the colour stays or moves to a neighbour), on the user (liked styles, textures and
brands, which only the history as a whole reveals) and weakly on popularity. The newest items were launched after most
of every history, so they are met in the last two interactions only: never in training, and to be ranked by content.

What was tuned. The strengths below were chosen, together with the pretraining of the tiny encoders
(``tpme.bench.task.tiny.pretrain``), so that a small recommender can learn the task within a few hundred steps and so
that popularity, item ids alone, frozen encoders and adapted encoders come out clearly apart. Only data and pretraining
were tuned, with one set of settings for all methods; nothing here or there knows any method. Figures obtained on this
data show that the machinery works; they say nothing about real catalogues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from tpme.bench.record import Frozen
from tpme.bench.task.sources.drawing import COLOURS, SHAPES, TEXTURES, Drawing, draw
from tpme.bench.task.sources.raw import RawData
from tpme.bench.task.sources.wording import CATEGORIES, STYLES, brand_names, title

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

BRANDS = 24

# How much each reason adds to the log odds of taking an item next.
CATEGORY_FOLLOWS = 4.0
SHAPE_FOLLOWS = 3.0
COLOUR_STAYS = 3.0
BRAND_LIKED = 2.0
STYLE_LIKED = 3.0
TEXTURE_LIKED = 2.0
POPULARITY = 0.5


class Synthetic(Frozen):
    """Settings of the built-in catalogue. Everything is decided by them: equal settings, equal data."""

    users: PositiveInt = 1000
    items: Annotated[int, Field(ge=40)] = 1000
    seed: int = 12345
    """Decides items, users and histories."""
    world: int = 1
    """Decides what holds for all of them: brands, which attributes meet, and what follows what."""
    shortest_history: Annotated[int, Field(ge=5)] = 5
    longest_history: Annotated[int, Field(ge=5)] = 13
    continues: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Probability that a history goes on after each interaction: lengths are geometric between the two limits."""
    newest_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of items that nobody has met before the last two interactions."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> Synthetic:
        if self.longest_history < self.shortest_history:
            raise ValueError("longest_history must not be less than shortest_history")
        return self


@dataclass(frozen=True)
class World:
    """What holds for all items and users of one world."""

    brands: tuple[str, ...]
    brand_styles: Floats
    """(brands, styles): the share of each style among a brand's items."""
    category_shapes: Floats
    """(categories, shapes): the share of each shape among a category's items."""
    category_follows: Floats
    """(categories, categories): from 0 to 1, how strongly the second follows the first."""
    shape_follows: Ints
    """(shapes,): the shape that follows each."""


@dataclass(frozen=True)
class Catalogue:
    """Items with what was planted in them; every array is (items,)."""

    category: Ints
    style: Ints
    brand: Ints
    colour: Ints
    shape: Ints
    texture: Ints
    titles: list[str]
    pictures: list[Drawing]


def make_world(number: int) -> World:
    """The world of this number."""
    rng = np.random.default_rng((number, 0))
    categories, shapes = len(CATEGORIES), len(SHAPES)
    follows = np.zeros((categories, categories))
    order = rng.permutation(categories)  # one ring through all categories, so that each leads somewhere else
    follows[order, np.roll(order, 1)] = 1.0
    follows[order, np.roll(order, 3)] = 0.7
    ring = rng.permutation(shapes)
    shape_follows = np.empty(shapes, np.int64)
    shape_follows[ring] = np.roll(ring, 1)
    return World(
        brands=brand_names(rng, BRANDS),
        brand_styles=rng.dirichlet(np.full(len(STYLES), 0.6), BRANDS),
        category_shapes=rng.dirichlet(np.full(shapes, 3.0), categories),
        category_follows=follows,
        shape_follows=shape_follows,
    )


def make_catalogue(world: World, rng: np.random.Generator, count: int) -> Catalogue:
    """``count`` items of a world."""
    category = rng.integers(len(CATEGORIES), size=count)
    brand = rng.integers(BRANDS, size=count)
    style = _choose(rng, world.brand_styles[brand])
    shape = _choose(rng, world.category_shapes[category])
    colour = rng.integers(len(COLOURS), size=count)
    texture = rng.integers(len(TEXTURES), size=count)
    every = range(count)
    return Catalogue(
        category=category,
        style=style,
        brand=brand,
        colour=colour,
        shape=shape,
        texture=texture,
        titles=[title(rng, world.brands[brand[i]], category[i], style[i], colour[i], texture[i]) for i in every],
        pictures=[draw(rng, shape[i], colour[i], texture[i]) for i in every],
    )


def generate(config: Synthetic) -> RawData:
    """The catalogue and the histories of these settings."""
    world = make_world(config.world)
    catalogue = make_catalogue(world, np.random.default_rng((config.seed, 1)), config.items)
    return RawData(
        name="synthetic",
        items=[f"item-{number:05d}" for number in range(config.items)],
        titles=catalogue.titles,
        pictures=list(catalogue.pictures),
        users=[f"user-{number:05d}" for number in range(config.users)],
        histories=make_histories(config, world, catalogue),
        skipped={},
        synthetic=config.model_dump(exclude_unset=True),
    )


def make_histories(config: Synthetic, world: World, catalogue: Catalogue) -> list[NDArray[np.int32]]:
    """What every user took, oldest first; no item twice."""
    rng = np.random.default_rng((config.seed, 2))
    users, items = config.users, config.items
    lengths = config.shortest_history - 1 + rng.geometric(max(1 - config.continues, 1e-9), users)
    lengths = np.minimum(lengths, config.longest_history)
    known = np.where(rng.random(items) < config.newest_share, -np.inf, 0.0)
    appeal = POPULARITY * rng.normal(size=items) + tastes(rng, catalogue, users)
    follows = transitions(world, catalogue)
    taken = np.zeros((users, config.longest_history), np.int32)
    for step in range(config.longest_history):
        chance = appeal.copy()
        if step > 0:
            chance += follows[taken[:, step - 1]]
            np.put_along_axis(chance, taken[:, :step], -np.inf, axis=1)
        chance += np.where((step < lengths - 2)[:, None], known, 0.0)
        taken[:, step] = np.argmax(chance + rng.gumbel(size=chance.shape), axis=1)
    return [row[:length].copy() for row, length in zip(taken, lengths, strict=True)]


def tastes(rng: np.random.Generator, catalogue: Catalogue, users: int) -> Floats:
    """(users, items): what a user's own liking of two styles, two textures and three brands adds."""
    liked = np.zeros((users, len(catalogue.titles)))
    for attribute, kinds, count, strength in (
        (catalogue.style, len(STYLES), 2, STYLE_LIKED),
        (catalogue.texture, len(TEXTURES), 2, TEXTURE_LIKED),
        (catalogue.brand, BRANDS, 3, BRAND_LIKED),
    ):
        order = np.argsort(rng.random((users, kinds)), axis=1)[:, :count]
        likes = np.zeros((users, kinds))
        np.put_along_axis(likes, order, strength, axis=1)
        liked += likes[:, attribute]
    return liked


def transitions(world: World, catalogue: Catalogue) -> Floats:
    """(items, items): what having just taken the first adds to the second."""
    category, shape, colour = catalogue.category, catalogue.shape, catalogue.colour
    apart = np.abs(colour[:, None] - colour[None, :])
    apart = np.minimum(apart, len(COLOURS) - apart)
    reasons: Floats = (
        CATEGORY_FOLLOWS * world.category_follows[category[:, None], category[None, :]]
        + SHAPE_FOLLOWS * (world.shape_follows[shape][:, None] == shape[None, :])
        + COLOUR_STAYS * np.maximum(0, 1 - apart / 2)
    )
    return reasons


def _choose(rng: np.random.Generator, shares: Floats) -> Ints:
    """One column for each row, drawn with the row's shares."""
    chosen: Ints = np.argmax(np.log(shares) + rng.gumbel(size=shares.shape), axis=1)
    return chosen

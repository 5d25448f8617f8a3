"""Settings of the built-in data set, and the world they describe: its rules, and items with their attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Strict, model_validator

from tpme.bench.limits import Number, Seed
from tpme.bench.record import Frozen
from tpme.bench.task.sources.synthetic_images import COLOURS, SHAPES, TEXTURES, Drawing, draw
from tpme.bench.task.sources.synthetic_titles import BRANDS, CATEGORIES, STYLES, brand_names, title

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

MOST_USERS, MOST_ITEMS = 10**7, 10**6


class Synthetic(Frozen):
    """Settings of the built-in data set. Equal settings give equal data."""

    users: Annotated[Number, Field(le=MOST_USERS)] = 1000
    items: Annotated[Number, Field(ge=40, le=MOST_ITEMS)] = 1000
    seed: Seed = 12345
    """Of items, users and histories."""
    world: Seed = 1
    """Seed of the ``World``: brands, combinations of attributes, and transitions."""
    shortest_history: Annotated[Number, Field(ge=5)] = 5
    longest_history: Annotated[Number, Field(ge=5, le=1000)] = 13
    continues: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.75
    """Probability that a history continues after an interaction: lengths are geometric between the two limits."""
    newest_share: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.2
    """Share of items that occur in the last two interactions of a history only."""

    @model_validator(mode="after")
    def _limits_in_order(self) -> Synthetic:
        if self.longest_history < self.shortest_history:
            raise ValueError("longest_history must not be less than shortest_history")
        return self


@dataclass(frozen=True)
class World:
    """The rules shared by all items and users of one world."""

    brands: tuple[str, ...]
    brand_styles: Floats
    """(brands, styles): share of each style among a brand's items."""
    category_shapes: Floats
    """(categories, shapes): share of each shape among a category's items."""
    category_follows: Floats
    """(categories, categories): strength, 0 to 1, of a transition from the first to the second."""
    shape_follows: Ints
    """(shapes,): the next shape after each."""


@dataclass(frozen=True)
class Catalogue:
    """Synthetic items and their attributes; every array is (items,)."""

    category: Ints
    style: Ints
    brand: Ints
    colour: Ints
    shape: Ints
    texture: Ints
    titles: list[str]
    pictures: list[Drawing]
    """Empty where none were asked for."""


def make_world(number: int) -> World:
    """Return the world with this number."""
    rng = np.random.default_rng((number, 0))
    categories, shapes = len(CATEGORIES), len(SHAPES)
    follows = np.zeros((categories, categories))
    order = rng.permutation(categories)  # a ring through all categories, so each leads to others
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


def make_catalogue(world: World, rng: np.random.Generator, count: int, *, pictures: bool = True) -> Catalogue:
    """Draw ``count`` items of a world; pictures come last, so the rest is the same without them."""
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
        pictures=[draw(rng, shape[i], colour[i], texture[i]) for i in every] if pictures else [],
    )


def _choose(rng: np.random.Generator, shares: Floats) -> Ints:
    """Draw one column per row with the row's shares as probabilities."""
    chosen: Ints = np.argmax(np.log(shares) + rng.gumbel(size=shares.shape), axis=1)
    return chosen

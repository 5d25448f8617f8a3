"""How a synthetic item is called: a title made of attribute words, from a few templates, with words that say nothing.

Category, style and brand can be read in the title only; colour and texture are named now and then, the shape never.
Some titles also name a *second* category that the item merely goes with, so a bag of words is not enough.
"""

from __future__ import annotations

import numpy as np

CATEGORIES = (
    ("mug", "cup", "tumbler"),
    ("lamp", "light", "lantern"),
    ("bag", "tote", "satchel"),
    ("cushion", "pillow", "bolster"),
    ("clock", "timer", "watch"),
    ("vase", "urn", "jar"),
    ("rug", "mat", "carpet"),
    ("blanket", "throw", "quilt"),
    ("tray", "platter", "board"),
    ("box", "case", "crate"),
    ("notebook", "journal", "diary"),
    ("poster", "print", "canvas"),
)
"""Synonyms of each category."""
STYLES = (
    ("rustic", "farmhouse", "cottage"),
    ("modern", "minimal", "sleek"),
    ("vintage", "retro", "antique"),
    ("nautical", "coastal", "marine"),
    ("floral", "botanical", "blossom"),
    ("festive", "holiday", "party"),
    ("kids", "nursery", "playful"),
    ("luxury", "premium", "deluxe"),
)
"""Synonyms of each style."""
COLOUR_WORDS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
TEXTURE_WORDS = ("plain", "striped", "barred", "dotted", "checked", "shaded")
SYLLABLES = tuple(f"{a}{b}" for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "or", "an", "el"))
FILLERS = (
    "gift",
    "home",
    "quality",
    "new",
    "large",
    "small",
    "classic",
    "everyday",
    "design",
    "original",
    "set",
    "item",
)
GLUE = ("by", "for", "with", "your", "the", "and", "of", "goes", "pairs", "matches", "-", ",")

_TEMPLATES = (
    "{brand} {style} {paint} {category}",
    "{style} {category} by {brand} , {paint}",
    "{brand} {category} - {style} {filler} {paint}",
    "{filler} {category} , {paint} {style} , {brand}",
    "{brand} {style} {category} with {filler} design",
)
_COMPANIONS = ("goes with {other}", "for your {other}", "matches the {other}")

_COLOUR_NAMED = 0.15
_TEXTURE_NAMED = 0.1
_COMPANION_NAMED = 0.3


def brand_names(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    """Invented names of two syllables, all different: a tokenizer that never met one spells it in pieces."""
    numbers = rng.choice(len(SYLLABLES) ** 2, size=count, replace=False)
    return tuple(SYLLABLES[n // len(SYLLABLES)] + SYLLABLES[n % len(SYLLABLES)] for n in numbers)


def title(rng: np.random.Generator, brand: str, category: int, style: int, colour: int, texture: int) -> str:
    """One title of at most eleven words, in lower case."""
    template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
    paint = []
    if rng.random() < _COLOUR_NAMED:
        paint.append(COLOUR_WORDS[colour])
    elif rng.random() < _TEXTURE_NAMED:
        paint.append(TEXTURE_WORDS[texture])
    if rng.random() < _COMPANION_NAMED:
        other = (category + rng.integers(1, len(CATEGORIES))) % len(CATEGORIES)
        template += " " + _COMPANIONS[rng.integers(len(_COMPANIONS))].format(other=rng.choice(CATEGORIES[other]))
    words = template.format(
        brand=brand,
        style=rng.choice(STYLES[style]),
        category=rng.choice(CATEGORIES[category]),
        filler=rng.choice(FILLERS),
        paint=" ".join(paint),
    )
    return " ".join(words.split()).removesuffix(" ,")


def words() -> list[str]:
    """Every whole word a title can hold, brands aside."""
    groups = (*CATEGORIES, *STYLES, COLOUR_WORDS, TEXTURE_WORDS, FILLERS, GLUE)
    return sorted({word for group in groups for word in group})

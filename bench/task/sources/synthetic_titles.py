"""Titles of synthetic items: attribute words in a few templates, with uninformative filler words.

Category, style and brand appear in the title only; colour and texture are named occasionally, the shape never. Some
titles also name a *second* category, of a matching item, so a bag of words does not suffice.
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
BRANDS = 24
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
    """Invented names of two syllables, all different; a tokenizer splits an unknown one into pieces."""
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
        template += " " + _COMPANIONS[rng.integers(len(_COMPANIONS))].format(other=_one(rng, CATEGORIES[other]))
    words = template.format(
        brand=brand,
        style=_one(rng, STYLES[style]),
        category=_one(rng, CATEGORIES[category]),
        filler=_one(rng, FILLERS),
        paint=" ".join(paint),
    )
    return " ".join(words.split()).removesuffix(" ,")


def _one(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """What ``rng.choice(words)`` draws, which would make an array of them first."""
    return words[rng.integers(len(words))]


def words() -> list[str]:
    """All words that occur in titles, except brands."""
    groups = (*CATEGORIES, *STYLES, COLOUR_WORDS, TEXTURE_WORDS, FILLERS, GLUE)
    return sorted({word for group in groups for word in group})

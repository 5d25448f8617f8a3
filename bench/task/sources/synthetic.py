"""The built-in data set: synthetic items, and users whose behaviour depends on titles and images.

Signal: an item has a category, style and brand (in its title) and a colour, shape and texture (in its image), so each
modality carries half of the information. The next item depends on the previous one (a category leads to certain
others, a shape to the next one, the colour stays or moves to a neighbour), on the user (preferred styles, textures and
brands, visible only in the whole history) and weakly on popularity. The newest items occur only in the last two
interactions of a history: they are never trained on and can be ranked by content alone.

Tuning: the strengths in ``synthetic_histories`` were chosen, together with the pretraining of the tiny encoders
(``tpme.bench.task.tiny.pretrain``), such that a small recommender learns the task within a few hundred steps and that
popularity, item ids, frozen encoders and adapted encoders are clearly separated. Only data and pretraining were tuned,
with the same settings for all methods and without any code specific to a method. Results on this data show that the
benchmark works; they say nothing about real catalogues.
"""

from __future__ import annotations

import numpy as np

from tpme.bench.record import Modality
from tpme.bench.task.sources.raw import Computed, RawData
from tpme.bench.task.sources.synthetic_histories import make_histories
from tpme.bench.task.sources.synthetic_world import (
    Catalogue,
    Synthetic,
    World,
    make_catalogue,
    make_world,
)

__all__ = ["Catalogue", "Synthetic", "World", "generate", "make_catalogue", "make_world"]


def generate(config: Synthetic, modalities: tuple[Modality, ...] = ("text", "image")) -> RawData:
    """Generate the items, in these modalities, and the histories of these settings."""
    world = make_world(config.world)
    rng = np.random.default_rng((config.seed, 1))
    catalogue = make_catalogue(world, rng, config.items, pictures="image" in modalities)
    return RawData(
        name="synthetic",
        items=Computed(config.items, "item-{:05d}".format),
        titles=catalogue.titles,
        pictures=catalogue.pictures,
        users=Computed(config.users, "user-{:05d}".format),
        histories=make_histories(config, world, catalogue),
        skipped={},
        synthetic=config.model_dump(exclude_unset=True),
    ).only(modalities)

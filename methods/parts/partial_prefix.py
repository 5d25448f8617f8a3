"""Trained keys and values in the attention of some layers of an encoder, which are chosen after they were made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender, group
from tpme.bench.task.view import EncoderView
from tpme.methods.parts.attention import Attended
from tpme.methods.prefix import Prefix, PrefixConfig, prepend


class PartialPrefix(Prefix):
    """The keys and values of some layers of an encoder, (2, H_kv, P, d_h) each; table j belongs to ``chosen[j]``.

    Which layers these are is found when the data are there, after the tables were made: until then the first ones.
    """

    def __init__(self, view: EncoderView, length: int, number: int, dropout: float) -> None:
        super().__init__(view, PrefixConfig(length=length))
        self.dropout = dropout
        self.choose(range(number))

    def choose(self, layers: Iterable[int]) -> None:
        """Let the tables belong to ``layers``; drop those that are too many. Raises ValueError for too few tables."""
        chosen = tuple(int(layer) for layer in layers)
        if len(chosen) > len(self.layers):
            raise ValueError(f"state of another structure: prompts in {len(chosen)} layers, {len(self.layers)} here")
        self.chosen, self.layers = chosen, nn.ParameterList(list(self.layers)[: len(chosen)])
        group(self, "prompt")

    def vectors(self, layer: int) -> Tensor:
        """Keys and values of a chosen layer, (2, H_kv, P, d_h), with dropout in training."""
        table = super().vectors(self.chosen.index(layer))
        return nn.functional.dropout(table, self.dropout, self.training)


def partial_prefixes(model: Recommender) -> dict[Modality, PartialPrefix]:
    """The prompts of every encoder."""
    return {modality: view.module.get_submodule("prefix") for modality, view in model.views.items()}  # type: ignore[misc]


@contextmanager
def without_prompts(model: Recommender) -> Iterator[None]:
    """Attend to no prompts within the block."""
    before = {prefix: prefix.chosen for prefix in partial_prefixes(model).values()}
    try:
        for prefix in before:
            prefix.chosen = ()
        yield
    finally:
        for prefix, chosen in before.items():
            prefix.chosen = chosen


def prepend_chosen(
    prefix: PartialPrefix, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Attended:
    """Prepend the prompts in the chosen layers."""
    if layer not in prefix.chosen:
        return query, key, value, mask
    return prepend(prefix, layer, query, key, value, mask)

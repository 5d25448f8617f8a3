"""The search space of AutoPEFT: sizes, vectors, parameters."""

from __future__ import annotations

import itertools
from types import ModuleType

import numpy as np
import pytest

from tpme.bench.errors import UserError
from tpme.methods.parts.search_space import KINDS, EncoderModules, EncoderSize, SearchSpace, sizes_of

BASE = EncoderSize(width=768, depth=12, key_value=2 * 768)
SMALL = EncoderSize(width=4, depth=2, key_value=8)


def test_the_sizes_are_those_of_the_paper() -> None:
    assert sizes_of(768) == (768, 384, 192, 96, 48, 24, 12, 6, 3, 1, 0)


def test_the_space_of_bert_base_is_that_of_the_paper() -> None:
    space = SearchSpace({"text": BASE})
    assert len(space.choices) == 15
    assert len(space) == 11**3 * 2**12 == 5_451_776
    both = SearchSpace({"text": BASE, "image": BASE})
    assert (len(both.choices), len(both)) == (30, 5_451_776**2)
    assert len(SearchSpace({"text": BASE, "image": BASE}, shared=True)) == 5_451_776


def test_vectors_and_configurations_are_one_to_one() -> None:
    """Over a whole space: all sizes of width 4 (4, 2, 1, 0) of three kinds, two layers."""
    space = SearchSpace({"text": SMALL})
    vectors = list(itertools.product(*map(range, space.choices)))
    assert len(vectors) == len(space) == 4**3 * 2**2
    assert [space.encode(space.decode(vector)) for vector in vectors] == vectors
    assert len({str(space.decode(vector)) for vector in vectors}) == len(vectors)
    assert [space.nearest(point) for point in space.unit(vectors)] == vectors


def test_a_kind_that_is_named_twice_counts_once() -> None:
    assert (
        SearchSpace({"text": SMALL}, ["serial", "serial"]).choices == SearchSpace({"text": SMALL}, ["serial"]).choices
    )


def test_configurations_without_a_module_are_not_valid() -> None:
    space = SearchSpace({"text": SMALL, "image": SMALL}, ["serial"])
    sizes_off = space.encode({"text": EncoderModules(layers=(0, 1)), "image": EncoderModules(layers=(1,))})
    layers_off = space.encode({m: EncoderModules(serial=2, layers=()) for m in ("text", "image")})
    one_on = space.encode({"text": EncoderModules(serial=2, layers=()), "image": EncoderModules(serial=1, layers=(0,))})
    assert [space.valid(vector) for vector in (sizes_off, layers_off, one_on)] == [False, False, True]


def test_draws_are_valid_and_follow_the_seed() -> None:
    space = SearchSpace({"text": SMALL}, ["prefix"])
    first, again = (list(itertools.islice(space.draw(np.random.default_rng(3)), 200)) for _ in range(2))
    assert first == again
    assert all(map(space.valid, first))
    assert set(first) == set(filter(space.valid, itertools.product(range(4), range(2), range(2))))


def test_parameters_are_those_of_the_formula() -> None:
    modules = EncoderModules(serial=24, parallel=12, prefix=6, layers=(0, 3, 11))
    expected = 3 * ((2 * 768 * 24 + 24 + 768) + (2 * 768 * 12 + 12 + 768) + 6 * 2 * 768)
    assert BASE.parameters(modules) == expected
    space = SearchSpace({"text": BASE, "image": BASE})
    assert space.parameters(space.encode({"text": modules, "image": EncoderModules(layers=())})) == expected


def test_the_formula_is_what_trains(tiny: ModuleType) -> None:
    """Ten random configurations of the tiny encoders, beside the same model without a module."""
    _, frozen = tiny.build("frozen")
    views = tiny.views()
    space = SearchSpace({modality: EncoderSize.of(view) for modality, view in views.items()})
    for vector in itertools.islice(space.draw(np.random.default_rng(0)), 10):
        configuration = {modality: modules.model_dump() for modality, modules in space.decode(vector).items()}
        method, model = tiny.build("autopeft", {"configuration": configuration})
        trained, head = ([p.numel() for p in m.parameters() if p.requires_grad] for m in (model, frozen))
        assert sum(trained) - sum(head) == space.parameters(vector)
        assert set(method.frozen_encoders(("text", "image"))) == {
            modality for modality, modules in space.decode(vector).items() if modules.empty
        }


def test_shared_coordinates_give_both_encoders_the_same() -> None:
    space = SearchSpace({"text": BASE, "image": EncoderSize(384, 12, 768)}, shared=True)
    assert space.choices == (10, 10, 10, *[2] * 12)
    found = space.decode((0, 8, 9, *[1, 0] * 6))
    assert [found["text"].serial, found["image"].serial] == [768, 384]
    assert [found["text"].parallel, found["image"].parallel] == [3, 1]
    assert [found["text"].prefix, found["image"].prefix] == [0, 0]
    assert found["text"].layers == found["image"].layers == (0, 2, 4, 6, 8, 10)


def test_shared_coordinates_need_the_same_depth() -> None:
    with pytest.raises(
        UserError, match="needs encoders of the same depth, these have text 12, image 2 layers"
    ) as error:
        SearchSpace({"text": BASE, "image": SMALL}, KINDS, shared=True)
    assert "\n" not in str(error.value)

"""Matrices: which cells they expand to, what they refuse, and what makes two cells the same."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tpme.bench.counting.batch import DataShape
from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec, cell_id
from tpme.bench.run.cell_checks import MetaCells, check_cells
from tpme.bench.run.matrix import MatrixFile, PreparedDataset, expand, load_matrix, presets
from tpme.bench.task.encoders import pin_revision
from tpme.methods.registry import available

TEXT = PreparedDataset(Path("/nowhere/text"), "f" * 64, ("text",))
BOTH = PreparedDataset(Path("/nowhere/both"), "e" * 64, ("text", "image"))
SHAPES = {"d": DataShape.assumed(users=50, items=100)}
HUB = {"text": {"source": "somebody/text"}, "image": {"source": "somebody/image"}}


def raw(**changes: Any) -> dict[str, Any]:
    """A small matrix as it is written."""
    plain = {
        "name": "m",
        "datasets": [{"name": "d", "path": "/nowhere/both"}],
        "encoders": [HUB],
        "methods": [{"name": "fft"}, {"name": "frozen"}],
    }
    return {key: value for key, value in (plain | changes).items() if value is not None}


def cells(data: PreparedDataset = BOTH, device: str = "cpu", **changes: Any) -> list[Cell]:
    matrix = MatrixFile.model_validate(raw(**changes))
    return expand(matrix, {entry.name: data for entry in matrix.datasets}, device=device)


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "m.toml"
        path.write_text(text)
        return str(path)

    return write


MINIMAL = """
name = "m"
datasets = [{ name = "d", path = "data" }, { name = "s", synthetic = { users = 50 } }]
encoders = [{ text = { source = "somebody/text" } }, { text = { source = "somebody/other" } }]
methods = [{ name = "fft" }, { name = "frozen", options = { } }]
"""


# --- expansion ------------------------------------------------------------------------------------------------------


def test_cells_are_the_product_of_all_axes_in_the_order_they_run() -> None:
    found = cells(
        datasets=[{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}],
        encoders=[HUB, HUB | {"image": {"source": "somebody/larger"}}],
        seeds=[1, 2],
        axes={"precision": ["fp32", "bf16"], "blocks": [1, 2]},
        methods=[{"name": "frozen", "cached": [False, True], "lr": [1e-3, 2e-3]}, {"name": "fft", "lr": [1e-4, 2e-4]}],
    )
    methods = [("frozen", False, 1e-3), ("frozen", False, 2e-3), ("frozen", True, 1e-3), ("frozen", True, 2e-3)]
    methods += [("fft", False, 1e-4), ("fft", False, 2e-4)]
    images = ("somebody/image", "somebody/larger")
    expected = itertools.product("ab", images, (1, 2), ("fp32", "bf16"), (1, 2), methods)
    assert [
        (
            cell.dataset,
            cell.image_encoder.source if cell.image_encoder else None,
            cell.seed,
            cell.training.precision,
            cell.training.blocks,
            (cell.method, cell.cached, cell.lr.image),
        )
        for cell in found
    ] == list(expected)
    assert len({cell_id(cell, "v") for cell in found}) == len(found) == 2 * 2 * 2 * 4 * 6


def test_a_cell_carries_every_setting_of_its_matrix() -> None:
    (cell,) = cells(
        methods=[{"name": "lora", "options": {"rank": 4}}],
        protocol="paper",
        seeds=[7],
        training={"epochs": 3, "precision": "bf16", "activation_checkpointing": True},
        lr={"recommender": 1e-3, "text": 2e-3, "image": 3e-3, "method": 4e-3},
        device="cuda",
    )
    assert (cell.method, cell.options, cell.cached, cell.protocol, cell.seed) == (
        "lora",
        {"rank": 4},
        False,
        "paper",
        7,
    )
    assert (cell.training.epochs, cell.training.precision, cell.training.activation_checkpointing) == (3, "bf16", True)
    assert cell.lr.model_dump() == {"recommender": 1e-3, "text": 2e-3, "image": 3e-3, "method": 4e-3}
    assert (cell.dataset, cell.dataset_fingerprint, cell.device) == ("d", BOTH.fingerprint, "cuda")
    assert (cell.lr_trial, cell.lr_trials) == (0, 1)


def test_a_cell_says_which_matrix_asked_and_whether_it_is_a_baseline(tmp_path: Path) -> None:
    (tmp_path / "nearest.py").write_text(
        "from tpme.methods.base import Method\n\nclass Nearest(Method):\n    baseline = True\n\nMETHOD = Nearest\n"
    )
    names = ("fft", "iisan", "frozen", "id", "popularity", "nearest")
    matrix = MatrixFile.model_validate(raw(name="mine", methods=[{"name": name} for name in names]))
    found = expand(matrix, {"d": BOTH}, device="cpu", methods_path=[tmp_path])
    assert {cell.matrix for cell in found} == {"mine"}
    assert [cell.method for cell in found if cell.baseline] == ["frozen", "id", "popularity", "nearest"]


def test_patterns_stand_for_the_methods_that_no_entry_names() -> None:
    every = list(available())
    assert [cell.method for cell in cells(methods="all")] == every
    assert [cell.method for cell in cells(methods="iisan*")] == ["iisan", "iisan-versa"]
    found = cells(methods=["i*", {"name": "id"}, {"name": "*", "lr": [1e-2]}, "frozen"])
    inner = [name for name in every if name.startswith("i") and name != "id"]
    rest = [name for name in every if name not in {*inner, "id", "frozen"}]
    assert [cell.method for cell in found] == [*inner, "id", *rest, "frozen"]
    assert {cell.method for cell in found if cell.lr.method == 1e-2} == set(rest)
    titles = {cell.method for cell in cells(data=TEXT, methods="all")}
    assert set(every) - titles == {"context-peft"}  # it needs images too


def test_trials_are_laid_over_the_learning_rates_of_the_matrix() -> None:
    base = {"recommender": 1e-3, "text": 2e-3, "image": 3e-3, "method": 4e-3}
    found = cells(methods=[{"name": "fft", "lr": [5e-3, {"text": 6e-3}, 1]}], lr=base)
    assert [cell.lr.model_dump() for cell in found] == [
        {"recommender": 1e-3, "text": 5e-3, "image": 5e-3, "method": 5e-3},
        base | {"text": 6e-3},
        {"recommender": 1e-3, "text": 1.0, "image": 1.0, "method": 1.0},
    ]
    assert [(cell.lr_trial, cell.lr_trials) for cell in found] == [(0, 3), (1, 3), (2, 3)]


def test_learning_rates_are_an_axis_of_the_matrix() -> None:
    """Every method gets the trials of the axis, or as many of its own."""
    base = {"recommender": 1e-3, "text": 2e-3, "image": 3e-3, "method": 4e-3}
    own = {"name": "fft", "lr": [1e-5, 2e-5]}
    found = cells(methods=[own, {"name": "id"}, {"name": "popularity"}], lr=base, axes={"lr": [5e-3, {"text": 6e-3}]})
    assert [(cell.method, cell.lr_trial, cell.lr_trials, cell.lr.text) for cell in found] == [
        ("fft", 0, 2, 1e-5),
        ("fft", 1, 2, 2e-5),
        ("id", 0, 2, 5e-3),
        ("id", 1, 2, 6e-3),
        ("popularity", 0, 2, 5e-3),
        ("popularity", 1, 2, 6e-3),
    ]
    assert {cell.lr.recommender for cell in found} == {1e-3}
    assert {cell.training for cell in found} == {found[0].training}


GATED = (
    "from tpme.methods.base import Method\n\nclass Gated(Method):\n    groups = ('gates', 'banks')\n\nMETHOD = Gated\n"
)


def test_a_method_gets_the_learning_rates_of_its_own_groups(tmp_path: Path) -> None:
    (tmp_path / "gated.py").write_text(GATED)

    def rates(methods: list[Any], **changes: Any) -> list[dict[str, float]]:
        matrix = MatrixFile.model_validate(raw(methods=methods, **changes))
        return [cell.lr.groups for cell in expand(matrix, {"d": BOTH}, device="cpu", methods_path=[tmp_path])]

    gated = {"name": "gated", "lr": [{"groups": {"gates": 1e-2}}, 1e-3]}
    fft = {"name": "fft", "lr": [1e-3, 1e-4]}
    assert rates([gated, fft]) == [{"gates": 1e-2}, {}, {}, {}]
    shared = {"groups": {"gates": 3e-2, "banks": 2e-2}}
    assert rates([gated, fft], lr=shared) == [{"gates": 1e-2, "banks": 2e-2}, shared["groups"], {}, {}]
    assert rates([{"name": "gated"}, {"name": "id"}], axes={"lr": [shared, 1e-3]}) == [shared["groups"], {}, {}, {}]
    with pytest.raises(UserError, match=r"method 'fft', lr.groups: no .*'gates'; there are no groups"):
        rates([{"name": "gated"}, {"name": "fft", "lr": [{"groups": {"gates": 1e-2}}]}])
    with pytest.raises(UserError, match=r"matrix .*, lr.groups: no .*'gatse'; its groups are: banks, gates$"):
        rates([{"name": "gated"}], lr={"groups": {"gatse": 1e-2}})


def test_recomputed_activations_and_several_passes_are_refused(tmp_path: Path) -> None:
    body = "from tpme.methods.base import Method\n\nclass Two(Method):\n"
    (tmp_path / "two.py").write_text(f"{body}    def passes(self):\n        return 'thin', 'full'\n\nMETHOD = Two\n")
    (tmp_path / "side.py").write_text(
        (tmp_path / "two.py").read_text().replace("    def", "    decoupled = True\n\n    def")
    )

    def count(*names: str, **changes: Any) -> int:
        matrix = MatrixFile.model_validate(raw(methods=[{"name": name} for name in names], **changes))
        return len(expand(matrix, {"d": BOTH}, device="cpu", methods_path=[tmp_path]))

    assert count("two") == 1
    checkpointing = {"training": {"activation_checkpointing": True}}
    assert count("fft", "side", **checkpointing) == 2
    for changes in (checkpointing, {"axes": {"activation_checkpointing": [False, True]}}):
        with pytest.raises(UserError, match=r"'two' has 2 passes a step \(thin, full\): .* = false$"):
            count("fft", "two", **changes)


def test_no_groups_leave_a_cell_what_it_was() -> None:
    (cell,) = cells(methods=[{"name": "fft"}])
    assert "groups" not in cell.model_dump()["lr"]
    assert "groups" not in cell.model_dump_json()
    named = cell.model_copy(update={"lr": cell.lr.model_copy(update={"groups": {"gates": 1e-2}})})
    assert Cell.model_validate_json(named.model_dump_json()) == named
    assert cell_id(named, "v") != cell_id(cell, "v")


def test_modalities_are_those_of_the_data_or_those_asked_for() -> None:
    (cell, _) = cells()
    assert cell.modalities == ("text", "image")
    (cell, _) = cells(data=TEXT)
    assert (cell.modalities, cell.image_encoder) == (("text",), None)
    (cell, _) = cells(modalities=["image"])
    assert (cell.modalities, cell.text_encoder) == (("image",), None)
    # Their order is no setting: it must not make another cell.
    assert cells(modalities=["image", "text"]) == cells(modalities=["text", "image"]) == cells()


def test_the_paper_protocol_alone_lets_a_method_choose_its_batch() -> None:
    (cell,) = cells(methods=[{"name": "fft", "training": {"users_per_batch": 64}}], protocol="paper")
    assert cell.training.users_per_batch == 64


def test_all_presets_expand() -> None:
    assert set(presets()) >= {"demo", "iisan-paper", "scientific-text"}
    found = {}
    for name in presets():
        matrix = load_matrix(name)
        data = TEXT if matrix.modalities == ("text",) else BOTH
        found[name] = expand(matrix, {entry.name: data for entry in matrix.datasets}, device="cpu")
    demo = [cell.label for cell in found["demo"]]
    cards = ["fft", "adapter", "lora", "bitfit", "prompt", "iisan", "iisan (cached)", "frozen (cached)"]
    cards += ["id", "popularity"]
    assert demo == cards
    assert {cell.training.epochs for cell in found["demo"]} == {8}
    paper = {cell.label: cell for cell in found["iisan-paper"]}
    assert list(paper) == ["fft", "adapter", "lora", "bitfit", "iisan", "iisan (cached)"]
    assert {cell.protocol for cell in paper.values()} == {"paper"}
    assert {cell.training.precision for cell in paper.values()} == {"fp16"}
    assert {label: cell.training.users_per_batch for label, cell in paper.items()} == dict.fromkeys(paper, 32) | {
        "iisan": 64,
        "iisan (cached)": 64,
    }
    assert paper["lora"].options == {"rank": 8, "alpha": 1}
    assert paper["fft"].lr.model_dump(exclude={"method"}) == {"recommender": 1e-4, "text": 5e-5, "image": 1e-4}
    assert (paper["iisan"].lr.recommender, paper["iisan"].lr.method) == (2e-4, 1e-4)
    text = found["scientific-text"]
    assert [cell.label for cell in text] == ["iisan (cached)", "frozen (cached)", "id", "popularity"]
    assert {cell.modalities for cell in text} == {("text",)}
    assert {cell.image_encoder for cell in text} == {None}


# --- mistakes -------------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"trainings": {}}, "trainings: no such setting; did you mean training\\?"),
    "unknown training key": ({"training": {"epoch": 2}}, "training.epoch: .*; did you mean training.epochs\\?"),
    "a word of other tools": ({"training": {"batch_size": 2}}, "batch_size: .*; did you mean training.users_per_batch"),
    "a key of another table": ({"training": {"learning_rate": 1e-3}}, "learning_rate: .*; did you mean lr\\?"),
    "a key that is in a table": ({"epochs": 3}, "epochs: no such setting; did you mean training.epochs\\?"),
    "a key of an encoder": (
        {"encoders": [{"text": {"source": "a", "weight": "random"}}]},
        "encoders.0.text.weight: .*; did you mean encoders.text.weights\\?",
    ),
    "a key unlike any other": ({"lr": {"qqq": 1}}, "lr.qqq: no such setting; known: recommender, text, image, method,"),
    "unknown method key": ({"methods": [{"name": "fft", "cahced": True}]}, "methods.0: 'cahced': did you mean cached"),
    "an option twice": (
        {"methods": [{"name": "lora", "rank": 1, "options": {"rank": 2}}]},
        "option 'rank' is given tw",
    ),
    "a seed as a number": ({"seeds": 42}, r"seeds: 42 is a number of seeds, .* write seeds = \[42\]"),
    "a number for a table": ({"lr": 1e-3}, "lr: this is a table; known: recommender, text, image, method, groups"),
    "a name for a table": ({"encoders": [{"text": "bert"}]}, "encoders.0.text: this is a table; known: source, revis"),
    "one name for a list": ({"modalities": "text"}, "modalities: this is a list, in square brackets"),
    "no number of seeds": ({"seeds": 0}, "seeds: .*at least 1"),
    "a size without a unit": ({"cache_limit_bytes": "8Q"}, "cache_limit_bytes: '8Q': give a number and a unit"),
    "no methods": ({"methods": []}, "methods: .*at least 1"),
    "no data": ({"datasets": []}, "datasets: .*at least 1"),
    "no encoders": ({"encoders": []}, "encoders: .*at least 1"),
    "no such pooling": ({"encoders": [{"text": {"source": "a", "pool": "max"}}]}, "encoders.0.text.pool: .*'first'"),
    "no such tower": ({"encoders": [{"text": {"source": "a", "tower": "audio"}}]}, "encoders.0.text.tower: .*'text'"),
    "no such dtype": ({"encoders": [{"text": {"source": "a", "dtype": "fp8"}}]}, "encoders.0.text.dtype: .*'fp32'"),
    "no seeds": ({"seeds": []}, "seeds: .*at least 1"),
    "a negative seed": ({"seeds": [-1]}, "seeds.0: .*greater than or equal to 0"),
    "an empty axis": ({"axes": {"precision": []}}, "axes.precision: .*at least 1"),
    "no modality": ({"modalities": []}, "modalities: .*at least 1"),
    "neither cached nor not": ({"methods": [{"name": "iisan", "cached": []}]}, "methods.0.cached"),
    "no trial": ({"methods": [{"name": "fft", "lr": []}]}, "methods.0.lr"),
    "two sources": ({"datasets": [{"name": "d", "path": "x", "synthetic": {}}]}, "datasets.0: .*give either path"),
    "no source": ({"datasets": [{"name": "d"}]}, "datasets.0: .*give either path"),
    "one name twice": (
        {"datasets": [{"name": "d", "path": "a"}, {"name": "d", "path": "b"}]},
        "two data sets share a",
    ),
    "unknown protocol": ({"protocol": "mine"}, "protocol: Input should be 'suite' or 'paper'"),
    "zero epochs": ({"training": {"epochs": 0}}, "training.epochs: .*greater than 0"),
    "text for a number": ({"training": {"epochs": "many"}}, "training.epochs: .*valid integer"),
    "an infinite learning rate": ({"lr": {"text": float("inf")}}, "lr: inf is not a finite number"),
    "a negative trial": ({"methods": [{"name": "fft", "lr": [-1e-3]}]}, "methods.0.lr.0.number: .*greater than 0"),
    "no name": ({"name": None}, "name: Field required"),
    "a limit of nothing": ({"time_limit_s": 0}, "time_limit_s: .*greater than 0"),
}
CONFLICTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"methods": [{"name": "lorra"}]}, "unknown method 'lorra'; did you mean 'lora'"),
    "unknown option": ({"methods": [{"name": "lora", "options": {"r": 8}}]}, "'lora', option 'r': .*options are: rank"),
    "an option of other tools": (
        {"methods": [{"name": "lora", "lora_alpha": 8}]},
        "no such option .did you mean 'alpha'",
    ),
    "a setting among options": (
        {"methods": [{"name": "fft", "epochs": 2}]},
        "'fft', option 'epochs': there is no such",
    ),
    "a batch size on an axis": ({"axes": {"batch_size": [8, 16]}}, "batch_size: .*; did you mean users_per_batch\\?"),
    "bad option": ({"methods": [{"name": "lora", "options": {"rank": 0}}]}, "'lora', option 'rank': .*greater than 0"),
    "cached encoders that train": (
        {"methods": [{"name": "fft", "cached": True}]},
        "'fft' cannot be cached: it leaves no encoder frozen",
    ),
    "half cached": ({"methods": [{"name": "fft", "cached": [False, True]}]}, "'fft' cannot be cached"),
    "unequal trials": (
        {"methods": [{"name": "fft", "lr": [1e-3, 1e-4]}, {"name": "lora"}]},
        "same number of lr trials, but there are fft 2, lora 1",
    ),
    "unequal trials of one method": (
        {"methods": [{"name": "lora", "lr": [1e-3, 1e-4]}, {"name": "lora", "options": {"rank": 4}, "lr": [1e-3]}]},
        "same number of lr trials, but there are lora 2, lora 1",
    ),
    "unequal trials beside an axis": (
        {"methods": [{"name": "fft", "lr": [1e-3]}, {"name": "lora"}], "axes": {"lr": [1e-3, 1e-4]}},
        "same number of lr trials, but there are fft 1, lora 2",
    ),
    "a bad learning rate on an axis": (
        {"axes": {"lr": [1e-3, -1]}},
        "axes.lr: 1.number: Input should be greater than 0",
    ),
    "an unknown part on an axis": ({"axes": {"lr": [{"txt": 1e-3}]}}, "axes.lr: 0.table.txt: no such setting"),
    "an unknown axis": ({"axes": {"colour": ["red"]}}, "axes: colour: no such setting"),
    "a bad value on an axis": ({"axes": {"precision": ["fp32", "fp8"]}}, "axes: precision: Input should be 'fp32'"),
    "a batch of its own": (
        {"methods": [{"name": "fft", "training": {"users_per_batch": 64}}]},
        "'fft': training settings belong to the task",
    ),
    "epochs of its own": (
        {"protocol": "paper", "methods": [{"name": "fft", "training": {"epochs": 64}}]},
        "only the paper protocol lets a method set users_per_batch",
    ),
    "a bad batch of its own": (
        {"protocol": "paper", "methods": [{"name": "fft", "training": {"users_per_batch": 0}}]},
        "'fft', training: users_per_batch: .*greater than 0",
    ),
    "no image encoder": ({"encoders": [{"text": HUB["text"]}]}, "uses image but names no image encoder"),
    "a pattern without a method": ({"methods": ["fft", "lara*"]}, "no method matches 'lara\\*'; known: .*lora"),
    "the same twice": ({"methods": [{"name": "id"}, {"name": "id"}]}, "'id' appears twice"),
    "cached twice": ({"methods": [{"name": "iisan", "cached": [True, True]}]}, "'iisan .cached.' appears twice"),
    "the same trial twice": ({"methods": [{"name": "fft", "lr": [1e-3, 1e-3]}]}, "'fft' appears twice"),
    "more stages than epochs": (
        {"methods": ["pt-peft"], "training": {"epochs": 1}},
        "'pt-peft' trains in 2 stages of at least one epoch each; raise training.epochs, which is 1",
    ),
    "half precision that trains": (
        {"encoders": [{**HUB, "image": {"source": "somebody/image", "dtype": "bf16"}}]},
        "'fft' trains through the image encoder, whose weights must then be in float32; remove dtype = 'bf16'",
    ),
    "no such encoder": ({"encoders": [{**HUB, "text": {"source": "./nowhere"}}]}, "'./nowhere': it has no config.json"),
    "no such built-in": ({"encoders": [{**HUB, "text": {"source": "builtin:huge"}}]}, "no such built-in encoder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_file_is_one_line_that_says_where(name: str, tmp_path: Path) -> None:
    changes, message = MISTAKES[name]
    path = tmp_path / "m.toml"
    path.write_text(tomli_w.dumps(raw(**changes)))
    with pytest.raises(UserError, match=message) as error:
        load_matrix(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_does_not_fit_together_is_refused_before_anything_runs(name: str) -> None:
    changes, message = CONFLICTS[name]
    with pytest.raises(UserError, match=message) as error:
        check_cells(cells(**changes), SHAPES, 10**12, MetaCells())
    assert "\n" not in str(error.value)


def test_what_a_method_cannot_do_with_these_encoders_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "shallow.py").write_text(
        "from tpme.bench.errors import UserError\nfrom tpme.methods.base import Method\n\n"
        "class Shallow(Method):\n    def adapt(self, model, schedule):\n        for view in model.views.values():\n"
        "            if view.shape.depth > 1:\n                raise UserError('one layer at most')\n\n"
        "METHOD = Shallow\n"
    )
    tiny = {"text": {"source": "builtin:tiny-text"}, "image": {"source": "builtin:tiny-image"}}
    matrix = MatrixFile.model_validate(raw(methods=["frozen", "shallow"], encoders=[tiny], seeds=[1, 2]))
    found = expand(matrix, {"d": BOTH}, device="cpu", methods_path=[tmp_path])
    with pytest.raises(UserError, match=r"^method 'shallow': one layer at most$"):
        check_cells(found, SHAPES, 10**12, MetaCells([tmp_path]))
    check_cells([cell for cell in found if cell.method == "frozen"], SHAPES, 10**12, MetaCells())


def test_modalities_that_data_or_method_lack(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data set 'd' has no image; set modalities = \['text'\]"):
        cells(data=TEXT, modalities=["text", "image"])
    (tmp_path / "needy.py").write_text(
        "from tpme.methods.base import Method\nclass Needy(Method):\n    needs = ('text', 'image')\nMETHOD = Needy\n"
    )
    matrix = MatrixFile.model_validate(raw(methods=[{"name": "needy"}]))
    with pytest.raises(UserError, match="method 'needy' needs text and image; this matrix has no image"):
        expand(matrix, {"d": TEXT}, device="cpu", methods_path=[tmp_path])
    assert len(expand(matrix, {"d": BOTH}, device="cpu", methods_path=[tmp_path])) == 1


def test_a_file_that_is_none(toml: Callable[[str], str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matrix 'demmo': no such file, and no preset; did you mean 'demo'\?$"):
        load_matrix("demmo")
    with pytest.raises(UserError, match=r"matrix 'mine': no such file, and no preset \(.*demo, "):
        load_matrix("mine")
    with pytest.raises(UserError, match=r"m.toml: not a readable TOML file: .*line 1"):
        load_matrix(toml("name = m"))
    with pytest.raises(UserError, match="not a regular file"):
        load_matrix(str(tmp_path))
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.toml: not UTF-8 \(byte 8\)"):
        load_matrix(str(tmp_path / "latin.toml"))


# --- short forms ----------------------------------------------------------------------------------------------------


def test_methods_are_names_tables_or_tables_with_their_options(toml: Callable[[str], str]) -> None:
    long = MatrixFile.model_validate(raw(methods=[{"name": "fft"}, {"name": "lora", "options": {"rank": 4}}]))
    assert MatrixFile.model_validate(raw(methods=["fft", {"name": "lora", "rank": 4}])).methods == long.methods
    mixed = {"name": "lora", "rank": 4, "options": {"alpha": 2}, "cached": False}
    assert MatrixFile.model_validate(raw(methods=[mixed])).methods[0].options == {"rank": 4, "alpha": 2}
    for setting in ('methods=["fft", "id"]', "methods=[fft, id]", "methods=fft,id"):  # with quotes that a shell removes
        assert [entry.name for entry in load_matrix(toml(MINIMAL), [setting]).methods] == ["fft", "id"]
    named = load_matrix(
        toml(MINIMAL.replace('{ name = "fft" }', '"lora"')), ["methods.0.rank=2", "methods.1.cached=true"]
    )
    assert [(entry.options, entry.cached) for entry in named.methods] == [({"rank": 2}, False), ({}, True)]


def test_a_number_of_seeds_begins_with_the_default_seed() -> None:
    assert MatrixFile.model_validate(raw(seeds=3)).seeds == (12345, 12346, 12347)
    assert MatrixFile.model_validate(raw(seeds=1)).seeds == MatrixFile.model_validate(raw()).seeds
    assert MatrixFile.model_validate(raw(seeds=[3])).seeds == (3,)


@pytest.mark.parametrize(("size", "number"), [("8G", 8 * 10**9), ("8GiB", 8 * 2**30), ("500 MB", 5 * 10**8), (70, 70)])
def test_sizes_have_units(size: str | int, number: int, toml: Callable[[str], str]) -> None:
    assert MatrixFile.model_validate(raw(cache_limit_bytes=size)).cache_limit_bytes == number
    assert load_matrix(toml(MINIMAL), [f"cache_limit_bytes={size}"]).cache_limit_bytes == number


# --- --set ----------------------------------------------------------------------------------------------------------


def test_settings_reach_into_tables_and_lists(toml: Callable[[str], str]) -> None:
    matrix = load_matrix(
        toml(MINIMAL),
        [
            "training.epochs=2",
            "training.precision=bf16",  # no TOML value: taken as text
            "encoders.text.source=/a b/c",  # into every pair
            'encoders.1.text.revision="main"',  # into one
            "methods.1.options.x=1",
            "datasets.1.synthetic.users=70",
            "seeds=[3, 4]",
            "lr.recommender=1e-2",
            "seeds.0=5",
        ],
    )
    assert (matrix.training.epochs, matrix.training.precision) == (2, "bf16")
    assert [pair.text and (pair.text.source, pair.text.revision) for pair in matrix.encoders] == [
        ("/a b/c", None),
        ("/a b/c", "main"),
    ]
    assert [method.options for method in matrix.methods] == [{}, {"x": 1}]
    assert matrix.datasets[1].synthetic == {"users": 70}
    assert matrix.seeds == (5, 4)
    assert matrix.lr.recommender == 1e-2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.epochs", "--set training.epochs: write it as key=value"),
        ("training.epoch=2", r"^--set training.epoch=2: training.epoch: .*; did you mean training.epochs\?$"),
        ("batch_size=8", r"^--set batch_size=8: batch_size: .*; did you mean training.users_per_batch\?$"),
        ("encoders.text.wieghts=random", r"^--set encoders.text.wieghts=random: .* mean encoders.text.weights\?$"),
        ("training.epochs=", "training.epochs: .*valid integer"),
        ("name.first=x", "--set name.first=x: no such setting in the matrix"),
        ("methods.7.name=x", "--set methods.7.name=x: no such setting in the matrix"),
        ("methods.0=1", "methods.0: "),
        ("=1", ": no such setting"),
    ],
)
def test_a_setting_that_fits_nowhere(toml: Callable[[str], str], setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_matrix(toml(MINIMAL), [setting])
    assert "\n" not in str(error.value)


# --- identity -------------------------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "method": {"methods": [{"name": "bitfit"}]},
    "options": {"methods": [{"name": "iisan", "options": {"bottleneck": 8}}]},
    "cached": {"methods": [{"name": "iisan", "cached": True}]},
    "protocol": {"protocol": "paper"},
    "modalities": {"modalities": ["text"]},
    "encoder": {"encoders": [HUB | {"text": {"source": "somebody/else"}}]},
    "revision": {"encoders": [HUB | {"text": {"source": "somebody/text", "revision": "v2"}}]},
    "weights": {"encoders": [HUB | {"text": {"source": "somebody/text", "weights": "random"}}]},
    **{
        name: {"encoders": [HUB | {"text": {"source": "somebody/text", name: value}}]}
        for name, value in {"tower": "text", "pool": "mean", "dtype": "bf16", "attention": "eager"}.items()
    },
    "seed": {"seeds": [1]},
    "lr": {"lr": {"recommender": 3e-4}},
    "name of the data": {"datasets": [{"name": "e", "path": "/nowhere/both"}]},
    **{
        f"training.{name}": {"training": {name: value}}
        for name, value in {
            "epochs": 3,
            "patience": 3,
            "users_per_batch": 16,
            "precision": "bf16",
            "activation_checkpointing": True,
            "compile": True,
            "cuda_graphs": True,
            "embedding_dim": 32,
            "dropout": 0.2,
            "blocks": 1,
            "heads": 1,
            "title_tokens": 12,
            "max_steps_per_epoch": 5,
            "devices": 2,
        }.items()
    },
    "training.shard": {"training": {"devices": 2, "shard": True}},
}


def test_identity_changes_with_everything_that_may_change_the_result() -> None:
    plain = raw(methods=[{"name": "iisan"}])
    ids = {"plain": cell_id(cells(**plain)[0], "v")}
    for name, changes in CHANGES.items():
        ids[name] = cell_id(cells(**(plain | changes))[0], "v")
    ids["data"] = cell_id(cells(data=PreparedDataset(BOTH.path, "0" * 64, BOTH.modalities), **plain)[0], "v")
    ids["device"] = cell_id(cells(device="cuda", **plain)[0], "v")
    ids["code"] = cell_id(cells(**plain)[0], "w")
    assert len(set(ids.values())) == len(ids)
    # Every field of the settings is among the changes above.
    assert {name.removeprefix("training.") for name in CHANGES if "." in name} == set(
        cells(**plain)[0].training.model_dump()
    )


def test_identity_does_not_change_with_places_names_or_order() -> None:
    plain = cells(methods=[{"name": "iisan"}])[0]
    for changes in (
        {"name": "another"},
        {"description": "words"},
        {"time_limit_s": 5},
        {"cache_limit_bytes": 5},
        {"datasets": [{"name": "d", "path": "/elsewhere"}]},
        {"methods": [{"name": "fft"}, {"name": "iisan"}]},
    ):
        moved = PreparedDataset(Path("/elsewhere"), BOTH.fingerprint, BOTH.modalities)
        found = cells(data=moved, **({"methods": [{"name": "iisan"}]} | changes))
        assert [cell_id(cell, "v") for cell in found if cell.method == "iisan"] == [cell_id(plain, "v")]
    # A further trial leaves the first one as it is.
    trials = cells(methods=[{"name": "iisan", "lr": [{}, 1e-3]}])
    assert [cell_id(cell, "v") == cell_id(plain, "v") for cell in trials] == [True, False]


def test_identity_is_the_same_in_every_process() -> None:
    cell = cells(methods=[{"name": "lora", "options": {"rank": 4, "alpha": 2, "targets": ["query", "key"]}}])[0]
    program = (
        "import sys; from tpme.bench.record import Cell, cell_id; "
        "print(cell_id(Cell.model_validate_json(sys.argv[1]), 'v'))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program, cell.model_dump_json()],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert told == {cell_id(cell, "v")}
    assert len(cell_id(cell, "v")) == 12


def test_an_encoder_in_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "bert"}')
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "README.md").write_text(name)
    spec = EncoderSpec(source=str(tmp_path / "a"))
    before = pin_revision(spec)
    assert before.revision is not None
    assert pin_revision(before) == before
    assert pin_revision(EncoderSpec(source=str(tmp_path / "b"))).revision == before.revision
    (cell, _) = cells(encoders=[{"text": {"source": str(tmp_path / "a")}}], modalities=["text"])
    assert cell.text_encoder == before
    (tmp_path / "a" / "model.safetensors").write_bytes(b"other weights")
    assert pin_revision(spec).revision != before.revision
    assert pin_revision(spec.model_copy(update={"weights": "random"})) == pin_revision(
        EncoderSpec(source=str(tmp_path / "a"), weights="random", revision="anything")
    )
    hub = EncoderSpec(source="somebody/text", revision="v1")
    assert pin_revision(hub) == hub

"""Files of precomputed states: read by item wherever their rows are, and refused in one line where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.encoders import encoder_shape, pin_revision
from tpme.bench.task.items import EncoderShape, Reads
from tpme.bench.task.placement import place, table_bytes
from tpme.bench.task.precomputed import StatesFile

NAMES = ["", "apple", "pear", "plum", "fig"]
"""Item names of a data set of four items, as ``Dataset.item_names``."""
STATES = torch.arange(4 * 3 * 2, dtype=torch.float32).reshape(4, 3, 2) / 4
ARRAY = STATES.numpy()
LEVELS = Reads((0, 2), final=True)


def npy(folder: Path, values: Any = ARRAY) -> EncoderSpec:
    np.save(folder / "states.npy", values)
    return EncoderSpec(source=f"states:{folder / 'states.npy'}")


def tensors(folder: Path, values: torch.Tensor = STATES, items: Any = None, name: str = "states") -> EncoderSpec:
    metadata = None if items is None else {"items": items if isinstance(items, str) else json.dumps(items)}
    save_file({"other": torch.zeros(3), name: values}, folder / "states.safetensors", metadata)
    return EncoderSpec(source=f"states:{folder / 'states.safetensors'}")


def by_item(spec: EncoderSpec, reads: Reads = LEVELS) -> torch.Tensor:
    return StatesFile.open(spec).read(reads, NAMES).whole(torch.device("cpu"))


EXPECTED = torch.cat([torch.zeros(1, 3, 2), STATES[:, [0, 2, 2]]])


def test_rows_are_those_of_the_data_set(tmp_path: Path) -> None:
    assert torch.equal(by_item(npy(tmp_path)), EXPECTED)
    assert torch.equal(by_item(tensors(tmp_path)), EXPECTED)


def test_named_rows_may_have_any_order_and_company(tmp_path: Path) -> None:
    order = [3, 0, 2, 1]
    more = torch.cat([STATES[order], torch.full((1, 3, 2), 9.0)])
    assert torch.equal(by_item(tensors(tmp_path, more, ["fig", "apple", "plum", "pear", "kiwi"])), EXPECTED)


def test_one_state_an_item_is_its_level_0_and_its_final_state(tmp_path: Path) -> None:
    spec = npy(tmp_path, STATES[:, 0].numpy())
    assert encoder_shape(spec, "text") == EncoderShape(width=2, depth=0)
    assert torch.equal(by_item(spec, Reads((0,), final=True)), EXPECTED[:, [0, 0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_kept_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    table = by_item(tensors(tmp_path, STATES.to(dtype)))
    assert table.dtype == dtype
    assert torch.equal(table.float(), EXPECTED)


def test_shape_and_facts(tmp_path: Path) -> None:
    spec = pin_revision(npy(tmp_path))
    facts = StatesFile.open(spec).facts(spec)
    assert encoder_shape(spec, "text") == EncoderShape(width=2, depth=2)
    assert (facts.architecture, facts.width, facts.depth, facts.parameters) == ("states", 2, 2, 0)
    assert facts.revision == spec.revision is not None


def test_other_content_is_another_revision(tmp_path: Path) -> None:
    first = pin_revision(npy(tmp_path))
    assert pin_revision(npy(tmp_path)) == first
    assert pin_revision(npy(tmp_path, STATES.numpy() + 1)).revision != first.revision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("available", "where"), [(2**40, "host"), (0, "mapped")])
def test_they_are_read_the_same_wherever_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, where: str, dtype: torch.dtype
) -> None:
    expected = EXPECTED.to(dtype)
    mapped = StatesFile.open(tensors(tmp_path, STATES.to(dtype))).read(LEVELS, NAMES)
    assert mapped.bytes == table_bytes(expected)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    tables, placement = place({"image": mapped}, torch.device("cpu"))
    assert placement == where
    items = ItemStore(None, states=tables).gather(np.array([4, 0, 1]))  # type: ignore[arg-type]
    assert items.states is not None
    assert torch.equal(items.states["image"], expected[[4, 0, 1]])


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    mapped = StatesFile.open(npy(tmp_path)).read(LEVELS, NAMES)
    tables, placement = place({"image": mapped}, torch.device("cuda"))
    assert placement == "device"
    assert torch.equal(tables["image"].cpu(), EXPECTED)


def cut(folder: Path) -> EncoderSpec:
    spec = tensors(folder)
    path = folder / "states.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    return spec


def pickled(folder: Path) -> EncoderSpec:
    np.save(folder / "states.npy", np.array([{}]), allow_pickle=True)
    return EncoderSpec(source=f"states:{folder / 'states.npy'}")


HOLED = STATES.clone()
HOLED[2, 1, 0] = float("nan")

REFUSED: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: EncoderSpec(source=f"states:{f}/none.npy"), "none.npy: no such file"),
    "another format": (lambda f: EncoderSpec(source=f"states:{f}/x.pt"), "x.pt: .* are read from .npy or .safetensors"),
    "truncated": (cut, "states.safetensors: not readable"),
    "pickled": (pickled, "states.npy: not readable"),
    "Fortran order": (lambda f: npy(f, np.asfortranarray(STATES.numpy())), "ascontiguousarray"),
    "double": (lambda f: npy(f, STATES.double().numpy()), "its states are float64; save them as float16 or float32"),
    "big-endian": (lambda f: npy(f, STATES.numpy().astype(">f4")), "its states are >f4"),
    "integers": (lambda f: tensors(f, STATES.long()), "its states are I64"),
    "one dimension": (lambda f: npy(f, np.zeros(4, np.float32)), r"of shape \(4,\); save \(items, width\)"),
    "every token": (lambda f: npy(f, np.zeros((4, 3, 5, 2), np.float32)), r"of shape \(4, 3, 5, 2\)"),
    "nothing": (lambda f: npy(f, np.zeros((4, 0), np.float32)), r"of shape \(4, 0\)|not readable"),
    "another tensor": (lambda f: tensors(f, name="features"), "no tensor 'states' in it, only features, other"),
    "too few rows": (lambda f: npy(f, STATES[:3].numpy()), "3 rows for a data set of 4 items; save one for each line"),
    "a row too many": (lambda f: npy(f, np.zeros((5, 2), np.float16)), "5 rows for a data set of 4 items"),
    "too few names": (lambda f: tensors(f, items=["fig", "plum", "pear"]), "name 3 different items for 4 rows"),
    "one name twice": (lambda f: tensors(f, items=["fig", "fig", "plum", "pear"]), "name 3 different items for 4 rows"),
    "an item without": (
        lambda f: tensors(f, items=["fig", "apple", "plum", "kiwi"]),
        r"no states for 1 items of the data set \(first: pear\)",
    ),
    "names that are no list": (lambda f: tensors(f, items="fig"), "states.safetensors: not readable"),
    "not finite": (lambda f: npy(f, HOLED.numpy()), "row 2 holds a value that is not finite"),
    "infinite": (lambda f: tensors(f, (STATES * 1e30).bfloat16() * 1e30), "row 0 holds a value that is not finite"),
    "an option": (
        lambda f: npy(f).model_copy(update={"weights": "random"}),
        "precomputed states take no options besides source",
    ),
}


def check(spec: EncoderSpec) -> None:
    file = StatesFile.open(spec)
    file.check_values()
    file.rows_of(NAMES)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    make, message = REFUSED[case]
    spec = make(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        check(spec)
    assert "\n" not in str(refused.value)

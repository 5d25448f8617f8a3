"""The tables of docs/scale.md are what its script and ``tpme plan`` give."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tpme.bench.run.matrix import PreparedDataset, expand, load_matrix

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture
def scale_tables(script: Any) -> ModuleType:
    module: ModuleType = script("scale_tables")
    return module


def table(mark: str) -> list[list[str]]:
    """The rows of a generated table, without its head."""
    [text] = re.findall(rf"<!-- {mark} -->\n(.*?)\n<!-- /{mark} -->", DOCUMENT, flags=re.DOTALL)
    return [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]


def test_the_study_is_as_large_as_its_page_says() -> None:
    matrix = load_matrix(str(ROOT / "docs" / "scale" / "study.toml"))
    data = {entry.name: PreparedDataset(Path("mine"), "0" * 64, ("text", "image")) for entry in matrix.datasets}
    assert len(expand(matrix, data, device="cuda")) == 1200
    assert (len(matrix.methods), len(matrix.datasets), len(matrix.seeds)) == (20, 3, 5)


def test_the_commands_shown_are_those_of_the_tables(scale_tables: ModuleType) -> None:
    for matrix in (scale_tables.STUDY, scale_tables.DEVICES):
        assert f"tpme plan {matrix.relative_to(ROOT)} --device-profile h200" in DOCUMENT


@pytest.mark.slow
def test_a_row_on_several_devices_is_what_the_plan_gives(scale_tables: ModuleType) -> None:
    shown = [row for row in table("devices") if row[:2] == ["iisan (cached)", "16"]]
    assert shown == [list(row) for row in scale_tables.device_rows("iisan (cached)", counts=(16,))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fft", "fft, sharded", "lora"])
def test_rows_with_encoders_are_what_the_plan_gives(scale_tables: ModuleType, name: str) -> None:
    shown = [row for row in table("devices") if row[0] == name and row[1] in ("2", "64")]
    assert shown == [list(row) for row in scale_tables.device_rows(name, counts=(2, 64))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sizes", "study"])
def test_a_table_is_what_its_script_writes(scale_tables: ModuleType, name: str) -> None:
    whole = scale_tables.TABLES[name]().splitlines()[2:]
    assert table(name) == [line.strip("| ").split(" | ") for line in whole]

"""The table of the representation space: there where records hold it, with means over seeds and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpme.bench.record import Representation, SpaceFacts, Spectrum
from tpme.reports.data.section import Section
from tpme.reports.report import make_report, write_report
from tpme.reports.tables.representation_space import representation_space
from tpme.reports.tables.results import all_tables
from tpme.reports.tables.table import Table


def spectrum(rank: float) -> Spectrum:
    return Spectrum(effective_rank=rank, energy_rank_90=3, energy_rank_99=9, stable_rank=1.5)


def encoder(rank: float = 20.0, overlap: float = 0.75) -> SpaceFacts:
    return SpaceFacts(
        width=64,
        raw=spectrum(rank - 1),
        centred=spectrum(rank),
        unadapted_raw=spectrum(29),
        unadapted_centred=spectrum(30),
        overlap={8: overlap, 32: 0.5},
        cosine={8: 0.8, 32: 0.6},
        cka=0.9,
    )


ITEMS = SpaceFacts(width=16, raw=spectrum(5), centred=spectrum(6), cka=0.4)


def measured(**spaces: SpaceFacts) -> Representation:
    return Representation(probe_items=2048, items=512, spaces=spaces)


def section_of(root: Path) -> Section:
    (section,) = make_report([root]).sections
    return section


def line(table: Table, row: str, space: str, *, people: bool = False) -> dict[str, Any]:
    [entries] = [entries for entries in table.rows if (entries[0].value, entries[1].value) == (row, space)]
    if people:
        return {table.columns[index].title: entries[index].text for index in table.visible}
    return {column.key: entry.value for column, entry in zip(table.columns, entries, strict=True)}


def test_without_a_measure_there_is_no_table(factory: Any) -> None:
    factory.write("lora")
    assert "representation" not in [table.name for table in all_tables(section_of(factory.root))]


def test_a_line_for_each_space(factory: Any) -> None:
    factory.write("lora", representation=measured(items=ITEMS, text=encoder()))
    factory.write("fft")
    section = section_of(factory.root)
    assert "representation" in [table.name for table in all_tables(section)]
    table = representation_space(section)
    assert [(entries[0].value, entries[1].value) for entries in table.rows] == [("lora", "text"), ("lora", "items")]
    assert line(table, "lora", "text", people=True) == {
        "Method": "lora",
        "Space": "text",
        "Width": "64",
        "Effective rank": "20.0 (30.0)",
        "90 % energy": "3.00 (3.00)",
        "99 % energy": "9.00 (9.00)",
        "Stable rank": "1.50 (1.50)",
        "Overlap, k = 8": "0.750",
        "Overlap, k = 32": "0.500",
        "CKA": "0.900",
    }
    vectors = line(table, "lora", "items", people=True)
    assert (vectors["Effective rank"], vectors["Overlap, k = 8"], vectors["CKA"]) == ("6.00", "–", "0.400")
    known = line(table, "lora", "text")
    assert [known[f"effective_rank{end}"] for end in ("", "_unadapted", "_raw", "_raw_unadapted")] == [20, 30, 19, 29]
    assert known["cosine_32"] == 0.6
    assert "512 items" in table.notes[0]


def test_values_are_means_over_the_seeds_that_have_them(factory: Any) -> None:
    for seed, facts in ((1, encoder(20, 0.5)), (2, encoder(24, 0.7))):
        factory.write("lora", seed=seed, representation=measured(text=facts))
    factory.write("lora", seed=3)
    known = line(representation_space(section_of(factory.root)), "lora", "text")
    assert (known["effective_rank"], known["overlap_8"]) == (22, pytest.approx(0.6))


def test_what_is_missing_is_named_with_its_reason(factory: Any) -> None:
    broken = Representation(probe_items=64, items=64, spaces={"items": ITEMS}, reasons={"text": "out of memory"})
    factory.write("lora", representation=broken)
    assert representation_space(section_of(factory.root)).notes[-1] == "text of lora: out of memory."


def test_it_is_written_with_the_others(factory: Any, tmp_path: Path) -> None:
    factory.write("lora", representation=measured(text=encoder()))
    write_report([factory.root], tmp_path / "report", formats=["json"])
    [found] = (tmp_path / "report").rglob("representation.json")
    assert "0.75" in json.dumps(json.loads(found.read_text()))
    assert "### Representation space" in (tmp_path / "report" / "details.md").read_text()

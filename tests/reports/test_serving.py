"""What serving costs, in tables, figures and the page, from records that measured it and from those that did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpme.bench.record import Inference, Reading, Timings
from tpme.reports.data.load import load
from tpme.reports.data.section import Section
from tpme.reports.figures.costs import make_plot
from tpme.reports.figures.serving_plot import inference as plot
from tpme.reports.report import make_report, write_report
from tpme.reports.tables.results import all_tables
from tpme.reports.tables.serving_costs import inference as table_of
from tpme.reports.tables.table import Table

FLOPS = Reading(value=2.5e8, source="1 multiply-add = 2 FLOPs, one pass over 100 items")
RUNS = (1.0, 4.0, 2.0, 5.0, 3.0)


def facts(memory: Any, **changes: Any) -> Inference:
    given: dict[str, Any] = {
        "flops_per_item": FLOPS,
        "single": Timings(size=1, run_s=RUNS),
        "batch": Timings(size=100, run_s=RUNS),
        "user": Timings(size=1, run_s=(0.002,) * 5, passes=7),
        "memory": memory,
        "loaded_bytes": Reading(value=4e6, source="all parameters and buffers of the prepared model"),
    }
    return Inference(**{**given, **changes})


@pytest.fixture
def peaks(peaks_of: Any) -> Any:
    return peaks_of(3e8)


def section_of(root: Path) -> Section:
    (section,) = make_report([root]).sections
    return section


def values(table: Table, row: str) -> dict[str, Any]:
    [entries] = [entries for entries in table.rows if entries[0].value == row]
    return {column.key: entry.value for column, entry in zip(table.columns, entries, strict=True)}


def texts(table: Table, row: str) -> dict[str, str]:
    [entries] = [entries for entries in table.rows if entries[0].value == row]
    return {table.columns[index].title: entries[index].text for index in table.visible}


def test_the_table_holds_every_fact_with_its_unit_and_spread(factory: Any, peaks: Any) -> None:
    factory.write("lora", inference=facts(peaks))
    table = table_of(section_of(factory.root))
    assert texts(table, "lora") == {
        "Method": "lora",
        "FLOPs an item (MFLOP) ↓": "250",
        "items/s, one by one ↑": "0.333 (0.250–0.500)",
        "items/s, 100 at a time ↑": "33.3 (25.0–50.0)",
        "User (ms) ↓": "2.00 (2.00–2.00)",
        "Memory (MB) ↓": "300",
        "Loaded (MB) ↓": "4.00",
        "Delta (MB) ↓": "4.00",
    }
    known = values(table, "lora")
    assert known["inference_flops"] == 2.5e8
    assert known["inference_items_per_s"] == pytest.approx(100 / 3)
    assert (known["inference_items_per_s_low"], known["inference_items_per_s_high"]) == (25, 50)
    assert known["inference_items_per_s_runs"] == 5
    assert known["stored_bytes"] == 4e6
    assert "median (quartiles) of 5 runs" in table.notes[0]


def test_the_runs_of_all_seeds_are_pooled(factory: Any, peaks: Any) -> None:
    for seed, slower in ((1, 1.0), (2, 10.0)):
        batch = Timings(size=100, run_s=tuple(slower * seconds for seconds in RUNS))
        factory.write("lora", seed=seed, inference=facts(peaks, batch=batch))
    known = values(table_of(section_of(factory.root)), "lora")
    assert known["inference_items_per_s_runs"] == 10
    rates = [100 / (slower * seconds) for slower in (1, 10) for seconds in RUNS]
    assert known["inference_items_per_s"] == pytest.approx(np.median(rates))


def test_what_was_not_measured_is_a_dash_with_its_reason(factory: Any, peaks: Any) -> None:
    lacking = Reading(value=1e8, source="counted", valid=False, reason="no FLOP formula for aten.foo")
    factory.write("lora", inference=facts(peaks, flops_per_item=lacking, single=Timings(size=1, reason="it is broken")))
    factory.write("fft", inference=facts(peaks))
    section = section_of(factory.root)
    table = table_of(section)
    shown = texts(table, "lora")
    assert (shown["FLOPs an item (MFLOP) ↓"], shown["items/s, one by one ↑"]) == ("–", "–")
    assert values(table, "lora")["inference_flops"] is None
    assert table.notes[-2:] == (
        "FLOPs of encoding an item of lora: no FLOP formula for aten.foo.",
        "Items encoded one by one of lora: it is broken.",
    )
    drawn = make_plot(plot, section)
    assert drawn is not None
    assert "–" in [text.get_text() for axes in drawn.figure.axes for text in axes.texts]


def test_flops_by_data_and_cached_rows_are_named(factory: Any, peaks: Any) -> None:
    factory.write("dyt", inference=facts(peaks, flops_by_data=True))
    factory.write("iisan", cached=True, inference=facts(peaks, looked_up=("text", "image")))
    section = section_of(factory.root)
    notes = " ".join(table_of(section).notes)
    assert "FLOPs differ from item to item, mean over a batch: dyt." in notes
    assert "so new items cost their encoders, too: iisan (cached)." in notes
    assert "Without encoders, from a table of hidden states: iisan (cached)." in make_plot(plot, section).caption


def test_a_gpu_tells_held_from_allocated_memory(factory: Any, peaks_of: Any) -> None:
    factory.write("lora", device="cuda", inference=facts(peaks_of(1e9, "cuda")))
    shown = texts(table_of(section_of(factory.root)), "lora")
    assert (shown["Memory (GB) ↓"], shown["allocated (GB) ↓"]) == ("1.00", "0.800")


def test_records_without_inference_have_neither_table_nor_figure(factory: Any, tmp_path: Path) -> None:
    old = factory.write("lora")
    rate = {"value": 412.0, "source": "median of 4 chunks of 256 items"}
    old.write_text(json.dumps(json.loads(old.read_text()) | {"inference_items_per_s": rate}))
    factory.write("fft")
    section = section_of(factory.root)
    tables = {table.name: table for table in all_tables(section)}
    assert "inference" not in tables
    assert texts(tables["costs"], "lora")["Inference (items/s) ↑"] == "412", "which old records did measure"
    assert make_plot(plot, section) is None
    write_report([factory.root], tmp_path / "out", formats=("html", "csv", "png"))
    assert not list((tmp_path / "out").rglob("*inference*"))
    assert '"inference":null' in (tmp_path / "out" / "index.html").read_text()


def test_rows_of_old_records_beside_new_ones_are_left_out(factory: Any, peaks: Any) -> None:
    factory.write("lora")
    factory.write("fft", inference=facts(peaks))
    tables = {table.name: table for table in all_tables(section_of(factory.root))}
    assert [row[0].value for row in tables["inference"].rows] == ["fft"]
    assert not any("Inference" in column.header for column in tables["costs"].columns), "it has a table of its own"


def test_the_frame_has_the_facts_of_every_cell(factory: Any, peaks: Any) -> None:
    factory.write("lora", inference=facts(peaks))
    factory.write("fft")
    frame = load([factory.root]).set_index("method")
    assert frame.loc["lora", "inference_flops"] == 2.5e8
    assert frame.loc["lora", "inference_items_per_s_1"] == pytest.approx(1 / 3)
    assert frame.loc["lora", "inference_user_s"] == 0.002
    assert frame.loc["lora", "inference_held_bytes"] == 3e8
    columns = [name for name in frame if name.startswith("inference")]
    assert frame.loc["fft", columns].isna().all()


def test_the_page_shows_the_table(tab: Any) -> None:
    assert tab.is_visible("#inference")
    rows = tab.locator("#inference tbody tr")
    assert rows.count() == 9
    first = rows.nth(0)
    assert first.locator("th").inner_text() == "iisan (cached)"
    assert first.locator("td.best").first.inner_text() == "0.300"
    assert tab.locator("#inference thead th").nth(1).inner_text() == "FLOPs an item (MFLOP) ↓"
    assert "From a table of hidden states" in tab.inner_text("#inference-notes")


def test_the_figure_draws_every_row(demo_run: Path) -> None:
    drawn = make_plot(plot, section_of(demo_run))
    quality, flops, rate = drawn.figure.axes
    assert (flops.get_xscale(), rate.get_xscale()) == ("log", "log")
    assert [len(axes.lines[0].get_xdata()) for axes in (flops, rate)] == [9, 9], "dots, for there is no 0 to begin at"
    assert not flops.patches
    assert "2.00M" in [text.get_text() for text in rate.texts]
    assert [axes.get_title() for axes in (quality, flops, rate)] == ["Recall@10 ↑", "MFLOP/item ↓", "items/s ↑"]

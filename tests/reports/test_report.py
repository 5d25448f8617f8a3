from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.record import Failure, Flag, LearningRates, Reading, read_result
from tpme.bench.side_files import load_ranks
from tpme.reports import report as report_module
from tpme.reports.data import resampling
from tpme.reports.data import summary as summary_module
from tpme.reports.data.tpme import Weights
from tpme.reports.figures import draw as drawing
from tpme.reports.report import make_report, write_report
from tpme.reports.tables.results import all_tables, costs, cutoffs, failures, learning_rates, results
from tpme.reports.tables.scales import scales

TABLES = (
    "results",
    "tpme",
    "differences",
    "cutoffs",
    "warm-cold",
    "costs",
    "inference",
    "phases",
    "lr",
    "failures",
    "environment",
)
PLOTS = ("quality-tpme", "tpme", "costs", "inference", "phases", "memory-time", "learning", "step-times")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def column(table, key: str) -> dict[str, object]:
    keys = [column.key for column in table.columns]
    return {row[0].value: row[keys.index(key)].value for row in table.rows}


def texts(table, key: str) -> dict[str, str]:
    keys = [column.key for column in table.columns]
    return {row[0].value: row[keys.index(key)].text for row in table.rows}


@pytest.fixture(scope="module")
def written(demo_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    write_report([demo_run], out)
    return out


def test_the_folder_holds_every_table_and_plot_and_the_two_texts_show_them(written):
    found = set(files(written))
    assert found == {
        "report.md",
        "details.md",
        "index.html",
        *(f"tables/{name}.{ending}" for name in TABLES for ending in ("csv", "json", "tex")),
        *(f"tables/pairs.{ending}" for ending in ("csv", "json")),
        "tables/results-compact.tex",
        *(f"plots/{name}.{ending}" for name in PLOTS for ending in ("png", "svg", "pdf")),
    }
    text, details = ((written / name).read_text() for name in ("report.md", "details.md"))
    links = re.findall(r"\]\(((?:plots|tables)/[^)]+)\)", text + details)
    assert set(links) == {name for name in found if name.startswith("plots/")}
    assert {Path(link).stem for link in links if f"({link})" in text} == {"quality-tpme", "memory-time"}
    for name in TABLES:
        title = json.loads((written / "tables" / f"{name}.json").read_text())["title"]
        assert name == "results" or f"### {title}" in details
    parts = [details.index(f"## {part}") for part in ("How to read", "Notes", "Figures", "Tables", "To repeat")]
    assert parts == sorted(parts)


def test_the_csv_tells_how_a_row_ended_and_what_to_know_of_it(written):
    frame = pd.read_csv(written / "tables" / "results.csv").set_index("method")
    assert frame.loc["dyt", "status"] == "oom"
    assert frame.loc["dyt", "footnotes"].startswith("oom during train: the allocator asked for 1.5 GB; use a smaller")
    assert frame.loc["id", "footnotes"] == "the clock was throttled in 3 of 8 epochs"
    assert pd.isna(frame.loc["frozen", "footnotes"])
    assert set(frame["warnings"].str.split(";").str[0]) == {
        "M is resident memory of the process tree: the cells ran on a CPU"
    }


def test_every_cost_has_its_arrow_its_best_row_and_its_spread_over_seeds(demo_run):
    (section,) = make_report([demo_run]).sections
    tables = {table.name: table for table in all_tables(section)}
    for name, key, header in (
        ("costs", "wall_s", "Whole cell (s) ↓"),
        ("costs", "stored_bytes", "Stored (MB) ↓"),
        ("phases", "train_s", "train ↓"),
        ("results", "epoch_time_s", "T (s) ↓"),
    ):
        table = tables[name]
        keys = [column.key for column in table.columns]
        place = keys.index(key)
        assert table.columns[place].title == header
        assert {row[0].value for row in table.rows if row[place].best} == (
            {"bitfit", "prompt"} if key == "none" else {"prompt"} if key == "stored_bytes" else {"iisan (cached)"}
        )
    walls = section.cells[(section.cells["row"] == "fft") & section.cells["selected"]]["wall_s"]
    mean, spread = walls.mean(), walls.std(ddof=1)
    for name in ("costs", "phases"):
        assert texts(tables[name], "wall_s")["fft"] == f"{mean:.0f} ± {spread:.1f}"
        assert column(tables[name], "wall_s_sd")["fft"] == pytest.approx(spread)
        assert column(tables[name], "wall_s_sd")["frozen"] is None


def test_equal_seeds_have_no_spread(factory):
    for seed in (1, 2, 3):
        factory.write("lora", seed=seed, time=0.1)  # three times 0.1 is not 0.3
    (section,) = make_report([factory.root]).sections
    assert texts(results(section), "epoch_time_s")["lora"] == "0.100 ± 0"


def test_all_in_is_a_cost_where_any_record_has_it(factory):
    factory.write("lora", seed=1)
    (section,) = make_report([factory.root]).sections
    assert "all_in_s" not in {one.key for one in costs(section).columns}
    for seed, seconds in ((1, 100.0), (2, 120.0)):
        factory.write("iisan", seed=seed, all_in_s=seconds)
    (section,) = make_report([factory.root]).sections
    table = costs(section)
    assert texts(table, "all_in_s") == {"iisan": "110 ± 14", "lora": "–"}
    assert column(table, "all_in_s")["iisan"] == 110.0
    assert any(note.startswith("All in: feature cache") for note in table.notes)


def test_the_time_to_the_best_epoch_stands_beside_that_of_an_epoch(factory):
    """Four epochs of 10 s, of which the third is the best, and 60 s before the first."""
    factory.write("iisan", all_in_s=100.0)
    (section,) = make_report([factory.root]).sections
    table = results(section)
    keys = [one.key for one in table.columns if not one.machine_only]
    assert keys[keys.index("epoch_time_s") + 1] == "time_to_best_s"
    assert texts(table, "time_to_best_s") == {"iisan": "90.0"}


def test_the_peak_of_the_whole_run_stands_beside_m_with_its_phase(factory, peaks_of):
    """Training takes 2 GB, ranking 3; a row that ran out of memory needs at least what was seen."""
    path = factory.write("lora", peak=2e9)
    result = read_result(path)
    ranked = [phase.model_copy(update={"memory": peaks_of(3e9)}) if phase.kind == "rank" else phase
              for phase in result.phases]  # fmt: skip
    path.write_text(result.model_copy(update={"phases": tuple(ranked)}).model_dump_json())
    factory.write("fft", peak=2.5e9)
    factory.write("dyt", status="oom", time=None, peak=4e9)
    (section,) = make_report([factory.root]).sections
    table = results(section)
    keys = [one.key for one in table.columns if not one.machine_only]
    assert keys[keys.index("memory_bytes") + 1] == "peak_bytes"
    assert texts(table, "peak_bytes") == {"lora": "3.00 (rank)", "fft": "2.50", "dyt": "≥ 4.00"}
    assert column(table, "peak_bytes") == {"lora": 3e9, "fft": 2.5e9, "dyt": 4e9}
    assert column(table, "peak_phase")["lora"] == "rank"


def test_costs_stand_as_a_ratio_to_the_reference_where_there_is_one(factory):
    factory.write("lora", time=5.0, millions=0.5, peak=4e9)
    factory.write("bitfit", time=10.0)
    keys = {one.key for one in results(make_report([factory.root]).sections[0]).columns}
    assert "cost_ratio" not in keys
    (section,) = make_report([factory.root], reference="bitfit").sections
    table = results(section)
    assert "Cost / bitfit ↓" in [one.title for one in table.columns]
    assert texts(table, "cost_ratio") == {"lora": f"{0.5**0.45 * 0.5**0.1 * 2**0.45:.3f}", "bitfit": "1.00"}
    assert {one.title for one in scales(section).columns} >= {"T / bitfit ↓", "P / bitfit ↓", "M / bitfit ↓"}


def test_a_feature_cache_has_its_memory_and_its_bytes_on_disk(factory):
    path = factory.write("iisan", cached=True)
    result = read_result(path)
    cache = result.cache.model_copy(update={"peak_bytes": Reading(value=4.61e8, source="VmHWM")})
    path.write_text(result.model_copy(update={"cache": cache}).model_dump_json())
    (section,) = make_report([factory.root]).sections
    told = (
        "trains on a feature cache that took 4.2 s and 461 MB of memory (of its builder alone, in an earlier run) to "
        "build, once, and 12.0 MB on disk; not part of T and M"
    )
    assert section.notes.footnotes == (told,)


def test_the_energy_of_an_epoch_is_that_of_the_last_stage(factory):
    path = factory.write("lora", time=5.0)
    result = read_result(path)
    train = next(phase for phase in result.phases if phase.kind == "train")
    joules = (90.0, 10.0, 20.0, 30.0)
    phases = [train.model_copy(update={"energy_j": Reading(value=one, source="counter")}) for one in joules]
    epochs = [epoch.model_copy(update={"stage": "wide" if epoch.index == 1 else "narrow"}) for epoch in result.epochs]
    assert len(epochs) == len(phases)
    path.write_text(result.model_copy(update={"phases": tuple(phases), "epochs": tuple(epochs)}).model_dump_json())
    (section,) = make_report([factory.root]).sections
    assert column(costs(section), "energy_epoch_j")["lora"] == 20.0
    assert column(costs(section), "training_energy_j")["lora"] == 150.0


def test_the_cache_that_one_seed_built_for_all_is_counted_once(factory):
    for seed in (1, 2, 3):
        path = factory.write("iisan", cached=True, seed=seed)
        if seed == 1:
            path.write_text(path.read_text().replace('"kind": "load"', '"kind": "cache"'))
    (section,) = make_report([factory.root]).sections
    tables = {table.name: table for table in all_tables(section)}
    spent = {key: column(tables["phases"], f"{key}_s")["iisan (cached)"] for key in ("cache", "load", "train")}
    assert spent == pytest.approx({"cache": 0.5 / 3, "load": 1.0 / 3, "train": 40.0})
    assert texts(tables["costs"], "cache_build_s")["iisan (cached)"] == "4.20"


def test_a_row_whose_parameters_were_not_counted_has_a_time_and_no_tpme(factory):
    factory.write("lora", millions=None)
    factory.write("fft")
    factory.write("bitfit", time=9.0)
    (section,) = make_report([factory.root]).sections
    assert section.compared == ["bitfit", "fft"]
    assert texts(results(section), "epoch_time_s")["lora"] == "10.0"


def test_spread_over_seeds_and_interval_over_users_are_told_apart(demo_run, factory):
    (section,) = make_report([demo_run]).sections
    for table, key in ((cutoffs(section), "recall_10"), (cutoffs(section), "ndcg_20")):
        (spread,) = [one for one in table.columns if one.key == f"{key}_sd"]
        assert (spread.header, spread.machine_only) == ("± seeds", False)
        assert texts(table, f"{key}_sd")["lora"] == f"{section.summary[f'{key}_sd']['lora']:.4f}"
        assert texts(table, f"{key}_sd")["frozen"] == "–"
    assert "± seeds" in cutoffs(section).notes[0]
    factory.write("lora")
    (alone,) = make_report([factory.root]).sections
    assert "± seeds" not in [cutoffs(alone).columns[index].header for index in cutoffs(alone).visible]
    assert "± seeds" not in cutoffs(alone).notes[0]


def test_rows_that_set_the_frame_say_why_they_have_no_interval(demo_run):
    (section,) = make_report([demo_run]).sections
    assert texts(scales(section), "tpme_low_percent")["fft"] == "end of scale"
    notes = " ".join(scales(section).notes)
    assert "No interval for iisan (cached) and fft: each of these rows is the minimum or maximum in every" in notes


def test_intervals_without_time_and_a_second_seed_say_that_nothing_was_repeated(factory):
    for index, method in enumerate(("fft", "lora", "iisan")):
        factory.write(method, time=10.0 - index, peak=1e9 * (3 - index))
    (section,) = make_report([factory.root], weights=Weights.parse("0,0.5,0.5")).sections
    note = "No interval for iisan and lora and fft: no cost that counts was measured twice."
    assert note in " ".join(scales(section).notes)


def test_every_row_is_in_the_results_whatever_its_end(demo_run, written):
    frame = pd.read_csv(written / "tables" / "results.csv").set_index("method")
    assert len(frame) == 15
    assert {"<script>", "a_b&c%", "iisan (cached)", "dyt", "pyra", "dapt"} <= set(frame.index)
    (section,) = make_report([demo_run]).sections
    shown = texts(results(section), "recall_10")
    assert {name: shown[name] for name in ("dyt", "pyra", "dapt", "<script>")} == {
        "dyt": "oom",
        "pyra": "diverged",
        "dapt": "timeout",
        "<script>": "error",
    }
    assert set(column(failures(section), "status").values()) == {"oom", "diverged", "timeout", "error"}


def test_numbers_agree_with_the_records(demo_run, written):
    """From the raw files, by hand: LoRA's first trial (2e-4) is the better one on validation."""
    values = []
    for path in sorted(demo_run.rglob("attempt-1.json")):
        record = json.loads(path.read_text())
        if record["cell"]["method"] == "lora" and record["cell"]["lr_trial"] == 0:
            ranks = np.load(path.parent / "ranks-1.npz")
            hit = (ranks["rank"] <= 10) & ~ranks["in_history"]
            values.append((hit.mean(), np.where(hit, 1 / np.log2(1 + ranks["rank"]), 0).mean()))
    assert len(values) == 3
    row = pd.read_csv(written / "tables" / "results.csv").set_index("method").loc["lora"]
    recall, ndcg = np.mean(values, axis=0)
    assert row["recall_10"] == pytest.approx(recall)
    assert row["ndcg_10"] == pytest.approx(ndcg)
    assert row["recall_10_sd"] == pytest.approx(np.std(values, axis=0, ddof=1)[0])
    assert row["epoch_time_s"] == pytest.approx(18.9 * 1.02)
    assert row["trainable_millions"] == pytest.approx(0.05)
    assert row["memory_bytes"] == pytest.approx(1.6e9 * 1.01)


def test_rows_without_adaptation_get_no_tpme_unless_named(demo_run):
    (section,) = make_report([demo_run]).sections
    shown = column(results(section), "tpme_percent")
    assert [shown[name] for name in ("frozen", "id", "popularity")] == [None] * 3
    assert shown["fft"] == pytest.approx(100)
    assert len(section.compared) == 8
    (named,) = make_report([demo_run], rows=["fft", "frozen", "iisan"]).sections
    assert sorted(named.compared) == ["fft", "frozen", "iisan"]
    assert len(results(named).rows) == 15
    assert "TPME compares 3 rows (" in " ".join(scales(named).notes)


def test_a_plug_ins_baseline_gets_no_tpme_and_does_not_move_the_frame(factory):
    """Whatever it is called: the record says that it adapts no encoder."""
    for name, cost in (("fft", 20.0), ("lora", 12.0), ("adapter", 14.0)):
        factory.write(name, time=cost, millions=cost, peak=cost * 1e9)
    (without,) = make_report([factory.root]).sections
    factory.write("nearest", baseline=True, time=0.1, millions=0.001, peak=1e7)
    factory.write("frozen", baseline=False, time=13.0, millions=13.0, peak=13e9)  # a name alone decides nothing
    (section,) = make_report([factory.root]).sections
    assert section.frame == without.frame.model_copy(update={"rows": ("adapter", "fft", "frozen", "lora")})
    shown = column(results(section), "tpme_percent")
    assert shown["nearest"] is None
    assert {name: shown[name] for name in ("fft", "lora")} == pytest.approx({"fft": 100, "lora": 0})
    assert "No TPME, as no encoder is adapted: nearest." in results(section).notes
    (named,) = make_report([factory.root], rows=["nearest", "fft"]).sections
    assert sorted(named.compared) == ["fft", "nearest"]


def test_out_of_memory_is_shown_with_its_lower_bound(demo_run):
    (section,) = make_report([demo_run]).sections
    table = results(section)
    assert texts(table, "memory_bytes")["dyt"] == "≥ 2.40"
    assert texts(table, "tpme_percent")["dyt"].startswith("≥ ")
    assert column(table, "tpme_percent")["dyt"] is None
    assert "dyt" not in section.frame.rows


def test_flags_become_footnotes_once_and_shared_ones_a_warning(demo_run):
    (section,) = make_report([demo_run]).sections
    for table in all_tables(section):
        if table.name in ("results", "costs", "phases"):
            assert table.warnings[0] == "M is resident memory of the process tree: the cells ran on a CPU"
            assert len(table.warnings) == 2  # and what the instruments can tell apart
            assert "the clock was throttled in 3 of 8 epochs" in [text for _, text in table.used_footnotes]
    mark = 1 + section.notes.footnotes.index("the clock was throttled in 3 of 8 epochs")
    marked = {row[0].value for row in results(section).rows if mark in row[0].marks}
    assert marked == {"id"}


def test_the_search_is_told_with_its_cost_and_shows_no_test_numbers(demo_run):
    (section,) = make_report([demo_run]).sections
    table = learning_rates(section)
    assert [column.key for column in table.columns] == [
        "method", "lr_image", "lr_method", "lr_recommender", "lr_text",
        "cells_finished", "valid_recall_10", "wall_s", "selected",
    ]  # fmt: skip
    searched = [row for row in table.rows if row[0].value in {"fft", "adapter", "lora", "bitfit", "prompt", "iisan"}]
    assert len(searched) == 12
    assert len([row for row in searched if row[-1].value]) == 6
    assert "popularity" not in {row[0].value for row in table.rows}
    cells = section.cells[section.cells["row"] == "fft"]
    assert cells["search_wall_s"].tolist() == pytest.approx([cells["wall_s"].sum()] * 6)


def test_learning_rates_of_named_groups_have_columns(factory):
    factory.write("lora", lr=LearningRates(groups={"gates": 0.01}))
    factory.write("fft", lr=LearningRates(method=0.003))
    (section,) = make_report([factory.root]).sections
    table = learning_rates(section)
    assert column(table, "lr_gates") == {"lora": 0.01, "fft": 0.003}
    assert not next(column.machine_only for column in table.columns if column.key == "lr_gates")


def test_a_failed_seed_is_told(factory):
    factory.write("lora", seed=1)
    factory.write("lora", seed=2)
    factory.write("lora", seed=3, status="killed", time=None, with_environment=False)
    (section,) = make_report([factory.root]).sections
    assert texts(results(section), "seeds_finished")["lora"] == "2 of 3"
    assert section.notes.footnotes == ("2 of 3 seeds finished (killed); the row is over those alone",)
    assert len(failures(section).rows) == 1


def test_flags_that_differ_in_numbers_alone_become_one(factory):
    for method, share in (("fft", 17), ("lora", 9.5), ("iisan", 56)):
        factory.write(method, flags=(Flag(code="crowded", message=f"waited for {share}% of 2 epochs"),))
    factory.write("bitfit", flags=(Flag(code="x", message="read 1 time"),))
    factory.write("prompt", flags=(Flag(code="x", message="read 2 time"),))
    (section,) = make_report([factory.root]).sections
    assert set(section.notes.footnotes) == {"waited for 9.5 to 56% of 2 epochs", "read 1 time", "read 2 time"}
    assert section.notes.marks["fft"] == section.notes.marks["iisan"]


def test_options_stand_in_a_footnote_where_the_name_leaves_them_out(factory):
    factory.write("lora", options={"rank": 4})
    factory.write("fft")
    (section,) = make_report([factory.root]).sections
    assert section.notes.footnotes == ("with rank=4",)
    assert set(section.summary.index) == {"lora", "fft"}


def test_doubtful_readings_shape_no_frame_and_say_so(factory):
    from tpme.bench.record import Reading

    for method, time_s in (("fft", 100.0), ("lora", 50.0)):
        factory.write(method, time=time_s)
    doubt = Reading(value=1.0, source="clock", valid=False, reason="another process used the machine")
    factory.write("iisan", time_reading=doubt)
    (section,) = make_report([factory.root]).sections
    assert section.frame.rows == ("fft", "lora")
    assert texts(results(section), "tpme_percent")["iisan"] == "–"
    assert texts(results(section), "epoch_time_s")["iisan"] == "1.00"
    assert "another process used the machine" in section.notes.footnotes[0]


def test_random_weights_stand_under_tables_and_the_quality_figure(factory, tmp_path):
    flag = Flag(code="random-weights", message="text encoder with random weights: quality is meaningless")
    for method in ("fft", "lora"):
        factory.write(method, flags=(flag,), time=float(len(method)))
    write_report([factory.root], tmp_path / "out")
    text, details = ((tmp_path / "out" / name).read_text() for name in ("report.md", "details.md"))
    assert "**No quality to compare:** the encoders have random weights." in text
    assert text.count("quality is meaningless") == 2  # in "Trust" and under the figure
    assert "- Text encoder with random weights: quality is meaningless" in details


def test_memory_sources_that_differ_are_told(factory):
    for method, valid in (("fft", True), ("lora", False), ("iisan", True)):
        factory.write(method, device="cuda", process_valid=valid)
    (section,) = make_report([factory.root]).sections
    assert set(section.notes.footnotes) == {"M by NVML process peak", "M by NVML device delta"}


def test_groups_never_share_a_frame(factory, tmp_path):
    for device, factor in (("one", 1.0), ("two", 5.0)):
        for method, time_s in (("fft", 10.0), ("lora", 4.0)):
            folder = type(factory)(factory.root / device)
            folder.write(method, time=time_s * factor, device_key=device)
    report = write_report([factory.root], tmp_path / "out", formats=("csv", "tex"))
    assert [column(results(section), "tpme_percent") for section in report.sections] == [{"lora": 0, "fft": 45}] * 2
    assert {path.name for path in (tmp_path / "out" / "tables").iterdir()} >= {"results.csv", "results-2.csv"}
    labels = [
        label
        for path in (tmp_path / "out" / "tables").glob("*.tex")
        for label in re.findall(r"\\label{(.*?)}", path.read_text())
    ]
    assert len(labels) == len(set(labels)) >= 4
    text, details = ((tmp_path / "out" / name).read_text() for name in ("report.md", "details.md"))
    assert "## Results, group 2: demo, suite protocol, fp32, two" in text
    assert "## Tables, group 2: demo, suite protocol, fp32, two" in details
    answers = [text.index(f"**Group {number}: demo, suite protocol, fp32, {name}**") for number, name in
               ((1, "one"), (2, "two"))]  # fmt: skip
    assert answers == sorted(answers)
    assert text.count("**Trust:**") == 2
    assert text.rindex("**Trust:**") < text.index("## Results")


def test_the_same_records_give_the_same_bytes(make_factory, tmp_path):
    """In another folder, written in another order, on another day."""
    what = [("fft", 20.0), ("lora", 12.0), ("iisan", 4.0), ("popularity", None)]
    for name, order in (("a/run", what), ("b/run", what[::-1])):
        for method, time_s in order:
            make_factory(tmp_path / name).write(method, time=time_s)
        write_report([tmp_path / name], tmp_path / name / "report")
        time.sleep(0.01)
    one, other = files(tmp_path / "a/run/report"), files(tmp_path / "b/run/report")
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
def test_a_large_report_is_drawn_on_request_by_as_many_processes_as_asked_for(make_factory, monkeypatch, tmp_path):
    monkeypatch.setattr(report_module, "ROWS_DRAWN", 4)
    for data in ("one", "other"):
        for method in ("fft", "lora"):
            make_factory(tmp_path / "run" / data).write(method, dataset=data)
    write_report([tmp_path / "run"], tmp_path / "every")
    assert (tmp_path / "every" / "plots" / "costs-2.png").is_file()

    make_factory(tmp_path / "run" / "one").write("iisan", dataset="one")
    console = Console(record=True, file=io.StringIO(), width=200)
    write_report([tmp_path / "run"], tmp_path / "text", console=console)
    told = "5 rows in 2 groups: figures are drawn with --formats all"
    assert told in console.export_text()
    assert not (tmp_path / "text" / "plots").exists()
    assert (tmp_path / "text" / "index.html").is_file()

    for name, workers in (("drawn", 1), ("in-parallel", 2)):
        write_report([tmp_path / "run"], tmp_path / name, formats=("svg",), workers=workers)
    drawn = files(tmp_path / "drawn")
    assert "plots/costs-2.svg" in drawn
    assert drawn == files(tmp_path / "in-parallel")


def test_there_are_no_more_processes_than_figures(factory, monkeypatch, tmp_path):
    asked = []
    start = drawing.worker_processes
    monkeypatch.setattr(
        drawing, "worker_processes", lambda count, *rest, **more: asked.append(count) or start(2, *rest, **more)
    )
    factory.write("lora")
    write_report([factory.root], tmp_path, formats=("png",), workers=64)
    assert asked == [len(PLOTS) + 1], "that of weights has nothing to draw"


def test_the_encoders_behind_a_feature_cache_are_told(factory, tmp_path):
    factory.write("iisan", cached=True)
    write_report([factory.root], tmp_path / "report")
    told = json.loads((tmp_path / "report" / "tables" / "environment.json").read_text())
    assert "builtin:tiny-text: BertModel, pretrained weights" in json.dumps(told)


def test_the_first_finished_seed_stands_for_a_row(factory):
    factory.write("lora", seed=1, status="oom", time=None)
    unsampled = factory.write("lora", seed=2)
    for seed in (4, 3):
        factory.write("lora", seed=seed)
    content = json.loads(unsampled.read_text())
    del content["files"]["samples"]
    unsampled.write_text(json.dumps(content))
    factory.write("fft", status="oom", time=None)
    (section,) = make_report([factory.root]).sections

    def seeds(firsts):
        return {name: one.result.cell.seed for name, one in firsts.items()}

    assert seeds(section.firsts()) == {"lora": 2, "fft": 1}
    assert seeds(section.firsts(sampled=True))["lora"] == 3


def test_a_report_inside_the_run_is_not_read_back(factory):
    factory.write("lora")
    write_report([factory.root], factory.root / "report")
    again = write_report([factory.root], factory.root / "report")
    assert len(again.sections[0].cells) == 1


def test_nothing_is_written_on_bad_input(factory, tmp_path):
    factory.write("lora")
    with pytest.raises(UserError, match="format 'docx'"):
        write_report([factory.root], tmp_path / "out", formats=("docx",))
    with pytest.raises(UserError, match="row 'fff'"):
        write_report([factory.root], tmp_path / "out", rows=["fff"])
    next(factory.root.rglob("samples-1.npz")).write_bytes(b"cut")
    with pytest.raises(UserError, match="not a readable"):
        write_report([factory.root], tmp_path / "out", formats=("csv", "html"))
    assert not (tmp_path / "out").exists()


def test_the_command_makes_the_same_report(factory):
    factory.write("lora")
    report = make_report([factory.root], rows=["lora"], title="Ours & theirs")
    assert report.command == "tpme report run --weights 0.45,0.1,0.45 --rows lora --title 'Ours & theirs'"


def test_weights_change_the_order(demo_run):
    def order(weights: str) -> list[str]:
        (section,) = make_report([demo_run], weights=Weights.parse(weights)).sections
        return section.compared

    assert order("0,1,0")[0] == "prompt"
    assert order("1,0,0")[0] == "iisan (cached)"


def test_frames_can_be_frozen(factory, tmp_path):
    for method, time_s in (("fft", 10.0), ("lora", 5.0)):
        factory.write(method, time=time_s)
    frame = tmp_path / "frame.json"
    for out in ("one", "two"):
        write_report([factory.root], tmp_path / out, frame=frame, formats=("csv",))
    assert files(tmp_path / "one") == files(tmp_path / "two")  # whether the file was made or read
    factory.write("slow", time=20.0)
    free = make_report([factory.root]).sections[0]
    frozen = make_report([factory.root], frame=frame).sections[0]
    assert column(results(free), "tpme_percent")["fft"] == pytest.approx(15.0)
    assert column(results(frozen), "tpme_percent") == pytest.approx({"lora": 0.0, "fft": 45.0, "slow": 135.0})
    assert "frame.json" in " ".join(results(frozen).notes)
    other = type(factory)(tmp_path / "other")
    other.write("fft", protocol="paper")
    with pytest.raises(UserError, match=r"frame\.json: made on another"):
        make_report([other.root], frame=frame)


def test_nothing_is_frozen_where_no_row_has_a_tpme(factory, tmp_path):
    factory.write("popularity", time=None)
    with pytest.raises(UserError, match=r"frame\.json: not made, for none of these rows has a TPME"):
        write_report([factory.root], tmp_path / "out", frame=tmp_path / "frame.json")
    assert not list(tmp_path.glob("*.json"))


def test_a_thousand_records(make_factory, tmp_path):
    """25 methods x 5 seeds x 8 data sets: all but the figures takes less than 5 s, and all land in their group."""
    factory = make_factory(tmp_path / "run", users=60)
    for data in range(8):
        for method in range(25):
            for seed in range(5):
                factory.write(f"method{method}", seed=seed, time=5.0 + method, dataset_fingerprint=f"{data:02d}" * 32)
    started = time.process_time()
    report = write_report([tmp_path / "run"], tmp_path / "out")
    spent = time.process_time() - started
    assert [len(section.cells) for section in report.sections] == [125] * 8
    assert all(len(section.compared) == 25 for section in report.sections)
    assert not (tmp_path / "out" / "plots").exists()
    assert (tmp_path / "out" / "index.html").is_file()
    assert spent < 5, "seconds of processor time"


def test_a_failure_message_cannot_break_the_table(factory, tmp_path):
    message = "a | b\n<img src=x> & 100 % _of_ $x$ \\end{tabular}"
    factory.write("fft", status="error", failure=Failure(phase="train", message=message), time=None)
    factory.write("lora")
    write_report([factory.root], tmp_path / "out", formats=("tex",))
    text, details = ((tmp_path / "out" / name).read_text() for name in ("report.md", "details.md"))
    assert "<img" not in text + details
    assert all(line.endswith("|") for line in (text + details).splitlines() if line.startswith("|"))
    assert text.count(r"a \| b\\n&lt;img") == 1  # its footnote
    assert details.count(r"a \| b &lt;img") == 1  # and the table of failures
    latex = (tmp_path / "out" / "tables" / "failures.tex").read_text()
    assert latex.count(r"\end{tabular}") == 1


def test_ranks_are_read_once_and_every_row_is_drawn_once(demo_run, monkeypatch):
    """A report of a thousand records takes seconds that way."""
    read, drawn, medians = [], [], resampling._medians
    monkeypatch.setattr(summary_module, "load_ranks", lambda path: read.append(path) or load_ranks(path))
    monkeypatch.setattr(resampling, "_medians", lambda *given: drawn.append(given) or medians(*given))
    [made] = make_report([demo_run]).sections
    all_tables(made)
    assert len(read) == len(set(read)) == sum(made.cells["selected"] & made.cells["ranks_path"].notna())
    assert len(drawn) == (made.summary["epoch_time_s"].notna() & (made.summary["status"] == "ok")).sum()

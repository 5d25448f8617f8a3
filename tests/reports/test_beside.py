"""What stands beside the results: noise floor, energy, the paper's figures, plan against measured."""

from __future__ import annotations

import json

import pytest

from tpme.bench.record import DatasetFacts, EncoderSpec, Reading, Training, read_result
from tpme.reports.report import make_report, write_report
from tpme.reports.tables.paper import paper
from tpme.reports.tables.planned import planned
from tpme.reports.tables.results import all_tables, costs, results
from tpme.reports.tables.searches import searches
from tpme.reports.tables.table import to_json


def section_of(factory):
    [section] = make_report([factory.root]).sections
    return section


def change(path, **update) -> None:
    path.write_text(read_result(path).model_copy(update=update).model_dump_json())


def count(path, **values: float) -> None:
    counters = {name: Reading(value=value, source="test") for name, value in values.items()}
    change(path, counters=read_result(path).counters | counters)


def line(table, name: str) -> dict[str, str]:
    [found] = [row for row in table.rows if row[0].value == name]
    return {column.key: entry.text for column, entry in zip(table.columns, found, strict=True)}


# --- instruments -----------------------------------------------------------------------------------------------


def test_the_noise_floor_stands_under_the_results_and_on_the_page(factory, tmp_path):
    count(factory.write("fft"), noise_time_ratio=0.031, noise_memory_ratio=0.002, overhead_ratio=0.004)
    count(factory.write("lora"), noise_time_ratio=0.029, noise_memory_ratio=0.001, sampler_core_share=0.0061)
    told = (
        "Noise floor of this device: time ±3.1 %, memory ±0.2 % between runs of the same cell; the harness adds 0.40 % "
        "to an epoch; the sampler took at most 0.6 % of one core."
    )
    rows = [table for table in all_tables(section_of(factory)) if table.columns[0].key == "method"]
    assert {"results", "costs", "phases"} <= {table.name for table in rows}
    assert all(told in table.warnings for table in rows if table.name not in ("differences", "lr", "failures"))
    write_report([factory.root], tmp_path / "out", formats=("html", "tex"))
    escaped = told.split(";")[0].replace("%", r"\%").split("±")[0]
    assert escaped in (tmp_path / "out" / "tables" / "costs.tex").read_text()
    assert (tmp_path / "out" / "details.md").read_text().count(told.split(";")[0]) == 1
    assert (tmp_path / "out" / "index.html").read_text().count(told) == 1


def test_a_noise_floor_that_was_not_measured_says_so(factory):
    path = factory.write("fft")
    assert "Noise floor of this device: not measured (tpme doctor --noise)." in results(section_of(factory)).warnings
    missing = {"noise_time_ratio": Reading.missing("A/A runs", "not measured on this device yet")}
    change(path, counters=missing | {"sampler_core_share": Reading(value=0.005, source="test")})
    told = "Noise floor of this device: not measured (tpme doctor --noise); the sampler took at most 0.5 % of one core."
    assert told in results(section_of(factory)).warnings


# --- energy ----------------------------------------------------------------------------------------------------


def test_energy_is_a_column_where_there_is_any(factory):
    path = factory.write("fft")
    factory.write("lora", time=5.0)
    assert "energy_epoch_j" not in [column.key for column in costs(section_of(factory)).columns]
    phases = [
        phase.model_copy(update={"energy_j": Reading(value=24_000.0, source="NVML energy counter")})
        if phase.kind == "train"
        else phase
        for phase in read_result(path).phases
    ]
    change(path, phases=tuple(phases))
    table = costs(section_of(factory))
    [column] = [column for column in table.columns if column.key == "energy_epoch_j"]
    assert column.title == "E (J) ↓"
    assert line(table, "fft")["energy_epoch_j"] == "6000"  # 24 kJ over four epochs
    assert line(table, "lora")["energy_epoch_j"] == "–"
    assert any(note.startswith("E: energy of a training epoch") for note in table.notes)


# --- the paper -------------------------------------------------------------------------------------------------

PAPER = {
    "matrix": "iisan-paper",
    "dataset": "scientific",
    "text_encoder": EncoderSpec(source="bert-base-uncased"),
    "image_encoder": EncoderSpec(source="google/vit-base-patch16-224"),
    "protocol": "paper",
    "device": "cuda",
}
BATCH = {"training": Training(epochs=200, users_per_batch=32, precision="fp16")}


def test_the_papers_figures_stand_beside_the_measured_ones(factory):
    factory.write("fft", time=221.5, peak=47e9, **PAPER, **BATCH)
    factory.write("adapter", time=365.0, peak=38e9, **PAPER, **BATCH)
    factory.write("bitfit", time=100.0, peak=9e9, **PAPER, **BATCH)
    factory.write("iisan", time=50.0, peak=9e9, **PAPER, **BATCH)
    factory.write("iisan", cached=True, time=44.0, peak=1.5e9, **PAPER, **BATCH)
    table = paper(section_of(factory))
    assert {row[0].value for row in table.rows} == {"fft", "adapter", "iisan (cached)"}
    fft, adapter, cached = (line(table, name) for name in ("fft", "adapter", "iisan (cached)"))
    assert (fft["paper_epoch_time_s_low"], fft["measured_epoch_time_s"], fft["ratio_epoch_time_s_low"]) == (
        "443", "222", "0.50",
    )  # fmt: skip
    assert (fft["paper_memory_gb_low"], fft["measured_memory_gb"], fft["ratio_memory_gb_low"]) == ("47", "47.0", "1.00")
    assert (adapter["paper_epoch_time_s_low"], adapter["ratio_epoch_time_s_low"]) == ("350–380", "0.96–1.04")
    assert (adapter["paper_memory_gb_low"], adapter["ratio_memory_gb_low"]) == ("37–39", "0.97–1.03")
    assert (cached["ratio_epoch_time_s_low"], cached["ratio_memory_gb_low"]) == ("2.00", "0.50")
    told = " ".join(table.notes)
    assert "SIGIR 2024" in told
    assert "the protocol 'paper'" in told
    assert "Measured: protocol 'paper', fp16" in told
    found = {row["method"]: row for row in json.loads(to_json(table))["rows"]}
    assert (found["adapter"]["paper_memory_gb_low"], found["adapter"]["paper_memory_gb_high"]) == (37, 39)
    assert found["adapter"]["ratio_memory_gb_high"] == pytest.approx(38 / 37)


def test_the_other_protocol_is_named_and_epochs_cut_short_are_scaled(factory):
    cut = {"training": Training(epochs=2, users_per_batch=32, precision="bf16", max_steps_per_epoch=50)}
    path = factory.write("lora", time=10.0, **{**PAPER, "protocol": "suite"}, **cut)
    facts: DatasetFacts = read_result(path).dataset
    change(path, dataset=facts.model_copy(update={"users": 12_076}), files={})
    table = paper(section_of(factory))
    assert line(table, "lora")["measured_epoch_time_s"] == "75.6"  # 378 steps of 32 users, 50 of them measured
    assert "Measured: protocol 'suite', bf16" in " ".join(table.notes)
    assert any("cut short" in note for note in table.notes)


@pytest.mark.parametrize(
    "other", [{"matrix": "microlens"}, {"matrix": None}, {"text_encoder": EncoderSpec(source="bert-large-uncased")}]
)
def test_other_matrices_have_no_paper_view(factory, other):
    factory.write("fft", **{**PAPER, **other})
    assert paper(section_of(factory)).rows == ()
    assert "paper" not in [table.name for table in all_tables(section_of(factory))]


def test_a_row_that_ran_out_of_memory_keeps_its_place_beside_the_paper(factory):
    factory.write("fft", status="oom", time=None, peak=None, **PAPER)
    fft = line(paper(section_of(factory)), "fft")
    assert (fft["paper_memory_gb_low"], fft["measured_memory_gb"], fft["ratio_memory_gb_low"]) == ("47", "–", "–")


# --- plan against measured -------------------------------------------------------------------------------------

PARTS = {"weight_bytes": 8e8, "gradient_bytes": 2e8, "optimizer_bytes": 4e8, "saved_bytes": 20e8}


@pytest.mark.parametrize(("device", "measured"), [("cuda", 3.2e9), ("cpu", 4e9)])
def test_the_plan_stands_beside_the_measured_peak(factory, device, measured):
    path = factory.write("fft", peak=4e9, device=device)  # torch allocated 0.8 of that, says the factory
    count(path, **PARTS, planned_peak_bytes=3.2e9, forward_flops=2e9, backward_flops=4e9, mfu=0.41)
    factory.write("lora", device=device)
    table = planned(section_of(factory))
    assert [row[0].value for row in table.rows] == ["fft"]
    fft = line(table, "fft")
    assert [fft[key] for key in PARTS] == ["0.800", "0.200", "0.400", "2.00"]
    assert (fft["planned_peak_bytes"], fft["peak_ratio"]) == ("3.20", f"{measured / 3.2e9:.2f}")
    assert fft["measured_peak_bytes"] == f"{measured / 1e9:.2f}"
    assert (fft["flops"], fft["mfu_percent"]) == ("6.00", "41.0")


def test_records_without_a_planned_peak_show_their_counters_alone(factory):
    count(factory.write("fft"), **PARTS)
    table = planned(section_of(factory))
    assert [column.key for column in table.columns] == ["method", *PARTS, "flops"]
    assert line(table, "fft")["flops"] == "–"


def test_no_counters_no_table(factory):
    factory.write("fft")
    assert "plan" not in [table.name for table in all_tables(section_of(factory))]


# --- searches --------------------------------------------------------------------------------------------------


def test_the_cost_of_a_search_stands_beside_its_winner_in_seconds_and_in_runs_of_full_fine_tuning(factory):
    factory.write("fft", seed=1, all_in_s=40.0)
    factory.write("fft", seed=2, all_in_s=60.0)
    for seed, seconds in ((1, 90.0), (2, 110.0)):
        path = factory.write("autopeft", seed=seed, all_in_s=seconds + 30)
        values = {"trials": 8, "trials_failed": seed - 1, "search_s": seconds, "proposing_s": 7.0}
        count(path, **{f"procedure_{name}": value for name, value in values.items()})
    table = searches(section_of(factory))
    assert [row[0].value for row in table.rows] == ["autopeft"]
    row = line(table, "autopeft")
    assert (row["procedure_trials"], row["procedure_trials_failed"]) == ("8", "0.5")
    assert row["procedure_search_s"].startswith("100")
    assert row["procedure_search_runs"] == "2.00"
    assert "over the 50.0 s of everything that leads to the model of 'fft'" in table.notes[0]


def test_without_full_fine_tuning_a_search_is_in_seconds_alone(factory):
    factory.write("lora", all_in_s=10.0)
    count(factory.write("autopeft", all_in_s=60.0), procedure_trials=8, procedure_search_s=30.0)
    table = searches(section_of(factory))
    assert "procedure_search_runs" not in [column.key for column in table.columns]
    assert "A matrix with a row 'fft' also says" in table.notes[0]


def test_a_row_says_that_its_time_and_memory_leave_out_what_came_before_the_last_training(factory):
    """Searches, estimations and earlier stages; a feature cache has a footnote of its own."""
    told = "T and M, and so TPME, are those of the last training alone"
    factory.write("lora", all_in_s=40.0)  # four epochs of 10 s
    factory.write("autopeft", all_in_s=80.0)
    path = factory.write("pt-peft", all_in_s=40.0)
    epochs = [epoch.model_copy(update={"stage": str(epoch.index > 2)}) for epoch in read_result(path).epochs]
    change(path, epochs=tuple(epochs))
    cached = factory.write("iisan", cached=True, all_in_s=40.0)
    change(cached, all_in_s=Reading(value=40 + read_result(cached).cache.build_s, source="test"))
    notes = section_of(factory).notes
    [number] = [place for place, text in enumerate(notes.footnotes, start=1) if text.startswith(told)]
    assert {name for name, marks in notes.marks.items() if number in marks} == {"autopeft", "pt-peft"}


def test_no_search_no_table_of_searches(factory):
    factory.write("fft", all_in_s=10.0)
    assert "searches" not in [table.name for table in all_tables(section_of(factory))]

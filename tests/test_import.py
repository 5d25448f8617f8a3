"""Published results become records: what they hold, what is refused, and the page made from them."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_checks import all_plots, boxes, overlapping
from typer.testing import CliRunner

from tpme.bench.cli import app
from tpme.bench.imports.csv_table import read_table
from tpme.bench.imports.peft_comparison import DEFINITIONS, read_folder
from tpme.bench.imports.published import write_runs
from tpme.bench.record import CellResult, find_results, read_result, write_result
from tpme.reports.data.others import foot_of_others
from tpme.reports.figures.style import add_foot, new_figure, row_label, style
from tpme.reports.report import make_report, write_report

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT.parent / "shared" / "data" / "peft-method-comparison" / "MetaMathQA"
LORA = "lora--llama-3.2-3B-rank32.json"
with_files = pytest.mark.skipif(not FILES.is_dir(), reason="peft's result files are not beside the project")


def result_file(**changes: Any) -> dict[str, Any]:
    """A small file as the suite writes them; ``changes`` are fields of its run, its training or its settings."""
    intervals = [
        {"step": step, "valid accuracy": 0.1, "train loss": 1.0, "train time": 10.0 + step / 100, "eval time": 9.0}
        for step in (100, 200)
    ]
    config = {"model_id": "org/Model-1B", "max_steps": 200, "seed": 3, "batch_size": 4, "optimizer_kwargs": {"lr": 0.1}}
    config |= {"eval_steps": 100}
    run = {
        "created_at": "2026-07-14T13:26:19+00:00", "total_time": 60.0, "experiment_name": "lora/model-1B-rank8",
        "peft_config": {"peft_type": "LORA", "r": 8, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {}},
        "error_msg": "",
    }  # fmt: skip
    train = {
        "accelerator_memory_max": 20, "accelerator_memory_reserved_avg": 10, "accelerator_memory_reserved_99th": 15,
        "train_time": 40.0, "file_size": 7, "num_trainable_params": 5, "num_total_params": 50, "status": "success",
        "metrics": [*intervals, {"step": 200, "test accuracy": 0.5, "train loss": 1.0, "forgetting": -0.1}],
    }  # fmt: skip
    for part in (config, run, train):
        part.update({key: value for key, value in changes.items() if key in part})
    system = {"system": "Linux", "release": "6", "machine": "x86_64", "accelerator": "Card 9"}
    packages = {
        "peft-version": "0.19",
        "peft-commit-hash": "d787f51",
        "torch-version": "2.13",
        "torch-commit-hash": None,
    }
    meta = {"package_info": packages, "system_info": system, "dataset_info": {"gsm8k": {"sha": "740"}}}
    return {"run_info": run | {"train_config": config}, "train_info": train, "meta_info": meta}


def imported(tmp_path: Path, **changes: Any) -> CellResult:
    source = tmp_path / "files"
    source.mkdir(exist_ok=True)
    (source / "lora.json").write_text(json.dumps(result_file(**changes)))
    write_runs(read_folder(source, commit="5d602fd"), tmp_path / "out")
    (path,) = find_results([tmp_path / "out"])
    return read_result(path)


def test_a_result_file_is_a_record(tmp_path: Path) -> None:
    record = imported(tmp_path)
    assert (record.cell.method, record.cell.task, record.cell.seed) == ("lora", "MetaMathQA", 3)
    assert record.cell.options["experiment"] == "rank8"
    assert record.cell.options["peft"] == {"r": 8, "target_modules": ["q_proj", "v_proj"]}
    assert record.cell.options["training"] == {"optimizer_kwargs": {"lr": 0.1}}
    assert record.cell.settings == {"model_id": "org/Model-1B", "max_steps": 200, "batch_size": 4, "eval_steps": 100}
    assert (record.epoch_time_s.value, record.time_of) == (23.0, "200 steps")
    assert record.all_in_s is not None
    assert record.all_in_s.value == 40.0
    assert [epoch.steps for epoch in record.epochs] == [100, 100]
    assert record.training_memory is not None
    assert record.training_memory.torch_reserved_bytes.value == 20
    assert record.training_memory.nvml_process_bytes.reason == "not published"
    assert record.parameters is not None
    assert (record.parameters.trainable, record.parameters.total, record.parameters.stored_bytes) == (5, 50, 7)
    qualities = {name: (metric.value.value, metric.higher_is_better) for name, metric in record.metrics.items()}
    assert qualities == {"test accuracy": (0.5, True), "forgetting": (-0.1, False)}
    assert record.source is not None
    assert (record.source.commit, record.source.definitions) == ("5d602fd", DEFINITIONS)
    assert record.code_version == "d787f51"
    assert record.environment is not None
    assert record.environment.packages == {"peft": "0.19", "torch": "2.13"}


@pytest.mark.parametrize(("message", "status"), [("CUDA out of memory. Tried", "oom"), ("", "error")])
def test_a_run_that_did_not_succeed_is_a_row(tmp_path: Path, message: str, status: str) -> None:
    metrics = result_file()["train_info"]["metrics"][:1]
    record = imported(tmp_path, status="canceled", error_msg=message, metrics=metrics)
    assert record.status == status
    assert record.failure is not None
    assert message[:18] in record.failure.message
    assert (record.epoch_time_s.value, record.epoch_time_s.reason) == (None, "it reached step 100 of 200")
    assert record.metrics["test accuracy"].value.reason == "not published"
    (section,) = make_report([tmp_path / "out"]).sections
    assert section.summary["status"].tolist() == [status]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"train_time": "long"}, "field 'train_info.train_time'"),
        ({"max_steps": 300}, "intervals up to step 200 of 300"),
        ({"metrics": [{"step": step, "train time": 1.0} for step in (100, 50, 200)]}, "step 50 after step 100"),
        ({"num_trainable_params": -1}, "num_trainable_params"),
        ({"metrics": [{"step": 100}, {"step": 200, "train time": 1.0}]}, "no `train time` at step 100"),
        (
            {"eval_steps": 100, "metrics": [{"step": 200, "train time": 1.0}]},
            "no `train time` between steps 0 and 200, though each interval has 100",
        ),
    ],
)
def test_a_wrong_file_is_one_line_and_nothing_is_written(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    source = tmp_path / "files"
    source.mkdir()
    (source / "a.json").write_text(json.dumps(result_file()))
    (source / "b.json").write_text(json.dumps(result_file(**changes)))
    done = CliRunner().invoke(app, ["import", "peft-comparison", str(source), "--out", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert what in str(done.exception)
    assert "b.json" in str(done.exception)
    assert "\n" not in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_other_folders_and_a_second_import_are_refused(tmp_path: Path) -> None:
    from tpme.bench.errors import UserError

    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no result files"):
        read_folder(tmp_path / "empty")
    (tmp_path / "empty" / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="not a result file of peft"):
        read_folder(tmp_path / "empty")
    imported(tmp_path)
    runs = read_folder(tmp_path / "files")
    with pytest.raises(UserError, match="is there already"):
        write_runs(runs, tmp_path / "out")
    with pytest.raises(UserError, match="method, options, settings and seed"):
        write_runs([*runs, *runs], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of peft's 63 files."""
    records = tmp_path_factory.mktemp("published") / "peft-metamathqa"
    write_runs(read_folder(FILES, commit="5d602fd"), records)
    return records


@with_files
@pytest.mark.slow
def test_the_published_files_make_the_report(published: Path, tmp_path: Path) -> None:
    """To repair: the commands at the end of docs/peft-comparison/README.md."""
    from test_results import contents

    docs = ROOT / "docs" / "peft-comparison"
    title = re.search(r'--title "(.*)"', (docs / "README.md").read_text(encoding="utf-8"))
    assert title is not None
    write_report([published], tmp_path, formats=("html", "csv", "png"), title=title[1])
    expected, made = contents(docs), contents(tmp_path)
    del expected["README.md"]
    assert made.keys() == expected.keys()
    assert [path for path in expected if made[path] != expected[path]] == []


@with_files
def test_the_findings_are_what_the_records_say(published: Path) -> None:
    docs = ROOT / "docs" / "peft-comparison"
    page = (docs / "README.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("peft_findings", ROOT / "scripts" / "peft_findings.py")
    assert spec is not None
    assert spec.loader is not None
    findings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(findings)
    assert findings.rewritten(page, published) == page
    assert "takes 3.1 times as long as LoRA" in page
    assert "2.3 times by `train_time`" in page
    assert not list(docs.rglob("*.json")), "the result files stay with their authors"


# --- any table ------------------------------------------------------------------------------------------------


def documented(tmp_path: Path) -> tuple[Path, Path]:
    """The files that docs/imports.md shows."""
    from test_docs import blocks

    for name, text in blocks(ROOT / "docs" / "imports.md").items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "table.csv", tmp_path / "map.toml"


def test_the_documented_table_is_imported(tmp_path: Path) -> None:
    table, mapping = documented(tmp_path)
    out = tmp_path / "doe-2026"
    done = CliRunner().invoke(app, ["import", "csv", str(table), "--map", str(mapping), "--out", str(out)])
    assert done.exit_code == 0, done.output
    said = (ROOT / "docs" / "imports.md").read_text(encoding="utf-8")
    assert done.output.strip().replace(str(out), "doe-2026") in said
    (section,) = make_report([out]).sections
    rows = section.summary
    assert rows.loc["LoRA [rank=8]", "epoch_time_s"] == 630
    assert rows.loc["LoRA [rank=8]", "memory_bytes"] == pytest.approx(22.3e9)
    assert rows.loc["LoRA [rank=8]", "metric_accuracy"] == pytest.approx(0.478)
    assert rows.loc["Full FT fp32", "status"] == "oom"
    assert rows[["stored_bytes", "wall_s", "total_millions"]].isna().all(axis=None), "what is unknown is not 0"
    assert section.group.key["source"] == "Doe et al. 2026, table 3"
    assert section.time_of == "1000 steps"
    assert any("no accuracy: left out of the table" in note for note in section.notes.footnotes)


def test_a_table_keeps_its_source_and_what_it_says_of_itself(tmp_path: Path) -> None:
    table, mapping = documented(tmp_path)
    text = mapping.read_text(encoding="utf-8")
    mapping.write_text(f'commit = "4bb1e2f"\n{text}', encoding="utf-8")
    rows = table.read_text(encoding="utf-8").replace("18.4,", '"1,018.4",')
    table.write_text(rows, encoding="utf-8")
    write_runs(runs := read_table(table, mapping), tmp_path / "out")
    assert [run.parameters.trainable for run in runs if run.parameters] == [9_200_000, 1_018_400_000] + [
        3_212_000_000
    ] * 2
    for path in find_results([tmp_path / "out"]):
        record = read_result(path)
        assert record.source is not None
        said = record.source.name, record.source.reference, record.source.commit
        assert said == ("Doe et al. 2026, table 3", "https://example.org/doe2026", "4bb1e2f")
        assert record.source.definitions["T"] == "time of training alone, as the authors say"
        assert record.source.definitions["P"] == 'column "Params (M)"'
        assert record.cell.settings == {"model": "Llama-3.2-3B", "batch": 4}
        assert record.environment is not None
        assert (record.environment.device_name, record.cell.device) == ("NVIDIA L40S", "cuda")


@pytest.mark.parametrize(
    ("file", "old", "new", "what"),
    [
        ("table.csv", "22.3,", "much,", "line 2: 'much' in column 'Mem (GB)' is not a number"),
        ("table.csv", "10.5,", '"1.234,5",', "line 2: '1.234,5' in column 'Time (min)' is not a number"),
        ("table.csv", "10.5,", '"10,5",', "line 2: '10,5' in column 'Time (min)' is not a number"),
        ("table.csv", "10.5,", "1_0,", "line 2: '1_0' in column 'Time (min)' is not a number"),
        ("table.csv", "LoRA,64,", "LoRA,8,", "method, options, settings and seed are those of"),
        ("table.csv", ",ok\nFull", "\nFull", "line 3: 7 fields, the header has 8"),
        ("table.csv", "Seed", "r", "line 1: every column needs a name of its own"),
        ("table.csv", ",1,30.2", ",one,30.2", "'one' in column 'Seed' is not a seed"),
        ("table.csv", "18.4", "-18.4", "cannot be negative"),
        ("map.toml", '"Mem (GB)"', '"Memory (GB)"', "memory: "),
        ("map.toml", 'unit = "min"', 'unit = "days"', "field 'time.unit'"),
        ("map.toml", 'higher_is_better = true', "", "field 'metrics.accuracy.higher_is_better'"),
        ("map.toml", 'unit = "GB"', 'unit = "pages"', "unit 'pages'"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_one_line(tmp_path: Path, file: str, old: str, new: str, what: str) -> None:
    table, mapping = documented(tmp_path)
    path = tmp_path / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["import", "csv", str(table), "--map", str(mapping), "--out", str(out)])
    assert done.exit_code != 0
    assert what in str(done.exception), str(done.exception)
    assert file in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not out.exists()
    assert not list(tmp_path.glob(".*")), "nothing half-written stays"


def test_missing_files_are_named(tmp_path: Path) -> None:
    from tpme.bench.errors import UserError

    table, mapping = documented(tmp_path)
    with pytest.raises(UserError, match=r"docs/imports\.md shows one"):
        read_table(table, tmp_path / "none.toml")
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv", mapping)


# --- never unmarked -------------------------------------------------------------------------------------------


def write_second_source(tmp_path: Path) -> None:
    """The same file by somebody else, a second slower, below ``out2``."""
    source = tmp_path / "other"
    shutil.copytree(tmp_path / "files", source)
    for path in source.iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace('"train time": 11.0', '"train time": 12.0'))
    write_runs(read_folder(source, name="somebody else"), tmp_path / "out2")


def test_rows_of_others_share_no_frame_unless_mixed(tmp_path: Path) -> None:
    """Nor do two sources; with ``mix`` every name and the answer say who measured."""
    imported(tmp_path)
    write_second_source(tmp_path)
    both = [tmp_path / "out", tmp_path / "out2"]
    sections = make_report(both).sections
    assert len(sections) == 2
    assert all("measured by others" in section.name for section in sections)
    (mixed,) = make_report(both, mix=True).sections
    assert mixed.group.mixed == ("source",)
    assert sorted(mixed.lines) == [
        "lora [rank8, measured by others: huggingface/peft method_comparison]",
        "lora [rank8, measured by others: somebody else]",
    ]
    assert any(note.startswith("Mixed: rows of different sources") for note in mixed.notes.shared)


def test_every_figure_names_who_measured(tmp_path: Path) -> None:
    """A picture is copied without the page around it."""
    imported(tmp_path)
    write_second_source(tmp_path)
    (section,) = make_report([tmp_path / "out"]).sections
    plots = all_plots(section)
    assert [plot.name for plot in plots] == ["costs", "learning"]
    for plot in plots:
        said = [text.get_text() for text in plot.figure.texts]
        assert said == ["Measured by others: huggingface/peft method_comparison, commit 5d602fd"], plot.name
        with style():
            assert overlapping(plot.figure) == [], plot.name
    costs = plots[0].figure
    assert "M, torch's allocator (MB)" in [axes.get_title() for axes in costs.axes]
    (mixed,) = make_report([tmp_path / "out", tmp_path / "out2"], mix=True).sections
    assert sorted(row_label(mixed, name) for name in mixed.lines) == ["lora [rank8]†*", "lora [rank8]‡*"]
    foot = foot_of_others([one.result for one in mixed.records], mixed=True)
    assert foot.endswith(": † huggingface/peft method_comparison, commit 5d602fd; ‡ somebody else")
    plots = all_plots(mixed)
    assert {"quality-tpme", "tpme", "costs", "learning"} <= {plot.name for plot in plots}
    for plot in plots:
        (said, *rest) = [text.get_text().replace("\n", " ") for text in plot.figure.texts]
        assert (said, rest) == (foot, []), plot.name
        with style():
            assert overlapping(plot.figure) == [], plot.name


def test_a_foot_moves_nothing_of_a_figure() -> None:
    with style():
        figure = new_figure(3, 2)
        axes = figure.add_axes((0.2, 0.3, 0.5, 0.6))
        axes.plot([0, 1], label="line")
        figure.legend(loc="lower center")
        figure.text(0.1, 0.95, "above")
        before = axes.get_window_extent().bounds, [box.bounds for _, box in boxes(figure)]
        add_foot(figure, "who measured " * 12)
        after = axes.get_window_extent().bounds, [box.bounds for _, box in boxes(figure)]
        grown = (figure.get_figheight() - 2) * figure.dpi
        assert 30 < grown < 200
        assert after[0] == pytest.approx(np.add(before[0], (0, grown, 0, 0)))
        assert overlapping(figure) == []
        assert all(box.x1 < 3 * figure.dpi for _, box in boxes(figure))


def test_a_report_of_others_says_nothing_that_holds_of_our_own_runs_alone(tmp_path: Path) -> None:
    imported(tmp_path)
    write_second_source(tmp_path)
    write_report([tmp_path / "out"], tmp_path / "one", formats=("html", "json", "csv"))
    write_report([tmp_path / "out", tmp_path / "out2"], tmp_path / "both", formats=("html", "json", "csv"), mix=True)
    texts = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.md")]
    assert len(texts) == 4
    for text in texts:
        assert not re.search(
            r"doctor --noise|tpme run|feature cache|recall|ndcg|\busers?\b|\bitems?\b", text, re.IGNORECASE
        )
    page = (tmp_path / "one" / "index.html").read_text(encoding="utf-8")
    assert ">Memory M<" in page
    assert '"memory_help":"By accelerator_memory_max, reserved by torch' in page.replace('": "', '":"')
    assert not [path for path in tmp_path.rglob("tables/*") if "recall" in path.read_text(encoding="utf-8")]


def test_the_gate_and_the_export_say_who_measured_and_why_something_is_missing(tmp_path: Path) -> None:
    imported(tmp_path)
    baseline = tmp_path / "baseline.json"
    for command in (
        ["baseline", str(tmp_path / "out"), "--out", str(baseline)],
        ["check", str(tmp_path / "out"), "--baseline", str(baseline), "--all"],
    ):
        done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        assert "Card 9, measured by others: huggingface/peft method_comparison" in done.output
        assert "tpme ab" not in done.output
    record = read_result(find_results([tmp_path / "out"])[0])
    assert record.environment is not None
    ours = record.model_copy(update={"source": None})  # as if measured here, on a device of that name
    write_result(ours, tmp_path / "ours" / "cells" / ours.cell_id / "attempt-1.json")
    done = CliRunner().invoke(app, ["check", str(tmp_path / "ours"), "--baseline", str(baseline)])
    assert "not compared: reserved" not in done.output
    assert "memory" not in done.output.partition("numbers compared: ")[2].partition("\n")[0], "of another device"
    metrics = result_file()["train_info"]["metrics"][:2]
    other = tmp_path / "other"
    other.mkdir()
    imported(other, metrics=metrics, status="canceled")
    table = tmp_path / "all.csv"
    assert CliRunner().invoke(app, ["export", str(other / "out"), "--out", str(table)]).exit_code == 0
    (row,) = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    assert (row["source"], row["source_commit"]) == ("huggingface/peft method_comparison", "5d602fd")
    assert json.loads(row["source_definitions"]) == DEFINITIONS
    assert json.loads(row["missing_reasons"])["metric_test accuracy"] == "not published"
    assert json.loads(row["missing_reasons"])["peak_nvml_device_bytes"] == "not published"


def test_a_quality_that_no_row_has_is_reported_as_missing(tmp_path: Path) -> None:
    imported(tmp_path, metrics=result_file()["train_info"]["metrics"][:2])
    report = write_report([tmp_path / "out"], tmp_path / "report", formats=("html", "csv", "png"))
    (section,) = report.sections
    assert section.summary["metric_test accuracy"].isna().all()
    assert "no test accuracy: not published" in section.notes.footnotes
    for command in (["choose", str(tmp_path / "out")], ["compare", str(tmp_path / "out"), str(tmp_path / "out")]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (done.output, done.exception)

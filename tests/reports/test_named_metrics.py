"""Reports on tasks other than recommendation: they show the metrics that records name, and no word of Recall."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tpme.bench.cli import app
from tpme.bench.errors import UserError
from tpme.bench.record import Cell, CellResult, Epoch, NamedMetric, Parameters, Reading, cell_id, write_result
from tpme.reports.changes import Change
from tpme.reports.choose import Limits, choose, metric_limits
from tpme.reports.compare import compare
from tpme.reports.data.answer import answer
from tpme.reports.data.qualities import validated
from tpme.reports.data.stats import welch
from tpme.reports.page_axes import Axes
from tpme.reports.report import make_report, write_report
from tpme.reports.tables.results import results
from tpme.reports.tables.table import to_markdown

from .conftest import environment, memory

pytestmark = pytest.mark.slow

ROWS = {
    "fft": (30.0, 9.0, 4e9, 0.70, 1.2),
    "lora": (20.0, 1.0, 2e9, 0.72, 1.1),
    "bitfit": (15.0, 0.1, 1.9e9, 0.60, 1.6),
}
"""T, P in millions, M, accuracy and loss."""


def write_row(
    root: Path,
    method: str,
    seed: int = 1,
    *,
    accuracy: float | None = None,
    higher: bool = True,
    status: str = "ok",
    **changes: object,
) -> None:
    time, millions, peak, good, loss = ROWS[method]
    cell = Cell(
        method=method, dataset="news", dataset_fingerprint="", modalities=(), task="classification", seed=seed,
        settings={"batch": 8}, **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    value = good + seed / 1000 if accuracy is None else accuracy
    record = CellResult(
        cell_id=cell_id(cell, "code"), attempt=1, cell=cell, code_version="code", status="ok",
        started_at="2026-01-01T00:00:00+00:00", wall_s=90, environment=environment("cpu: test, 2 threads", "cpu"),
        parameters=Parameters(
            trainable=round(1e6 * millions), trainable_max=round(1e6 * millions), total=10**7, by_group={},
            stored_bytes=100,
        ),
        epochs=tuple(
            Epoch(index=index, train_s=time + index / 10, steps=250, loss=None, metrics={"valid accuracy": value})
            for index in (1, 2, 3)
        ),
        epoch_time_s=Reading(value=time + 0.2, source="median"), time_of="250 steps", training_memory=memory(peak),
        metrics={
            "accuracy": NamedMetric(value=Reading(value=value, source="test"), higher_is_better=higher),
            "loss": NamedMetric(value=Reading(value=loss, source="test"), higher_is_better=False),
        },
    )  # fmt: skip
    write_result(record, root / "cells" / record.cell_id / "attempt-1.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for method in ROWS:
        for seed in (1, 2, 3):
            write_row(tmp_path / "run", method, seed)
    return tmp_path / "run"


def test_a_section_knows_its_qualities(run: Path) -> None:
    (section,) = make_report([run]).sections
    assert [(what.header, what.better) for what in section.qualities] == [("accuracy", "higher"), ("loss", "lower")]
    assert section.main is section.deciding is section.qualities[0]
    assert section.summary["metric_accuracy"]["lora"] == pytest.approx(0.722)
    assert section.summary["metric_accuracy_sd"]["lora"] == pytest.approx(0.001)
    assert section.name == "classification, news, cpu: test, 2 threads, T of 250 steps"


def test_tables_show_the_metrics_with_their_direction(run: Path) -> None:
    (section,) = make_report([run]).sections
    table = results(section)
    shown = {table.columns[index].title for index in table.visible}
    assert {"accuracy ↑", "loss ↓"} <= shown
    best = {
        column.key: [row[0].text for row in table.rows if row[place].best] for place, column in enumerate(table.columns)
    }
    assert (best["metric_accuracy"], best["metric_loss"]) == (["lora"], ["lora"])
    text = to_markdown(table)
    assert "0.7220 ± 0.0010" in text
    assert "epoch" not in text
    assert "Recall" not in text
    assert "users" not in text


def test_no_text_of_the_report_speaks_of_recommendation(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "report", formats=("html", "csv", "png", "tex"))
    folder = tmp_path / "report"
    for path in [*folder.glob("*.md"), *folder.rglob("*.csv"), *folder.rglob("*.tex")]:
        text = path.read_text(encoding="utf-8")
        for word in ("Recall", "NDCG", "recommender", "encoder", "catalogue"):
            assert word not in text.replace("recall_10", ""), (path, word)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "Recall@10" not in page
    assert "accuracy" in page
    assert {path.stem for path in folder.glob("plots/*.png")} >= {"quality-tpme", "costs", "learning", "tpme"}


def test_the_answer_claims_no_test_over_users(run: Path) -> None:
    (section,) = make_report([run]).sections
    said = answer(section)
    assert said.best == "Best accuracy: lora (0.7220); no test says which differences are real: a metric of few seeds."
    assert "Lowest TPME: bitfit, with accuracy 0.6020" in said.cheapest
    assert "s for 250 steps" in said.cheapest


def test_the_page_offers_the_metrics_as_axes(run: Path) -> None:
    (section,) = make_report([run]).sections
    axes = Axes(section)
    assert [(axis.key, axis.better) for axis in axes.metrics] == [("metric_accuracy", 1), ("metric_loss", -1)]
    value, low, high = axes.values("lora")["metric_accuracy"]  # type: ignore[misc]
    assert high - value == pytest.approx(value - low) == pytest.approx(0.001)


def test_choose_limits_a_metric_in_its_direction(run: Path) -> None:
    sections = make_report([run]).sections
    for text, qualifying in (("accuracy=0.7", {"lora", "fft"}), ("loss=1.15", {"lora"})):
        bounds, metrics = metric_limits(sections, [text])
        (choice,) = choose(sections, Limits(bounds, None, metrics))
        assert set(choice.qualifying) == qualifying
    assert choice.qualifying == ("lora",)
    (reason,) = choice.rejected["bitfit"]
    assert reason.text == "loss 1.60 > 1.15"
    done = CliRunner().invoke(app, ["choose", str(run), "--metric", "accuracy=0.7", "--json"])
    (group,) = json.loads(done.output)["groups"]
    assert [row["method"] for row in group["qualifying"]] == ["lora", "fft"]
    for wrong in ("precision=0.5", "accuracy", "accuracy=high", "accuracy=nan"):
        with pytest.raises(UserError, match="--metric"):
            metric_limits(sections, [wrong])


def test_a_metric_that_turns_round_is_refused(run: Path) -> None:
    write_row(run, "lora", 4, higher=False)
    with pytest.raises(UserError, match="metric 'accuracy': more is better in some"):
        make_report([run])


def test_a_lower_main_metric_is_best_at_its_least(tmp_path: Path) -> None:
    for method, loss in (("fft", 2.0), ("lora", 1.0)):
        write_row(tmp_path, method, accuracy=loss, higher=False)
    (section,) = make_report([tmp_path]).sections
    assert answer(section).best.startswith("Best accuracy: lora (1.0000)")
    (choice,) = choose([section], Limits({}))
    assert choice.qualifying == ("lora", "fft")


def test_other_settings_and_other_units_of_t_are_other_groups(run: Path) -> None:
    cell = Cell(
        method="lora", dataset="news", dataset_fingerprint="", modalities=(), task="classification",
        settings={"batch": 16},
    )  # fmt: skip
    old = next((run / "cells").rglob("attempt-1.json"))
    content = json.loads(old.read_text())
    content |= {"cell": cell.model_dump(mode="json"), "cell_id": cell_id(cell, "code")}
    write_result(CellResult.model_validate_json(json.dumps(content)), run / "cells" / "x" / "attempt-1.json")
    names = [section.name for section in make_report([run]).sections]
    assert len(names) == 2
    assert any("batch=16" in name for name in names)


# --- two sides ------------------------------------------------------------------------------------------------


def change_of(a: Path, b: Path, row: str = "lora") -> Change:
    (pair,) = compare(a, b).pairs
    (found,) = [one.change("metric_accuracy") for one in pair.rows if one.a == row]
    assert found is not None
    return found


def test_compare_has_an_interval_over_seeds(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for seed in (1, 2, 3):
        write_row(other, "lora", seed, accuracy=0.80 + seed / 1000)
        write_row(other, "fft", seed, accuracy=0.70 + (seed - 2) / 10)
    assert change_of(run, other).outcome == "higher"
    assert change_of(run, other).effect == pytest.approx(0.08)
    assert change_of(run, other, "fft").outcome == "not told apart"
    alone = tmp_path / "alone"
    write_row(alone, "lora", accuracy=0.9)
    assert change_of(run, alone).outcome == "unclear"
    done = CliRunner().invoke(app, ["compare", str(run), str(other)])
    assert done.exit_code == 0, done.output
    assert "accuracy: B is higher" in done.output


@pytest.mark.parametrize(
    ("accuracy", "verdict", "code"), [(0.72, "same", 0), (0.60, "regressed", 1), (0.9, "improved", 0)]
)
def test_the_gate_judges_a_metric_by_its_threshold(tmp_path: Path, accuracy: float, verdict: str, code: int) -> None:
    for name, value in (("base", 0.72), ("head", accuracy)):
        write_row(tmp_path / name, "lora", accuracy=value)
    command = [
        "check",
        str(tmp_path / "head"),
        "--baseline",
        str(tmp_path / "base"),
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == code, done.output
    (cell,) = json.loads((tmp_path / "out.json").read_text())["cells"]
    (item,) = [one for one in cell["comparisons"] if one["metric"] == "metric_accuracy"]
    assert (item["verdict"], item["kind"]) == (verdict, "quality")


def test_a_baseline_file_keeps_metrics(tmp_path: Path) -> None:
    write_row(tmp_path / "base", "lora")
    write_row(tmp_path / "head", "lora", accuracy=0.5)
    file = tmp_path / "baseline.json"
    done = CliRunner().invoke(app, ["baseline", str(tmp_path / "base"), "--out", str(file)])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["check", str(tmp_path / "head"), "--baseline", str(file)])
    assert done.exit_code == 1, done.output
    assert "accuracy" in done.output


def test_board_and_export_take_them(run: Path, tmp_path: Path) -> None:
    for command in (
        ["board", str(run), "--out", str(tmp_path)],
        ["export", str(run), "--out", str(tmp_path / "x.csv")],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    board = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Best accuracy" in board
    assert "Recall" not in board
    head = (tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert {"metric_accuracy", "metric_loss", "task", "settings", "time_of", "source"} <= set(head)


# --- parts ----------------------------------------------------------------------------------------------------


def test_welch_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = np.array([1.0, 2.0, 4.0]), np.array([3.0, 5.0, 4.5, 4.0])
    expected = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    low, high = welch(a, b)
    assert low <= expected.low < expected.high <= high, "freedom is rounded down, so the interval is no narrower"
    assert welch(a, a + 1) == pytest.approx((1 - (welch(a, a)[1]), 1 + welch(a, a)[1]))
    assert welch(np.array([1.0, 1.0]), np.array([2.0, 2.0])) == (1.0, 1.0)


def test_a_curve_is_the_first_metric_of_an_epoch() -> None:
    epoch = Epoch(index=1, train_s=1, steps=1, loss=1, metrics={"valid accuracy": 0.5, "b": 1.0})
    assert validated([epoch]) == "valid accuracy"
    assert validated([epoch.model_copy(update={"valid_recall_10": 0.1})]) == "Recall@10"
    assert validated([]) == ""
    assert math.isfinite(epoch.metrics["b"])

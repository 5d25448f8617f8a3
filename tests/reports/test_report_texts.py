"""report.md: the answer first, and short; everything else in details.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from tpme.bench.record import CELLS_FILE, EncoderSpec, Failure, Training
from tpme.reports.report import write_report

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("html", "csv", "png")
EXPLAINED = ("T: ", "P: ", "M: ", "Peak: ", "TPME: ", "Cost / fft: ")


def texts(folder: Path) -> tuple[str, str]:
    return (folder / "report.md").read_text(), (folder / "details.md").read_text()


def check_order(text: str, details: str) -> None:
    """Three sentences, each group's under its name, the links, the columns explained, and only then a table."""
    lines = [line for line in text.splitlines()[1:] if line]
    said = [line for line in lines if line.startswith("- **")]
    assert [line.split("**")[1].split()[0] for line in said[:3]] == ["Best", "Cheapest", "Trust:"]
    assert said[2].endswith("[Details](details.md)")
    head = text.split("\n| Method |", 1)[0]
    assert text.index(said[-1]) < len(head)
    assert [name for name in EXPLAINED if name not in head] == []
    assert "[index.html](index.html)" in head
    assert "[report.md](report.md)" in details
    assert not re.search(r"\bframe\b|\bK\b", text)


def test_the_report_of_the_demo_is_short_and_answers_first(tmp_path: Path) -> None:
    """It had 4,333 words, 2,972 of them in tables."""
    write_report([ROOT / "results" / "demo"], tmp_path, formats=FORMATS)
    text, details = texts(tmp_path)
    assert 500 < len(text.split()) < 1500
    check_order(text, details)
    assert re.search(r"[0-9]+ MB while training, [0-9]+ MB at the peak of the whole run", text)
    assert "- In every row: Seeds 3." in text.splitlines()
    assert "- Noise floor" in details
    assert "Noise floor" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table}) == 1
    assert "| iisan (cached) " in text


def test_the_report_of_two_devices_is_short(make_factory, tmp_path: Path) -> None:
    for device, factor in (("cpu: one", 1.0), ("cpu: two", 5.0)):
        factory = make_factory(tmp_path / "run" / device[-3:])
        for index, method in enumerate(("fft", "lora", "adapter", "bitfit", "prompt", "iisan", "frozen", "id")):
            for seed in (1, 2, 3):
                cost = {"time": factor * (20 - 2 * index) * (1 + 0.01 * seed), "peak": 1e9 * (9 - index)}
                factory.write(method, seed=seed, device_key=device, cached=method == "iisan", all_in_s=99.0, **cost)
        factory.write("dyt", status="oom", time=None, device_key=device)
    write_report([tmp_path / "run"], tmp_path / "out", formats=FORMATS)
    text, details = texts(tmp_path / "out")
    assert text.count("- TPME: mean of T, P and M") == 1
    assert text.count("1 of 25 cells did not finish") == 2
    assert 1000 < len(text.split()) < 2500
    check_order(text, details)
    assert text.count("**Best Recall@10:**") == text.count("[Details](details.md)") == 2
    assert "plots/quality-tpme-2.png" in text


@pytest.fixture
def changed_run(factory) -> Path:
    """A run folder whose matrix was edited: a misspelt encoder, 3 epochs, then 4, then another version of a method."""
    misspelt = EncoderSpec(source="builtin:tiny-txet")
    failure = Failure(phase="load", message="builtin:tiny-txet: no such encoder")
    kept = []
    for method in ("fft", "lora"):
        factory.write(method, text_encoder=misspelt, status="error", time=None, failure=failure)
        factory.write(method, training=Training(epochs=3), time=30.0)
        factory.write(method, training=Training(epochs=4), time=20.0, code="a" * 40)
        new = factory.write(
            method, training=Training(epochs=4), time=10.0, code="b" * 40, started_at="2026-02-01T00:00:00+00:00"
        )
        kept.append(new.parent.name)
    (factory.root / CELLS_FILE).write_text(json.dumps({"cells": kept}))
    return factory.root


def test_a_report_holds_the_last_matrix_alone(changed_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = write_report([changed_run], out, formats=("csv", "html"))
    assert len(report.sections) == 1
    frame = pd.read_csv(out / "tables" / "results.csv").set_index("method")
    assert frame["epoch_time_s"].to_dict() == {"fft": 10.0, "lora": 10.0}
    everywhere = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert "tiny-txet" not in everywhere
    assert "epochs=3" not in everywhere
    assert "did not finish" not in (out / "report.md").read_text()


def test_history_shows_all_that_ever_ran(changed_run: Path, tmp_path: Path) -> None:
    report = write_report([changed_run], tmp_path, formats=("csv",), history=True)
    assert "tpme report run --weights 0.45,0.1,0.45 --all" in (tmp_path / "details.md").read_text()
    assert sum(len(section.cells) for section in report.sections) == len(list(changed_run.rglob("attempt-*.json"))) == 8
    names = {str(name) for section in report.sections for name in section.summary.index}
    assert {"lora [@aaaaaaa]", "lora [@bbbbbbb]"} <= names
    assert any("epochs=3" in name for name in names)
    assert "tiny-txet" in (tmp_path / "report.md").read_text()

"""The same findings in every format, and text from outside that no format may trip over."""

from __future__ import annotations

import base64
import io
import json
import zlib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from tpme.bench.console import PlainConsole
from tpme.bench.quantities import amount
from tpme.reports.gate import formats as gate_formats
from tpme.reports.gate.measures import MOST_USERS, Quality
from tpme.reports.gate.verdict import CellVerdict, Comparison, GateReport, Policy, conclude

NASTY = "a|b [red]<c>&*`_ 50%\n::error::x\x07\ufffe"
STEP = Comparison(metric="step_s", kind="time", base=0.02, head=0.03, ratio=1.5, bound=0.1, p=1e-6, verdict="slower")


def report(
    *comparisons: Comparison, name: str = "lora", head: str = "runs", policy: Policy | None = None
) -> GateReport:
    cells = [
        CellVerdict(key="1", name=name, dataset="demo", state="compared", comparisons=comparisons),
        CellVerdict(key="2", name="gone", dataset="demo", state="missing", note="differs in seed"),
        CellVerdict(key="3", name="fresh", dataset="demo", state="new"),
    ]
    return conclude(
        cells, policy or Policy(), command="check", base="b.json", head=head, notes=("a note",), duration_s=0.25
    )


@pytest.fixture
def full() -> GateReport:
    """Every verdict there is."""
    return report(
        STEP,
        Comparison(metric="saved_bytes", kind="counter", base=2e6, head=1e6, ratio=0.5, bound=0.0, verdict="improved"),
        Comparison(metric="tokens", kind="counter", base=3.0, head=4.0, ratio=4 / 3, bound=0.0, verdict="changed"),
        Comparison(metric="stored_bytes", kind="counter", base=5.0, head=5.0, ratio=1.0, bound=0.0, verdict="same"),
        Comparison(metric="host_rss_bytes", kind="memory", verdict="not compared", note="other device"),
        Comparison(metric="recall_10", kind="quality", base=0.2, head=0.1, ratio=0.5, p=0.5, verdict="same"),
    )


def printed(of: GateReport, *, everything: bool = False) -> str:
    console = PlainConsole(file=io.StringIO(), width=200)
    gate_formats.show(of, console, everything=everything)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_improvements_are_told_as_loudly_as_regressions(full: GateReport) -> None:
    for text in (printed(full), gate_formats.markdown(full)):
        assert "training step" in text
        assert "+50.00%" in text
        assert "saved for backward" in text
        assert "-50.00%" in text
        assert "1 regressed, 1 improved" in text
    lines = gate_formats.github_annotations(full)
    assert [line.split(" ")[0] for line in lines] == [
        "::error",
        "::notice",
        "::notice",
        "::warning",
        "::warning",
        "::notice",
        "::error",
    ]


def test_what_was_not_judged_is_said(full: GateReport) -> None:
    for text in (printed(full), gate_formats.markdown(full).replace("\\", "")):
        assert "not compared: resident memory peak of lora: other device" in text
        assert "missing from the runs: gone (differs in seed)" in text
        assert "new, not in the base: fresh" in text
        assert "a note" in text
        assert "the check itself took 0.25 s" in text
    assert "stored state" not in printed(full)
    assert "stored state" in printed(full, everything=True)


def test_junit_counts_what_failed(full: GateReport) -> None:
    suite = ElementTree.fromstring(gate_formats.junit(full))
    cases = suite.findall("testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    assert failed == ["step_s", "verdict"]
    assert skipped == ["host_rss_bytes", "cell", "cell"]
    assert [suite.get(name) for name in ("tests", "failures", "skipped")] == [str(len(cases)), "2", "3"]


def test_a_gate_that_compared_nothing_is_red_in_junit() -> None:
    nothing = report(Comparison(metric="step_s", kind="time", verdict="not compared", note="other device"))
    assert nothing.exit_code == 2
    suite = ElementTree.fromstring(gate_formats.junit(nothing))
    assert suite.get("failures") == "1"
    assert gate_formats.github_annotations(nothing)[-1].startswith("::error")


def test_benchmark_entries_are_smaller_is_better(full: GateReport) -> None:
    entries = {entry["name"]: entry for entry in gate_formats.smaller_is_better(full)}
    assert entries["lora: training step"] == {
        "name": "lora: training step",
        "unit": "s",
        "value": 0.03,
        "extra": "base 0.02",
    }
    assert "lora: saved for backward" in entries
    assert not any("Recall" in name for name in entries)


def test_text_from_outside_breaks_no_format(tmp_path: Path) -> None:
    lost = Comparison(metric=NASTY, kind="counter", verdict="not compared", note=NASTY)
    nasty = report(STEP.model_copy(update={"note": NASTY}), lost, name=NASTY, head=NASTY)
    assert "[red]" in printed(nasty)
    assert not [line for line in printed(nasty).splitlines() if line.startswith("::")], "no annotation by accident"
    rows = [line for line in gate_formats.markdown(nasty).splitlines() if line.startswith("| 🔴")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 8
    assert "<c>" not in rows[0]
    ElementTree.fromstring(gate_formats.junit(nasty).encode())
    for line in gate_formats.github_annotations(nasty):
        assert "\n" not in line
    gate_formats.write(nasty, as_json=tmp_path / "a" / "r.json", as_benchmark=tmp_path / "b.json")
    assert GateReport.model_validate_json((tmp_path / "a" / "r.json").read_bytes()) == nasty
    assert json.loads((tmp_path / "b.json").read_text())[0]["value"] == 0.03


def test_what_has_an_interval_is_shown_also_where_it_did_not_change() -> None:
    same = STEP.model_copy(update={"verdict": "same", "ratio": 1.01, "low": 0.98, "high": 1.04, "note": "2 runs"})
    interleaved = report(same).model_copy(update={"command": "ab"})
    for text in (printed(interleaved), gate_formats.markdown(interleaved)):
        assert "+1.00% [-2.0%, +4.0%]" in text.replace("\\", "")
    assert "+1.00%" not in printed(report(same)), "a check of a hundred times would be a table of a hundred rows"


def test_an_interval_is_shown_with_its_change() -> None:
    assert gate_formats.change(STEP.model_copy(update={"low": 1.4, "high": 1.6})) == "+50.00% [+40%, +60%]"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (796_736.0, "", "796,736"),
        (1.5e9, "bytes", "1.5 GB"),
        (12.0, "bytes", "12 bytes"),
        (0.0214, "s", "21.4 ms"),
        (2.85545e8, "FLOP", "285.545 MFLOP"),
        (0.12345, "", "0.1235"),
        ("oom", "", "oom"),
        (None, "s", "none"),
    ],
)
def test_values_are_shown_with_their_unit(value: float | str | None, unit: str, text: str) -> None:
    assert amount(value, unit) == text


@pytest.mark.parametrize("ranks", [b"", bytes(MOST_USERS + 1), b"\x0b"], ids=["none", "a bomb", "a rank of 11"])
def test_packed_ranks_of_a_baseline_are_bounded(ranks: bytes) -> None:
    packed = base64.b64encode(zlib.compress(ranks, 9)).decode()
    with pytest.raises(ValidationError, match="not the ranks"):
        Quality(users="0" * 12, recall_10=0.0, ndcg_10=0.0, ranks=packed)

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tpme.bench.cli import main
from tpme.bench.errors import UserError
from tpme.bench.quantities import BYTES, parse_quantity
from tpme.bench.record import Flag, Reading
from tpme.reports.choose import MILLIONS, SECONDS, Limits, choose, qualifying_table
from tpme.reports.report import make_report


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tpme", "choose", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def answer(root, device: str | None = None, **bounds: float):
    (choice,) = choose(make_report([root]).sections, Limits(bounds, device))
    return choice


def told(choice) -> dict[str, list[tuple[str, str]]]:
    return {name: [(reason.code, reason.text) for reason in found] for name, found in choice.rejected.items()}


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("8GB", BYTES, 8e9),
        ("8G", BYTES, 8e9),
        ("8GiB", BYTES, 8 * 2**30),
        ("500MB", BYTES, 5e8),
        (" 1.5 gb ", BYTES, 1.5e9),
        ("60s", SECONDS, 60),
        ("2min", SECONDS, 120),
        ("500ms", SECONDS, 0.5),
        ("5M", MILLIONS, 5),
        ("250k", MILLIONS, 0.25),
        ("1000000", MILLIONS, 1),
        ("0", MILLIONS, 0),
    ],
)
def test_units(text, units, value):
    assert parse_quantity("--x", text, units, "1") == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "units"),
    [("8", BYTES), ("8GBs", BYTES), ("GB", BYTES), ("-8GB", BYTES), ("8 G B", BYTES), ("60", SECONDS), ("2m", SECONDS),
     ("", SECONDS), ("1e3s", SECONDS), ("nan s", SECONDS), ("5%", MILLIONS)],
)  # fmt: skip
def test_bad_units_are_one_line(text, units):
    with pytest.raises(UserError, match=r"--max-x '.*': give a number and a unit") as caught:
        parse_quantity("--max-x", text, units, "8GB")
    assert "\n" not in str(caught.value)


def test_who_qualifies_and_why_the_others_do_not(factory):
    factory.write("fft", time=100.0, millions=90, peak=9e9, skill=0.4)
    factory.write("lora", time=40.0, millions=1, peak=5e9, skill=0.35)
    factory.write("iisan", time=8.0, millions=1, peak=1e9, skill=0.3)
    factory.write("bitfit", time=8.0, millions=1, peak=1e9, skill=0.02)
    choice = answer(factory.root, memory_bytes=6e9, epoch_time_s=60, ndcg_10=0.1, trainable_millions=50)
    assert choice.qualifying == ("lora", "iisan")
    found = told(choice)
    assert found["fft"] == [("limit", "M 9.00 GB > 6 GB"), ("limit", "T 100 s > 60 s"), ("limit", "P 90.0 M > 50 M")]
    ((code, text),) = found["bitfit"]
    assert code == "limit"
    assert text.startswith("NDCG@10 0.0")
    assert text.endswith(" < 0.1")
    reason = choice.rejected["fft"][0]
    assert (reason.quantity, reason.value, reason.limit) == ("memory_bytes", 9e9, 6e9)


def test_what_equals_its_limit_keeps_it_and_what_breaks_it_by_little_shows_that(factory):
    factory.write("lora", time=60.0, peak=8.0004e9)
    assert answer(factory.root, epoch_time_s=60).qualifying == ("lora",)
    assert told(answer(factory.root, memory_bytes=8e9))["lora"] == [("limit", "M 8.0004 GB > 8 GB")]


def test_rows_that_print_the_same_quality_are_ranked_by_tpme(factory):
    for method, time_s in (("fft", 20.0), ("lora", 10.0), ("iisan", 5.0), ("frozen", 1.0)):
        factory.write(method, time=time_s, skill=0.3)
    factory.write("adapter", time=30.0, skill=0.4)
    assert answer(factory.root).qualifying == ("adapter", "iisan", "lora", "fft", "frozen")


def test_what_did_not_finish_says_how(factory):
    factory.write("fft", status="oom", time=None, peak=2.4e9)
    factory.write("lora", status="diverged")
    factory.write("iisan")
    choice = answer(factory.root, memory_bytes=8e9)
    assert choice.qualifying == ("iisan",)
    assert told(choice) == {
        "fft": [("oom", "out of memory, at least 2.40 GB (limit 8 GB)")],
        "lora": [("failed", "did not finish: diverged")],
    }
    assert told(answer(factory.root))["fft"] == [("oom", "out of memory, at least 2.40 GB")]


def test_doubtful_and_missing_values_count_only_where_they_are_asked_for(factory):
    doubt = Reading(value=1.0, source="clock", valid=False, reason="another process used the machine")
    factory.write("lora", time_reading=doubt)
    factory.write("popularity", time=None, peak=None)
    found = told(answer(factory.root, epoch_time_s=60))
    assert found["lora"] == [("untrusted", "T 1 s is not to be trusted (limit 60 s): another process used the machine")]
    assert found["popularity"] == [("missing", "no T (limit 60 s): no epoch ended")]
    assert answer(factory.root, trainable_millions=5).qualifying


def test_the_peak_of_a_row_that_trained_nothing_stands(factory):
    factory.write("popularity", time=None, peak=None)
    assert answer(factory.root, peak_bytes=2e8).qualifying == ("popularity",)
    assert told(answer(factory.root, peak_bytes=5e7))["popularity"] == [("limit", "Peak 100 MB > 50 MB")]
    ((code, text),) = told(answer(factory.root, memory_bytes=2e8))["popularity"]
    assert (code, text) == ("missing", "no M (limit 200 MB): nothing was trained, or the attempt ended before")


def test_what_makes_memory_doubtful_makes_the_peak_doubtful_too(factory, spoil_memory):
    spoil_memory(factory.write("lora", peak=1e9), "another process used the device")
    for key, name in (("memory_bytes", "M"), ("peak_bytes", "Peak")):
        text = f"{name} 1 GB is not to be trusted (limit 2 GB): another process used the device"
        assert told(answer(factory.root, **{key: 2e9}))["lora"] == [("untrusted", text)]


def test_quality_of_random_weights_is_none(factory):
    flag = Flag(code="random-weights", message="text encoder with random weights: quality is meaningless")
    factory.write("lora", flags=(flag,), skill=0.9, time=5.0)
    factory.write("iisan", skill=0.1, time=9.0)
    choice = answer(factory.root, ndcg_10=0.01)
    assert choice.qualifying == ("iisan",)
    assert told(choice)["lora"] == [("random-weights", "NDCG@10 means nothing with random weights (limit 0.01)")]
    costs_alone = answer(factory.root, epoch_time_s=60)
    assert costs_alone.qualifying == ("iisan", "lora")
    texts = [[entry.text for entry in row] for row in qualifying_table(costs_alone, Limits({})).rows]
    assert texts[0][2] != "–"
    assert texts[1][2] == "–"


def test_devices_are_answered_apart(factory):
    for device, kind, time_s in (("Xeon, 2 threads", "cpu", 50.0), ("NVIDIA H200, driver 5", "cuda", 5.0)):
        factory.write("fft", device=kind, device_key=device, time=time_s)
    sections = make_report([factory.root]).sections
    for wanted in ("cuda", "h200"):
        gpu, cpu = choose(sections, Limits({"epoch_time_s": 60.0}, wanted))
        assert gpu.qualifying == ("fft",)
        assert told(cpu) == {"fft": [("device", "measured on Xeon, 2 threads")]}
    both = choose(sections, Limits({"epoch_time_s": 60.0}))
    assert [choice.qualifying for choice in both] == [("fft",), ("fft",)]
    first, second = choose(sections, Limits({}, "xeon"))
    assert first.qualifying == ("fft",)
    assert second.rejected["fft"][0].code == "device"
    with pytest.raises(UserError, match="--device a100: none of these records is from there, but from NVIDIA H200"):
        choose(sections, Limits({}, "a100"))


def test_the_command_prints_both_tables(demo_run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, demo_run, "--max-memory", "2GB", "--max-epoch-time", "15s", "--min-ndcg10", 0.1) == 0
    printed = capsys.readouterr().out
    assert "of 15 rows qualify" in printed
    assert "Asked for: Peak ≤ 2 GB, T ≤ 15 s, NDCG@10 ≥ 0.1." in printed
    assert "T 22.5 s > 15 s" in printed
    assert "out of memory, at least 2.40 GB (limit 2 GB)" in printed
    assert "did not finish: diverged" in printed
    places = [line.split()[:2] for line in printed.splitlines() if line.startswith(" ")]
    assert [place for place in places if place and place[0] in "12"] == [["1", "a_b&c%"], ["2", "iisan"]]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_fit(demo_run, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    run(monkeypatch, demo_run, "--max-memory", "2GB", "--max-epoch-time", "15s", "--min-ndcg10", 0.1)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= width


def test_json_holds_ranks_and_reasons(demo_run, monkeypatch, capsys):
    assert run(monkeypatch, demo_run, "--max-epoch-time", "15s", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["limits"] == {"epoch_time_s": 15}
    (group,) = content["groups"]
    assert group["device_key"] == "cpu: test, 2 threads"
    assert [row["place"] for row in group["qualifying"]] == list(range(1, 1 + len(group["qualifying"])))
    assert len(group["qualifying"]) + len(group["rejected"]) == 15
    assert all(row["epoch_time_s"] <= 15 for row in group["qualifying"])
    reasons = {row["method"]: row["reasons"] for row in group["rejected"]}
    (fft,) = reasons["fft"]
    assert fft["value"] == pytest.approx(22.1 * 1.02)
    assert {key: fft[key] for key in ("code", "quantity", "limit", "text")} == {
        "code": "limit", "quantity": "epoch_time_s", "limit": 15, "text": "T 22.5 s > 15 s",
    }  # fmt: skip


def test_none_is_exit_code_1_and_bad_input_2(factory, monkeypatch, capsys):
    factory.write("lora", time=10.0)
    assert run(monkeypatch, factory.root, "--max-epoch-time", "1s") == 1
    assert "None of 1 rows qualifies" in capsys.readouterr().out
    assert run(monkeypatch, factory.root, "--max-epoch-time", "1s", "--json") == 1
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert (group["qualifying"], [row["method"] for row in group["rejected"]]) == ([], ["lora"])
    assert run(monkeypatch, factory.root, "--max-memory", "8 apples") == 2
    error = capsys.readouterr().err
    assert error.startswith("tpme: --max-memory '8 apples'")
    assert error.count("\n") == 1
    assert run(monkeypatch, factory.root, "--min-ndcg10", "4") == 2


def test_without_a_folder_all_runs_are_judged(factory, monkeypatch, capsys):
    monkeypatch.chdir(factory.root.parent)
    assert run(monkeypatch, "--max-memory", "8GB") == 2
    assert capsys.readouterr().err == "tpme: runs: no such file or folder; name one that 'tpme run' wrote\n"
    type(factory)(factory.root.parent / "runs" / "mine").write("lora")
    assert run(monkeypatch, "--max-memory", "8GB") == 0
    assert "1 of 1 rows qualify" in capsys.readouterr().out


def test_it_needs_no_torch(factory):
    factory.write("lora")
    code = (
        "import sys; from tpme.bench.cli import app; "
        f"app(['choose', {str(factory.root)!r}, '--max-memory', '8GB'], standalone_mode=False); "
        "bad = {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

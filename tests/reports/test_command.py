"""``tpme report`` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tpme.bench.cli import main


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tpme", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_writes_beside_the_run_and_prints_the_table(factory, monkeypatch, capsys):
    for method, time_s in (("fft", 10.0), ("lora", 4.0)):
        factory.write(method, time=time_s)
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, factory.root, "--title", "My <title>", "--weights", "1,0,0") == 0
    assert "# My &lt;title&gt;" in (factory.root / "report" / "report.md").read_text()
    printed = capsys.readouterr().out
    assert printed.strip().startswith("Best Recall@10: ")
    starts = [printed.index(start) for start in ("Best Recall@10: ", "Cheapest ", "Trust: one seed", "TPME: mean of")]
    assert starts == sorted(starts)
    assert "(weights 1, 0, 0)" in printed
    assert printed.endswith(f"Written to {factory.root / 'report' / 'report.md'}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "0.5,0.5,0.5"], "add up to 1.5"),
        (["--rows", "fft,lorra"], "did you mean 'lora'"),
        (["--frame", "/dev/null"], "/dev/null: not a regular file; name a frame"),
        (["--formats", "html,jpeg"], "format 'jpeg'"),
        (["--show", "results,fases"], "table 'fases': choose of results, tpme, differences, "),
    ],
)
def test_bad_options_are_one_line(factory, monkeypatch, capsys, arguments, said):
    factory.write("lora")
    factory.write("fft")
    assert run(monkeypatch, factory.root, *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("tpme: ")
    assert told.count("\n") == 1
    assert said in told
    assert not (factory.root / "report").exists()


@pytest.mark.parametrize("width", [80, 120])
def test_any_table_is_printed(demo_run, tmp_path, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    arguments = (demo_run, "--out", tmp_path, "--formats", "json", "--show")
    assert run(monkeypatch, *arguments, "all") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= width
    titles = [json.loads(path.read_text())["title"] for path in (tmp_path / "tables").iterdir() if path.stem != "pairs"]
    assert all(f"\n{title}" in f"\n{printed}" for title in titles)
    assert printed.count("CPU run: memory is") <= 1 <= printed.count("the clock was throttled")
    assert "paper: nothing in these records" in printed
    assert run(monkeypatch, *arguments, "phases, lr") == 0
    printed = capsys.readouterr().out
    shown = {title.split(" (")[0] for title in titles if f"\n{title}" in f"\n{printed}"}
    assert shown == {"Learning rates", "Where the time goes"}


def test_the_frame_is_kept_where_it_is_not_there(factory, monkeypatch, capsys):
    factory.write("lora")
    factory.write("fft", time=20.0)
    monkeypatch.chdir(factory.root.parent)
    for made in (True, False):
        assert run(monkeypatch, factory.root, "--frame", "frame.json", "--formats", "csv") == 0
        printed = capsys.readouterr().out
        assert ("frame.json: was not there; holds the frame of these records now\n" in printed) == made
        assert "the least of the rows of frame.json" in " ".join(printed.split())


def test_without_a_folder_all_runs_are_read(factory, make_factory, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch) == 2
    assert capsys.readouterr().err == "tpme: runs: no such file or folder; name one that 'tpme run' wrote\n"
    make_factory(tmp_path / "runs" / "one").write("lora")
    make_factory(tmp_path / "runs" / "two").write("fft", time=20.0)
    assert run(monkeypatch, "--formats", "csv") == 0
    text = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "| fft |" in text
    assert "| lora |" in text


def test_formats_that_were_not_asked_for_are_left_out(factory, monkeypatch):
    factory.write("fft")
    assert run(monkeypatch, factory.root, "--formats", "html, csv") == 0
    report = factory.root / "report"
    assert {path.suffix for path in report.rglob("*") if path.is_file()} == {".md", ".html", ".csv"}
    assert "plots/" not in (report / "report.md").read_text()


def test_an_empty_folder_is_one_line(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path) == 2
    assert "no records" in capsys.readouterr().err


def test_rows_with_commas_in_brackets_are_one_name(factory, monkeypatch):
    factory.write("lora", options={"rank": 4, "alpha": 8})
    factory.write("lora", time=3.0)
    factory.write("fft")
    assert run(monkeypatch, factory.root, "--rows", "lora [alpha=8, rank=4],fft", "--out", factory.root / "r") == 0
    content = json.loads((factory.root / "r" / "tables" / "results.json").read_text())
    values = {row["method"]: row["tpme_percent"] for row in content["rows"]}
    assert values["lora"] is None
    assert values["lora [alpha=8, rank=4]"] is not None


@pytest.mark.parametrize(
    ("formats", "unwanted"),
    [(None, {"torch", "transformers", "peft"}), (("csv", "json", "tex", "html"), {"torch", "matplotlib"})],
)
def test_a_report_loads_only_what_it_needs(factory, formats, unwanted):
    factory.write("lora")
    code = (
        "import sys; from pathlib import Path; from tpme.reports.report import write_report; "
        f"write_report([Path({str(factory.root)!r})], Path({str(factory.root / 'report')!r}), formats={formats!r}); "
        f"bad = {unwanted!r} & set(sys.modules); sys.exit(f'imported {{bad}}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_starts_without_pandas():
    code = "import sys, tpme.bench.cli; sys.exit(bool({'torch', 'pandas', 'matplotlib'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The board: who leads, history over versions, and links that lead to records."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest

from tpme.bench.record import read_result
from tpme.reports.board import write_board
from tpme.reports.history import chart, places


class Parsed(HTMLParser):
    """Links, anchors, elements and text of a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.links += [found["href"] or ""] if "href" in found else []
        self.anchors |= {found["id"] or ""} if "id" in found else set()

    def handle_data(self, data: str) -> None:
        self.text += data


def commit(path: Path, revision: str, dirty: bool) -> None:
    """Let a record know its commit."""
    result = read_result(path)
    environment = result.environment.model_copy(update={"git_revision": revision, "git_dirty": dirty})
    path.write_text(result.model_copy(update={"environment": environment}).model_dump_json())


@pytest.fixture
def versions(factory) -> Path:
    """Two rows over three versions of the code, with two seeds; lora becomes slower, one cell runs out of memory."""
    for number, code in enumerate(("aaaaaaa1", "bbbbbbb2", "ccccccc3"), start=1):
        for seed in (1, 2):
            at = {"code": code, "started_at": f"2026-0{number}-01T00:00:00+00:00", "seed": seed}
            oom = (number, seed) == (2, 1)
            slow = {"time": None, "status": "oom"} if oom else {"time": 5.0 + number + seed / 10}
            commit(
                factory.write("lora", skill=0.4, millions=0.5, peak=1e9, **slow, **at), f"{number}eeeeee9", number == 3
            )
            factory.write("fft", time=20.0, skill=0.05, **at)
    return factory.root


def rows_of(page: Path, kind: str) -> list[list[str]]:
    """The fields of the tables of a class as text."""
    text = page.read_text(encoding="utf-8")
    tables = re.findall(rf'<table class="{kind}">.*?<tbody>(.*?)</tbody>', text, flags=re.DOTALL)
    plain = [
        re.sub(r"<[^>]+>", "", re.sub(r"</t[hd]>", "\t", line)) for table in tables for line in table.split("<tr>")
    ]
    return [line.strip().split("\t") for line in plain if line.strip()]


def test_who_leads(versions, tmp_path):
    page = write_board([versions], tmp_path / "board")
    [[group, best, cheapest, fastest, least, newest]] = rows_of(page, "leaders")
    assert group == "demo, suite protocol, fp32, cpu: test, 2 threads"
    assert re.fullmatch(r"lora: 0\.\d{4}", best)
    assert cheapest == "lora: TPME&nbsp;0.00&nbsp;%"
    assert (fastest, least) == ("lora: 8.15&nbsp;s", "lora: 1.00&nbsp;GB")
    assert newest == "2026-03-01 (12 records)"


def test_rows_are_of_the_newest_version_and_the_history_holds_all(versions, tmp_path):
    page = write_board([versions], tmp_path / "board")
    rows = {row[0]: row for row in rows_of(page, "rows")}
    assert set(rows) == {"lora", "fft"}
    assert rows["lora"][4] == "8.15"  # the mean of the newest version's seeds
    lora = [record for record in rows_of(page, "records") if record[1] in ("aaaaaaa", "bbbbbbb", "ccccccc")][:6]
    assert [(record[0], *record[1:5]) for record in lora] == [
        ("2026-03-01 00:00 newest", "ccccccc", "3eeeeee+", "2", "ok"),
        ("2026-03-01 00:00 newest", "ccccccc", "3eeeeee+", "1", "ok"),
        ("2026-02-01 00:00", "bbbbbbb", "2eeeeee", "2", "ok"),
        ("2026-02-01 00:00", "bbbbbbb", "2eeeeee", "1", "oom"),
        ("2026-01-01 00:00", "aaaaaaa", "1eeeeee", "2", "ok"),
        ("2026-01-01 00:00", "aaaaaaa", "1eeeeee", "1", "ok"),
    ]


def test_rows_that_share_a_rank_say_so(factory, tmp_path):
    for method, time in (("fft", 20.0), ("lora", 2.0), ("bitfit", 2.0)):
        factory.write(method, time=time)
    rows = rows_of(write_board([factory.root], tmp_path / "board"), "rows")
    assert {row[0]: row[-3] for row in rows} == {"bitfit": "1=", "lora": "1=", "fft": "3"}


def test_every_link_leads_to_a_record_or_a_place_of_the_page(versions, demo_run, tmp_path):
    page = write_board([versions, demo_run], tmp_path / "some where" / "board")
    parsed = Parsed(page)
    records = set()
    for link in parsed.links:
        if link.startswith("#"):
            assert link[1:] in parsed.anchors
        else:
            records.add((page.parent / unquote(link)).resolve())
            read_result(page.parent / unquote(link))
    assert {path.resolve() for path in versions.rglob("attempt-*.json")} <= records


def test_the_page_holds_no_script_and_escapes_names(demo_run, tmp_path):
    parsed = Parsed(write_board([demo_run], tmp_path))
    assert "script" not in parsed.tags
    assert "<script>" in parsed.text  # the name of a row


def test_a_cell_that_is_in_no_last_matrix_stays_in_the_history(factory, tmp_path):
    factory.write("fft")
    gone = factory.write("lora")
    current = [path.name for path in (factory.root / "cells").iterdir() if path != gone.parent]
    (factory.root / "cells.json").write_text(f'{{"cells": ["{current[0]}"]}}')
    page = write_board([factory.root], tmp_path / "board")
    assert [row[0] for row in rows_of(page, "rows")] == ["fft"]
    assert any(unquote(link).endswith(f"{gone.parent.name}/attempt-1.json") for link in Parsed(page).links)


def test_groups_of_several_runs_come_newest_first(make_factory, tmp_path):
    make_factory(tmp_path / "a").write("lora", started_at="2026-01-01T00:00:00+00:00")
    make_factory(tmp_path / "b").write("lora", started_at="2026-02-01T00:00:00+00:00", device_key="another")
    page = write_board([tmp_path / "a", tmp_path / "b"], tmp_path / "board")
    assert [row[0].rsplit("fp32, ")[1] for row in rows_of(page, "leaders")] == ["another", "cpu: test, 2 threads"]
    assert "2 records, 2 devices, 1 data set, 1 version" in Parsed(page).text


# --- charts --------------------------------------------------------------------------------------------------


def record(day: str, seed: int, time: float, status: str = "ok", **changes: object) -> dict[str, object]:
    line = {
        "started_at": f"2026-01-{day}T00:00:00",
        "version": "abcdef123",
        "commit": "",
        "seed": seed,
        "status": status,
    }
    return {**line, "epoch_time_s": time, "latest": False, "link": "x.json", **changes}


def test_records_of_one_day_and_version_share_a_place():
    lines = [record("02", 1, 1.0), record("01", 1, 1.0), record("01", 2, 1.0), record("02", 1, 1.0, version="other")]
    assert [(place.day[-2:], place.code, len(place.records)) for place in places(lines)] == [
        ("01", "abcdef1", 2), ("02", "abcdef1", 1), ("02", "other", 1),
    ]  # fmt: skip


def test_a_chart_begins_at_zero_and_keeps_proportions():
    history = places([record("01", 1, 10.0), record("02", 1, 20.0, latest=True), record("03", 1, 5.0, status="oom")])
    drawn = chart("epoch_time_s", "a<b", history)
    heights = [float(y) for y in re.findall(r'<circle class="dot[ now]*" cx="[\d.]+" cy="([\d.]+)"', drawn)]
    base = float(re.findall(r'class="axis"[^>]*y1="([\d.]+)"', drawn)[0])
    assert (base - heights[0]) / (base - heights[1]) == pytest.approx(0.5, abs=0.01)
    assert drawn.count("dot now") == 1
    assert drawn.count('class="end"') == 1  # and no dot for what did not finish
    assert "a<b" not in drawn


def test_labels_of_a_long_history_do_not_touch():
    history = places([record(f"{day:02}", 1, 1.0) for day in range(1, 30)])
    drawn = chart("epoch_time_s", "lora", history)
    labels = sorted(float(x) for x in re.findall(r'<text x="([\d.]+)"[^>]*>2026-', drawn))
    assert labels[-1] - labels[-2] > 60
    assert min(b - a for a, b in pairwise(labels)) > 60
    assert drawn.count("2026-01-29<") == 1


def test_a_quantity_that_no_record_has_is_not_drawn():
    assert chart("epoch_time_s", "popularity", places([record("01", 1, float("nan"))])) == ""


# --- the command and a browser -------------------------------------------------------------------------------


def test_the_command(versions, tmp_path):
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tpme.bench.cli", "board", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(versions)
    assert (done.returncode, done.stdout) == (0, "Written to board/index.html\n")
    first = (tmp_path / "board" / "index.html").read_bytes()
    assert run(versions, "--out", "board").returncode == 0
    assert (tmp_path / "board" / "index.html").read_bytes() == first
    wrong = run(tmp_path / "missing")
    assert wrong.returncode == 2
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, versions, demo_run, tmp_path, width, scheme):
    page = write_board([versions, demo_run], tmp_path)
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    trouble: list[str] = []
    tab.on("console", lambda message: trouble.append(message.text))
    tab.on("request", lambda request: request.url.startswith("file:") or trouble.append(request.url))
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    charts = tab.locator(".charts svg")
    assert charts.count() >= 3
    assert charts.first.bounding_box()["width"] > 250
    anchor = tab.locator("table.rows tbody th a").first.get_attribute("href")
    tab.goto(page.as_uri() + anchor)
    assert tab.locator(anchor).is_visible(), "the folded list of records opens"
    tab.close()
    assert trouble == []

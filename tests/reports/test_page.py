"""The page in a real browser: what it computes, what it shows, and that it asks nothing of the network."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from tpme.bench.record import EncoderSpec, Reading, cell_id, find_results, read_result
from tpme.bench.run.launch import prepare_datasets
from tpme.bench.run.matrix import MatrixFile, expand
from tpme.reports.data.phase_colours import PHASE_COLOURS
from tpme.reports.data.ratios import cost_ratios
from tpme.reports.data.ties import tied_ranks
from tpme.reports.data.tpme import COLUMNS, Weights, frame_of, tpme
from tpme.reports.page import matrix_of
from tpme.reports.report import make_report, write_report
from tpme.reports.tables.results import results
from tpme.reports.tables.table import to_csv

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def section(demo_run):
    (only,) = make_report([demo_run]).sections
    return only


def shown(tab, key: str) -> dict[str, float]:
    found = tab.eval_on_selector_all(
        "#body tr[data-row]",
        "(rows, key) => rows.map(r => [r.dataset.row, r.querySelector(`[data-key=${key}]`).dataset.value])",
        key,
    )
    return {name: float(value) for name, value in found if value}


def names(tab) -> list[str]:
    return tab.eval_on_selector_all("#body tr[data-row]", "rows => rows.map(r => r.dataset.row)")


def texts(tab, key: str) -> dict[str, str]:
    found = "(rows, key) => rows.map(r => [r.dataset.row, r.querySelector(`[data-key=${key}]`).textContent])"
    return dict(tab.eval_on_selector_all("#body tr[data-row]", found, key))


def weights(tab) -> tuple[float, ...]:
    return tuple(float(tab.get_attribute(f"#output-{axis}", "data-value")) for axis in "tpm")


def slide(tab, axis: str, value: float) -> None:
    tab.eval_on_selector(
        f"#weight-{axis}", "(s, v) => { s.value = v; s.dispatchEvent(new Event('input')) }", str(value)
    )


def test_the_page_starts_as_the_report_says(tab, section):
    expected = (100 * section.summary["tpme"].dropna()).to_dict()
    assert shown(tab, "tpme") == pytest.approx(expected, abs=1e-7)
    assert shown(tab, "rank") == section.summary["tpme_rank"].dropna().to_dict()


@pytest.mark.parametrize("moves", [[("m", 0.9)], [("t", 0.123), ("p", 0.5)], [("p", 1.0), ("m", 0.2)], [("t", 0.0)]])
def test_sliders_give_the_tpme_of_the_python_code(tab, section, moves):
    for axis, value in moves:
        slide(tab, axis, value)
    given = weights(tab)
    assert sum(given) == pytest.approx(1, abs=1e-12)
    assert given["tpm".index(moves[-1][0])] == moves[-1][1]
    compared = section.summary[section.summary["compared"]]
    expected = tpme(compared, given).dropna()
    got = {name: value / 100 for name, value in shown(tab, "tpme").items()}
    assert got == pytest.approx(expected.to_dict(), abs=1e-9, rel=0)
    chosen = Weights(**dict(zip(("time", "parameters", "memory"), given, strict=True)))
    ranks = tied_ranks(compared.assign(tpme=expected), chosen, section.frame, section.noise)
    assert shown(tab, "rank") == ranks.dropna().to_dict()
    ratios = cost_ratios(section.summary, section.reference, chosen)["cost_ratio"]
    known = section.summary[list(COLUMNS)].notna().all(axis=1) & (section.summary["status"] != "oom")
    assert shown(tab, "cost_ratio") == pytest.approx(ratios[known].to_dict(), rel=1e-9)


@pytest.mark.parametrize("frame", ["own", "report"])
def test_rows_can_be_left_out_and_the_frame_be_kept(tab, section, frame):
    tab.check(f"input[name=frame][value={frame}]")
    tab.uncheck('input[aria-label="compare fft in TPME"]')
    compared = section.summary[section.summary["compared"]]
    rest = compared.drop(index="fft")
    expected = tpme(rest, frame=section.frame if frame == "report" else frame_of(rest)).dropna()
    got = {name: value / 100 for name, value in shown(tab, "tpme").items()}
    assert got == pytest.approx(expected.to_dict(), abs=1e-9, rel=0)
    assert "fft" not in tab.eval_on_selector_all("[data-point]", "points => points.map(p => p.dataset.point)")


def test_the_front_is_that_of_the_python_code(tab, section):
    from tpme.reports.data.tpme import pareto

    expected = {str(name) for name, on in pareto(section.summary).items() if on}
    assert set(tab.eval_on_selector_all(".point.front", "points => points.map(p => p.dataset.point)")) == expected


def test_times_and_memories_have_their_spread_over_seeds(tab, section):
    table = results(section)
    place = next(index for index, column in enumerate(table.columns) if column.key == "epoch_time_s")
    assert texts(tab, "t") == {str(row[0].value): row[place].text for row in table.rows}
    assert texts(tab, "t")["lora"] == "19.3 ± 0.19"
    assert texts(tab, "m")["lora"] == "1.62 ± 0.0080 GB"
    assert texts(tab, "m")["dyt"] == "≥ 2.40 GB"


def test_intervals_of_tpme_are_shown_for_the_reports_own_choices_alone(tab, section):
    bounds = 100 * section.summary[["tpme_low", "tpme_high"]]
    expected = {str(name): f"{low:.1f}–{high:.1f}" for name, (low, high) in bounds.dropna().iterrows()}
    expected |= dict.fromkeys(map(str, bounds.index[section.summary["tpme_end"]]), "end of scale")
    none = dict.fromkeys(names(tab), "")
    assert texts(tab, "low") == none | expected
    tab.check("input[name=frame][value=report]")  # the same frame by another name
    assert texts(tab, "low") == none | expected
    assert tab.is_hidden("#no-intervals")
    slide(tab, "m", 0.8)
    assert texts(tab, "low") == none
    assert tab.is_visible("#no-intervals")
    tab.click("#reset")
    assert texts(tab, "low") == none | expected
    tab.uncheck('input[aria-label="compare fft in TPME"]')
    assert texts(tab, "low") == none


def test_energy_is_a_column_where_there_is_any(browser, factory, tmp_path):
    path = factory.write("fft", time=8.0)
    factory.write("lora", time=5.0)
    result = read_result(path)
    joules = Reading(value=48_000.0, source="NVML energy counter")
    phases = [one.model_copy(update={"energy_j": joules}) if one.kind == "train" else one for one in result.phases]
    path.write_text(result.model_copy(update={"phases": tuple(phases)}).model_dump_json())
    write_report([factory.root], tmp_path, formats=("html",))
    opened = browser.new_page()
    opened.goto((tmp_path / "index.html").as_uri())
    assert texts(opened, "e") == {"fft": "12.0 kJ", "lora": "–"}  # 48 kJ over four epochs
    opened.click("button.open:text-is('fft')")
    assert opened.inner_text("tr.detail tr:has-text('Epoch energy E')") == "Epoch energy E\t12.00 kJ"
    opened.close()


def test_sorting_by_keyboard_and_missing_values_last(tab, section):
    tab.focus("[data-sort=recall_10]")
    tab.keyboard.press("Enter")
    order = section.summary["recall_10"].dropna().sort_values(ascending=False)
    assert [section.summary.loc[name, "recall_10"] for name in names(tab)[: len(order)]] == list(order)
    assert tab.get_attribute("th:has([data-sort=recall_10])", "aria-sort") == "descending"
    tab.keyboard.press("Enter")  # the focus stays on the header
    assert section.summary.loc[names(tab)[0], "recall_10"] == order.iloc[-1]
    assert tab.get_attribute("th:has([data-sort=recall_10])", "aria-sort") == "ascending"
    assert set(names(tab)[len(order) :]) == set(section.summary.index) - set(order.index)


def test_filters(tab):
    tab.fill("#filter", "IISAN")
    assert sorted(names(tab)) == ["iisan", "iisan (cached)"]
    tab.fill("#filter", "")
    tab.select_option("#status", "oom")
    assert names(tab) == ["dyt"]
    assert tab.inner_text("#count") == "1 of 15 rows shown"


def test_a_row_opens_its_cell(tab, section):
    tab.click("button.open:text-is('lora')")
    detail = tab.inner_text("tr.detail")
    for text in ("Phases and memory over time", "builtin:tiny-text", "Test CPU", "tpme run cell.toml --device cpu"):
        assert text in detail
    told = dict(line.split("\t") for line in detail.splitlines() if "\t" in line)
    lora = section.summary.loc["lora"]
    assert told["Recall@10"] == "{recall_10:.4f} ({recall_10_low:.4f}–{recall_10_high:.4f})".format(**lora)
    epoch = "{epoch_time_s:.2f} ({epoch_time_s_low:.2f}–{epoch_time_s_high:.2f}) s"
    assert told["Epoch training time T"] == epoch.format(**lora)
    assert told["Training peak memory M"] == f"{lora['memory_bytes'] / 1e9:.3f} ± 0.0080 GB"
    assert told["Whole-run peak memory"] == f"{lora['peak_bytes'] / 1e9:.3f} GB (train)"
    assert told["Cost ratio to fft"] == f"{lora['cost_ratio']:.4f}"
    assert told["TPME"] == "{:.2f} ({:.2f}–{:.2f}) %".format(*(100 * lora[["tpme", "tpme_low", "tpme_high"]]))
    assert tab.get_attribute("button.open:text-is('lora')", "aria-expanded") == "true"
    assert tab.is_hidden("#tip")  # the numbers would cover what was opened


def test_the_memory_curve_lies_in_bands_of_its_named_phases(tab):
    tab.click("button.open:text-is('lora')")
    drawn = (
        "rects => rects.map(r => [r.querySelector('title').textContent, r.getAttribute('x'), r.getAttribute('fill')])"
    )
    bands = tab.eval_on_selector_all(".timeline .bands > rect", drawn)
    assert [title.split(",")[0] for title, *_ in bands] == ["load", "train", "validate", "rank"]
    assert bands[1][0] == "train, 0.500 to 76.9 s: training"
    named = tab.eval_on_selector_all(".timeline > text:not(.tick)", "texts => texts.map(t => t.firstChild.data)")
    assert named == ["load", "train", "validate", "rank"]
    assert tab.eval_on_selector_all(".timeline > rect", drawn) == bands  # a lane below each band
    assert [colour for *_, colour in bands] == [PHASE_COLOURS[kind] for kind in ("load", "train", "validate", "rank")]
    places = [float(x) for _, x, _ in bands]
    assert all(before < after for before, after in pairwise(places))


def test_points_tell_their_numbers_to_mouse_and_keyboard(tab):
    tab.focus("[data-point=fft]")
    assert "TPME 100.00 %" in tab.inner_text("#tip")
    tab.keyboard.press("Enter")
    assert tab.locator("tr.detail").count() == 1
    tab.hover("[data-point=iisan]")
    assert tab.inner_text("#tip").startswith("iisan\n")
    tab.hover("button.open:text-is('id')")  # in no chart, for it has no TPME
    assert "no TPME" in tab.inner_text("#tip")
    assert "the clock was throttled in 3 of 8 epochs" in tab.inner_text("#tip")
    tab.hover("button.open:text-is('dyt')")
    assert "M ≥ 2.400 GB" in tab.inner_text("#tip")
    tab.mouse.move(0, 0)
    tab.focus("[data-choose='0']")
    assert tab.is_hidden("#tip")
    tab.keyboard.press("Tab")
    name = tab.evaluate("document.activeElement.textContent")
    assert tab.inner_text("#tip").startswith(f"{name}\nRank 1, TPME")
    tab.locator("button.open").last.focus()
    seen = "(b => [b.top >= 0, b.bottom <= innerHeight])(document.querySelector('#tip').getBoundingClientRect())"
    assert tab.evaluate(seen) == [True, True]
    tab.keyboard.press("Escape")
    assert tab.is_hidden("#tip")


def test_the_address_keeps_the_state(tab, browser):
    slide(tab, "m", 0.8)
    tab.uncheck('input[aria-label="compare fft in TPME"]')
    tab.fill("#filter", "a")
    tab.click("[data-sort=ndcg_10]")
    before = (weights(tab), names(tab), shown(tab, "tpme"))
    other = browser.new_page()
    other.goto(tab.url)
    assert (weights(other), names(other), shown(other, "tpme")) == before
    other.close()
    tab.click("#reset")
    assert "#" not in tab.url


def test_an_address_that_changes_under_the_page_is_followed(tab):
    tab.evaluate("location.hash = 'weights=0,1,0&filter=iisan&open=iisan'")
    tab.wait_for_selector("tr.detail")
    assert weights(tab) == (0, 1, 0)
    assert sorted(names(tab)) == ["iisan", "iisan (cached)"]


def test_groups_are_chosen_and_a_frozen_frame_is_kept(browser, make_factory, tmp_path):
    for device, factor in (("one", 1.0), ("two", 5.0)):
        for method, time_s in (("fft", 10.0), ("lora", 4.0)):
            make_factory(tmp_path / device).write(method, time=time_s * factor, device_key=device)
    frame = tmp_path / "frame.json"
    write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "first", frame=frame, formats=())
    make_factory(tmp_path / "two").write("slow", time=100.0, device_key="two")
    report = write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "out", frame=frame, formats=("html",))
    opened = browser.new_page()
    opened.goto((tmp_path / "out" / "index.html").as_uri())
    assert names(opened) == ["lora", "fft"]
    opened.select_option("#group", "1")
    assert opened.is_checked("input[name=frame][value=report]")
    assert opened.inner_text("#frame-name") == "as the file frame.json keeps them"
    expected = (100 * report.sections[1].summary["tpme"]).to_dict()
    assert expected["slow"] > 100
    assert shown(opened, "tpme") == pytest.approx(expected, abs=1e-7)
    assert all(texts(opened, "low").values())
    opened.check("input[name=frame][value=own]")
    assert not any(texts(opened, "low").values())
    opened.check("input[name=frame][value=report]")
    opened.reload()
    assert names(opened) == ["lora", "fft", "slow"]
    opened.close()


@pytest.mark.parametrize(
    "fragment", ["group=9&weights=2,2,2", "weights=a,b&rows=nobody&sort=__proto__", "%zz&group=-1"]
)
def test_a_broken_address_does_no_harm(tab, written, fragment):
    tab.goto("about:blank")
    tab.goto(f"{written.as_uri()}#{fragment}")
    assert len(names(tab)) == 15
    assert weights(tab) == (0.45, 0.1, 0.45)


def test_the_visible_table_can_be_downloaded(tab, tmp_path, section):
    tab.fill("#filter", "iisan")
    with tab.expect_download() as caught:
        tab.click("#csv")
    caught.value.save_as(tmp_path / "tpme.csv")
    rows = list(csv.DictReader((tmp_path / "tpme.csv").open(encoding="utf-8")))
    assert {row["method"] for row in rows} == {"iisan", "iisan (cached)"}
    for row in rows:
        assert float(row["tpme_percent"]) == pytest.approx(100 * section.summary.loc[row["method"], "tpme"], abs=1e-7)


def test_the_download_says_what_the_table_of_results_says(tab, section):
    with tab.expect_download() as caught:
        tab.click("#csv")
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(Path(caught.value.path()).read_text("utf-8")))}
    table = list(csv.DictReader(io.StringIO(to_csv(results(section)))))
    assert set(rows) == {row["method"] for row in table}
    common = (rows["lora"].keys() & table[0].keys()) - {"footnotes"}
    assert len(common) > 15
    for expected in table:
        for key in common:
            got, wanted = rows[expected["method"]][key], expected[key].replace("–", "")
            same = float(got) == pytest.approx(float(wanted), rel=1e-9) if re.match(r"[\d.]", wanted) else got == wanted
            assert same, (expected["method"], key, got, wanted)
    assert rows["dyt"]["status"] == "oom"
    assert float(rows["dyt"]["tpme_lower_bound_percent"]) > 0
    assert rows["dyt"]["memory_bytes"] == ""
    assert float(rows["dyt"]["memory_seen_bytes"]) == 2.4e9
    assert "the allocator asked for 1.5 GB" in rows["dyt"]["footnotes"]
    assert "; " in rows["dyt"]["footnotes"]
    assert rows["id"]["footnotes"] == "the clock was throttled in 3 of 8 epochs"


def test_names_are_shown_and_never_run(browser, factory, tmp_path):
    factory.write(EVIL, time=9.0, options={"x": "</script><img src=x onerror=alert(2)>"})
    factory.write("=1+1", time=4.0)
    write_report([factory.root], tmp_path, formats=("html",), title="</title><script>alert(3)</script>")
    opened = browser.new_page()
    dialogs: list[str] = []
    opened.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    opened.goto((tmp_path / "index.html").as_uri())
    opened.click(f"button.open:text-is('{EVIL}')")
    assert "onerror=alert(2)" in opened.inner_text("tr.detail")
    assert opened.locator("img").count() == 0
    assert opened.locator("script").count() == 2
    # Were a script to get in all the same, the policy would stop it.
    opened.evaluate("() => document.body.append(Object.assign(document.createElement('script'), {text: 'alert(4)'}))")
    with opened.expect_download() as caught:
        opened.click("#csv")
    assert "'=1+1" in Path(caught.value.path()).read_text()
    opened.close()
    assert dialogs == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (1280, "dark"), (390, "dark")])
def test_it_fits_wide_and_narrow_windows(browser, written, tmp_path, width, scheme):
    opened = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    opened.goto(written.as_uri())
    opened.click("button.open:text-is('lora')")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    inside = """() => [...document.querySelectorAll('#chart text')].map(t => t.getBoundingClientRect())
        .every(b => b.left >= -1 && b.right <= innerWidth + 1)"""
    assert opened.evaluate(inside)
    assert len(opened.screenshot(path=tmp_path / f"page-{width}-{scheme}.png", full_page=True)) > 10_000
    opened.close()


def test_no_name_covers_another_with_25_methods(browser, factory, tmp_path):
    for index in range(25):
        factory.write(f"method-{index:02d}", time=5.0 + index % 7, millions=0.1 * index, skill=0.2 + 0.004 * index)
    write_report([factory.root], tmp_path, formats=("html",))
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.goto((tmp_path / "index.html").as_uri())
    covered = """() => { let hits = 0;
        const boxes = [...document.querySelectorAll('#chart > text.name')].map(t => t.getBoundingClientRect());
        boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => { if (a.left + 1 < b.right && b.left + 1 < a.right
            && a.top + 3 < b.bottom && b.top + 3 < a.bottom) hits += 1; })); return [boxes.length, hits]; }"""
    drawn, hits = opened.evaluate(covered)
    opened.screenshot(path=tmp_path / "many.png")
    opened.close()
    assert hits == 0
    assert drawn >= 20


# --- without a browser ---------------------------------------------------------------------------------------


def test_the_page_is_small_and_tells_no_paths(written, demo_run):
    text = written.read_text(encoding="utf-8")
    assert len(text.encode()) < 600_000
    assert str(demo_run.parent) not in text
    assert "http://www.w3.org/2000/svg" in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg") + text.count("http-equiv")


def test_phases_of_a_kind_that_follow_each_other_are_one_span(factory, tmp_path):
    path = factory.write("lora")
    result = read_result(path)
    load, train, validate, rank = result.phases
    parts = [load, load, train, train, validate, train, rank]
    starts = [sum(one.wall_s for one in parts[:index]) for index in range(len(parts))]
    phases = tuple(one.model_copy(update={"start_s": at}) for one, at in zip(parts, starts, strict=True))
    path.write_text(result.model_copy(update={"phases": phases}).model_dump_json())
    write_report([factory.root], tmp_path, formats=("html",))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    [found] = re.findall(r'<script type="application/json" id="data">(.*)</script>', page)
    assert json.loads(found)["groups"][0]["rows"][0]["cell"]["phases"] == {
        "load": [[0, 1]],
        "train": [[1, 81], [83, 123]],
        "validate": [[81, 83]],
        "rank": [[123, 123.4]],
    }


def test_the_command_of_a_page_repeats_every_cell_of_the_demo(tmp_path):
    """What the page says of a cell, run as it stands, is that very cell: nothing is left to fill in."""
    prepared = {}
    records = [read_result(path) for path in find_results([ROOT / "results" / "demo"])]
    assert records
    for result in records:
        text = matrix_of(result.cell, result.dataset)
        assert "fill in" not in text
        matrix = MatrixFile.model_validate(tomllib.loads(text))
        prepared = prepared or prepare_datasets(matrix, tmp_path, Console(file=io.StringIO()))
        [cell] = expand(matrix, prepared, device=result.cell.device)
        assert cell_id(cell, result.code_version) == result.cell_id, cell.label


def test_the_configuration_says_what_is_to_be_filled_in(factory):
    here = EncoderSpec(source="/disk/models/own/bert")
    text = matrix_of(factory.cell(text_encoder=here))
    assert "/disk" not in text
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("# ")] == [
        '# data: "demo"',
        "# fill in: path",
        "# fill in: source",
    ]


def test_the_documentation_gives_the_size_of_script_and_style():
    assets = ROOT / "reports" / "assets"
    size = sum(path.stat().st_size for path in [assets / "page.css", *assets.glob("page*.js")])
    [told] = re.findall(
        r"about\s+(\d+) kB of script and\s+style", (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
    )
    assert int(told) == pytest.approx(size / 1000, abs=5)


def test_the_configuration_of_a_cell_is_a_matrix(factory):
    cell = factory.cell("lora", options={"rank": 4, "odd key": [1, {"a": True}, "\U0001f600 \n"]}, cached=True)
    matrix = MatrixFile.model_validate(tomllib.loads(matrix_of(cell)))
    assert matrix.seeds == (cell.seed,)
    assert (matrix.training, matrix.lr, matrix.protocol) == (cell.training, cell.lr, cell.protocol)
    (method,) = matrix.methods
    assert (method.name, method.options, method.cached) == ("lora", cell.options, True)
    assert json.loads(json.dumps(matrix.encoders[0].text.model_dump())) == cell.text_encoder.model_dump()

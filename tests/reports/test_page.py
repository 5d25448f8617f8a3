"""The page in a real browser: what it computes, what it shows, and that it asks nothing of the network."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path

import pytest

from tpme.bench.matrix import MatrixFile
from tpme.reports.page import matrix_of
from tpme.reports.report import make_report, write_report
from tpme.reports.tpme import frame_of, tpme

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


def weights(tab) -> tuple[float, ...]:
    return tuple(float(tab.get_attribute(f"#told-{axis}", "data-value")) for axis in "tpm")


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
    assert shown(tab, "rank") == expected.round(12).rank(method="min").to_dict()


@pytest.mark.parametrize("frame", ["own", "report"])
def test_rows_can_be_left_out_and_the_frame_be_kept(tab, section, frame):
    tab.check(f"input[name=frame][value={frame}]")
    tab.uncheck('input[aria-label="fft is one of the K rows"]')
    compared = section.summary[section.summary["compared"]]
    rest = compared.drop(index="fft")
    expected = tpme(rest, frame=section.frame if frame == "report" else frame_of(rest)).dropna()
    got = {name: value / 100 for name, value in shown(tab, "tpme").items()}
    assert got == pytest.approx(expected.to_dict(), abs=1e-9, rel=0)
    assert "fft" not in tab.eval_on_selector_all("[data-point]", "points => points.map(p => p.dataset.point)")


def test_the_front_is_that_of_the_python_code(tab, section):
    from tpme.reports.tpme import pareto

    expected = {str(name) for name, on in pareto(section.summary).items() if on}
    assert set(tab.eval_on_selector_all(".point.front", "points => points.map(p => p.dataset.point)")) == expected


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
    for text in ("Phases", "Memory over time", "builtin:tiny-text", "Test CPU", "tpme run cell.toml --device cpu"):
        assert text in detail
    assert tab.get_attribute("button.open:text-is('lora')", "aria-expanded") == "true"
    assert tab.is_hidden("#tip")  # the numbers would cover what was opened


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


def test_the_address_keeps_the_state(tab, browser):
    slide(tab, "m", 0.8)
    tab.uncheck('input[aria-label="fft is one of the K rows"]')
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
    assert opened.inner_text("#frame-name") == "frozen in frame.json"
    expected = (100 * report.sections[1].summary["tpme"]).to_dict()
    assert expected["slow"] > 100
    assert shown(opened, "tpme") == pytest.approx(expected, abs=1e-7)
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
    covered = """() => { const boxes = [...document.querySelectorAll('#chart > text:not(.tick)')].slice(2)
        .map(t => t.getBoundingClientRect()); let hits = 0;
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


def test_the_configuration_of_a_cell_is_a_matrix(factory):
    cell = factory.cell("lora", options={"rank": 4, "odd key": [1, {"a": True}]}, cached=True)
    matrix = MatrixFile.model_validate(tomllib.loads(matrix_of(cell)))
    assert matrix.seeds == (cell.seed,)
    assert (matrix.training, matrix.lr, matrix.protocol) == (cell.training, cell.lr, cell.protocol)
    (method,) = matrix.methods
    assert (method.name, method.options, method.cached) == ("lora", cell.options, True)
    assert json.loads(json.dumps(matrix.encoders[0].text.model_dump())) == cell.text_encoder.model_dump()

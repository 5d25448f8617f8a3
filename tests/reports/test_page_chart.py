"""The chart and the learning curves of the page: axes, reference rows, bars, marks, and what they say in words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpme.bench.record import Reading, read_result
from tpme.reports.data.answer import answer
from tpme.reports.data.tpme import pareto
from tpme.reports.page_axes import learning
from tpme.reports.report import make_report, write_report

PLACES = """points => points.map(p => { const box = p.querySelector('.dot').getBBox();
    const base = document.querySelector('#chart').viewBox.baseVal;
    return [p.dataset.point, box.x + box.width / 2, base.height - box.y - box.height / 2]; })"""


@pytest.fixture(scope="module")
def section(demo_run: Path) -> Any:
    (only,) = make_report([demo_run]).sections
    return only


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    """Opens the page of the records below a folder; the tab is closed at the end."""
    tabs = []

    def page_of(root: Path, **window: Any) -> Any:
        write_report([root], tmp_path / "out", formats=("html",))
        tabs.append(browser.new_page(**window))
        tabs[-1].goto((tmp_path / "out" / "index.html").as_uri())
        return tabs[-1]

    yield page_of
    for tab in tabs:
        tab.close()


def offered(tab: Any, which: str) -> list[str]:
    return tab.eval_on_selector_all(f"#{which} option", "options => options.map(o => o.value)")


def places(tab: Any) -> dict[str, tuple[float, float]]:
    return {name: (x, y) for name, x, y in tab.eval_on_selector_all("[data-point]", PLACES)}


def straight(pairs: list[tuple[float, float]]) -> bool:
    """Whether places are a linear function of the values, and rise with them."""
    (v0, p0), (v1, p1) = min(pairs), max(pairs)
    slope = (p1 - p0) / (v1 - v0)
    return slope > 0 and all(place == pytest.approx(p0 + slope * (value - v0), abs=0.2) for value, place in pairs)


def test_the_page_begins_with_the_answer(tab: Any, section: Any) -> None:
    told = tab.locator("#answer p").all_inner_texts()
    said = answer(section)
    assert told == [said.best, said.cheapest, f"Trust: {said.trust} Details"]
    top = tab.evaluate("['#answer', '#chart'].map(one => document.querySelector(one).getBoundingClientRect().top)")
    assert top == sorted(top)
    tab.click("#answer a")
    assert tab.evaluate("document.activeElement.id") == "trust"
    assert "CPU" in tab.inner_text("#trust")
    assert "torch 2.13.0" in tab.inner_text("#trust")
    assert "#" not in tab.url  # the state of the page lives there


def test_every_axis_with_data_is_offered_and_no_other(tab: Any) -> None:
    costs = ["tpme_percent", "cost_ratio", "epoch_time_s", "memory_bytes", "peak_bytes", "trainable_millions"]
    assert offered(tab, "x") == [
        *costs, "time_to_best_s", "inference_flops", "inference_items_per_s", "inference_user_s",
    ]  # fmt: skip
    cuts = [f"{metric}_{k}" for k in (10, 5, 20) for metric in ("recall", "ndcg")]
    split = [f"{metric}_10_{part}" for part in ("warm", "cold") for metric in ("recall", "ndcg")]
    assert offered(tab, "y") == [*cuts, *split, "valid_recall_10"]
    for which, key, words in (("x", "peak_bytes", "from loading to export"), ("y", "ndcg_5", "as Recall")):
        tab.select_option(f"#{which}", key)
        assert words in tab.inner_text(f"#{which}-help")


def test_energy_and_flops_are_axes_where_they_were_measured(opened: Callable[..., Any], factory: Any) -> None:
    for name, time in (("fft", 8.0), ("lora", 5.0)):
        path = factory.write(name, time=time)
        result = read_result(path)
        joules = Reading(value=6000 * time, source="NVML energy counter")
        phases = [one.model_copy(update={"energy_j": joules}) if one.kind == "train" else one for one in result.phases]
        counters = {f"{way}_flops": Reading(value=1e9 * time, source="counted") for way in ("forward", "backward")}
        path.write_text(result.model_copy(update={"phases": tuple(phases), "counters": counters}).model_dump_json())
    tab = opened(factory.root)
    assert {"flops", "energy_epoch_j"} <= set(offered(tab, "x"))
    tab.select_option("#x", "flops")
    assert "FLOPs of a training step (GFLOP), lower is better" in tab.inner_html("#chart")
    (fft, lora) = (places(tab)[name][0] for name in ("fft", "lora"))
    assert fft > lora


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("x", "y"), [("epoch_time_s", "recall_10"), ("memory_bytes", "ndcg_20")])
def test_points_lie_where_their_values_are(tab: Any, section: Any, x: str, y: str, log: bool) -> None:
    tab.select_option("#x", x)
    tab.select_option("#y", y)
    tab.set_checked("#log", log)
    drawn, summary = places(tab), section.summary
    assert set(section.compared) <= set(drawn)
    value = math.log10 if log else float
    assert straight([(value(summary.loc[name, x]), at) for name, (at, _) in drawn.items()])
    assert straight([(summary.loc[name, y], at) for name, (_, at) in drawn.items()])
    front = {str(name) for name, on in pareto(summary[summary["tpme"].notna()], x, y).items() if on}
    assert set(tab.eval_on_selector_all(".point.front", "points => points.map(p => p.dataset.point)")) == front
    assert f"x={x}" in tab.url
    assert tab.is_checked("#log") == log


def test_a_logarithmic_axis_keeps_a_place_for_zero(tab: Any, section: Any) -> None:
    tab.select_option("#x", "trainable_millions")
    assert tab.is_checked("#log")  # from 0.01 to 3.1 millions
    zero = places(tab)["popularity"][0]
    assert section.summary.loc["popularity", "trainable_millions"] == 0
    assert all(at > zero + 10 for name, (at, _) in places(tab).items() if name != "popularity")


def test_tpme_has_no_logarithm_and_more_items_a_second_are_better(tab: Any) -> None:
    assert tab.is_disabled("#log")
    tab.select_option("#x", "inference_items_per_s")
    assert "higher is better" in tab.inner_html("#chart")
    assert tab.inner_text("#chart-note").startswith("Best is up and to the right.")


def test_reference_rows_are_always_in_the_plot(tab: Any, section: Any) -> None:
    references = {"frozen", "id", "popularity"}
    lines = "lines => lines.map(line => line.dataset.reference)"
    assert set(tab.eval_on_selector_all("[data-reference]", lines)) == references  # they have no TPME
    tab.select_option("#x", "epoch_time_s")
    assert set(tab.eval_on_selector_all("[data-reference]", lines)) == {"popularity"}  # it trains nothing
    squares = "points => points.map(p => p.dataset.point)"
    assert set(tab.eval_on_selector_all(".point.reference", squares)) == references - {"popularity"}
    for row in section.compared:
        tab.uncheck(f'input[aria-label="compare {row} in TPME"]')
    assert set(places(tab)) == references - {"popularity"}
    assert "reference rows, which adapt no encoder" in tab.inner_text("#chart-note")


def test_an_empty_selection_says_so(tab: Any, section: Any) -> None:
    assert tab.is_hidden("#empty")
    for row in section.compared:
        tab.uncheck(f'input[aria-label="compare {row} in TPME"]')
    assert tab.inner_text("#empty").startswith("No row is ticked: tick rows in the table below")
    assert tab.inner_text("#said") == "No row is ticked, so there is no TPME."
    tab.check('input[aria-label="compare lora in TPME"]')
    assert tab.inner_text("#empty").startswith("TPME compares rows, and one row alone has none")
    assert tab.inner_text("#said") == "TPME compares rows, and one row alone has none."
    tab.fill("#filter", "nothing is called so")
    assert tab.inner_text("#body") == "No method has this name and outcome."


def test_one_row_has_a_dash_for_tpme_and_the_reason(opened: Callable[..., Any], factory: Any) -> None:
    factory.write("lora")
    factory.write("frozen", time=3.0)
    tab = opened(factory.root)
    assert tab.text_content("tr[data-row=lora] [data-key=tpme]") == "–"
    assert tab.text_content("tr[data-row=lora] [data-key=rank]") == "–"
    assert tab.inner_text("#said") == "TPME compares rows, and one row alone has none."
    assert tab.inner_text("#constant").endswith("TPME compares rows, and one row alone has none.")
    assert tab.input_value("#x") == "epoch_time_s"
    assert "tpme_percent" not in offered(tab, "x")
    assert set(places(tab)) == {"lora", "frozen"}


def test_records_without_a_cost_or_a_quality_say_so(opened: Callable[..., Any], factory: Any) -> None:
    factory.write("lora", status="error", time=None, millions=None, peak=None)
    tab = opened(factory.root)
    assert tab.inner_text("#empty") == "These records hold no cost or no quality, so there is nothing to draw."
    assert tab.inner_text("#said") == "No row can be ticked, so there is no TPME."
    assert tab.is_hidden("#curves")
    tab.click("button.open:text-is('lora')")
    assert "not known: the attempt ended before" not in tab.inner_text("tr.detail")


def test_rows_tied_within_noise_share_a_rank(opened: Callable[..., Any], factory: Any) -> None:
    for name, time in (("fft", 20.0), ("lora", 10.0), ("twin", 10.1)):
        for seed, factor in ((1, 0.97), (2, 1.0), (3, 1.03)):
            factory.write(name, time=time * factor, peak=2e8 * time * factor, seed=seed)
    tab = opened(factory.root)
    ranks = dict(tab.eval_on_selector_all("#body tr", "r => r.map(x => [x.dataset.row, x.cells[2].textContent])"))
    assert ranks == {"fft": "3", "lora": "1=", "twin": "1="}
    assert tab.get_attribute("tr[data-row=lora] [data-key=rank]", "title") == "tied within noise with twin"
    assert tab.inner_text("#said") == "3 rows compared; lowest TPME: lora, tied within noise: twin."
    assert "spread over seeds" in tab.inner_text("#trust")


def test_points_have_the_bars_that_their_axes_have(tab: Any, section: Any) -> None:
    def bars(way: str) -> int:
        same, other = ("x", "y") if way == "up" else ("y", "x")
        test = f"l.getAttribute('{same}1') === l.getAttribute('{same}2') && l.getAttribute('{other}1') !== "
        return tab.eval_on_selector_all(
            ".reach", f"lines => lines.filter(l => {test} l.getAttribute('{other}2')).length"
        )

    shown = len(section.compared)
    assert bars("up") == shown
    known = section.summary.loc[section.compared, "tpme_low"].notna().sum()
    assert bars("across") == known > 0
    assert "95 % interval over users (up and down), 95 % interval over seeds and epochs" in tab.inner_text(
        "#chart-note"
    )
    tab.select_option("#x", "trainable_millions")  # exact
    assert bars("across") == 0
    assert "across" not in tab.inner_text("#chart-note")


# --- learning curves -----------------------------------------------------------------------------------------


def test_every_row_with_epochs_has_its_curves(tab: Any, section: Any) -> None:
    trained = [name for name, first in section.firsts().items() if first.result.epochs]
    for panel in tab.locator("#panels svg").all():
        names = panel.locator("[data-curve]").evaluate_all("groups => groups.map(g => g.dataset.curve)")
        assert sorted(names) == sorted(trained)
    assert "popularity" not in trained
    titles = tab.locator("#panels svg > text:not(.tick)").all_text_contents()
    assert titles == ["Training loss", "Recall@10 in validation"]
    steps = "[data-curve=fft] > path:first-child"
    told = [re.findall(r"[\d.]+,([\d.]+)", tab.locator(f"#panels svg >> nth={i} >> {steps}").get_attribute("d"))
            for i in (0, 1)]  # fmt: skip
    first = section.firsts()["fft"].result.epochs
    assert straight([(-epoch.loss, float(y)) for epoch, y in zip(first, told[0], strict=True)])
    assert straight([(-epoch.valid_recall_10, float(y)) for epoch, y in zip(first, told[1], strict=True)])


def test_the_axis_of_curves_is_epochs_or_training_time(tab: Any, section: Any) -> None:
    def ends() -> dict[str, float]:
        last = (
            "groups => groups.map(g => [g.dataset.curve, +g.firstChild.getAttribute('d').match(/([\\d.]+),[^,]*$/)[1]])"
        )
        return dict(tab.eval_on_selector_all("#panels svg:first-child [data-curve]", last))

    assert len(set(ends().values())) == 1  # four epochs each
    tab.select_option("#along", "time")
    seconds = {name: sum(epoch.train_s for epoch in section.firsts()[name].result.epochs) for name in ends()}
    assert straight([(seconds[name], place) for name, place in ends().items()])
    assert "seconds of training" in tab.inner_html("#panels")
    assert "along=time" in tab.url


def test_a_curve_is_marked_by_its_name_and_shines_with_its_point(tab: Any) -> None:
    chip = tab.locator("button.chip[data-curve=a_b\\&c\\%]")
    before = chip.get_attribute("aria-pressed")
    chip.focus()
    assert tab.inner_text("#tip").startswith("a_b&c%\n4 epochs, best 3: Recall@10 ")
    tab.keyboard.press("Enter")
    assert chip.get_attribute("aria-pressed") != before
    assert tab.locator("#panels [class*=mark-][data-curve='a_b&c%']").count() == (2 if before == "false" else 0)
    tab.hover("[data-point=fft]")
    hot = tab.eval_on_selector_all("#panels .hot", "curves => curves.map(c => c.dataset.curve)")
    assert hot == ["fft", "fft"]
    tab.mouse.move(0, 0)
    assert tab.locator(".hot").count() == 0


def test_a_later_stage_begins_a_new_line(factory: Any) -> None:
    result = read_result(factory.write("two-stages"))
    epochs = [one.model_copy(update={"stage": "late" if one.index > 2 else "early"}) for one in result.epochs]
    told = learning(result.model_copy(update={"epochs": tuple(epochs)}))
    assert told is not None
    assert told["starts"] == [2]
    assert told["best"] == 2
    assert told["time"] == [10, 20, 30, 40]
    assert learning(result.model_copy(update={"epochs": ()})) is None


# --- an opened cell, and narrow windows ----------------------------------------------------------------------


def test_escape_closes_a_cell_and_the_keyboard_stays_there(tab: Any) -> None:
    tab.focus("button.open:text-is('lora')")
    tab.keyboard.press("Enter")
    assert tab.locator("tr.detail svg").count() == 3  # loss, validation, memory over time
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Close (Escape)"
    tab.keyboard.press("Escape")
    assert tab.locator("tr.detail").count() == 0
    assert tab.is_hidden("#tip")
    assert tab.evaluate("document.activeElement.textContent") == "lora"
    tab.focus("[data-point=lora]")
    tab.keyboard.press("Enter")
    tab.click("button.close")
    assert tab.locator("tr.detail").count() == 0
    assert "open=" not in tab.url


def test_numbers_of_a_cell_are_formatted(tab: Any) -> None:
    tab.click("button.open:text-is('iisan')")
    detail = tab.inner_text("tr.detail")
    assert not re.search(r"\d\.\d{6,}", detail)
    assert not re.search(r"\b\w+_\w+\t", detail)  # no key of a data frame


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_shows_the_chart_first_and_folds_the_controls(browser: Any, written: Path, scheme: str) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    tab.goto(written.as_uri())
    assert not tab.locator("#x").is_visible()
    order = "['#chart', '#controls', '#body'].map(one => document.querySelector(one).getBoundingClientRect().top)"
    assert (tops := tab.evaluate(order)) == sorted(tops)
    tab.focus("#controls summary")
    tab.keyboard.press("Enter")
    assert tab.locator("#x").is_visible()
    tab.click("button.open:text-is('lora')")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    wide = """() => [...document.querySelectorAll('tr.detail .cell *')].filter(one => one.checkVisibility()
        && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wide) == []
    tab.close()


def test_the_data_of_a_page_hold_what_all_cells_share_once(written: Path) -> None:
    [found] = re.findall(r'<script type="application/json" id="data">(.*)</script>', written.read_text("utf-8"))
    group = json.loads(found)["groups"][0]
    assert group["environment"]["torch"] == "2.13.0"
    assert all("torch" not in row["cell"]["environment"] for row in group["rows"] if row["cell"]["environment"])
    [unknown] = [row["name"] for row in group["rows"] if row["cell"]["environment"] is None]
    assert unknown == "<script>"

"""The page without a mouse, without sight, in the dark and on paper."""

from __future__ import annotations

import re
from typing import Any

import pytest

CONTROLS = {"button", "checkbox", "combobox", "image", "radio", "region", "searchbox", "slider", "table"}
LEAST_CONTRAST = 4.5
"""WCAG 2.2, 1.4.3 (AA), for text of this size."""

CONTRASTS = r"""() => {
  const numbers = (text) => text.match(/[\d.]+/g).map(Number);
  const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (node) => {
    const colour = numbers(getComputedStyle(node).backgroundColor);
    return colour[3] === 0 && node.parentElement ? behind(node.parentElement) : colour;
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    if (!text.textContent.trim() || !node.checkVisibility() || ["SCRIPT", "OPTION"].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const own = numbers(node instanceof SVGElement ? style.fill : style.color);
    const [dark, light] = [luminance(own), luminance(behind(node))].sort((x, y) => x - y);
    const name = `${node.tagName}.${node.getAttribute("class")}`;
    found[name] = Math.min(found[name] ?? 99, (light + 0.05) / (dark + 0.05));
  }
  return found;
}"""


def focused(tab: Any) -> str:
    """A word for what has the focus, by which a test knows it again."""
    return str(
        tab.evaluate(
            """() => { const at = document.activeElement; const data = at.dataset;
            return at.id || data.sort || (data.point && "point") || (data.choose && "choose") || (data.open && "open")
                || at.getAttribute("name") || at.getAttribute("aria-label") || at.tagName; }"""
        )
    )


def test_the_tab_key_reaches_every_control_once_and_leaves(tab: Any) -> None:
    stops = []
    for _ in range(120):
        tab.keyboard.press("Tab")
        stops.append(focused(tab))
        if stops[-1] == "BODY":
            break
    assert stops[-1] == "BODY"
    order = ["A", "point", "x", "y", "weight-t", "weight-p", "weight-m", "frame", "reset", "filter", "status", "csv"]
    assert stops[: len(order)] == order
    heads = [
        "name",
        "rank",
        "tpme",
        "low",
        "cost_ratio",
        "recall_10",
        "ndcg_10",
        "t",
        "p",
        "m",
        "peak_bytes",
        "seeds",
        "status",
    ]
    assert stops[len(order) : len(order) + 14] == ["Table of every method", *heads]
    assert stops.count("open") == 15
    assert stops.count("choose") == 10  # rows with a T, P and M


def test_arrow_keys_move_sliders_and_points(tab: Any) -> None:
    tab.focus("#weight-m")
    before = float(tab.get_attribute("#output-m", "data-value"))
    tab.keyboard.press("ArrowRight")
    told = [float(tab.get_attribute(f"#output-{axis}", "data-value")) for axis in "tpm"]
    assert told[2] > before
    assert sum(told) == pytest.approx(1, abs=1e-12)
    assert focused(tab) == "weight-m"
    assert tab.get_attribute("#weight-m", "aria-valuetext") == f"{100 * told[2]:.0f} percent"
    tab.focus(".point")
    first = tab.evaluate("document.activeElement.dataset.point")
    tab.keyboard.press("ArrowRight")
    second = tab.evaluate("document.activeElement.dataset.point")
    assert second != first
    assert tab.inner_text("#tip").startswith(f"{second}\n")
    tab.keyboard.press("Escape")
    assert tab.is_hidden("#tip")
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("document.activeElement.dataset.point") == first


def test_everything_has_a_name_for_a_screen_reader(tab: Any) -> None:
    tab.click("button.open:text-is('lora')")
    session = tab.context.new_cdp_session(tab)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found: dict[str, list[str]] = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        if not node.get("ignored") and role in CONTROLS:
            found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert [role for role, names in found.items() if not all(names)] == []
    assert found["slider"] == ["Epoch time T", "Trainable parameters P", "Training memory M"]
    assert "compare lora in TPME" in found["checkbox"]
    assert any(re.match("Memory rises to .* Phases: load 0.500 s, train ", name) for name in found["image"])
    assert {"Table of every method", "Table of inference", "Configuration", "Command"} <= set(found["region"])
    told = ["Every method, with its costs and quality; a column head sorts", "Costs", "Quality", "Measured on"]
    assert sorted(found["table"]) == sorted([*told, "Inference: what serving every method costs"])


def test_a_row_head_tells_its_marks_and_the_live_regions_what_changed(tab: Any) -> None:
    assert tab.text_content("tr[data-row='iisan (cached)'] th").endswith(", on the Pareto front")
    assert ", footnote " in tab.text_content("tr[data-row=id] th")
    before = tab.text_content("#said")
    tab.uncheck('input[aria-label="compare iisan (cached) in TPME"]')
    assert tab.text_content("#said") != before
    tab.fill("#filter", "lo")
    assert tab.text_content("#count") == "1 of 15 rows shown"
    for region in ("#said", "#count"):
        assert tab.get_attribute(region, "role") == "status"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(tab: Any, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.click("button.open:text-is('dyt')")
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 15
    assert {name: ratio for name, ratio in found.items() if ratio < LEAST_CONTRAST} == {}
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


def test_paper_shows_every_row_and_no_control(tab: Any) -> None:
    tab.click("button.open:text-is('lora')")
    tab.emulate_media(media="print", color_scheme="dark")
    tab.set_viewport_size({"width": 718, "height": 1000})  # A4 within margins of 1 cm
    for control in ("input", "select", "#reset", "#csv"):
        assert not any(one.is_visible() for one in tab.locator(control).all()), control
    assert tab.locator("#body tr[data-row] th:visible").count() == 15
    assert tab.inner_text("#output-t") == "0.45"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    clipped = """() => [...document.querySelectorAll("main *")].filter((one) => one.checkVisibility()
        && !one.closest(".unseen") && one.getBoundingClientRect().right > innerWidth + 1)
        .map((one) => one.outerHTML.slice(0, 80))"""
    assert tab.evaluate(clipped) == []
    hidden = """() => [...document.querySelectorAll("main pre, .scroll")].filter((one) =>
        one.scrollHeight > one.clientHeight + 1 || one.scrollWidth > one.clientWidth + 1).length"""
    assert tab.evaluate(hidden) == 0
    assert tab.pdf(format="A4").startswith(b"%PDF")

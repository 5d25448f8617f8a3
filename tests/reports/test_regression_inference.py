"""The gate on inference: FLOPs and bytes exactly, times by a test, memory by bounds; runs that did not measure it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpme.bench.record import Inference, Memory, Reading, Timings, read_result
from tpme.reports.data.load import Recorded
from tpme.reports.gate.baseline import from_records, load_baseline, load_runs, read_baseline, write_baseline
from tpme.reports.gate.check import judge
from tpme.reports.gate.interleaved import judge_runs
from tpme.reports.gate.measures import cell_key
from tpme.reports.gate.verdict import CellVerdict, Comparison, Policy, conclude

POLICY = Policy()


@pytest.fixture
def facts(peaks_of: Callable[..., Memory]) -> Callable[..., Inference]:
    """Inference of twenty runs each; keyword arguments scale times, memory and counters."""

    def make(
        *,
        slower: float = 1.0,
        larger: float = 1.0,
        flops: float = 2e8,
        loaded: float = 1e7,
        noise: float = 0.02,
        **more: Any,
    ) -> Inference:
        spread = np.random.default_rng(round(1e6 * slower)).lognormal(0, noise, 20)

        def timed(seconds: float, size: int) -> Timings:
            return Timings(size=size, run_s=tuple(slower * seconds * spread), passes=4)

        fields: dict[str, Any] = {
            "flops_per_item": Reading(value=flops, source="counted"),
            "single": timed(0.004, 1),
            "batch": timed(0.3, 256),
            "user": timed(0.001, 1),
            "memory": peaks_of(3e8 * larger),
            "loaded_bytes": Reading(value=loaded, source="counted"),
        }
        return Inference(**{**fields, **more})

    return make


@pytest.fixture
def found(make_factory: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Comparison]]:
    """Comparisons by metric of a base and a head that measured so much of inference."""

    def compare(base: Inference | None, head: Inference | None) -> dict[str, Comparison]:
        make_factory(tmp_path / "base").write("lora", inference=base)
        make_factory(tmp_path / "head").write("lora", code="n", inference=head)
        (cell,) = judge(load_baseline(tmp_path / "base"), load_runs([tmp_path / "head"]), POLICY)
        return {item.metric: item for item in cell.comparisons}

    return compare


TIMES = ("inference_single_s", "inference_batch_s", "inference_user_s")


@pytest.mark.parametrize(
    ("change", "metrics", "verdict"),
    [
        ({}, (*TIMES, "inference_flops", "inference_loaded_bytes", "inference_host_rss_bytes"), "same"),
        ({"slower": 1.3}, TIMES, "slower"),
        ({"slower": 0.7}, TIMES, "faster"),
        ({"slower": 1.15}, TIMES, "same"),
        ({"flops": 2e8 + 1}, ("inference_flops",), "regressed"),
        ({"loaded": 1e7 - 4}, ("inference_loaded_bytes",), "improved"),
        ({"larger": 1.12}, ("inference_host_rss_bytes",), "regressed"),
        ({"larger": 1.08}, ("inference_host_rss_bytes",), "same"),
    ],
)
def test_each_kind_of_change_is_told(
    found: Any, facts: Any, change: dict[str, Any], metrics: tuple[str, ...], verdict: str
) -> None:
    items = found(facts(), facts(**change))
    assert {name: items[name].verdict for name in metrics} == dict.fromkeys(metrics, verdict)
    assert items["host_rss_bytes"].verdict == "same", "the peak of training is another one"
    kinds = {name: items[name].kind for name in items if name.startswith("inference")}
    assert set(kinds.values()) == {"time", "counter", "memory"}


def test_passes_that_vary_much_need_a_larger_change(found: Any, facts: Any) -> None:
    items = found(facts(noise=0.5), facts(slower=1.3, noise=0.5))
    assert items["inference_batch_s"].bound > 0.4
    assert items["inference_batch_s"].verdict == "inconclusive"


def test_flops_that_depend_on_the_data_are_told_and_not_judged(found: Any, facts: Any) -> None:
    items = found(facts(flops_by_data=True), facts(flops=3e8, flops_by_data=True))
    assert items["inference_flops"].verdict == "changed"
    assert items["inference_loaded_bytes"].verdict == "same"


def test_a_count_that_is_not_valid_is_not_compared(found: Any, facts: Any) -> None:
    invalid = Reading(value=1e8, source="counted", valid=False, reason="no FLOP formula for aten.foo")
    items = found(facts(), facts(flops_per_item=invalid))
    assert (items["inference_flops"].verdict, items["inference_flops"].head) == ("not compared", None)


def test_inference_on_one_side_alone_is_told(found: Any, facts: Any) -> None:
    """A baseline from before it was measured."""
    items = found(None, facts())
    assert {items[name].verdict for name in (*TIMES, "inference_flops", "inference_host_rss_bytes")} == {"not compared"}
    assert items["inference_batch_s"].note == "not in the base"


def test_a_strict_check_passes_where_the_base_is_older(found: Any, facts: Any) -> None:
    items = tuple(found(None, facts()).values())
    cell = CellVerdict(key="k", name="lora", dataset="demo", state="compared", comparisons=items)
    report = conclude([cell], Policy(strict=True), command="check", base="a", head="b", duration_s=0.0)
    assert report.overall == "fine"


def test_a_baseline_file_keeps_inference(factory: Any, facts: Any, tmp_path: Path) -> None:
    factory.write("lora", inference=facts())
    write_baseline(from_records([factory.root]), tmp_path / "base.json")
    (cell,) = read_baseline(tmp_path / "base.json").cells
    assert cell.counters["inference_flops"] == 2e8
    (device,) = cell.devices.values()
    assert len(device.timing.inference_batch_s) == 20
    assert device.memory["inference_host_rss_bytes"] == 3e8
    (verdict,) = judge(load_baseline(tmp_path / "base.json"), load_runs([factory.root]), POLICY)
    assert {item.verdict for item in verdict.comparisons if item.metric.startswith("inference")} == {"same"}


def test_interleaved_runs_compare_inference_too(make_factory: Callable[..., Any], tmp_path: Path, facts: Any) -> None:
    sides: list[dict[str, list[Recorded]]] = []
    for name, slower in (("base", 1.0), ("head", 1.4)):
        runs = []
        for number in range(4):
            factory = make_factory(tmp_path / f"{name}-{number}")
            path = factory.write("lora", code=name, inference=facts(slower=slower + number / 1000))
            runs.append(Recorded(path, read_result(path), "device"))
        sides.append({cell_key(runs[0].result.cell): runs})
    (cell,) = judge_runs(sides[0], sides[1], POLICY, ("base", "head"))
    items = {item.metric: item for item in cell.comparisons}
    assert {items[name].verdict for name in TIMES} == {"slower"}
    assert items["step_s"].verdict == "same"
    assert items["inference_batch_s"].ratio == pytest.approx(1.4, rel=0.02)

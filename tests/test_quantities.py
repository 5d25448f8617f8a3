"""Quantities: light to import, one unit and format each, and one rule for what is meant by memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tpme.bench.quantities import COSTS, COUNTERS, QUANTITIES, amount, memory_instrument, memory_reading, quantity
from tpme.bench.record import Memory, Reading
from tpme.reports.data.user_ranks import REPORTED

ABSENT = Reading.missing("not measured", "no GPU")


def reading(value: float) -> Reading:
    return Reading(value=value, source="test")


GPU = Memory(
    torch_allocated_bytes=reading(1),
    torch_reserved_bytes=reading(2),
    nvml_device_bytes=reading(3),
    nvml_process_bytes=reading(4),
    host_rss_bytes=reading(5),
)


def test_importing_them_loads_nothing_heavy():
    code = "import sys, tpme.bench.quantities; print([m for m in ('numpy', 'pandas', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_reported_quality_and_every_cost_is_listed():
    assert all(quantity(f"{metric}_{k}").better == "higher" for metric, k in REPORTED)
    assert all(QUANTITIES[key].better == "lower" for key in (*COSTS, *COUNTERS))
    assert quantity("shards").kind == "counter"  # of a method's report()
    assert quantity("shards").title == "shards"


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("epoch_time_s", 12.345, "12.3"),
        ("trainable_millions", 0.2119, "0.212"),
        ("trainable_millions", 0.00042, "0.00042"),
        ("total_millions", 109.482, "109.5"),
        ("recall_10", 0.00004, "0.0000"),
        ("ndcg_20", 0.12345, "0.1235"),
        ("memory_bytes", None, "–"),
        ("energy_epoch_j", float("nan"), "–"),
    ],
)
def test_a_value_has_the_format_of_its_quantity(key, value, text):
    assert quantity(key).format(value) == text


@pytest.mark.parametrize(
    ("key", "values", "unit"),
    [
        ("memory_bytes", [2e9, 3e6, None], ("GB", 1e9)),
        ("memory_bytes", [float("nan"), 3e3], ("MB", 1e6)),
        ("cache_bytes", [5e9], ("MB", 1e6)),
        ("energy_epoch_j", [9999], ("J", 1)),
        ("energy_epoch_j", [1e4], ("kJ", 1e3)),
        ("training_energy_j", [1e6], ("J", 1)),
        ("forward_s", [2.0], ("ms", 1e-3)),
        ("flops", [], ("GFLOP", 1e9)),
        ("recall_10", [0.5], ("", 1)),
    ],
)
def test_the_unit_of_a_column_suits_its_largest_value(key, values, unit):
    assert quantity(key).scale(values) == unit


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.53e9, "bytes", "1.53 GB"),
        (0.0214, "s", "21.4 ms"),
        (796736, "", "796,736"),
        (12, "bytes", "12 bytes"),
        (0.25, "", "0.2500"),
        (None, "s", "none"),
        ("oom", "", "oom"),
    ],
)
def test_a_single_value_has_the_largest_unit_that_fits(value, unit, text):
    assert amount(value, unit) == text


def test_memory_held_is_that_of_the_process_where_nvml_knows_it_and_of_the_device_elsewhere():
    blind = GPU.model_copy(update={"nvml_process_bytes": ABSENT})
    assert memory_reading("memory_bytes", GPU, "cuda").value == 4
    assert memory_reading("memory_bytes", blind, "cuda").value == 3
    assert memory_reading("memory_bytes", GPU, "cpu").value == 5
    assert memory_reading("memory_bytes", None, "cpu").value is None


def test_a_peak_beside_a_plan_is_what_torch_allocated_and_on_a_cpu_resident_memory():
    assert memory_instrument("measured_peak_bytes", GPU, "cuda") == "torch_allocated_bytes"
    assert memory_instrument("measured_peak_bytes", GPU, "cpu") == "host_rss_bytes"


def test_a_quantity_that_is_no_memory_has_no_instrument():
    with pytest.raises(AssertionError, match="epoch_time_s"):
        memory_instrument("epoch_time_s", GPU, "cpu")

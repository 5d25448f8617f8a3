"""Rows of cells on several devices: what they show, and that they share no frame with rows of another number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpme.bench.record import RankFacts, Reading, Training, read_result
from tpme.reports.data.load import load
from tpme.reports.report import make_report
from tpme.reports.tables.results import costs

KEY = "cpu: test, 2 threads"


def write_pair(factory: Any, peaks: tuple[float, float], peaks_of: Any, **settings: Any) -> None:
    """A record of a cell on two devices, whose ranks held so much."""
    key = "cpu: test, 2 ranks of 1 thread"
    path = Path(factory.write(peak=max(peaks), training=Training(devices=2), device_key=key, **settings))
    missing = Reading.missing("counter", "no counter")
    ranks = tuple(
        RankFacts(
            rank=rank,
            hostname_hash="0" * 12,
            node=None,
            device_name="cpu: test",
            cpu_threads=1,
            training_memory=peaks_of(peak),
            peak_memory=peaks_of(peak),
            training_energy_j=missing,
            collective_s=missing,
        )
        for rank, peak in enumerate(peaks)
    )
    path.write_text(read_result(path).model_copy(update={"ranks": ranks}).model_dump_json())


def test_m_is_that_of_the_highest_device_and_the_sum_stands_beside(factory: Any, peaks_of: Any) -> None:
    write_pair(factory, (2e9, 1e9), peaks_of)
    write_pair(factory, (2e9, 1e9), peaks_of, method="fft", status="oom", time=None)
    factory.write("bitfit", peak=1e9)
    rows = load([factory.root]).set_index("method")
    assert rows.loc["lora", "memory_bytes"] == 2e9
    assert rows.loc["lora", "memory_sum_bytes"] == 3e9
    assert rows["memory_sum_bytes"].isna().to_dict() == {"lora": False, "fft": True, "bitfit": True}


def test_rows_of_another_number_of_devices_have_a_frame_of_their_own(factory: Any, peaks_of: Any) -> None:
    write_pair(factory, (2e9, 1e9), peaks_of)
    factory.write("lora", peak=2e9)
    one, two = make_report([factory.root]).sections
    assert (one.group.key["device_key"], two.group.key["device_key"]) == ("cpu: test, 2 ranks of 1 thread", KEY)
    shown = {section.group.key["device_key"]: costs(section) for section in (one, two)}
    heads = {key: [column.key for column in table.columns] for key, table in shown.items()}
    assert "memory_sum_bytes" in heads["cpu: test, 2 ranks of 1 thread"]
    assert "memory_sum_bytes" not in heads[KEY]
    assert any("E that of all" in note for note in shown["cpu: test, 2 ranks of 1 thread"].notes)

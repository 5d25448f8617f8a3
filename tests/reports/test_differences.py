from __future__ import annotations

import numpy as np
import pytest

from tpme.bench.record import Reading, read_result
from tpme.bench.side_files import load_ranks
from tpme.reports.data.stats import paired
from tpme.reports.data.user_ranks import gains
from tpme.reports.report import make_report
from tpme.reports.tables.differences import pairs, table
from tpme.reports.tables.results import steps


def section_of(factory):
    [section] = make_report([factory.root]).sections
    return section


def test_rows_far_apart_are_told_apart_and_rows_alike_are_not(factory):
    factory.users = 1000
    factory.write("fft", skill=0.6, seed=1)
    factory.write("lora", skill=0.6, seed=2)
    factory.write("bitfit", skill=0.02, seed=3)
    section = section_of(factory)
    found = {frozenset((one.first, one.second)): one for one in section.differences["ndcg"]}
    assert len(found) == 3
    assert found[frozenset(("fft", "bitfit"))].significant
    assert found[frozenset(("lora", "bitfit"))].significant
    assert not found[frozenset(("fft", "lora"))].significant
    made = table(section)
    for place, column in enumerate(made.columns):
        if column.key.endswith("_10_not_told_apart"):
            alike = {row[0].value: (row[place].text, row[place].value) for row in made.rows}
            assert alike == {"fft": ("lora", "lora"), "lora": ("fft", "fft"), "bitfit": ("–", None)}, column.key


def test_pairs_hold_difference_and_p_of_both_metrics(factory):
    factory.users = 1000
    for seed, (method, skill) in enumerate((("fft", 0.6), ("lora", 0.6), ("bitfit", 0.02))):
        factory.write(method, skill=skill, seed=seed)
    section = section_of(factory)
    made = pairs(section)
    rows = [tuple(entry.value for entry in row) for row in made.rows]
    expected = [
        (one.first, one.second, f"{metric}_10", one.difference, one.p)
        for metric in ("recall", "ndcg")
        for one in section.differences[metric]
    ]
    assert rows == expected
    assert len(rows) == 6
    means = section.summary["recall_10"]
    assert rows[0][3] == pytest.approx(means[rows[0][0]] - means[rows[0][1]])
    assert {row[0].value: row[-1].best for row in made.rows if row[1].value == "bitfit"} == {"fft": True, "lora": True}


def test_the_only_pair_is_the_plain_paired_test_and_seeds_are_averaged_by_user(factory):
    gain = {}
    for method, skill in (("fft", 0.3), ("lora", 0.25)):
        paths = [factory.write(method, skill=skill, seed=seed) for seed in (1, 2)]
        kept = [load_ranks(path.parent / read_result(path).files["ranks"]) for path in paths]
        gain[method] = np.mean([gains(ranks, "ndcg", 10) for ranks in kept], axis=0)
    [one] = section_of(factory).differences["ndcg"]
    assert one.p == pytest.approx(paired(gain["fft"] - gain["lora"]))
    assert abs(one.difference) == pytest.approx(abs(float((gain["fft"] - gain["lora"]).mean())))


def test_equal_rows_are_rarely_told_apart(factory):
    factory.users = 400
    for number in range(12):
        factory.write(f"method-{number:02d}", skill=0.3, seed=number)
    assert sum(one.significant for one in section_of(factory).differences["ndcg"]) <= 1


def test_the_parts_of_a_step_are_shown_in_milliseconds_where_they_were_measured(factory):
    path = factory.write("lora")
    factory.write("fft")
    result = read_result(path)
    parts = {"data_wait_s": 0.0005, "forward_s": 0.02, "backward_s": 0.03, "update_s": 0.001}
    counters = {name: Reading(value=value, source="test") for name, value in parts.items()}
    path.write_text(result.model_copy(update={"counters": counters}).model_dump_json())
    made = steps(section_of(factory))
    assert [row[0].value for row in made.rows] == ["lora"]
    assert [made.rows[0][index].text for index in made.visible[1:]] == ["0.500", "20.0", "30.0", "1.00"]
    assert [made.rows[0][index].value for index in made.visible[1:]] == list(parts.values())

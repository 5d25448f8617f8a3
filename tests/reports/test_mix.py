from __future__ import annotations

import json
import re

import pytest

from tpme.bench.record import EncoderSpec, Training
from tpme.reports.data.load import load
from tpme.reports.data.trials import names, split
from tpme.reports.report import make_report, write_report
from tpme.reports.tables.machines import machines
from tpme.reports.tables.results import all_tables, results


def two_devices(factory):
    """Twice the same two rows, on a CPU and on a faster GPU."""
    for method, time_s in (("fft", 10.0), ("lora", 6.0)):
        factory.write(method, time=time_s, peak=1e9, device_key="Intel(R) Xeon(R) Processor, 2 threads")
        factory.write(method, time=time_s / 5, peak=3e9, device="cuda", device_key="NVIDIA H200, driver 5, 2 threads")
    return factory.root


def test_without_it_nothing_is_mixed(factory):
    groups = split(load([two_devices(factory)]))
    assert len(groups) == 2
    assert all(group.mixed == () for group in groups)
    assert not any("ixed" in text for section in make_report([factory.root]).sections for text in section.notes.shared)


def test_all_rows_share_one_frame_and_their_names_carry_the_device(factory):
    (section,) = make_report([two_devices(factory)], mix=True).sections
    assert set(section.compared) == {
        "fft [Intel Xeon]", "lora [Intel Xeon]", "fft [NVIDIA H200]", "lora [NVIDIA H200]",
    }  # fmt: skip
    assert section.frame.epoch_time_s.min == pytest.approx(1.2)
    assert section.frame.epoch_time_s.max == pytest.approx(10.0)
    assert section.group.mixed == ("device_key",)
    assert section.name.startswith("rows of different devices mixed: demo, suite protocol, fp32, Intel(R)")


def test_nodes_of_one_kind_share_a_frame_and_are_named(factory):
    """Unlike nodes differ in their device key; the names of nodes alone do not part rows."""
    for method, node in (("fft", "one"), ("lora", "two")):
        factory.write(method, node=node)
        factory.write(method, node="three", device_key="another CPU", seed=2)
    alike, other = make_report([factory.root]).sections
    assert set(alike.compared) == set(other.compared) == {"fft", "lora"}
    (nodes,) = [row for row in machines(other).rows if row[0].text == "Node"]
    assert set(nodes[1].text.split("; ")) == {"one", "two"}
    (section,) = make_report([factory.root], mix=True).sections
    assert section.group.mixed == ("device_key",)


def test_every_artefact_says_so(factory, tmp_path):
    write_report([two_devices(factory)], tmp_path / "out", mix=True, formats=("tex", "json", "html", "png"))
    text, details = ((tmp_path / "out" / name).read_text() for name in ("report.md", "details.md"))
    for part in ("Results", "Notes", "Figures", "Tables"):
        assert re.search(rf"^## {part}: rows of different devices mixed: ", text + details, re.MULTILINE)
    [trust] = re.findall(r"^- \*\*Trust:\*\* .*", text, re.MULTILINE)
    for told in (trust, details):
        assert "ows of different devices share this table and its TPME" in told
        assert "M is not one quantity: resident memory over a baseline on a CPU, GPU memory by NVML on a GPU" in told
    assert "--mix" in details.split("## To repeat it")[1]
    table = json.loads((tmp_path / "out" / "tables" / "results.json").read_text())
    assert table["warnings"][0].startswith("Mixed: rows of different devices")
    latex = (tmp_path / "out" / "tables" / "results.tex").read_text()
    assert latex.count("rows of different devices") == 2  # caption and note
    page = (tmp_path / "out" / "index.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    (group,) = json.loads(data)["groups"]
    assert group["name"].startswith("rows of different devices mixed")
    assert group["shared"][0].startswith("Mixed: rows of different devices")


def test_memory_is_one_quantity_where_only_protocols_differ(factory):
    factory.write("fft")
    factory.write("fft", protocol="paper", time=3.0)
    (section,) = make_report([factory.root], mix=True).sections
    assert set(section.summary.index) == {"fft [suite]", "fft [paper]"}
    assert "not one quantity" not in section.notes.shared[0]


def test_what_is_the_same_is_not_mixed(factory):
    factory.write("fft")
    factory.write("lora", time=3.0)
    factory.write("popularity", text_encoder=None, image_encoder=None, time=None)
    report = make_report([factory.root], mix=True)
    assert report.sections[0].group.mixed == ()
    assert report.sections[0].group.key == make_report([factory.root]).sections[0].group.key
    assert set(report.sections[0].summary.index) == {"fft", "lora", "popularity"}
    assert names([report.sections[0].group]) == ["demo, suite protocol, fp32, cpu: test, 2 threads"]


def test_names_carry_everything_that_differs(factory):
    tiny = "builtin:tiny-text"
    factory.write("fft", dataset="a")
    factory.write("fft", dataset="b", dataset_fingerprint="cd" * 32, training=Training(precision="bf16"))
    factory.write("fft", dataset="b", dataset_fingerprint="cd" * 32, options={"depth": 2})
    factory.write("fft", dataset="a", text_encoder=EncoderSpec(source=tiny, weights="random"))
    factory.write("id", dataset="a", text_encoder=None, image_encoder=None)
    (group,) = split(load([factory.root]), mix=True)
    assert group.mixed == ("dataset", "dataset_fingerprint", "encoders", "precision")
    assert set(group.cells["row"]) == {
        f"fft [a, {tiny} (text), fp32]",
        f"fft [b, {tiny} (text), bf16]",
        f"fft [depth=2, b, {tiny} (text), fp32]",
        f"fft [a, {tiny} (text, random weights), fp32]",
        "id [a, fp32]",
    }


def test_data_of_one_name_differ_by_their_content(factory):
    factory.write("fft")
    factory.write("fft", dataset_fingerprint="cd" * 32)
    (group,) = split(load([factory.root]), mix=True)
    assert len(set(group.cells["row"])) == 2
    assert all("abab" in row or "cdcd" in row for row in group.cells["row"])


def test_folders_that_end_alike_stay_two_rows(factory):
    for place in ("/one/models/bert", "/two/models/bert"):
        factory.write("fft", text_encoder=EncoderSpec(source=place))
    (group,) = split(load([factory.root]), mix=True)
    assert len(set(group.cells["row"])) == 2
    assert not any("/one" in row for row in group.cells["row"])


def test_seeds_of_one_row_stay_together(factory, make_factory):
    for seed in (1, 2):
        for device in ("one", "two"):
            make_factory(factory.root / device).write("fft", seed=seed, device_key=device)
    (section,) = make_report([factory.root], mix=True).sections
    assert dict(section.summary["seeds_ok"]) == {"fft [one]": 2, "fft [two]": 2}


def test_users_of_different_data_are_not_paired(factory, make_factory):
    factory.write("fft")
    make_factory(factory.root / "more", users=50).write("fft", dataset="b", dataset_fingerprint="cd" * 32)
    (section,) = make_report([factory.root], mix=True).sections
    assert not section.differences["ndcg"]
    assert "users)" not in results(section).subject
    assert {table.name for table in all_tables(section)} >= {"results", "phases", "environment"}


def test_a_frozen_frame_of_a_mixture_fits_that_mixture_alone(factory, tmp_path):
    frame = tmp_path / "frame.json"
    report = write_report([two_devices(factory)], tmp_path / "out", mix=True, frame=frame, formats=())
    again = make_report([factory.root], mix=True, frame=frame)
    assert again.sections[0].frame == report.sections[0].frame
    with pytest.raises(Exception, match="made on another device"):
        make_report([factory.root], frame=frame)

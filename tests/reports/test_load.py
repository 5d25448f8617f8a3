from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, RecordError
from tpme.reports.data.load import load, load_samples, read
from tpme.reports.data.ranks import load_ranks


def test_one_row_a_cell_with_units_in_the_names(factory):
    factory.write("lora", time=12.5, millions=0.5, peak=3e9, seed=1)
    factory.write("fft", time=20.0, seed=1)
    df = load([factory.root])
    assert len(df) == 2
    lora = df.set_index("method").loc["lora"]
    assert lora["epoch_time_s"] == 12.5
    assert lora["trainable_millions"] == 0.5
    assert lora["memory_bytes"] == 3e9
    assert lora["memory_source"] == "VmHWM over the baseline"
    assert lora["status"] == "ok"
    assert lora["best_epoch"] == 3
    assert lora["time_to_best_s"] == pytest.approx(3 * 12.5)


def test_options_of_an_encoder_are_part_of_its_name(factory):
    """Rows of other options share no frame."""
    names = set()
    for seed, options in enumerate(({}, {"pool": "mean"}, {"dtype": "bf16", "attention": "eager"})):
        factory.write("lora", seed=seed, text_encoder=EncoderSpec(source="a", revision="b", **options))
    names = set(load([factory.root])["encoders"].str.split(", image").str[0])
    assert any("a@b (text)" in name for name in names)
    assert any("a@b (text, pool mean)" in name for name in names)
    assert any("a@b (text, dtype bf16, attention eager)" in name for name in names)


def test_ranks_and_samples_are_reached_from_the_table(factory):
    path = factory.write("lora")
    df = load([str(factory.root)])
    ranks = load_ranks(df["ranks_path"].iloc[0])
    assert len(ranks.rank) == factory.users
    assert np.array_equal(ranks.rank, np.load(path.parent / "ranks-1.npz")["rank"])
    assert len(load_samples(df["samples_path"].iloc[0]).step_s) == 40


def test_only_the_latest_attempt_counts(factory):
    factory.write("lora", status="error", attempt=1, time=None)
    factory.write("lora", attempt=2, time=7.0)
    df = load([factory.root])
    assert list(df["attempt"]) == [2]
    assert list(df["status"]) == ["ok"]


def test_the_same_cell_in_two_runs_on_one_device_counts_once(make_factory, tmp_path):
    make_factory(tmp_path / "a").write("lora", time=1.0, started_at="2026-01-01T00:00:00+00:00")
    make_factory(tmp_path / "b").write("lora", time=2.0, started_at="2026-01-02T00:00:00+00:00")
    make_factory(tmp_path / "c").write("lora", time=3.0, device_key="another machine")
    df = load([tmp_path / "b", tmp_path / "a", tmp_path / "c"]).set_index("device_key")
    assert dict(df["epoch_time_s"]) == {"cpu: test, 2 threads": 2.0, "another machine": 3.0}
    assert df.loc["cpu: test, 2 threads", "superseded"] == 1


def test_overlapping_paths_do_not_count_twice(factory, monkeypatch):
    record = factory.write("lora")
    monkeypatch.chdir(factory.root)
    df = load([factory.root, factory.root / "cells", record, Path()])
    assert len(df) == 1
    assert df["superseded"].iloc[0] == 0


def test_an_attempt_without_environment_belongs_to_the_device_of_its_run(make_factory, tmp_path):
    near, far = make_factory(tmp_path / "near"), make_factory(tmp_path / "far")
    near.write("fft", device_key="this")
    near.write("lora", status="killed", time=None, with_environment=False)
    far.write("fft", device_key="that")
    df = load([tmp_path])
    assert df.loc[df["method"] == "lora", "device_key"].item() == "this"


@pytest.mark.parametrize(("process_valid", "expected"), [(True, 5e9), (False, 5.5e9)])
def test_memory_on_a_gpu_is_that_of_the_process_where_valid(factory, process_valid, expected):
    factory.write("lora", device="cuda", peak=5e9, process_valid=process_valid)
    assert load([factory.root])["memory_bytes"].item() == expected


def test_missing_values_are_missing_and_say_why(factory):
    factory.write("lora", status="oom", time=None, peak=None, millions=None)
    row = load([factory.root]).iloc[0]
    for name in ("epoch_time_s", "memory_bytes", "trainable_millions", "valid_recall_10", "ranks_path"):
        assert pd.isna(row[name]), name
    assert row["epoch_time_reason"] == "no epoch ended"
    assert row["memory_seen_bytes"] == 1e8


def test_a_job_that_still_runs_is_no_record(factory):
    record = factory.write("lora")
    (record.parent.parent / "other").mkdir()
    (record.parent.parent / "other" / "attempt-1.job.json").write_text("{}")
    assert len(load([factory.root])) == 1


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 99}', '{"schema_version": 1, "cell_id": 3}'])
def test_a_broken_record_is_named_in_one_line(factory, content):
    record = factory.write("lora")
    record.write_text(content)
    with pytest.raises(UserError) as caught:
        load([factory.root])
    assert str(record) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_renamed_records_of_one_folder_are_all_read_where_they_are_named(factory, tmp_path):
    named = [factory.write(method).rename(tmp_path / f"{method}.json") for method in ("fft", "lora")]
    assert [recorded.path for recorded in read(named)] == named


def test_no_records_and_no_folder(tmp_path):
    with pytest.raises(UserError, match="no records"):
        read([tmp_path])
    with pytest.raises(UserError, match="no such file"):
        read([tmp_path / "nowhere"])


def test_broken_rank_files_are_named(factory):
    path = factory.write("lora")
    file = path.parent / "ranks-1.npz"
    whole = dict(np.load(file))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RecordError, match=r"ranks-1\.npz"):
        load_ranks(file)
    np.savez(file, **{**whole, "cold": whole["cold"][:5]})
    with pytest.raises(RecordError, match="differ in length"):
        load_ranks(file)
    np.savez(file, **{**whole, "rank": whole["rank"] * 0})
    with pytest.raises(RecordError, match="ranks start at 1"):
        load_ranks(file)
    np.savez(file, rank=whole["rank"])
    with pytest.raises(RecordError, match="target"):
        load_ranks(file)
    file.unlink()
    with pytest.raises(RecordError, match="not a readable"):
        load_ranks(file)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(save, tmp_path):
    """Ten and 32 are the bytes that end a header and fill it up."""
    file = tmp_path / "samples-1.npz"
    save(file, step_s=np.array([]), step_epoch=np.array([10, 10, 32]), sample_t_s=np.ones(5, ">f4"), sample_bytes=[2.5])
    read, whole = load_samples(file), np.load(file)
    for name, array in whole.items():
        assert getattr(read, name).dtype == array.dtype
        assert np.array_equal(getattr(read, name), array)
    save(file, **{**whole, "step_s": np.ones((2, 2))})
    with pytest.raises(RecordError, match="one dimension"):
        load_samples(file)


def test_what_was_read_is_old_to_the_collector_of_garbage(factory):
    factory.write("lora")
    kept = read([factory.root])
    assert gc.isenabled()
    assert not any(one is kept[0].result for one in gc.get_objects(generation=0))
    assert any(one is kept[0].result for one in gc.get_objects(generation=2))

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Phase, Reading, RecordError, Training, read_result
from tpme.bench.side_files import load_ranks, load_samples
from tpme.reports.data.load import load, read, read_every
from tpme.reports.report import make_report

NO_ENERGY = Reading.missing("NVML energy", "no counter")


def rewrite(path, changes):
    result = read_result(path)
    path.write_text(result.model_copy(update=changes(result)).model_dump_json())


def with_peak(cache, peak):
    return cache.model_copy(update={"peak_bytes": Reading(value=peak, source="builder")})


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


def test_the_whole_run_peak_lies_where_most_memory_was_held(factory, peaks_of):
    """A cache can take more to build than training on it."""
    factory.write("fft", peak=2e9)
    factory.write("lora", status="oom", time=None, peak=1e9)
    rewrite(factory.write("iisan", cached=True, peak=1e8), lambda result: {"cache": with_peak(result.cache, 8e8)})
    own = ("count", "inference", "probe")
    late = [Phase(kind=kind, start_s=9, wall_s=1, memory=peaks_of(9e9), energy_j=NO_ENERGY) for kind in (*own, "rank")]
    rewrite(factory.write("id", peak=1e8), lambda result: {"phases": (*result.phases, *late[:-1])})
    rewrite(factory.write("frozen", peak=1e8), lambda result: {"phases": (*result.phases, *late)})
    peaks = load([factory.root]).set_index("method")[["peak_bytes", "peak_phase", "memory_bytes"]]
    assert tuple(peaks.loc["fft"]) == (2e9, "train", 2e9)
    assert tuple(peaks.loc["iisan"]) == (8e8, "cache", 1e8)
    assert tuple(peaks.loc["lora"])[:2] == (1e9, "train")
    assert tuple(peaks.loc["id"])[:2] == (1e8, "train"), "what the suite measures for itself is not the method's"
    assert tuple(peaks.loc["frozen"])[:2] == (9e9, "rank")


def test_the_whole_run_peak_is_never_below_m(factory):
    """Without its process reading training is read from the whole device, a phase beside it may not be."""
    factory.write("fft", peak=2e9, device="cuda", process_valid=False)
    row = load([factory.root]).iloc[0]
    assert (row["memory_bytes"], row["peak_bytes"], row["peak_phase"]) == (2.5e9, 2.5e9, "train")


def test_the_peak_of_a_cache_counts_for_every_cell_that_trains_on_it(factory, peaks_of):
    """The builder alone read 3e8 over its own baseline; the cell that started it held 8e8 with it."""
    build = Phase(kind="cache", start_s=1, wall_s=4, memory=peaks_of(8e8), energy_j=NO_ENERGY)
    for method, phases in (("iisan", (build,)), ("frozen", ())):
        path = factory.write(method, cached=True, peak=1e8)
        rewrite(path, lambda result, new=phases: {"cache": with_peak(result.cache, 3e8), "phases": result.phases + new})
    frame = load([factory.root])
    assert set(frame["peak_bytes"]) == set(frame["cache_peak_bytes"]) == {8e8}
    assert set(frame["peak_phase"]) == {"cache"}
    assert all(frame["cache_built"])


def test_a_cache_of_an_earlier_run_has_the_peak_of_its_builder_alone_and_the_row_says_so(factory):
    rewrite(factory.write("iisan", cached=True, peak=1e8), lambda result: {"cache": with_peak(result.cache, 3e8)})
    factory.write("fft")
    [section] = make_report([factory.root]).sections
    assert section.summary.loc["iisan (cached)", ["peak_bytes", "cache_built"]].tolist() == [3e8, False]
    [note] = section.notes.footnotes
    assert "300 MB of memory (of its builder alone, in an earlier run) to build, once" in note


def test_the_time_to_the_best_epoch_holds_all_that_leads_to_it(factory):
    """Of four epochs of 5 s the third is the best."""
    factory.write("fft", time=5.0, all_in_s=31.0)
    factory.write("iisan", time=5.0, cached=True)
    to_best = load([factory.root]).set_index("method")["time_to_best_s"]
    assert dict(to_best) == {"fft": 31.0 - 5.0, "iisan": 4.2 + 15.0}


def test_only_the_last_matrix_and_the_newest_version_count(factory, monkeypatch):
    """A misspelt encoder, four epochs in the place of three and a changed method leave no row behind."""
    misspelt = factory.write("fft", text_encoder=EncoderSpec(source="bert-bsae"), status="error", time=None)
    factory.write("fft", training=Training(epochs=4))
    old = factory.write("lora", code="aaaa")
    new = factory.write("lora", code="bbbb", started_at="2026-02-01T00:00:00+00:00")
    kept = [new, old, factory.write("fft")]
    assert len(load([factory.root])) == 4
    (factory.root / "cells.json").write_text(json.dumps({"cells": [path.parent.name for path in kept]}))
    for roots in ([factory.root], [factory.root / "cells"], [factory.root.parent]):
        assert set(load(roots)["path"]) == {str(new), str(kept[2])}
    monkeypatch.chdir(factory.root / "cells")
    assert len(load(["."])) == 2
    assert len(load([factory.root], history=True)) == 5
    assert list(load([old])["path"]) == [str(old)], "a record that is named counts"
    for named in (misspelt, misspelt.parent):
        assert list(load([named])["path"]) == [str(misspelt)], "of whatever matrix"
    assert sum(recorded.latest for recorded in read_every([factory.root])) == 2
    assert len(read_every([factory.root])) == 5
    (factory.root / "cells.json").write_text('{"cells": []}')
    with pytest.raises(UserError, match="no cell of the last matrix has ended; 'tpme report --all'"):
        read([factory.root])
    (factory.root / "cells.json").write_text("{")
    with pytest.raises(UserError, match=r"cells\.json: not readable; delete it"):
        read([factory.root])


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
    with pytest.raises(RecordError, match="ranks and targets start at 1"):
        load_ranks(file)
    np.savez(file, rank=whole["rank"])
    with pytest.raises(RecordError, match="target"):
        load_ranks(file)
    file.unlink()
    with pytest.raises(RecordError, match="no such file"):
        load_ranks(file)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_numpy_reads_them(save, tmp_path):
    """Ten and 32 are the bytes that end a header and fill it up."""
    file = tmp_path / "samples-1.npz"
    save(
        file,
        step_s=np.array([10, 10, 32], np.int16),
        step_epoch=np.array([10, 10, 32]),
        sample_t_s=np.ones(5, ">f4"),
        sample_bytes=[2.5, np.nan, 0, 1, 2],
    )
    read, whole = load_samples(file), np.load(file)
    for name, array in whole.items():
        assert getattr(read, name).dtype == array.dtype
        assert np.array_equal(getattr(read, name), array, equal_nan=True)
    save(file, **{**whole, "step_s": np.ones((2, 2))})
    with pytest.raises(RecordError, match="one dimension"):
        load_samples(file)


def test_what_was_read_is_old_to_the_collector_of_garbage(factory):
    factory.write("lora")
    kept = read([factory.root])
    assert gc.isenabled()
    assert not any(one is kept[0].result for one in gc.get_objects(generation=0))
    assert any(one is kept[0].result for one in gc.get_objects(generation=2))

from __future__ import annotations

import inspect
import json
import re
import sqlite3
import subprocess
import sys
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tpme.bench.cli import main
from tpme.bench.errors import UserError
from tpme.bench.record import Flag, RecordError
from tpme.reports.data import export
from tpme.reports.data.export import push, records_frame, write_table
from tpme.reports.data.load import load, read, read_every

COUNTERS = {
    "forward_flops": {"value": 2e9, "source": "counted", "valid": True, "reason": None},
    "mfu": {"value": 0.4, "source": "a guess", "valid": False, "reason": "the clock was throttled"},
}


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tpme", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.fixture
def records(factory):
    """A finished cell with counters and flags, a cached one, and one that ran out of memory."""
    path = factory.write("lora", time=12.5, flags=(Flag(code="throttled", message='said "slow", twice'),), seed=3)
    path.write_text(json.dumps({**json.loads(path.read_text()), "counters": COUNTERS}))
    factory.write("iisan", cached=True, time=2.0)
    factory.write("fft", status="oom", time=None, peak=None, millions=None)
    return read([factory.root])


def by_method(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index("method")


def test_nothing_that_matters_is_lost(records, factory):
    frame = by_method(records_frame(records))
    assert set(load([factory.root]).columns) - {"method"} <= set(frame.columns)
    lora, fft = frame.loc["lora"], frame.loc["fft"]
    assert (lora["status"], fft["status"]) == ("ok", "oom")
    assert json.loads(lora["flags"]) == [{"code": "throttled", "message": 'said "slow", twice'}]
    assert lora["epoch_time_s"] == 12.5
    assert lora["counter_forward_flops"] == 2e9
    assert lora["peak_host_rss_bytes"] == 2e9
    assert lora["phase_train_s"] == 50.0
    assert json.loads(lora["environment_packages"])["torch"] == "2.13.0"
    assert fft["failure_message"].startswith("oom: it was made up")
    assert pd.isna(fft["recall_10"])


def test_earlier_attempts_and_what_a_later_run_replaced_are_rows_too(make_factory, tmp_path):
    one, two = make_factory(tmp_path / "one"), make_factory(tmp_path / "two")
    one.write("lora", status="killed", time=None, attempt=1)
    one.write("lora", attempt=2, time=7.0)
    one.write("fft", time=9.0, started_at="2026-01-01T00:00:00+00:00")
    two.write("fft", time=8.0, started_at="2026-01-02T00:00:00+00:00")
    frame = records_frame(read_every([tmp_path])).sort_values(["method", "attempt", "started_at"])
    told = frame[["method", "attempt", "status", "latest", "selected"]].to_numpy().tolist()
    assert told == [
        ["fft", 1, "ok", False, False],
        ["fft", 1, "ok", True, True],
        ["lora", 1, "killed", False, False],
        ["lora", 2, "ok", True, True],
    ]
    latest = frame[frame["latest"]].set_index("path").sort_index()
    loaded = load([tmp_path]).set_index("path").sort_index()
    shared = loaded.columns.drop("flags")
    same = [frame[shared].astype(object).fillna("") for frame in (latest, loaded)]
    assert same[0].equals(same[1])
    assert frame["search_cells"].tolist() == [pd.NA, 1, pd.NA, 1]
    assert frame["recall_10"].notna().tolist() == [True, True, False, True]


def test_doubtful_counters_are_empty_and_say_why(records):
    lora = by_method(records_frame(records)).loc["lora"]
    assert pd.isna(lora["counter_mfu"])
    reasons = json.loads(lora["missing_reasons"])
    assert reasons["counter_mfu"] == "the clock was throttled"
    assert reasons["peak_nvml_device_bytes"] == "no GPU"


def test_quality_is_that_of_the_ranks(records):
    lora = by_method(records_frame(records)).loc["lora"]
    ranks = np.load(lora["ranks_path"])
    hit = (ranks["rank"] <= 5) & ~ranks["in_history"]
    assert lora["recall_5"] == pytest.approx(hit.mean())
    assert lora["ndcg_5"] == pytest.approx(np.where(hit, 1 / np.log2(1 + ranks["rank"]), 0).mean())


def test_csv_reads_back(records, tmp_path):
    frame = records_frame(records)
    write_table(frame, tmp_path / "new" / "cells.csv")
    back = pd.read_csv(tmp_path / "new" / "cells.csv")
    assert list(back.columns) == list(frame.columns)
    for name in ("epoch_time_s", "memory_bytes", "recall_10", "counter_forward_flops", "peak_torch_allocated_bytes"):
        assert np.array_equal(back[name].astype(float), frame[name].astype(float), equal_nan=True), name
    assert list(back["flags"]) == list(frame["flags"])
    assert list(back["failure_message"].notna()) == list(frame["failure_message"].notna())


@pytest.mark.parametrize("name", ["cells.sqlite", "CELLS.DB"])
def test_sqlite_answers_queries(records, tmp_path, name):
    write_table(records_frame(records), tmp_path / name)
    connection = sqlite3.connect(tmp_path / name)
    rows = connection.execute("select method, epoch_time_s, cached from cells order by method").fetchall()
    connection.close()
    assert rows == [("fft", None, 0), ("iisan", 2.0, 1), ("lora", 12.5, 0)]


def test_parquet_reads_back_with_types_that_do_not_depend_on_the_run(factory, records, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    write_table(records_frame(records), tmp_path / "all.parquet")
    write_table(records_frame([one for one in records if one.result.status == "ok"]), tmp_path / "ok.parquet")
    write_table(records_frame([one for one in records if one.result.status != "ok"]), tmp_path / "oom.parquet")
    back = by_method(pd.read_parquet(tmp_path / "all.parquet"))
    assert back.loc["lora", "epoch_time_s"] == 12.5
    assert back.loc["iisan", "cached"]
    types = {name: parquet.read_schema(tmp_path / f"{name}.parquet") for name in ("all", "ok", "oom")}
    for name in types["oom"].names:
        kinds = {
            str(schema.field(name).type).removeprefix("large_") for schema in types.values() if name in schema.names
        }
        assert len(kinds) == 1, (name, kinds)


def without_pyarrow(*args: object, **kwargs: object) -> None:
    raise ImportError("Missing optional dependency 'pyarrow'")


def test_parquet_without_pyarrow_is_one_line(records, tmp_path, monkeypatch):
    frame = records_frame(records)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", without_pyarrow)
    with pytest.raises(UserError, match=r"^Parquet needs pyarrow: pip install .*\[export\]'$"):
        write_table(frame, tmp_path / "cells.parquet")
    assert list(tmp_path.glob("*.parquet")) == []


def test_a_file_appears_whole_or_not_at_all(records, tmp_path, monkeypatch):
    out = tmp_path / "cells.csv"
    out.write_text("what was there")
    monkeypatch.setattr(export.pd.DataFrame, "to_csv", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_table(records_frame(records), out)
    assert out.read_text() == "what was there"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["cells.csv"]


def test_broken_ranks_are_named(records, factory):
    for path in factory.root.rglob("ranks-1.npz"):
        path.write_bytes(b"PK")
    with pytest.raises(RecordError, match=r"ranks-1\.npz"):
        records_frame(records)


def test_the_command(factory, records, tmp_path, monkeypatch, capsys):
    out = tmp_path / "cells.csv"
    assert run(monkeypatch, factory.root, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Written to {out}: 3 records, ")
    assert len(pd.read_csv(out)) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "nothing to do"), (["--out", "cells.xlsx"], "--out cells.xlsx: name a file that ends in .csv, .parquet")],
)
def test_bad_input_is_one_line(factory, records, monkeypatch, capsys, arguments, said):
    assert run(monkeypatch, factory.root, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_it_needs_no_torch_and_cells_need_no_mlflow(factory, records, tmp_path):
    code = (
        "import sys; from pathlib import Path; from tpme.bench.commands.export import export; "
        f"export([Path({str(factory.root)!r})], out=Path({str(tmp_path / 'a.csv')!r}), mlflow=None, "
        "experiment=''); bad = {'torch', 'mlflow'} & set(sys.modules); sys.exit(f'imported {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    code = "import sys, tpme.bench.run.job, tpme.bench.run.cell; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- MLflow --------------------------------------------------------------------------------------------------


@dataclass
class Info:
    run_id: str
    end_time: int | None = None


@dataclass
class Run:
    info: Info
    name: str
    start_time: int
    tags: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    status: str = "RUNNING"


class MlflowException(Exception):  # noqa: N818 - MLflow's name
    pass


class Server:
    """Holds what a client sent, and refuses what MLflow refuses."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: list[Run] = []
        self.calls: list[str] = []
        self.fail_at: str | None = None

    def called(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_at == name:
            raise MlflowException(f"{name}\nfailed")


def fake_client(server: Server) -> type:
    """``mlflow.MlflowClient`` with the signatures of MLflow's own, as far as they are used."""

    class Client:
        def __init__(self, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
            server.called("connect")

        def get_experiment_by_name(self, name: str) -> Any:
            home = server.experiments.get(name)
            return None if home is None else type("Experiment", (), {"experiment_id": home})()

        def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
            server.experiments[name] = str(len(server.experiments) + 1)
            return server.experiments[name]

        def search_runs(
            self, experiment_ids: list[str], filter_string: str = "", run_view_type: int = 1, max_results: int = 1000
        ) -> list[Run]:
            name, _, value = filter_string.removeprefix("tags.").partition(" = ")
            return [run for run in server.runs if run.tags.get(name.strip("`")) == value.strip("'")][:max_results]

        def create_run(
            self, experiment_id: str, start_time: int | None = None, tags: Any = None, run_name: str | None = None
        ) -> Run:
            assert experiment_id in server.experiments.values()
            server.runs.append(Run(Info(str(len(server.runs))), str(run_name), start_time or 0, dict(tags)))
            return server.runs[-1]

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
            server.called("log_batch")
            assert len(metrics) + len(params) + len(tags) <= 1000
            assert max(len(params), len(tags)) <= 100
            run = server.runs[int(run_id)]
            assert all(isinstance(one.value, str) and 0 < len(one.value) <= 5000 for one in (*params, *tags))
            assert all(isinstance(one.value, float) and one.value == one.value for one in metrics)
            assert all(run.params.get(one.key, one.value) == one.value for one in params)  # MLflow changes none
            run.params |= {one.key: one.value for one in params}
            run.tags |= {one.key: one.value for one in tags}
            run.metrics += metrics

        def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
            server.called("set_terminated")
            run = server.runs[int(run_id)]
            run.status, run.info.end_time = status or "FINISHED", end_time

    return Client


@pytest.fixture
def server(monkeypatch):
    entity = {
        "Metric": ("key", "value", "timestamp", "step"), "Param": ("key", "value"), "RunTag": ("key", "value")
    }  # fmt: skip
    found = Server()
    modules = {name: ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.exceptions")}
    modules["mlflow"].MlflowClient = fake_client(found)  # type: ignore[attr-defined]
    modules["mlflow.exceptions"].MlflowException = MlflowException  # type: ignore[attr-defined]
    for name, names in entity.items():
        made = dataclass(type(name, (), {"__annotations__": dict.fromkeys(names, Any)}))
        setattr(modules["mlflow.entities"], name, made)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_every_record_becomes_a_run(server, records):
    assert push(records, "http://x", "adaptation") == (3, 0)
    assert list(server.experiments) == ["adaptation"]
    runs = {run.name: run for run in server.runs}
    assert set(runs) == {"lora, seed 3", "iisan (cached), seed 1", "fft, seed 1"}
    lora = runs["lora, seed 3"]
    assert lora.status == "FINISHED"
    assert lora.info.end_time - lora.start_time == 1000 * (3 + 5 * 12.5)
    assert lora.params["method"] == "lora"
    assert lora.params["training.epochs"] == "8"
    assert lora.params["lr.method"] == "0.0004"
    assert lora.tags["tpme.status"] == "ok"
    assert "throttled" in lora.tags["tpme.flags"]
    values = {(one.key, one.step): one.value for one in lora.metrics}
    assert values["epoch_time_s", 0] == 12.5
    assert values["counter_forward_flops", 0] == 2e9
    assert ("counter_mfu", 0) not in values
    assert [values["epoch_loss", step] for step in (1, 2)] == [5.0, 2.5]
    assert 0 < values["recall_10", 0] < 1
    assert runs["fft, seed 1"].status == "FAILED"
    assert runs["fft, seed 1"].tags["tpme.failure_message"].startswith("oom: it was made up")


def test_a_push_names_no_home_folder(server, records, factory, monkeypatch):
    monkeypatch.setenv("HOME", str(factory.root))
    push(records, "http://x", "tpme")
    told = [*(run.tags for run in server.runs), *(run.params for run in server.runs)]
    assert all(str(factory.root) not in value for texts in told for value in texts.values())
    assert server.runs[0].tags["tpme.path"].startswith("~/")


def test_nothing_is_pushed_twice_and_what_was_cut_off_is_finished(server, records, factory):
    server.fail_at = "set_terminated"
    with pytest.raises(UserError, match="--mlflow http://x: set_terminated failed"):
        push(records, "http://x", "tpme")
    server.fail_at = None
    assert push(records, "http://x", "tpme") == (3, 0)
    assert len(server.runs) == 3
    assert push(records, "http://x", "tpme") == (0, 3)
    factory.write("bitfit")
    assert push(read([factory.root]), "http://x", "tpme") == (1, 3)
    assert len(server.runs) == 4


def test_what_later_records_change_is_brought_up_to_date(server, factory):
    factory.write("lora", status="killed", time=None, attempt=1)
    assert push(read_every([factory.root]), "http://x", "tpme") == (1, 0)
    factory.write("lora", attempt=2)
    for new, there in ((1, 1), (0, 2)):
        assert push(read_every([factory.root]), "http://x", "tpme") == (new, there)
        tags = {run.tags["tpme.status"]: (run.tags["tpme.latest"], run.tags["tpme.selected"]) for run in server.runs}
        assert tags == {"killed": ("False", "False"), "ok": ("True", "True")}


def test_many_metrics_go_in_several_requests(server, records, monkeypatch):
    monkeypatch.setattr(export, "BATCH", 10)
    push([one for one in records if one.result.cell.method == "lora"], "http://x", "tpme")
    assert server.calls.count("log_batch") > 3
    keys = [(one.key, one.step) for one in server.runs[0].metrics]
    assert len(keys) == len(set(keys)) > 20


def test_the_command_pushes_and_says_so(server, factory, records, monkeypatch, capsys):
    assert run(monkeypatch, factory.root, "--mlflow", "http://x", "--experiment", "mine") == 0
    assert capsys.readouterr().out == "Pushed to http://x, experiment mine: 3 new runs, 0 existed already\n"


def test_without_mlflow_it_is_one_line(factory, records, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert run(monkeypatch, factory.root, "--mlflow", "http://x") == 2
    assert re.fullmatch(r"tpme: --mlflow needs mlflow: pip install .*\[mlflow\]'\n", capsys.readouterr().err)


def test_the_fake_has_the_signatures_of_mlflow():
    real = pytest.importorskip("mlflow", reason="mlflow is not installed").MlflowClient
    fake = fake_client(Server())
    for name in ("search_runs", "create_run", "log_batch", "set_terminated", "create_experiment"):
        ours, theirs = (list(inspect.signature(getattr(one, name)).parameters) for one in (fake, real))
        assert ours == theirs[: len(ours)], name


def test_a_real_mlflow_takes_it(records, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other that needs no server
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = (tmp_path / "mlruns").as_uri()
    assert push(records, uri, "tpme") == (3, 0)
    assert push(records, uri, "tpme") == (0, 3)
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("tpme").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED", "FINISHED"]


def test_names_of_counters_are_no_formulas_and_thousands_are_no_table_of_sqlite(records, tmp_path):
    one = records[0]
    odd = {"a\nb": one.result.epoch_time_s, "\x1b[31m": one.result.epoch_time_s}
    named = replace(one, result=one.result.model_copy(update={"counters": odd}))
    write_table(records_frame([named]), tmp_path / "a.csv")
    assert {r"counter_a\nb", r"counter_\x1b[31m"} <= set((tmp_path / "a.csv").read_text().splitlines()[0].split(","))
    many = {f"counter {number}": one.result.epoch_time_s for number in range(3000)}
    named = replace(one, result=one.result.model_copy(update={"counters": many}))
    with pytest.raises(UserError, match=r"no table of SQLite \(.*\); export them as \.csv"):
        write_table(records_frame([named]), tmp_path / "a.sqlite")

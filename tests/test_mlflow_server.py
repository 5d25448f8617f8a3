"""A server that is away, mute or refuses: one line within seconds, and no password in it."""

from __future__ import annotations

import io
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from tpme.bench import mlflow_server
from tpme.bench.cli import main
from tpme.bench.errors import UserError
from tpme.bench.mlflow_server import open_experiment
from tpme.bench.run.live import LiveLog

pytest.importorskip("mlflow", reason="mlflow is not installed")
SECONDS = 10.0
"""Within which a server is said to be away; mlflow's import is part of it on a busy machine."""


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this process are as they were afterwards."""
    for name in mlflow_server.SETTINGS | mlflow_server.FIRST_CONTACT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def mute() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://user:PASSWORD@127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[str]:
    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:PASSWORD@127.0.0.1:{server.server_port}"
        server.shutdown()


def away() -> str:
    """The address of a port where nobody listens any more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://user:PASSWORD@127.0.0.1:{server.getsockname()[1]}"


def test_the_command_says_within_seconds_that_the_server_is_away(
    demo_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    monkeypatch.setattr(sys, "argv", ["tpme", "export", str(demo_runs), "--mlflow", away()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert time.monotonic() - started < SECONDS
    out, error = capsys.readouterr()
    answer = r"the server does not answer \(\[Errno 111\] Connection refused\)"
    assert re.fullmatch(rf"tpme: --mlflow http://\*\*\*@127\.0\.0\.1:\d+: {answer}\n", error), error
    assert out == ""


@pytest.fixture
def demo_runs() -> Path:
    return Path(__file__).parents[1] / "results" / "demo"


def test_a_server_that_says_nothing_is_given_up(mute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mlflow_server.FIRST_CONTACT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"the server does not answer \(Read timed out") as caught:
        open_experiment("--mlflow", mute, "tpme")
    assert time.monotonic() - started < SECONDS
    assert "PASSWORD" not in str(caught.value)
    assert mlflow_server.FIRST_CONTACT["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"


def test_what_a_server_answers_is_told_without_the_password(refusing: str) -> None:
    with pytest.raises(UserError, match=r"^--mlflow http://\*\*\*@127[\d.]+:\d+: .*401") as caught:
        open_experiment("--mlflow", refusing, "tpme")
    assert "PASSWORD" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_mlflow_quotes_of_the_address_has_no_password() -> None:
    with pytest.raises(UserError, match="unsupported URI") as caught:
        open_experiment("--mlflow", "nonsense://user:PASSWORD@host", "tpme")
    assert "PASSWORD" not in str(caught.value)


def test_live_logging_says_the_same_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", away())
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^--log mlflow: the server does not answer .*; MLFLOW_TRACKING") as caught:
        LiveLog("mlflow", tmp_path, Console(file=io.StringIO()))
    assert time.monotonic() - started < SECONDS
    assert "PASSWORD" not in str(caught.value)


def test_live_logging_shows_where_without_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpme.bench.run.live.open_experiment", lambda *_: (None, "1"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:PASSWORD@host:5000")
    where = LiveLog("mlflow", tmp_path, Console(file=io.StringIO())).where
    assert where == "MLflow at http://***@host:5000, experiment tpme-live"


def test_later_requests_have_more_patience_and_the_users_settings_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no other that needs no server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    for _ in range(2):
        client, home = open_experiment("--mlflow", (tmp_path / "mlruns").as_uri(), "tpme")
        assert client.get_experiment(home).name == "tpme"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == mlflow_server.SETTINGS["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]

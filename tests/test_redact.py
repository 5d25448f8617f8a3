"""What is cut out of a text, and what is not."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tpme.bench.errors import UserError, one_line
from tpme.bench.redact import publishable, redact_file, without_credentials, without_home

SECRETS = [
    "http://user:PASSWORD@host:5000/api",
    "http://user:PASS@WORD@host/x",
    "http://user:PASS/WORD@host/x",
    "git clone https://x-access-token:PASSWORD@github.com/o/r.git failed",
    "postgresql+psycopg://me:PASSWORD@db/mlflow",
    "https://PASSWORD@host/simple",
    "http:/me:PASSWORD@host: no such file",
    "GET https://host/path?token=PASSWORD&page=2",
    "https://bucket.host/key?X-Amz-Signature=PASSWORD",
    "HF_TOKEN=PASSWORD tpme run demo",
    "MLFLOW_TRACKING_PASSWORD='PASS WORD'",
    '{"password": "PASSWORD", "user": "me"}',
    "AWS_SECRET_ACCESS_KEY: PASSWORD",
    "tool --token PASSWORD --verbose",
    "tool --api-key=PASSWORD",
    "Authorization: Basic PASSWORD",
    "{'Authorization': 'Bearer PASSWORD'}",
    "Authorization: PASSWORD was refused",
    "Authorization: AWS4-HMAC-SHA256 Credential=PASSWORD",
    r'"{\"password\": \"PASS WORD\"}"',
    "Command '['pip', 'install', '--token', 'PASSWORD']' failed",
    "tool --token 'PASS WORD'",
    "MY_TOKEN=PASS,WORD psql",
    "smtp_password=PASSWORD",
    "login(token='abcdefgh-0123456-PASSWORD')",
    "X-Api-Key: PASSWORD",
    "Set-Cookie: session=PASSWORD; Path=/",
    "ssh://git:PASSWORD@host:2222/o/r.git",
    "https://user:PASSWORD@host:8443/o/r.git@v1",
    "sk-proj-PASSWORDPASSWORD0123456",
    "AKIAPASSWORDWORDPASS",
    "hf_PASSWORDaaaaaaaaaaaaaaaaaaaa",
    "ghp_PASSWORDaaaaaaaaaaaaaaaaaaaa and more",
    "eyJhbGciOiJIUzI1NiJ9.eyJPASSWORDPASSWORD.sig",
]


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_are_cut_out_once_and_for_all(text: str) -> None:
    cut = without_credentials(text)
    assert "PASS" not in cut.replace("MLFLOW_TRACKING_PASSWORD", "")
    assert "WORD" not in cut.replace("MLFLOW_TRACKING_PASSWORD", "")
    assert "***" in cut
    assert without_credentials(cut) == cut, "a second time changes nothing"
    assert "PASS" not in str(UserError(text)).replace("MLFLOW_TRACKING_PASSWORD", "")
    assert "PASS" not in one_line(OSError(text)).replace("MLFLOW_TRACKING_PASSWORD", "")


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/3",
        "http://host:8080/package@1.0",
        "states:/data.npy@1 and C:/x@y",
        "git+https://github.com/o/r.git@v1.0",
        "training.title_tokens=30, pad_token: [PAD]",
        "encoder 'x': it has no tokenizer; tokens: 14",
        "basic information about the bearer of news",
        "the key=5 of the table, author=Me",
        "skip-a-row-that-is-long-enough-for-a-token",
        "builtin:tiny-text (text) + org/model@main (image)",
        "git@github.com:o/r.git and ssh://host:22/o/r.git",
        "0123456789abcdef0123456789abcdef01234567 and sha256:" + 64 * "5",
        "cell 3f2a9c1b7d4e, 1,234,567 tokens, token: 12345678901234567890, signature: (a, b)",
        'File "http.py", line 400, in hf_raise_for_status, then hf_hub_url_to_filename',
        "a bearer certificate of authentication; --tokens 30 --set training.title_tokens=30",
        "PWD=/srv/x, SSH_AUTHOR=me, COMPASS: 5, key=value, monkey: 2",
    ],
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert publishable(text) == text


def test_the_value_of_a_secret_variable_is_cut_out_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct horse battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallel")
    monkeypatch.setenv("HF_TOKEN_PATH", "some/where/else")
    assert without_credentials("login with correct horse battery failed") == "login with *** failed"
    assert without_credentials("parallel, some/where/else") == "parallel, some/where/else"
    monkeypatch.setenv("PGPASSWORD", "a password of postgres")
    monkeypatch.setenv("DB_PASS", "a password of some database")
    monkeypatch.setenv("PWD", "/srv/this-folder")
    assert without_credentials("'a password of postgres', 'a password of some database'") == "'***', '***'"
    assert without_credentials("/srv/this-folder") == "/srv/this-folder"


@pytest.mark.parametrize(
    "part",
    ["://a:b", "eyJ-", "_TOKEN", "TOKEN='", 'token="', "sk-", "secret=", "--token ", "?key", "/home/x", "Cookie:"],
)
def test_a_long_text_takes_time_in_proportion_to_its_length(part: str) -> None:
    """The square of this length would take minutes."""
    started = time.monotonic()
    publishable(part * (300_000 // len(part)))
    assert time.monotonic() - started < 10


def test_a_log_of_many_lines_takes_seconds(tmp_path: Path) -> None:
    log = tmp_path / "attempt-1.log"
    log.write_text("step 3 of 400, loss 2.7182, the tokenizer has 30,522 words and its key is known\n" * 20_000)
    before, started = log.read_bytes(), time.monotonic()
    redact_file(log)
    assert time.monotonic() - started < 10
    assert log.read_bytes() == before


def test_home_folders_and_the_host_are_cut_out_of_what_one_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home-of-me"
    home.mkdir()
    (tmp_path / "link").symlink_to(home)
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    monkeypatch.setattr(socket, "gethostname", lambda: "gauss.example.org")
    assert without_home(f"{home}/data and states:{tmp_path}/link/x.npy") == "~/data and states:~/x.npy"
    assert without_home(f"{home}ly /var{home}/x") == f"{home}ly /var{home}/x", "other folders"
    assert Path(without_home(f"{home}/data")).expanduser().resolve() == home / "data"
    told = publishable(f"{home}/x, /home/alice/y: no such file; /Users/bob, gauss.example.org, (gauss) gaussian")
    assert told == "~/x, /home/***/y: no such file; /Users/***, ***, (***) gaussian"
    assert publishable(told) == told


def test_without_a_known_home_folder_a_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs as any user id."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", raise_key_error)
    assert publishable("~/x and /srv/x") == "~/x and /srv/x"


def raise_key_error(_uid: int) -> None:
    raise KeyError


def test_a_log_is_rewritten_line_by_line(tmp_path: Path) -> None:
    log = tmp_path / "attempt-1.log"
    log.write_bytes(b"first \xff line\r\nGET http://u:PASSWORD@host\rlast\n")
    log.chmod(0o640)
    redact_file(log)
    assert log.read_bytes() == b"first \xff line\r\nGET http://***@host\rlast\n"
    assert log.stat().st_mode & 0o777 == 0o640
    redact_file(tmp_path / "none.log")
    assert [path.name for path in tmp_path.iterdir()] == ["attempt-1.log"]

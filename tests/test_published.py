"""What one publishes (records, logs, run folders, reports of the gate) names no secret, home folder or host."""

from __future__ import annotations

import json
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from tpme.bench import cli
from tpme.bench.record import (
    FREE_TEXT,
    CellResult,
    EncoderSpec,
    Failure,
    Flag,
    Reading,
    find_results,
    published,
    read_result,
    write_result,
)
from tpme.bench.run.cell_checks import pinned
from tpme.bench.run.matrix import DatasetEntry, MatrixFile
from tpme.bench.task.builtin import builtin_folder

COMMITTED = Path(__file__).parents[1] / "results"
WORDS_OF_THE_SUITE = {
    # Names and hashes that the suite or the user's matrix gives, versions of packages, names of devices.
    "architecture", "attention", "by_group", "cell_id", "code", "code_version", "counters", "cosine", "cuda",
    "dataset_fingerprint", "device_key", "device_name", "device_kind", "devices", "driver", "dtype", "digests", "files",
    "fingerprint", "git_revision", "groups", "hostname_hash", "kind", "losses", "matrix", "method", "metrics", "name",
    "node", "options", "overlap", "packages", "parts", "phase", "pool", "precision", "protocol", "python", "revision",
    "spaces", "stage", "started_at", "status", "synthetic", "task", "throttled", "tower", "weights", "modalities",
    "encoders", "device", "dataset", "looked_up", "time_of", "commit", "definitions",
}  # fmt: skip


def fields_with_text(model: type[BaseModel], below: str = "") -> Iterator[tuple[str, str]]:
    """(field, path) of every field that may hold a string, in a model and the models within it; not in the cell."""
    for name, field in model.model_fields.items():
        if name == "cell":
            continue
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from fields_with_text(part, f"{below}{name}.")
            elif part is str or part is Any or isinstance(part, str):
                yield name, f"{below}{name}"


def parts_of(annotation: Any) -> Iterator[Any]:
    if annotation is None or isinstance(annotation, types.EllipsisType):
        return
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from parts_of(argument)


def test_every_text_of_a_record_is_free_text_or_a_word_of_the_suite() -> None:
    """A new field that holds text has to be put into one of the two sets, with thought."""
    found = dict(fields_with_text(CellResult))
    assert {"message", "reason", "source", "allocator", "reasons"} <= set(found), "the walk finds them"
    assert {path for name, path in found.items() if name not in FREE_TEXT | WORDS_OF_THE_SUITE} == set()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of somebody, on a host of some name, with a token among the variables."""
    folder = tmp_path / "home-of-somebody"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("HF_TOKEN", "token-of-somebody")
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-somebody")
    return folder


@pytest.fixture
def made() -> CellResult:
    """A whole record."""
    return read_result(find_results([COMMITTED / "demo"])[0])


def test_no_free_text_of_a_record_tells_where_it_was_made(made: CellResult, home: Path, tmp_path: Path) -> None:
    text = f"{home}/x on host-of-somebody with token-of-somebody at http://me:of-somebody@host"
    assert made.environment is not None
    changed = made.model_copy(
        update={
            "status": "error",
            "failure": Failure(phase="train", message=text),
            "flags": (Flag(code="x", message=text),),
            "counters": {"mine": Reading.missing(text, text)},
            "environment": made.environment.model_copy(update={"allocator": text, "platform": text}),
        }
    )
    write_result(changed, tmp_path / "attempt-1.json")
    written = (tmp_path / "attempt-1.json").read_text()
    assert "of-somebody" not in written
    assert written.count("~/x on *** with *** at http://***@host") == 6
    assert read_result(tmp_path / "attempt-1.json").cell == changed.cell


def test_a_record_without_such_text_is_written_as_it_is(made: CellResult, tmp_path: Path) -> None:
    write_result(made, tmp_path / "attempt-1.json")
    assert (tmp_path / "attempt-1.json").read_text() == made.model_dump_json(indent=1) + "\n"


def test_no_committed_record_names_a_home_folder() -> None:
    for path in find_results([COMMITTED]):
        result = json.loads(path.read_bytes())
        assert published(result) == result, path
        assert "/home/" not in path.read_text()


def test_an_encoder_below_home_is_recorded_from_the_tilde(home: Path) -> None:
    (home / "models").mkdir()
    (home / "models" / "text").symlink_to(builtin_folder("builtin:tiny-text"))
    spec = pinned(EncoderSpec(source=str(home / "models" / "text")))
    assert spec is not None
    assert spec.source == "~/models/text"
    assert pinned(spec) == spec, "it is found there"


def test_a_run_folder_names_no_home_folder_and_its_log_no_secret(world: Any, home: Path, tmp_path: Path) -> None:
    """The cell prints what it should not, and fails with it."""
    methods = home / "methods"
    methods.mkdir()
    (methods / "chatty.py").write_text(CHATTY)
    data = home / "data"
    matrix = world.matrix(["chatty"])
    data.symlink_to(matrix.datasets[0].path)
    entry = DatasetEntry(name=matrix.datasets[0].name, path=data)
    matrix = MatrixFile.model_validate(matrix.model_copy(update={"datasets": (entry,)}))
    (result,) = world.run(matrix, tmp_path / "run", methods_path=[methods])
    assert result.status == "error"
    assert result.failure is not None
    assert result.failure.message == "RuntimeError: cannot read ~/secret.txt with ***"
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".npz"]
    assert {path.name for path in files} >= {"matrix.json", "attempt-1.log", "attempt-1.json"}
    for path in files:
        told = path.read_text(errors="replace")
        assert str(home) not in told, path
        assert "token-of-somebody" not in told, path
    (log,) = (path.read_text() for path in files if path.suffix == ".log")
    assert 'File "~/methods/chatty.py", line ' in log
    assert "remote: https://***@github.com/o/r.git" in log
    restored = MatrixFile.model_validate_json((tmp_path / "run" / "matrix.json").read_bytes())
    assert restored.datasets[0].path == Path("~/data")


CHATTY = '''
import os
import sys

from tpme.methods.base import Method


class Chatty(Method):
    """Tells its log and its caller everything."""

    def before_step(self, state):
        print("remote: https://me:" + os.environ["HF_TOKEN"] + "@github.com/o/r.git", file=sys.stderr)
        raise RuntimeError(f"cannot read {os.path.expanduser('~')}/secret.txt with {os.environ['HF_TOKEN']}")


METHOD = Chatty
'''


def test_a_gates_report_names_no_home_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = home / "baseline.json"
    baseline.write_bytes((Path(__file__).parents[1] / "baselines" / "base-shape.json").read_bytes())
    files = {"--json": "r.json", "--markdown": "r.md", "--junit": "r.xml"}
    options = [word for option, name in files.items() for word in (option, str(home / name))]
    monkeypatch.setattr(sys, "argv", ["tpme", "check", str(baseline), "--baseline", str(baseline), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    for name in files.values():
        assert str(home) not in (home / name).read_text(), name
    assert json.loads((home / "r.json").read_bytes())["base"] == "~/baseline.json"
    assert str(home) not in capsys.readouterr().out


def test_no_instrument_fills_in_the_name_of_a_node() -> None:
    from tpme.bench.measure.environment import environment

    assert environment("cpu").node is None

"""The command line: what it lists, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from tpme.bench import cli
from tpme.methods.registry import BUILTIN


def tpme(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpme.bench.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_lists_are_valid_json() -> None:
    methods = json.loads(tpme("list", "methods", "--json").stdout)
    assert [row["name"] for row in methods] == list(BUILTIN)
    cacheable = {row["name"] for row in methods if row["cacheable"]}
    assert {"iisan", "frozen"} <= cacheable
    assert not cacheable & {"fft", "adapter", "lora", "bitfit", "prompt", "id", "popularity"}
    presets = json.loads(tpme("list", "presets", "--json").stdout)
    assert {row["name"] for row in presets} >= {"demo", "iisan-paper", "scientific-text"}
    encoders = json.loads(tpme("list", "encoders", "--json").stdout)
    assert {row["name"] for row in encoders} == {"builtin:tiny-text", "builtin:tiny-image"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "nothing-of-that-name"), "no such file, and no preset"),
        (("run", "demo", "--set", "encoders.text.source=builtin:huge"), "no such built-in encoder"),
        (("plan", "demo", "--set", "encoders.text.source=builtin:huge"), "no such built-in encoder"),
        (("run", "demo", "--device", "tpu"), "choose cpu, cuda or auto"),
        (("run", "demo", "--set", "training.epochs"), "write it as key=value"),
        (("run", "demo", "--compile", "--cuda-graphs"), "compile and cuda_graphs exclude each other"),
        (("run", "demo", "--cuda-graphs", "--device", "cpu"), "training.cuda_graphs needs a CUDA device"),
        (("report", "no-such-folder"), "no-such-folder"),
        (("run", "demo", "--store", "/dev/null/store"), "/dev/null/store"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments: tuple[str, ...], told: str) -> None:
    done = tpme(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_switches_of_run_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    laid_over: list[list[str]] = []

    def load(_source: str, settings: list[str]) -> None:
        laid_over.append(settings)
        raise typer.Exit

    monkeypatch.setattr("tpme.bench.run.matrix.load_matrix", load)
    for switches in ((), ("--compile",), ("--set", "seeds=[4]", "--cuda-graphs")):
        assert CliRunner().invoke(cli.app, ["run", "demo", *switches]).exit_code == 0
    assert laid_over == [[], ["training.compile=true"], ["seeds=[4]", "training.cuda_graphs=true"]]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "runs/demo"), "tpme: runs/demo: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "tpme: No space left on device\n"),
    ],
)
def test_what_the_file_system_refuses_is_one_line(
    error: OSError, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(cli, "app", refuse)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().err) == (2, told)

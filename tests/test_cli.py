"""The command line: what it lists, and that a mistake is one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tpme.bench import cli
from tpme.methods.registry import BUILTIN, method_class


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


@pytest.mark.slow
def test_methods_are_listed_with_their_options_at_80_columns() -> None:
    def shown(*names: str) -> str:
        done = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, ["list", "methods", *names])
        assert done.exit_code == 0, done.exception
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "…" not in done.stdout
        return done.stdout

    overview = re.split(rf"(?m)^(?:{'|'.join(map(re.escape, BUILTIN))}) ", shown())[1:]
    for name, block in zip(BUILTIN, overview, strict=True):
        for option in method_class(name).Config.model_fields:
            assert f" {option}=" in block
            assert re.search(rf"(?m)^{option} ", shown(name))
    details = tpme("list", "methods", "lora").stdout
    assert re.search(r"(?m)^rank +8 +integer > 0 *$", details)
    assert "Source: Hu et al., LoRA, ICLR 2022." in details
    assert "did you mean 'lora'?" in tpme("list", "methods", "lroa").stderr


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


@pytest.mark.parametrize("words", [(), ("list",)], ids=" ".join)
def test_without_a_command_the_help_is_shown(words: tuple[str, ...]) -> None:
    shown = [CliRunner().invoke(cli.app, [*words, *more], prog_name="tpme").output for more in ((), ("--help",))]
    assert shown[0] == shown[1]
    assert shown[0].count("\n") > 5


def test_a_wrong_call_shows_no_password() -> None:
    shown = CliRunner().invoke(cli.app, ["run", "demo", "http://user:PASSWORD@host"], prog_name="tpme").output
    assert "http://***@host" in shown
    assert "PASSWORD" not in shown


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


def commands(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group of commands with the words that call it."""
    command = command or typer.main.get_command(cli.app)
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_help_fits_80_columns_and_names_every_value(words: tuple[str, ...]) -> None:
    command = dict(commands())[words]
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, [*words, "--help"], prog_name="tpme").stdout
    described = shown.partition("\n\n")[2]
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search("<[a-z]", shown), "a Python type in the place of a word"
    assert "…" not in shown
    assert not [line for line in described.partition("Commands:")[2].splitlines() if line.endswith("...")]
    for parameter in command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert name in described or parameter.param_type_name == "argument"


def test_the_version_is_that_of_the_installed_package() -> None:
    assert tpme("--version").stdout == f"tpme {version('tpme-bench')}\n"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("tpme ex", ["export"]),
        ("tpme run de", ["demo"]),
        ("tpme run demo --save", ["--save-adapters"]),
        ("tpme method check dor", ["dora"]),
        ("tpme run ./some", []),  # the shell completes file names then
    ],
)
def test_the_shell_completes_commands_presets_and_methods(typed: str, completed: list[str]) -> None:
    code = "import sys; from tpme.bench import cli; sys.argv[0] = 'tpme'; cli.main()"
    asked = {"_TPME_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout.split() == completed


@pytest.mark.parametrize(("typed", "meant"), [(("chek",), "check"), (("run", "demo", "--devise", "cpu"), "--device")])
def test_a_misspelt_command_or_option_is_answered_with_the_nearest(typed: tuple[str, ...], meant: str) -> None:
    done = tpme(*typed)
    assert done.returncode == 2
    assert meant in done.stderr

"""``tpme method check`` as a user types it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from tpme.bench.cli import app
from tpme.bench.errors import UserError

METHOD = """
from pydantic import PositiveFloat
from tpme.methods.base import MethodConfig
from tpme.methods.id import ItemIDs

class Scale(MethodConfig):
    scale: PositiveFloat = 1.0

class Mine(ItemIDs):
    Config = Scale

    def losses(self, outputs):
        if self.config.scale == 13:
            raise RuntimeError("unlucky")
        return {name: self.config.scale * output.loss for name, output in outputs.items()}

METHOD = Mine
"""


def check(folder: Path, *arguments: str) -> Result:
    (folder / "mine.py").write_text(METHOD)
    return CliRunner().invoke(app, ["method", "check", *arguments, "--methods-path", str(folder)])


def test_a_method_of_ones_own_is_checked_line_by_line(tmp_path: Path) -> None:
    done = check(tmp_path, "mine")
    *lines, summary = done.stdout.splitlines()
    assert done.exit_code == 0, done.stdout
    assert "passed  mine: parameter_formula" in lines
    assert "passed  mine scale=0.5: trains_through_all_stages" in lines  # every option is changed once
    assert "skipped mine: padding_changes_nothing: the method reads no text" in lines
    skipped = sum(line.startswith("skipped ") for line in lines)
    assert summary == f"mine: keeps the contract ({len(lines) - skipped} passed, 0 failed, {skipped} skipped)"


def test_one_failed_check_is_exit_code_1(tmp_path: Path) -> None:
    done = check(tmp_path, "mine", "--set", "scale=13")
    assert done.exit_code == 1
    assert "failed  mine scale=13: trains_through_all_stages: RuntimeError: unlucky" in done.stdout.splitlines()
    assert "skipped mine scale=13: state_round_trip: its training failed: RuntimeError: unlucky" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("mine: does not keep the contract (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mime",), "unknown method 'mime'; did you mean 'mine'?"),
        (("mine", "--set", "scale=-1"), "method 'mine', option 'scale': Input should be greater than 0"),
        (("mine", "--set", "scale"), "--set scale: write it as key=value"),
        (("mine", "--methods-path", "nowhere"), "--methods-path nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = check(tmp_path, *arguments)
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(message)
    assert done.stdout == ""


def test_bad_input_is_exit_code_2(harness: ModuleType) -> None:
    done = harness.tpme("method", "check", "nothing-of-the-kind")
    assert done.returncode == 2
    assert done.stderr.startswith("tpme: unknown method 'nothing-of-the-kind'")

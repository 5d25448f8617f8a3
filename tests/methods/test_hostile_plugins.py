"""Plug-ins that end the program, break in any hook or describe themselves badly: they are named, the others work."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hostile.family_plugins import AT_IMPORT, IN_A_HOOK, IN_A_RUN, NEEDLESS, config, plugin

from tpme.bench.errors import UserError
from tpme.methods import registry


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of methods: a good one, ``fine``, and the one of the test."""
    found = tmp_path / "methods"
    found.mkdir()
    (found / "fine.py").write_text(plugin())
    source: str = request.param
    (found / "bad.py").write_bytes(source.encode("utf-8", "surrogateescape"))
    return found


def cases(*tables: dict[str, str]) -> pytest.MarkDecorator:
    merged = {name: source for table in tables for name, source in table.items()}
    return pytest.mark.parametrize("folder", [pytest.param(s, id=n) for n, s in merged.items()], indirect=True)


@cases(AT_IMPORT)
def test_what_breaks_at_import_is_one_line_that_names_it(folder: Path) -> None:
    for call in (registry.method_class, lambda name, path: registry.create(name, {}, path)):
        with pytest.raises(UserError, match=r"bad") as error:
            call("bad", [folder])
        assert "\n" not in str(error.value)


@cases(AT_IMPORT, IN_A_HOOK)
def test_the_rest_of_the_list_works(harness: ModuleType, folder: Path) -> None:
    listed = harness.tpme_here("list", "methods", "--json", "--methods-path", str(folder))
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout)}
    assert rows.keys() == {*registry.BUILTIN, "bad", "fine"}
    assert [name for name, row in rows.items() if "fault" in row] == ["bad"]
    assert "bad" in rows["bad"]["fault"]
    shown = harness.tpme_here("list", "methods", "--methods-path", str(folder))
    assert shown.returncode == 0
    assert "cannot be used" in shown.stdout
    alone = harness.tpme_here("list", "methods", "bad", "--methods-path", str(folder))
    assert alone.returncode == 2
    assert len(alone.stderr.strip().splitlines()) == 1
    assert "bad" in alone.stderr


@cases(NEEDLESS)
def test_options_that_json_cannot_hold_and_required_ones_are_listed(harness: ModuleType, folder: Path) -> None:
    listed = harness.tpme_here("list", "methods", "--json", "--methods-path", str(folder))
    assert listed.returncode == 0, listed.stderr
    bad = next(row for row in json.loads(listed.stdout, parse_constant=int) if row["name"] == "bad")
    assert "fault" not in bad
    assert bad["options"] or bad["required"] == ["rank"]
    for arguments in ([], ["bad"]):
        shown = harness.tpme_here("list", "methods", *arguments, "--methods-path", str(folder))
        assert shown.returncode == 0, shown.stderr
        assert "bad" in shown.stdout


@cases({"required option": NEEDLESS["required option"]})
def test_a_required_option_is_asked_for(folder: Path) -> None:
    with pytest.raises(UserError, match=r"method 'bad', option 'rank': Field required; its options are: rank"):
        registry.create("bad", {}, [folder])
    assert registry.create("bad", {"rank": 3}, [folder]).config.rank == 3


@pytest.mark.parametrize("command", ["run", "plan"])
@cases({"exit 0": AT_IMPORT["exit 0"], "interrupt": AT_IMPORT["interrupt"]}, IN_A_RUN)
def test_a_run_with_it_ends_with_2_and_names_it(
    world: Any, harness: ModuleType, folder: Path, tmp_path: Path, command: str
) -> None:
    file = world.write(tmp_path / "m.toml", world.matrix(["popularity", "bad"]))
    options = ["--device", "cpu", "--out", str(tmp_path / "run")] if command == "run" else []
    ended = harness.tpme_here(
        command, str(file), "--store", str(world.store), "--methods-path", str(folder), *options, cwd=tmp_path
    )
    assert ended.returncode == 2, (ended.stdout, ended.stderr)
    assert len(ended.stderr.strip().splitlines()) == 1, ended.stderr
    assert "bad" in ended.stderr
    assert not list(tmp_path.rglob("attempt-*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"a", object(), Path("a")])
@cases({"any option": config("a: Any = None")})
def test_an_option_that_no_record_can_hold_is_refused(folder: Path, value: object) -> None:
    with pytest.raises(UserError, match=r"method 'bad', option 'a': .*cannot be recorded"):
        registry.create("bad", {"a": [value]}, [folder])


def test_ctrl_c_while_a_plug_in_is_imported_stays_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised wherever the program is, here in a function that the plug-in calls."""

    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "pressed", pressed, raising=False)
    (tmp_path / "slow.py").write_text("import json\njson.pressed()\n")
    with pytest.raises(KeyboardInterrupt):
        registry.method_class("slow", [tmp_path])


def test_errors_of_built_in_methods_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), registry.blaming("lora"):
        raise ZeroDivisionError

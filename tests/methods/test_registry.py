from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tpme.bench.errors import UserError
from tpme.methods import registry
from tpme.methods.base import Method

METHOD = """
from tpme.methods.base import Method

class Mine(Method):
    '''Nothing but the frozen encoders.'''

METHOD = Mine
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that a package is installed which announces entry points: ``installed(name="module:Class")``."""

    def install(distribution: str = "others", **points: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[tpme.methods]", *lines]))
        (site / f"{distribution}_methods.py").write_text(METHOD)
        monkeypatch.syspath_prepend(str(site))

    return install


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "methods"
    found.mkdir()
    return found


def one_line(match: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_card_methods() -> None:
    assert list(registry.BUILTIN) == [
        "fft",
        "ftp",
        "tpgm",
        "adapter",
        "pfeiffer-adapter",
        "parallel-adapter",
        "lora",
        "dora",
        "adalora",
        "vera",
        "peft",
        "bitfit",
        "ln-tuning",
        "ia3",
        "prompt",
        "prefix",
        "pt-peft",
        "dapt",
        "dyt",
        "pyra",
        "context-peft",
        "light-peft",
        "autopeft",
        "fedpeptao",
        "iisan",
        "iisan-versa",
        "lst",
        "frozen",
        "id",
        "popularity",
    ]
    for name in registry.BUILTIN:
        method = registry.create(name, {})
        assert isinstance(method, Method)
        assert type(method).__doc__
        assert registry.source_file(name).stem == name.replace("-", "_")


def test_which_methods_may_be_cached_and_which_adapt_nothing() -> None:
    methods = {name: registry.method_class(name) for name in registry.BUILTIN}
    assert {name for name, method in methods.items() if method.decoupled} == {"iisan", "iisan-versa", "lst", "frozen"}
    assert {name for name, method in methods.items() if method.baseline} == {"frozen", "id", "popularity"}


def test_names_are_known_without_importing_torch() -> None:
    code = "import sys, tpme.methods.registry as r; assert len(r.available()) >= 9; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- names and options ----------------------------------------------------------------------------------------------


def test_an_unknown_name_gets_a_suggestion() -> None:
    one_line("unknown method 'iisann'; did you mean 'iisan'?", lambda: registry.create("iisann", {}))


def test_a_name_like_no_other_gets_the_list() -> None:
    one_line(
        "unknown method 'xyz'; known: adalora, adapter, autopeft, bitfit, .*vera", lambda: registry.create("xyz", {})
    )


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("lora", {"ranks": 4}, r"method 'lora', option 'ranks': .*; its options are: rank, alpha, dropout, targets"),
        ("lora", {"rank": 0}, "option 'rank': .*greater than 0"),
        ("lora", {"dropout": 1.0}, "option 'dropout': .*less than 1"),
        ("lora", {"targets": ["quary"]}, r"option 'targets\.0': .*'query'"),
        ("lora", {"targets": []}, "option 'targets': .*at least 1 item"),
        ("adapter", {"activation": "tanh"}, "option 'activation': .*'relu' or 'gelu'"),
        ("iisan", {"intra": False, "inter": False}, "method 'iisan': intra and inter cannot both"),
        ("bitfit", {"rank": 4}, "option 'rank': .*; its options are: none"),
        ("pyra", {"schedule": [-1, 1]}, r"option 'schedule\.0': Input should be greater than or equal to 0"),
        ("pyra", {"schedule": "none"}, "option 'schedule': Input should be 'low' or 'high'"),
    ],
)
def test_an_option_that_does_not_fit(name: str, options: dict[str, object], match: str) -> None:
    one_line(match, lambda: registry.create(name, options))


# --- entry points ---------------------------------------------------------------------------------------------------


def test_a_method_of_another_package(installed: Callable[..., None]) -> None:
    installed(mine="others_methods:Mine")
    assert registry.available()["mine"] == "others_methods:Mine"
    assert type(registry.create("mine", {})).__name__ == "Mine"
    assert registry.source_file("mine").name == "others_methods.py"


def test_the_same_entry_point_twice_is_no_collision(installed: Callable[..., None]) -> None:
    installed(mine="others_methods:Mine")
    installed("copied", mine="others_methods:Mine")
    assert registry.available()["mine"] == "others_methods:Mine"


def test_a_name_taken_by_another_package(installed: Callable[..., None]) -> None:
    installed(fft="others_methods:Mine")
    one_line(
        "'fft' is defined twice: by tpme.methods.fft:FullFineTuning and by others_methods:Mine", registry.available
    )


def test_two_packages_with_one_name(installed: Callable[..., None]) -> None:
    installed(mine="others_methods:Mine")
    installed("more", mine="more_methods:Mine")
    one_line("'mine' is defined twice: by (others|more)_methods:Mine and by (others|more)_methods", registry.available)


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("nowhere_at_all:Mine", "nowhere_at_all: cannot be imported .ModuleNotFoundError"),
        ("others_methods:Other", "others_methods:Other defines no Method class"),
    ],
)
def test_a_broken_entry_point(installed: Callable[..., None], target: str, match: str) -> None:
    installed(mine=target)
    one_line(match, lambda: registry.create("mine", {}))


# --- --methods-path -------------------------------------------------------------------------------------------------


def test_a_method_in_a_file(folder: Path) -> None:
    (folder / "mine.py").write_text(METHOD)
    (folder / "_shared.py").write_text("raise RuntimeError('helpers are not looked at')")
    known = registry.available([folder])
    assert set(known) - set(registry.available()) == {"mine"}
    assert type(registry.create("mine", {}, [folder])).__name__ == "Mine"
    assert registry.source_file("mine", [folder]) == (folder / "mine.py").resolve()


@pytest.mark.parametrize("line", ["from ._shared import NAME", "from _shared import NAME"])
def test_a_helper_beside_a_file_can_be_imported(folder: Path, tmp_path: Path, line: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for place, name in ((folder, "first"), (other, "second")):
        (place / "_shared.py").write_text(f"NAME = '{name}'\n")
        (place / f"{name}.py").write_text(f"{METHOD}\n{line}\nMine.NAME = NAME\n")
    classes = [registry.method_class(name, [folder, other]) for name in ("first", "second")]
    assert [cls.NAME for cls in classes] == ["first", "second"]  # type: ignore[attr-defined]


def test_files_of_one_name_in_two_folders_are_two_methods(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (folder / "mine.py").write_text(METHOD)
    (other / "mine.py").write_text(METHOD.replace("Mine", "Theirs"))
    assert registry.method_class("mine", [folder]).__name__ == "Mine"
    assert registry.method_class("mine", [other]).__name__ == "Theirs"
    one_line(
        r"'mine' is defined twice: by .*methods/mine\.py and by .*elsewhere/mine\.py",
        lambda: registry.available([folder, other]),
    )


def test_a_file_with_the_name_of_a_built_in_method(folder: Path) -> None:
    (folder / "lora.py").write_text(METHOD)
    one_line(
        r"'lora' is defined twice: by tpme\.methods\.lora:LoRA and by .*lora\.py", lambda: registry.available([folder])
    )


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    one_line("nothing: no such folder", lambda: registry.available([tmp_path / "nothing"]))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("def broken(:", r"mine\.py: cannot be imported \(SyntaxError: "),
        ("import nowhere_at_all", r"mine\.py: cannot be imported \(ModuleNotFoundError: "),
        ("raise ValueError('one\\ntwo')", r"mine\.py: cannot be imported \(ValueError: one two\)"),
        ("x = 1", r"mine\.py defines no Method class \(a file needs 'METHOD = YourClass'"),
        ("METHOD = 3", r"mine\.py defines no Method class"),
        ("METHOD = dict", r"mine\.py defines no Method class"),
    ],
)
def test_a_broken_file(folder: Path, content: str, match: str) -> None:
    (folder / "mine.py").write_text(content)
    one_line(match, lambda: registry.create("mine", {}, [folder]))


def test_a_file_may_be_mended_and_tried_again(folder: Path) -> None:
    (folder / "mine.py").write_text("import nowhere_at_all")
    one_line("cannot be imported", lambda: registry.create("mine", {}, [folder]))
    (folder / "mine.py").write_text(METHOD)
    assert type(registry.create("mine", {}, [folder])).__name__ == "Mine"

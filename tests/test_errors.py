"""What a mistake is answered with: the name that was meant, and the command that installs what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpme.bench import errors
from tpme.bench.errors import SYNONYMS, install_command, missing_extra, nearest
from tpme.bench.run.matrix import MatrixFile
from tpme.bench.run.settings import known_keys
from tpme.methods.registry import BUILTIN, method_class


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("epoch", ["epochs", "patience"], "epochs"),
        ("batch_size", ["users_per_batch", "blocks"], "users_per_batch"),
        ("batch_size", ["rank"], None),
        ("qqq", ["rank"], None),
    ],
)
def test_the_nearest_name_is_a_synonym_or_spelt_alike(word: str, known: list[str], meant: str | None) -> None:
    assert nearest(word, known) == meant


def test_every_synonym_stands_for_a_setting_or_an_option() -> None:
    settings = {key.rpartition(".")[2] for key in known_keys(MatrixFile)}
    options = {option for name in BUILTIN for option in method_class(name).Config.model_fields}
    assert set(SYNONYMS.values()) <= settings | options
    assert not set(SYNONYMS) & settings


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'tpme-bench[export]'"),  # from an index
        ({"url": "file:///w.whl", "archive_info": {}}, "pip install 'tpme-bench[export]'"),
        ({"url": "file://CLONE", "dir_info": {"editable": True}}, "pip install -e 'CLONE[export]'"),
        ({"url": "file://CLONE", "dir_info": {}}, "pip install 'CLONE[export]'"),
        ({"url": "file://HERE", "dir_info": {"editable": True}}, "pip install -e '.[export]'"),
        ({"url": "file:///gone", "dir_info": {"editable": True}}, "pip install 'tpme-bench[export]'"),
    ],
)
def test_the_command_for_an_extra_fits_the_installation(
    origin: dict[str, object] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CLONE", "HERE"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pyproject.toml").touch()
    text = json.dumps(origin).replace("CLONE", f"{tmp_path}/CLONE").replace("HERE", f"{tmp_path}/HERE")

    class Installed:
        def read_text(self, name: str) -> str | None:
            return text if name == "direct_url.json" and origin else None

    monkeypatch.setattr(errors, "distribution", lambda _name: Installed())
    monkeypatch.chdir(tmp_path / "HERE")
    assert install_command("export") == command.replace("CLONE", f"{tmp_path}/CLONE")
    assert str(missing_extra("Parquet", "pyarrow", "export")) == f"Parquet needs pyarrow: {install_command('export')}"

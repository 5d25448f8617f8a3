"""A corpus of hostile and broken input through the command line, and one oracle for all of it."""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path

import pytest
from hostile.cases import Case, corpus
from hostile.oracle import judge

CASES = list(corpus())
SHARE = 12
"""One of so many cases is in the usual tests, all others in ``tox -e slow``."""


def _marks(case: Case) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if zlib.crc32(case.name.encode()) % SHARE else ()


def test_the_corpus_is_large_and_every_case_has_a_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 300


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile-store").resolve()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=_marks(case)) for case in CASES])
def test_hostile_input_is_answered(case: Case, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPME_STORE", str(store))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPLCONFIGDIR", str(store))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path.resolve() / "temporary"))  # that of others may hold anything
    folder = tmp_path.resolve() / "work"
    folder.mkdir()
    judge(case, folder, store, monkeypatch)
    assert list((tmp_path / "temporary").glob("tpme-*")) == []

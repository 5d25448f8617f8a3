"""What the documentation shows holds: its method runs, its matrices load, its tables of settings are complete."""

from __future__ import annotations

import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tpme.bench.record import EncoderSpec, Frozen, LearningRates, Training
from tpme.bench.run.engines.profile import RunProfile, load_profile
from tpme.bench.run.matrix import DatasetEntry, MatrixFile, MethodEntry, PreparedDataset, expand

ROOT = Path(__file__).resolve().parents[1]


def blocks(document: Path) -> dict[str, str]:
    """Fenced blocks of a document that carry a file name, by that name."""
    text = document.read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", text, flags=re.DOTALL))


@pytest.mark.slow
def test_the_documented_method_runs(tmp_path: Path) -> None:
    from tpme.bench.record import find_results, read_result

    files = blocks(ROOT / "docs" / "adding-a-method.md")
    methods = tmp_path / "my-methods"
    methods.mkdir()
    (methods / "norms.py").write_text(files["norms.py"])
    (tmp_path / "matrix.toml").write_text(files["matrix.toml"])
    assert len(files["norms.py"].splitlines()) <= 40
    check = [sys.executable, "-m", "tpme.bench.cli", "method", "check", "norms", "--methods-path", "my-methods"]
    checked = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    command = [sys.executable, "-m", "tpme.bench.cli", "run", "matrix.toml", "--methods-path", "my-methods"]
    environment = os.environ | {"TPME_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {r.cell.method: r for r in map(read_result, find_results([tmp_path / "runs" / "norms"]))}
    assert {method: result.status for method, result in results.items()} == {"norms": "ok", "frozen": "ok"}
    trained = results["norms"].parameters
    assert trained is not None
    # Two layers of each tiny encoder, two LayerNorms of width 64 a layer, scale and shift.
    assert trained.by_group["text"] == trained.by_group["image"] == 2 * 2 * 2 * 64
    assert (tmp_path / "runs" / "norms" / "report" / "report.md").is_file()
    (methods / "searched.py").write_text(files["searched.py"])
    command += ["--set", 'methods=[{name="searched"}]', "--out", "runs/searched", "--no-report"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (searched,) = map(read_result, find_results([tmp_path / "runs" / "searched"]))
    searches = [phase.name for phase in searched.phases if phase.kind == "search"]
    assert searches == ["dropout 0.0", "dropout 0.1", "dropout 0.2"]


def test_every_check_of_the_contract_is_documented() -> None:
    from tpme.bench.contract.checks import CHECKS, SLOW_CHECKS

    shown = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "adding-a-method.md").read_text(), flags=re.MULTILINE)
    names = [check.__name__ for check in (*CHECKS, *SLOW_CHECKS)]
    assert shown[-len(names) :] == names


def test_the_documented_export_of_states_gives_what_the_matrix_beside_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from rich.console import Console

    from tpme.bench.run.matrix import load_matrix
    from tpme.bench.run.plan import plan_matrix
    from tpme.bench.task.dataset import Dataset
    from tpme.bench.task.precomputed import StatesFile
    from tpme.bench.task.prepare import prepare
    from tpme.bench.task.sources.synthetic import Synthetic, generate

    files = blocks(ROOT / "docs" / "data.md")
    monkeypatch.chdir(tmp_path)
    prepare(generate(Synthetic(users=40, items=50)), Path("data/mine"), image_size=32, workers=1)
    recordings: list[str] = []

    def model(recording: str) -> torch.Tensor:
        recordings.append(recording)
        return torch.full((5, 24), float(len(recordings)))

    exec(files["export.py"], {"model": model, "recording_of": lambda name: name})
    (tmp_path / "audio.toml").write_text(files["audio.toml"])
    matrix = load_matrix("audio.toml")
    names = Dataset.open("data/mine").item_names
    assert names == ["", *recordings]
    assert matrix.encoders[0].image is not None
    file = StatesFile.open(matrix.encoders[0].image)
    assert (file.size, file.dtype) == ((len(recordings), 5, 24), torch.float16)
    assert file.rows_of(names).tolist() == [0, *range(len(recordings))]
    planned = plan_matrix(matrix, store=tmp_path / "store", console=Console(quiet=True)).cells
    assert [(cell.label, cell.problem) for cell in planned] == [("frozen", None), ("iisan (cached)", None)]
    assert len(re.findall(r"^\S", files["export.py"], flags=re.MULTILINE)) == 5


def test_the_first_block_of_the_readme_is_the_two_commands_and_nothing_else() -> None:
    """What continuous integration runs, as it stands there."""
    first = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)[0]
    demo, tests = first.splitlines()
    for command, last in ((demo, ".venv/bin/tpme run demo"), (tests, ".venv/bin/tox")):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert command.endswith(f" && {last}")


def answer(command: str, folder: Path) -> list[str]:
    """Lines that a command of the documentation prints, 100 characters wide; sqlite3 is asked without its program."""
    program, *arguments = shlex.split(command)
    if program == "sqlite3":
        with sqlite3.connect(folder / arguments[0]) as connection:
            return ["|".join(map(str, row)) for row in connection.execute(arguments[1])]
    done = subprocess.run(
        [sys.executable, "-m", "tpme.bench.cli", *arguments],
        cwd=folder, env=os.environ | {"COLUMNS": "100"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [line.rstrip() for line in done.stdout.splitlines()]


def test_what_choose_and_export_print_is_what_the_records_of_the_demo_give(tmp_path: Path) -> None:
    """Line by line; three dots stand for lines that are left out."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(ROOT / "results" / "demo")
    shown = re.findall(r"```\n(\$ .*?)```", (ROOT / "docs" / "reports.md").read_text(), flags=re.DOTALL)
    parts = [re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)[1:] for block in shown]
    told = {command: text for block in parts for command, text in zip(block[::2], block[1::2], strict=True)}
    repeated = [command for command in told if re.match("tpme choose|tpme export .*--out|sqlite3", command)]
    assert len(repeated) == 3
    for command in repeated:
        printed = "".join(f"{line}\n" for line in answer(command, tmp_path))
        pattern = r"(.*\n)*?".join(map(re.escape, re.split(r"^\.\.\.\n", told[command], flags=re.MULTILINE)))
        assert re.fullmatch(pattern, printed), f"{command} prints now:\n{printed}"


def first_table(document: Path) -> list[list[str]]:
    """Rows of the first table of a document, without marks and bold type."""
    text = re.sub(r" <sup>.*?</sup>|\*\*", "", document.read_text(encoding="utf-8"))
    table = re.findall(r"^(?:\|.*\n)+", text, flags=re.MULTILINE)[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [row for row in rows if not row[0].startswith("---")]


@pytest.mark.parametrize(("document", "report"), [("README.md", "demo"), ("docs/results.md", "scientific-text")])
def test_a_table_of_results_is_that_of_its_report(document: str, report: str) -> None:
    """Row by row; a document may leave out columns."""
    for row, complete in zip(first_table(ROOT / document), first_table(ROOT / f"docs/{report}/report.md"), strict=True):
        rest = iter(complete)
        assert all(field in rest for field in row), row


def expanded(text: str) -> int:
    """How many cells a matrix has on a data set of titles and images."""
    matrix = MatrixFile.model_validate(tomllib.loads(text))
    data = {entry.name: PreparedDataset(Path("mine"), "0" * 64, ("text", "image")) for entry in matrix.datasets}
    return len(expand(matrix, data, device="cpu"))


def test_the_matrices_shown_are_valid() -> None:
    shown = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert [expanded(text) for text in shown] == [12]
    document = ROOT / "docs" / "matrix.md"
    cells = expanded(blocks(document)["matrix.toml"])
    assert f"= {cells} cells" in document.read_text()


SECTIONS: dict[str, type[Frozen]] = {
    "Top level": MatrixFile,
    "`datasets`": DatasetEntry,
    "`encoders`: `text` and `image`": EncoderSpec,
    "`methods`": MethodEntry,
    "`[training]`": Training,
    "`[lr]`": LearningRates,
}


@pytest.mark.parametrize("title", SECTIONS)
def test_every_setting_of_a_matrix_is_documented_with_its_default(title: str) -> None:
    (section,) = re.findall(
        rf"^## {re.escape(title)}\n(.*?)(?=^##|\Z)",
        (ROOT / "docs" / "matrix.md").read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \|", section, flags=re.MULTILINE)
    fields, told = SECTIONS[title].model_fields, dict(lines)
    assert [name for name, _ in lines] == list(fields)
    for name, field in fields.items():
        if field.is_required():
            assert told[name] == "required", name
        elif told[name].startswith("`") and told[name] != "`axes.lr`":
            assert value(told[name].strip("`")) == as_toml(field.get_default(call_default_factory=True)), name
        else:
            assert field.default is None or isinstance(field.default, Frozen), name


def test_every_key_of_a_profile_is_documented_with_its_default(tmp_path: Path) -> None:
    document = ROOT / "docs" / "cluster.md"
    (tmp_path / "lab.toml").write_text(blocks(document)["lab.toml"])
    assert load_profile(tmp_path / "lab.toml", None).gpus == 1
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", document.read_text(), flags=re.MULTILINE))
    assert list(told) == list(RunProfile.model_fields)
    for name, field in RunProfile.model_fields.items():
        if told[name].startswith("`"):
            assert value(told[name].strip("`")) == field.get_default(call_default_factory=True), name
        else:
            assert field.default is None, name


def value(text: str) -> Any:
    return tomllib.loads(f"value = {text}")["value"]


def as_toml(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


DOCUMENTS = sorted(path for folder in (ROOT, *ROOT.glob("docs/**/")) for path in folder.glob("*.md"))


def anchors(document: Path) -> set[str]:
    """What a link into a document may name: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if "://" not in link:
            path = (document.parent / target).resolve() if target else document
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    named = re.findall(r"`((?:bench|methods|reports|tests|scripts)/[\w/]+\.\w+)`", document.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists() and name != "methods/NAME.py"] == []

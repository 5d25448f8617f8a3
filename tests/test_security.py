"""The lines of docs/security.md: each names tests that exist; and what runs code, from every place it might."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, RecordError, read_result
from tpme.bench.run.matrix import load_matrix
from tpme.bench.task.builtin import builtin_folder
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate
from tpme.bench.task.tokens import load_tokenizer
from tpme.methods import registry
from tpme.methods.registry import available, create
from tpme.reports.data.export import records_frame
from tpme.reports.data.load import read

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "security.md"
PACKAGES = ("bench", "methods", "reports")

# --- the document ---------------------------------------------------------------------------------------------------


def rows() -> Iterator[tuple[str, str]]:
    """First and last column of every row of the document's tables."""
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            first, *_, last = (column.strip() for column in line.strip("| ").split(" | "))
            if last != "test":
                yield first, last


def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_line_of_the_threat_model_names_tests_that_exist() -> None:
    found = list(rows())
    assert len(found) > 30
    for first, last in found:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", last)
        assert named, f"'{first}' names no test"
        for path, name in named:
            assert name in functions_of(path), f"'{first}' names {path}::{name}, which does not exist"


def test_everything_that_comes_from_outside_has_a_line() -> None:
    firsts = " ".join(first for first, _ in rows())
    for kind in ("data", "encoders", "records", "matrices", "plug-ins", "revisions under `ab`", "action inputs"):
        assert kind in firsts


def test_the_policy_leads_to_the_threat_model() -> None:
    assert "(docs/security.md)" in (ROOT / "SECURITY.md").read_text()


# --- what may run code ----------------------------------------------------------------------------------------------

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "joblib.load", "yaml.load",
    "runpy.run_path", "runpy.run_module", "pd.read_pickle", "pickle.load", "pickle.loads",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "code"}
STARTING = r"subprocess\.(run|Popen|call|check_\w+)|ProcessPoolExecutor|os\.(fork|exec\w+|spawn\w+)"
STARTS_PROGRAMS = {
    "bench/commands/ab.py", "bench/git.py", "bench/measure/sampler.py", "bench/run/engines/ray_node.py",
    "bench/run/process.py", "bench/run/rank_processes.py", "bench/run/trees.py", "bench/slurm_commands.py",
    "bench/train/cached.py", "bench/workers.py",
}  # fmt: skip
"""The code of a side of ``ab``, git, the sampler, Python on a node of Ray, cells, their ranks, pip, Slurm's commands,
builders of caches, workers."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_source_runs_text_or_reads_pickles() -> None:
    for path, tree in sources():
        assert not imported(tree) & FORBIDDEN_MODULES, path
        for name, call in calls(tree):
            assert name not in FORBIDDEN_CALLS, f"{path}, line {call.lineno}"
            given = {argument.arg: getattr(argument.value, "value", None) for argument in call.keywords}
            assert not given.items() & FORBIDDEN_ARGUMENTS.items(), f"{path}, line {call.lineno}"


def test_few_modules_start_programs() -> None:
    starting, importing = set(), set()
    for path, tree in sources():
        for name, call in calls(tree):
            if re.fullmatch(STARTING, name):
                starting.add(path)
            by_name = name.endswith("import_module") and not isinstance(call.args[0], ast.Constant)
            if by_name or name.endswith("spec_from_file_location"):
                importing.add(path)
    assert starting == STARTS_PROGRAMS
    assert importing == {"methods/registry.py"}


PLUG_IN = """
from pathlib import Path

Path({mark!r}).touch()

from tpme.methods.base import Method


class Mine(Method):
    pass


METHOD = Mine
"""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once the planted code has run."""
    return tmp_path / "the-planted-code-ran"


def test_a_plug_in_is_imported_only_where_it_is_used(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "methods"
    folder.mkdir()
    (folder / "mine.py").write_text(PLUG_IN.format(mark=str(mark)))
    assert "mine" in available([folder])
    create("bitfit", {}, [folder])
    assert not mark.exists()
    create("mine", {}, [folder])
    assert mark.exists(), "the planted code would show"


def test_an_entry_point_is_imported_only_where_it_is_used(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_package_of_a_method.py").write_text(PLUG_IN.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    point = metadata.EntryPoint("planted", "planted_package_of_a_method:METHOD", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert "planted" in available()
    create("bitfit", {})
    assert not mark.exists()
    create("planted", {})
    assert mark.exists()


def test_a_file_in_the_working_directory_is_not_imported(tmp_path: Path, mark: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("torch", "numpy", "json", "sitecustomize", "tpme"):
        (here / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    code = "import sys; from tpme.bench.run.attempt import command; print(*command('x', (sys.executable, '-P')))"
    told = subprocess.run([sys.executable, "-P", "-c", code], cwd=here, capture_output=True, text=True, check=True)
    python, protected, *_ = told.stdout.split()
    assert protected == "-P"
    subprocess.run([python, protected, "-c", "import torch, numpy, json, tpme.bench.errors"], cwd=here, check=True)
    assert not mark.exists()
    subprocess.run([python, "-c", "import json"], cwd=here, check=True)
    assert mark.exists(), "the planted code would show"


# --- data, encoders, records, matrices, pages -----------------------------------------------------------------------


class Planted:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_a_pickled_array_in_prepared_data_runs_nothing(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "data"
    prepare(generate(Synthetic(users=40, items=50)), folder, image_size=8, workers=1)
    arrays = sorted(folder.glob("*.npy"))
    assert len(arrays) >= 4
    for path in arrays:
        whole = path.read_bytes()
        np.save(path, np.array([Planted(mark)], dtype=object), allow_pickle=True)
        with pytest.raises(UserError, match=path.name):
            Dataset.open(folder)
        assert not mark.exists()
        planted = path.read_bytes()
        path.write_bytes(whole)
    np.load(io.BytesIO(planted), allow_pickle=True)
    assert mark.exists(), "the planted code would show"


MODELLING = """
from pathlib import Path

Path({mark!r}).touch()

from transformers import BertConfig, BertModel, BertTokenizerFast


class Config(BertConfig):
    pass


class Model(BertModel):
    pass


class Tokenizer(BertTokenizerFast):
    pass
"""


@pytest.mark.parametrize("model_type", ["bert", "planted"])
def test_an_encoder_runs_no_code_of_its_own(tmp_path: Path, mark: Path, model_type: str) -> None:
    """With a model type that transformers ships and with one of its own."""
    folder = tmp_path / "encoder"
    shutil.copytree(builtin_folder("builtin:tiny-text"), folder)
    (folder / "planted.py").write_text(MODELLING.format(mark=str(mark)))
    classes = {"AutoConfig": "planted.Config", "AutoModel": "planted.Model", "AutoTokenizer": ["planted.Tokenizer"] * 2}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_bytes()) | {"auto_map": classes, "model_type": model_type}
        (folder / name).write_text(json.dumps(settings))
    spec = EncoderSpec(source=str(folder))
    for load in (lambda: load_encoder(spec, "text"), lambda: load_tokenizer(spec.source, None)):
        with contextlib.suppress(UserError):
            load()
    assert not mark.exists()
    (folder / "model.safetensors").unlink()
    torch.save({"x": Planted(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"safetensors|not usable|supported"):
        load_encoder(spec, "text")
    assert not mark.exists()


def test_pickled_ranks_of_a_record_run_nothing(tmp_path: Path, mark: Path) -> None:
    shutil.copytree(ROOT / "results" / "demo", tmp_path / "demo")
    records = read([tmp_path / "demo"])
    for recorded in records:
        ranks = recorded.beside("ranks")
        if ranks is not None:
            np.savez(ranks, rank=np.array([Planted(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(RecordError, match=r"\.npz"):
        records_frame(records)
    assert not mark.exists()


def test_a_matrix_is_data(tmp_path: Path, mark: Path) -> None:
    demo = (ROOT / "bench" / "presets" / "demo.toml").read_text()
    code = f"__import__('pathlib').Path('{mark}').touch()"
    for line in (f'name = "{code}"', f'description = "{{{{ {code} }}}} $(touch {mark})"', f'import = "{code}"'):
        (tmp_path / "matrix.toml").write_text(f"{line}\n" + re.sub(rf"^{line.split()[0]} = .*\n", "", demo, flags=re.M))
        with contextlib.suppress(UserError):
            load_matrix(str(tmp_path / "matrix.toml"), [f"training.epochs={code}"])
    assert not mark.exists()


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = (ROOT / "docs" / "demo" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(
        r"<(?:script|img|iframe|link|object|embed)[^>]*(?:src|href|data)\s*=\s*[\"']?(?:https?:)?//", page
    )
    assert not re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|eval)\s*\(", page)
    assert not re.findall(r"@import|url\(\s*[\"']?(?:https?:)?//", page)


def test_the_committed_records_are_read_where_the_tests_above_refuse() -> None:
    """So that a refusal is not one of everything."""
    assert read_result(read([ROOT / "results" / "demo"])[0].path).status == "ok"

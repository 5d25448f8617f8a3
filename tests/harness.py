"""A small world for the tests of the harness: two tiny random encoders with a tokenizer, a catalogue, matrices."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomli_w
from rich.console import Console

from tpme.bench import cli
from tpme.bench.measure.phases import measuring
from tpme.bench.record import CellResult
from tpme.bench.run.cell import CellRun
from tpme.bench.run.job import Job
from tpme.bench.run.launch import make_jobs, run_matrix
from tpme.bench.run.matrix import MatrixFile

USERS, ITEMS, TITLE_TOKENS = 60, 60, 8
CARD_METHODS = ("fft", "lora", "prompt", "iisan", "frozen", "id", "popularity")


@dataclass(frozen=True)
class World:
    """Folders that every matrix of a test session reads."""

    text: Path
    image: Path
    data: Path
    store: Path

    def matrix(self, methods: Sequence[str | Mapping[str, Any]], **changes: Any) -> MatrixFile:
        """A matrix of these methods: one epoch of small batches, whatever ``changes`` does not say otherwise."""
        raw: dict[str, Any] = {
            "name": "small",
            "datasets": [{"name": "world", "path": str(self.data)}],
            "encoders": [{"text": {"source": str(self.text)}, "image": {"source": str(self.image)}}],
            "methods": [{"name": method} if isinstance(method, str) else method for method in methods],
            "training": {"epochs": 1, "title_tokens": TITLE_TOKENS, "embedding_dim": 16, "max_steps_per_epoch": 2},
        }
        raw["training"] |= changes.pop("training", {})
        return MatrixFile.model_validate(raw | changes)

    def run(self, matrix: MatrixFile, folder: Path, **settings: Any) -> list[CellResult]:
        """Run a matrix as ``tpme run`` does."""
        return run_matrix(matrix, folder, store=self.store, device="cpu", console=quiet(), **settings)

    def jobs(self, matrix: MatrixFile, folder: Path, methods_path: Sequence[Path] = ()) -> list[Job]:
        """The jobs of a matrix."""
        return make_jobs(matrix, folder, self.store, device="cpu", methods_path=methods_path, console=quiet())

    def tell(self, matrix: MatrixFile, folder: Path, **settings: Any) -> CellResult:
        """Run the first cell of a matrix in this process; returns its record, which is not written."""
        methods_path = settings.pop("methods_path", ())
        job = self.job(matrix, folder, methods_path, **settings)
        with measuring("cpu") as phases:
            cell_run = CellRun(job, phases, lambda _what, _share: None)
            status = cell_run.run()
        return cell_run.record(status)

    def job(self, matrix: MatrixFile, folder: Path, methods_path: Sequence[Path] = (), **settings: Any) -> Job:
        """The job of the first cell of a matrix, which writes to ``folder`` itself."""
        [job, *_] = self.jobs(matrix, folder, methods_path)
        return job.model_copy(update={"folder": folder, "time_limit_s": 100.0} | settings)

    def write(self, path: Path, matrix: MatrixFile) -> Path:
        """``matrix`` as a TOML file."""
        path.write_text(tomli_w.dumps(matrix.model_dump(mode="json", exclude_none=True)))
        return path


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(file=open(os.devnull, "w"), width=200)  # noqa: PTH123


def tpme(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | settings.pop("env", {})
    command = [sys.executable, "-m", "tpme.bench.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **settings)


def tpme_here(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, where torch is imported already."""
    out, error, code = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(sys, "argv", ["tpme", *arguments])
        patch.chdir(cwd or Path.cwd())
        for name, value in ({"COLUMNS": "200"} | dict(env or {})).items():
            patch.setenv(name, value)
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


def wait_for(path: Path) -> str:
    """The content of a file that another process is about to write."""
    for _ in range(1200):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def make_world(root: Path, tiny: ModuleType) -> World:
    """Write encoders and data below ``root``."""
    from tpme.bench.task.dataset import Dataset
    from tpme.bench.task.prepare import prepare
    from tpme.bench.task.sources.synthetic import Synthetic, generate

    prepare(generate(Synthetic(users=USERS, items=ITEMS)), root / "data", image_size=tiny.SIDE, workers=1)
    titles = Dataset.open(root / "data").titles
    assert titles is not None
    tiny.encoder("text").save_pretrained(root / "text")
    tiny.encoder("image").save_pretrained(root / "image")
    save_tokenizer(root / "text", list(titles), tiny.VOCAB)
    return World(root / "text", root / "image", root / "data", root / "store")


def save_tokenizer(folder: Path, titles: Sequence[str], size: int) -> None:
    """A word tokenizer of the commonest words of ``titles``, ``size`` entries in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    counts: dict[str, int] = {}
    for word in " ".join(titles).split():
        counts[word] = counts.get(word, 0) + 1
    common = sorted(counts, key=lambda word: (-counts[word], word))
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *common][:size]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def write_method(folder: Path, name: str, body: str) -> None:
    """A method file: ``body`` is the body of a class that has the encoders and the harness's own options."""
    folder.mkdir(exist_ok=True)
    text = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    (folder / f"{name}.py").write_text(
        f'"""A method of the tests."""\nimport torch\nfrom tpme.methods.base import *\n\n'
        f"class Mine(Method):\n{text}\n\nMETHOD = Mine\n"
    )

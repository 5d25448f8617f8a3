"""What docs/recording.md shows runs: its examples, and its three walks from the first command to the last."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tpme.bench import Recorder
from tpme.bench.record import CellResult, find_results, read_result

pytestmark = pytest.mark.slow

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "recording.md").read_text(encoding="utf-8")
FILES: dict[str, str] = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", DOCUMENT, flags=re.DOTALL))
PARTS: dict[str, str] = dict(re.findall(r"<!-- part: (\S+) -->\n```\w+\n(.*?)```", DOCUMENT, flags=re.DOTALL))


def commands(walk: int) -> list[str]:
    """The commands of a walk, one a line."""
    section = re.split(r"^## Walk ", DOCUMENT, flags=re.MULTILINE)[walk]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    return [line for language, block in fenced if not language for line in block.splitlines()]


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of the document as its reader would; ``tpme`` and ``python`` are those of this process."""
    line = re.sub(r"(?<![\w.])tpme (?=[a-z])", f"{shlex.quote(sys.executable)} -m tpme.bench.cli ", command)
    line = re.sub(r"(?<![\w./-])python (?=\w)", f"{shlex.quote(sys.executable)} ", line)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def run(command: str, folder: Path) -> str:
    done = shell(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(FILES[name])


def only_record(folder: Path) -> CellResult:
    [path] = find_results([folder])
    return read_result(path)


def test_the_plain_loop_runs_as_it_stands_there(tmp_path: Path) -> None:
    write(tmp_path, "plain.py")
    run("python plain.py", tmp_path)
    result = only_record(tmp_path / "runs" / "parity")
    assert (result.status, [epoch.steps for epoch in result.epochs]) == ("ok", [10, 10, 10])
    assert "accuracy" in run("tpme report runs/parity", tmp_path)


def example(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> CellResult:
    """The record of a part of the document that uses what its reader has."""
    monkeypatch.chdir(folder)
    exec(PARTS[name], {"Recorder": Recorder, "name": "tiny"} | given)
    assert len(PARTS[name].splitlines()) <= 5
    return only_record(folder / "runs" / "reviews")


def test_the_trainer_needs_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    given = {
        "Trainer": Trainer,
        "model": BertForSequenceClassification(BertConfig(**shape)),
        "arguments": TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, save_strategy="no"),
        "data": [{"input_ids": [1, 2], "labels": 0}] * 16,
    }
    result = example("trainer.py", tmp_path, monkeypatch, given)
    assert [epoch.steps for epoch in result.epochs] == [2, 2, 2]


def test_lightning_needs_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed (extra 'lightning')")
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
    from torch.utils.data import DataLoader

    class Logging(BoringModel):  # type: ignore[misc]
        def validation_step(self, batch: Any, number: int) -> None:
            self.log("valid_accuracy", 0.5)

    given = {
        "Trainer": lambda **more: lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **more
        ),
        "module": Logging(),
        "batches": DataLoader(RandomDataset(32, 16), batch_size=4),
    }
    result = example("lightning.py", tmp_path, monkeypatch, given)
    assert ([epoch.steps for epoch in result.epochs], list(result.metrics)) == ([4, 4, 4], ["valid_accuracy"])


def test_walk_1_guards_a_script_over_two_commits(tmp_path: Path) -> None:
    run("git init -q . && git config user.email a@example.org && git config user.name A", tmp_path)
    write(tmp_path, "train.py")
    first, baseline, add, later = commands(1)
    for command in (first, baseline, add, "git add train.py && git commit -qm 'Guard the script'"):
        run(command, tmp_path)
    same = shell(later, tmp_path)
    assert "flops" not in "".join(re.findall(r"^.*regressed.*$", same.stdout, flags=re.MULTILINE)), same.stdout
    script = tmp_path / "train.py"
    script.write_text(FILES["train.py"].replace("LENGTH = 32", "LENGTH = 128"))
    run("git commit -qam 'Longer texts'", tmp_path)
    slower = shell(later.replace("runs/new", "runs/newer"), tmp_path)
    assert slower.returncode == 1, slower.stdout + slower.stderr
    assert re.search(r"step.*slower|slower.*step", slower.stdout, flags=re.IGNORECASE | re.DOTALL), slower.stdout


def test_walk_2_chooses_among_methods_of_peft(tmp_path: Path) -> None:
    write(tmp_path, "tune.py")
    loop, report, choose = commands(2)
    run(loop, tmp_path)
    shown = run(report, tmp_path)
    assert all(method in shown for method in ("lora", "ia3", "ln_tuning", "prompt"))
    assert "eval_loss" in shown
    results = {
        result.cell.method: result for result in map(read_result, find_results([tmp_path / "runs" / "counting"]))
    }
    assert {result.status for result in results.values()} == {"ok"}
    # 5 norms of 64; 4 tokens of 64; of 2 layers keys, values (64) and the FFN's output (128) scaled; rank 4 of q and v.
    trainable = {method: result.parameters.trainable for method, result in results.items() if result.parameters}
    assert trainable == {"ln_tuning": 5 * 64, "prompt": 4 * 64, "ia3": 2 * (2 * 64 + 128), "lora": 2 * 2 * 2 * 4 * 64}
    listed, _, others = run(choose, tmp_path).partition("lora")
    assert all(method in listed for method in ("ia3", "ln_tuning", "prompt")), listed
    assert "2K" in others or "2,000" in others or "0.002" in others, others


def test_walk_3_puts_a_published_table_beside_an_own_run(tmp_path: Path) -> None:
    write(tmp_path, "plain.py", "table.csv", "map.toml")
    own, imported, apart, mixed = commands(3)
    run(own, tmp_path)
    run(imported, tmp_path)
    run(apart, tmp_path)
    run(mixed, tmp_path)
    both, one = ((tmp_path / name / "report.md").read_text() for name in ("both", "mixed"))
    assert "Some were measured by others" not in both
    assert "Some were measured by others" in one

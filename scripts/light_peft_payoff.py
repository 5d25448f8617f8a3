"""How much faster and smaller than LoRA's training is after Light-PEFT's cut, and when its estimation has paid off.

    python scripts/light_peft_payoff.py --docs docs/procedures.md

Both methods take turns (A B A B), each run in a process of its own, with the real trainer and its instruments, on
synthetic data and random weights: only time and memory are looked at. T is the median training time of an epoch after
the first, M the peak resident memory of the training epochs over the memory before data and model are loaded. The
estimation has paid for itself after ``estimation / (T of LoRA - T after the cut)`` epochs; the cut is part of it.
About ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

import torch
from workload import ENCODERS, Size, make_trainer, put

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell
from tpme.bench.measure.phases import measuring
from tpme.bench.run.cell import load_libraries
from tpme.bench.train.facts import epoch_time

METHODS = ("lora", "light-peft")
MARK = "light-peft-payoff"


@dataclass(frozen=True)
class Run:
    """One training: measured seconds of an epoch and of the estimation, measured bytes of M, and exact counters."""

    epoch_s: float
    estimation_s: float
    peak_bytes: float
    weight_bytes: float
    saved_bytes: float
    flops: float
    trained: float


ROWS = {
    "epoch_s": ("T, s an epoch", 1),
    "peak_bytes": ("M, MiB", 2**20),
    "flops": ("GFLOP a step", 1e9),
    "weight_bytes": ("weights, MiB", 2**20),
    "saved_bytes": ("kept for the backward pass, MiB", 2**20),
    "trained": ("parameters that train, thousands", 1e3),
    "estimation_s": ("estimation and cut, s", 1),
}
"""Field -> its name in the table, and its unit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both methods in turn, and print or document the comparison."""
    parser = argparse.ArgumentParser(description="Light-PEFT after its cut against LoRA, and its estimation's cost.")
    parser.add_argument("--encoders", choices=list(ENCODERS), default="mini")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each method")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--users", type=int, default=48)
    parser.add_argument("--items", type=int, default=150, help="of the catalogue, which every validation encodes")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = {"encoders": options.encoders, "epochs": options.epochs, "users": options.users, "items": options.items}
    if options.one:
        sys.stdout.write(f"{json.dumps(asdict(measured(Size(options.one, batch=8, **shape))))}\n")
        return 0
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    for number in range(1, options.rounds + 1):
        for name in METHODS:
            runs[name].append(_in_own_process(name, shape))
            sys.stderr.write(f"{number}/{options.rounds} {name}: {runs[name][-1].epoch_s:.2f} s an epoch\n")
    text = report(runs, shape)
    if options.docs is None:
        sys.stdout.write(f"{text}\n")
    else:
        put(text, options.docs, MARK)
    return 0


def measured(size: Size) -> Run:
    """Train by the method's whole procedure in this process."""
    with tempfile.TemporaryDirectory(prefix="tpme-payoff-") as folder, measuring("cpu") as phases:
        with phases.phase("load", "libraries"):
            load_libraries(torch.device("cpu"))
        phases.baseline()
        with phases.phase("load"):
            trainer = make_trainer(size, Path(folder), phases)
        trainer.run()
        counts = count(MetaCell.trained(trainer, DataShape.of(trainer.dataset)))
        memory = phases.training_memory(trainer.outcome.first_phase).host_rss_bytes
        return Run(
            epoch_s=epoch_time(trainer.outcome).value or 0.0,
            estimation_s=sum(phase.wall_s for phase in phases.phases if phase.kind == "estimate"),
            peak_bytes=memory.value or 0.0,
            weight_bytes=counts.weight_bytes,
            saved_bytes=counts.step.saved_bytes,
            flops=counts.step.forward_flops + counts.step.backward_flops,
            trained=counts.trainable,
        )


def _in_own_process(name: str, shape: Mapping[str, str | int]) -> Run:
    given = [part for key, value in shape.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, __file__, "--one", name, *given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def report(runs: Mapping[str, Sequence[Run]], shape: Mapping[str, str | int]) -> str:
    """The comparison as a Markdown table of medians, and the epochs after which the estimation has paid off."""
    before, after = (_medians(runs[name]) for name in METHODS)
    encoders = ENCODERS[str(shape["encoders"])]
    count_of = len(runs[METHODS[0]])
    lines = [
        f"Medians of {count_of} runs of each method in turn, {torch.get_num_threads()} CPU threads; text and image "
        f"encoder of {encoders.depth} layers, {encoders.width} wide, {encoders.tokens} image tokens, batch 8.",
        "",
        f"| | {METHODS[0]} | {METHODS[1]} | ratio |",
        "|---|---:|---:|---:|",
    ]
    for name, (label, unit) in ROWS.items():
        a, b = before[name] / unit, after[name] / unit
        lines.append(f"| {label} | {a:,.4g} | {b:,.4g} | {f'{a / b:.2f}' if a else ''} |")
    paired = [a.epoch_s / b.epoch_s for a, b in zip(*(runs[name] for name in METHODS), strict=True)]
    lines += ["", f"T of every pair: {', '.join(f'{ratio:.2f}' for ratio in paired)} times faster after the cut."]
    gain = before["epoch_s"] - after["epoch_s"]
    if gain > 0:
        lines.append(f"The estimation has paid for itself after {after['estimation_s'] / gain:.1f} epochs.")
    else:
        lines.append("An epoch after the cut is not faster here, so the estimation does not pay for itself.")
    return "\n".join(lines)


def _medians(runs: Sequence[Run]) -> dict[str, float]:
    return {entry.name: median(getattr(run, entry.name) for run in runs) for entry in fields(Run)}


if __name__ == "__main__":
    sys.exit(main())

"""How much faster and smaller than LoRA's training is after Light-PEFT's cut, and when its estimation has paid off.

    python scripts/light_peft_payoff.py --docs docs/procedures.md

Four rows: LoRA with its default options, LoRA at the six projections that Light-PEFT adapts, Light-PEFT's estimation,
and Light-PEFT after its cut. Each has a process of its own, with the real model, trainer and instruments, on
synthetic data and random weights: only time and memory are looked at. After a first step the rows take turns (A B C D
A B C D), two steps each, all on the same batch, so that what else the machine does hits all of them; the second step
counts, and ratios of times come from these turns. T is the mean training time of a step, M the peak resident memory
of the steps over that before data and model are loaded. Counters are exact. An estimation of one epoch has paid for
itself after ``T of the estimation / (T of LoRA - T after the cut)`` epochs. About three minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from workload import ENCODERS, TITLE_TOKENS, Size, in_turns, make_trainer, put, say, take_turns

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.exact import count
from tpme.bench.counting.meta import MetaCell
from tpme.bench.measure.phases import measuring
from tpme.bench.train.libraries import load_libraries
from tpme.methods.light_peft import SIX
from tpme.reports.data.stats import paired_ratio_interval

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora, six projections": ("lora", {"targets": SIX, "alpha": 16, "dropout": 0.05}),
    "estimation": ("light-peft", {}),
    "light-peft": ("light-peft", {}),
}
"""Row -> method and options."""
BEFORE, AFTER, ESTIMATION = ("lora", "lora, six projections"), "light-peft", "estimation"
MARK = "light-peft-payoff"


@dataclass(frozen=True)
class Facts:
    """What is known of a row when its turns are over: measured bytes of M, and exact counters."""

    peak_bytes: float
    flops: float
    weight_bytes: float
    saved_bytes: float
    trained: float


UNITS = {
    "peak_bytes": ("M, MiB", 2**20),
    "flops": ("GFLOP a step", 1e9),
    "weight_bytes": ("weights, MiB", 2**20),
    "saved_bytes": ("kept for the backward pass, MiB", 2**20),
    "trained": ("parameters that train, thousands", 1e3),
}
"""Field of ``Facts`` -> its name in the table, and its unit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Let the rows take turns, and print or document the comparison."""
    parser = argparse.ArgumentParser(description="Light-PEFT after its cut against LoRA, and its estimation's cost.")
    parser.add_argument("--encoders", choices=list(ENCODERS), default="wide")
    parser.add_argument("--turns", type=int, default=12, help="measured steps of each row")
    parser.add_argument("--users", type=int, default=2, help="of the batch")
    parser.add_argument("--items", type=int, default=32, help="of the catalogue")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    shape = {"encoders": options.encoders, "users": options.users, "items": options.items}
    if options.row:
        method, given = ROWS[options.row]
        take_part(options.row, Size(method, options=given, batch=options.users, **shape))
        return 0
    given = [part for key, value in shape.items() for part in (f"--{key}", str(value))]
    commands = {row: [sys.executable, __file__, "--row", row, *given] for row in ROWS}
    taken, said = in_turns(commands, options.turns)
    seconds = {row: np.array(values) for row, values in taken.items()}
    facts = {row: Facts(**lines[-1]) for row, lines in said.items()}
    text = report(seconds, facts, shape)
    if options.docs is None:
        sys.stdout.write(f"{text}\n")
    else:
        put(text, options.docs, MARK)
    return 0


def take_part(row: str, size: Size) -> None:
    """One row: its turns, and then its ``Facts``."""
    with tempfile.TemporaryDirectory(prefix="tpme-payoff-") as folder, measuring("cpu") as phases:
        with phases.phase("load", "libraries"):
            load_libraries(torch.device("cpu"))
        phases.baseline()
        with phases.phase("load"):
            trainer = make_trainer(size, Path(folder), phases)
        estimating = row == ESTIMATION
        if not estimating:
            trainer.run()  # a light-peft row estimates and is cut here
        optimizer, first = trainer.optimizer(), len(phases.phases)

        def step() -> float:
            if estimating:
                trainer.method._estimate(trainer)
            else:
                trainer.train_epoch(optimizer, "turn")
            return phases.phases[-1].wall_s

        take_turns(lambda: "ready", step)
        counts = count(MetaCell.trained(trainer, DataShape.of(trainer.dataset)))
        facts = Facts(
            peak_bytes=phases.training_memory(first).host_rss_bytes.value or 0.0,
            flops=counts.step.forward_flops + counts.step.backward_flops,
            weight_bytes=counts.weight_bytes,
            saved_bytes=counts.step.saved_bytes,
            trained=counts.trainable,
        )
        say(asdict(facts))


def report(
    seconds: Mapping[str, NDArray[np.float64]], facts: Mapping[str, Facts], shape: Mapping[str, str | int]
) -> str:
    """The comparison as a Markdown table, the ratios' intervals, and when the estimation has paid for itself."""
    encoders = ENCODERS[str(shape["encoders"])]
    columns = (*BEFORE, AFTER)
    lines = [
        f"Text and image encoder of {encoders.depth} layers, {encoders.width} wide, {encoders.heads} heads; "
        f"{TITLE_TOKENS} tokens a title, {encoders.tokens} an image; {shape['users']} users a batch; "
        f"{torch.get_num_threads()} CPU threads.",
        "",
        f"| | {' | '.join(columns)} | {' | '.join(f'{name} / {AFTER}' for name in BEFORE)} |",
        f"|---|{'---:|' * (len(columns) + len(BEFORE))}",
        _line("T, s a step", [float(seconds[name].mean()) for name in columns]),
    ]
    for name, (label, unit) in UNITS.items():
        lines.append(_line(label, [getattr(facts[column], name) / unit for column in columns]))
    lines += ["", f"Over {len(seconds[AFTER])} turns, with 95 % intervals:", ""]
    for name in BEFORE:
        faster = (
            f"- A step of `{name}` takes {_ratio(seconds[AFTER], seconds[name])} times as long as one after the cut."
        )
        lines.append(f"{faster} {_payoff(seconds, name)}")
    slower = _ratio(seconds["lora"], seconds[ESTIMATION])
    lines.append(f"- A step of the estimation takes {slower} times as long as one of `lora`.")
    return "\n".join(lines)


def _line(label: str, values: Sequence[float]) -> str:
    *before, after = values
    cells = [*(f"{value:,.4g}" for value in values), *(f"{value / after:.2f}" for value in before)]
    return f"| {label} | {' | '.join(cells)} |"


def _ratio(old: NDArray[np.float64], new: NDArray[np.float64]) -> str:
    bounds = paired_ratio_interval(old, new)
    assert bounds is not None
    return f"{new.mean() / old.mean():.2f} ({bounds[0]:.2f} to {bounds[1]:.2f})"


def _payoff(seconds: Mapping[str, NDArray[np.float64]], before: str) -> str:
    """After how many epochs an estimation of one epoch has paid for itself."""
    gain = seconds[before] - seconds[AFTER]
    if gain.mean() <= 0:
        return "An epoch after the cut is not faster here, so the estimation does not pay for itself."
    return (
        f"An estimation of one epoch has paid for itself after {seconds[ESTIMATION].mean() / gain.mean():.1f} epochs."
    )


if __name__ == "__main__":
    sys.exit(main())

"""The figures of docs/procedures.md: for each method with a procedure of its own, one that only it can have.

    python scripts/procedure_figures.py fedpeptao RUN

The figure is written to ``docs/procedures``. A figure is made from what a run has left, or by training in its folder,
never from numbers kept here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from tpme.bench.measure.phases import PhaseLog
from tpme.bench.run.cell import CellRun
from tpme.bench.run.launch import make_jobs, store_folder
from tpme.bench.run.matrix import MethodEntry, load_matrix
from tpme.methods.fedpeptao import FedPepTAO
from tpme.methods.parts.federation import Round
from tpme.reports.figures.style import COLOURS, PAGE_INCHES, margins, new_figure, save, style

OUT = Path(__file__).resolve().parents[1] / "docs" / "procedures"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the figure of one method from a run."""
    parser = argparse.ArgumentParser(description="The figure of a method with a procedure of its own.")
    parser.add_argument("method", choices=list(FIGURES))
    parser.add_argument("run", type=Path, help="folder of a run with a cell of the method, or to train in")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figure")
    options = parser.parse_args(arguments)
    with style():
        content = save(FIGURES[options.method](options.run), "png")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.method}.png").write_bytes(content)
    return 0


# --- FedPepTAO --------------------------------------------------------------------------------------------------------

FEDERATIONS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "FedPepTAO": (COLOURS[0], {}),
    "FedPepTAO, all layers": (COLOURS[1], {"layer_ratio": 1.0}),
    "FedAvg": (COLOURS[2], {"algorithm": "fedavg"}),
}
"""Colour and options of three federations; prompts are in half of the layers unless it is said otherwise."""
PROMPT_RATE = 1e-2


def fedpeptao(run: Path) -> Figure:
    """What rounds send, and the validation that it buys: three federations on the demo's data, trained in ``run``.

    Rounds that an earlier call has finished there are read.
    """
    figure = new_figure(PAGE_INCHES, 2.5)
    sent, quality = figure.subplots(1, 2)
    handles = []
    for label, (colour, options) in FEDERATIONS.items():
        rounds, prompts = _federated(run / label.replace(", ", " ").replace(" ", "-"), options)
        total = np.cumsum([one.bytes_up + one.bytes_down for one in rounds]) / 1e6
        x = np.arange(1, len(rounds) + 1)
        handles += quality.plot(
            [megabytes for megabytes, one in zip(total, rounds, strict=True) if one.found],
            [one.found.recall_10 for one in rounds if one.found],
            color=colour, lw=1, marker="o", ms=2.5, label=label,
        )  # fmt: skip
        if label != "FedAvg":  # it sends what FedPepTAO sends: control variates cost nothing
            sent.plot(x, total, color=colour, lw=1)
            sent.plot(x, total * prompts, color=colour, lw=1, ls=":")
            for part, share in (("all", 1.0), ("prompts", prompts)):
                text = f" {part}: {total[-1] * share:.0f} MB"
                sent.annotate(text, (x[-1], total[-1] * share), color=colour, fontsize=6, va="center")
    sent.set_xlim(0, 1.35 * x[-1])
    sent.set_xticks(np.linspace(0, x[-1], 5))
    sent.set_xlabel("round")
    sent.set_ylabel("sent so far, both ways, MB")
    quality.set_xlabel("sent so far, both ways, MB")
    quality.set_ylabel("validation Recall@10")
    for axes in (sent, quality):
        axes.set_ylim(bottom=0)
    quality.set_xlim(left=0)
    margins(figure, 0.5, 0.15, 0.4, 0.3, across=0.6)
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), frameon=False, fontsize=7)
    return figure


def _federated(folder: Path, options: dict[str, Any]) -> tuple[Sequence[Round], float]:
    """The rounds of one federation on the data of ``all-methods``, and the share of the prompts in their bytes."""
    matrix = load_matrix("all-methods")
    entry = MethodEntry.model_validate({"name": "fedpeptao", "options": options})
    rates = matrix.lr.model_copy(update={"groups": {"prompt": PROMPT_RATE}})
    only = matrix.model_copy(update={"methods": (entry,), "lr": rates})
    [job] = make_jobs(only, folder, store_folder(None), device="cpu", console=Console(stderr=True))
    trainer = CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None).prepare()
    trainer.run()
    method = trainer.method
    assert isinstance(method, FedPepTAO)
    report = method.report(trainer.model)
    prompts, others = report["prompt_message_bytes"], report["head_message_bytes"]
    return method.rounds, prompts / (prompts + others)


FIGURES: Mapping[str, Callable[[Path], Figure]] = {"fedpeptao": fedpeptao}
"""By method: the function that draws its figure from the folder of a run."""


if __name__ == "__main__":
    sys.exit(main())

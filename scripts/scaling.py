"""Measure how an epoch grows with users, items, batch, sequence length and encoders, and evaluation with items.

    python scripts/scaling.py --docs docs/lab/scaling.md

Each point is measured in its own process and stored as one line of ``--out``, so an interrupted run continues where it
stopped; delete the file to start over. ``--only AXIS`` measures one axis. Takes about ten minutes on two otherwise idle
cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from matplotlib.ticker import FuncFormatter, NullLocator
from workload import ENCODERS, Size, make_trainer, put

from tpme.bench.measure.phases import PhaseLog, measuring
from tpme.bench.quantities import memory_reading
from tpme.bench.record import Frozen
from tpme.bench.run.process import PATIENT
from tpme.reports.figures.style import COLOURS, COLUMN_INCHES, SILVER, margins, new_figure, save, style

STEPS, WARMUP = 8, 2
SHORT = 3
"""Steps where one takes seconds. ``STEPS``: of an epoch that is not measured whole, after ``WARMUP`` steps."""
POINT_LIMIT_S = 300

Device = Literal["cpu", "cuda"]


class Point(Frozen):
    """A point to measure: axis, value on it, and row."""

    axis: str
    value: int | str
    method: str
    cached: bool
    device: Device

    @property
    def label(self) -> str:
        """Name of the row in tables."""
        return f"{self.method} (cached)" if self.cached else self.method


class Measurement(Frozen):
    """A measured point. Bytes are a process's peak over what it held before data and model."""

    point: Point
    seconds: float
    """Of an epoch; of a step on the axis ``depth``, of an evaluation on the axis ``evaluation``."""
    memory_bytes: float
    parts: dict[str, float] = {}


@dataclass(frozen=True)
class Axis:
    """Values of one axis, the rows measured along it, and the fixed sizes.

    varies: the field of ``Size`` that takes the values. unit: what is timed. largest: the last value of rows that stop
    before the end of the axis.
    """

    varies: str
    title: str
    unit: str
    values: tuple[int | str, ...]
    rows: tuple[tuple[str, bool], ...] = (("fft", False), ("lora", False), ("iisan", True))
    size: dict[str, Any] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def points(self, name: str, device: Device) -> Iterator[Point]:
        """Yield all points of the axis."""
        for method, cached in self.rows:
            for value in self.values:
                if not isinstance(value, int) or value <= self.largest.get(method, value):
                    yield Point(axis=name, value=value, method=method, cached=cached, device=device)


AXES = {
    "users": Axis("users", "users", "epoch", (250, 1000, 4000, 16_000), largest={"fft": 4000, "lora": 4000}),
    "items": Axis(
        "items",
        "items",
        "epoch",
        (1_000, 10_000, 100_000, 1_000_000),
        rows=(("fft", False), ("iisan", True), ("id", False)),
        largest={"fft": 100_000},
    ),
    "batch": Axis("batch", "users a batch", "epoch", (8, 32, 128, 512)),
    "sequence": Axis(
        "max_seq_len",
        "sequence length",
        "epoch",
        (10, 30, 100, 300),
        size={"batch": 8, "full": True},
        largest={"fft": 100, "lora": 100},
    ),
    "depth": Axis(
        "encoders",
        "encoders",
        "step",
        ("tiny", "mini", "small", "medium", "base"),
        size={"batch": 2, "users": 64, "items": 1000},
    ),
    "evaluation": Axis(
        "items",
        "items",
        "evaluation",
        (1_000, 10_000, 100_000, 1_000_000),
        rows=(("fft", False), ("iisan", True), ("id", False)),
        size={"users": 512},
        largest={"fft": 100_000},
    ),
}


def size_of(point: Point) -> Size:
    """Return the size of a point's workload."""
    axis = AXES[point.axis]
    return Size(point.method, point.cached, **axis.size | {axis.varies: point.value})


# --- one point, in its process ----------------------------------------------------------------------------------------


def measure(point: Point) -> Measurement:
    """Measure ``point`` in this process."""
    import torch

    from tpme.bench.train.libraries import load_libraries

    size = size_of(point)
    with tempfile.TemporaryDirectory(prefix="tpme-scaling-") as folder, measuring(point.device) as phases:
        with phases.phase("load", "libraries"):
            load_libraries(torch.device(point.device))
        phases.baseline()
        with phases.phase("load"):
            trainer = make_trainer(size, Path(folder), phases, point.device)
        if point.axis == "evaluation":
            seconds, parts = _evaluation(trainer, phases)
        else:
            seconds, parts = _training(point, trainer)
        if point.axis == "depth":
            parts |= _counted(trainer)
        if point.axis == "sequence":
            parts["loss_s"] = _loss_alone(trainer)
    kinds = ("validate", "rank") if point.axis == "evaluation" else ("train",)
    return Measurement(point=point, seconds=seconds, memory_bytes=_memory(phases, kinds, point.device), parts=parts)


def _training(point: Point, trainer: Any) -> tuple[float, dict[str, float]]:
    """Seconds of an epoch: timed whole along the users, else its number of steps times their median. On the axis
    ``depth``, seconds of one step."""
    whole = len(trainer.loader)
    steps = whole if point.axis == "users" else SHORT if point.axis == "depth" else min(STEPS, whole)
    optimizer = trainer.optimizer()
    for epoch, length in ((1, min(WARMUP, whole)), (2, steps)):
        trainer.state.epoch, trainer.loader.steps = epoch, length
        trainer.train_epoch(optimizer, f"epoch {epoch}")
    step_s = median(trainer.outcome.step_s[-steps:])
    if point.axis == "users":
        return trainer.phases.phases[-1].wall_s, {"step_s": step_s}
    return step_s * (1 if point.axis == "depth" else whole), {"step_s": step_s}


def _evaluation(trainer: Any, phases: PhaseLog) -> tuple[float, dict[str, float]]:
    """Seconds of encoding all items and of ranking one target per user, each on its second run."""
    from tpme.bench.task.evaluate import item_matrix, rank_split

    for _ in range(2):
        trainer.model.eval()
        with phases.phase("validate"):
            vectors = item_matrix(trainer.encode, trainer.store, trainer.device)
        with phases.phase("rank"):
            rank_split(trainer.model, vectors, trainer.dataset.test)
    parts = {f"{phase.kind}_s": phase.wall_s for phase in phases.phases[-2:]}
    return sum(parts.values()), parts


def _loss_alone(trainer: Any) -> float:
    """Seconds of the loss of one batch, forward and backward: the fastest of ``SHORT`` runs."""
    import torch

    from tpme.bench.measure.clock import now
    from tpme.bench.task.loss import in_batch_loss

    batch, dim, times_s = next(trainer.loader.epoch(1)), trainer.cell.training.embedding_dim, []
    for _ in range(SHORT):
        items = torch.randn(len(batch.items), dim, device=trainer.device, requires_grad=True)
        users = torch.randn(*batch.mask.shape, dim, device=trainer.device, requires_grad=True)
        started = now(trainer.device)
        in_batch_loss(users, items, batch.candidates).backward()  # type: ignore[no-untyped-call]
        times_s.append(now(trainer.device) - started)
    return min(times_s)


def _counted(trainer: Any) -> dict[str, float]:
    """Counted cost of a step: FLOPs, and the peak of a simulated step (bytes)."""
    from tpme.bench.counting.batch import DataShape
    from tpme.bench.counting.exact import count, run_step
    from tpme.bench.counting.meta import MetaCell

    meta = MetaCell(trainer.cell, DataShape.of(trainer.dataset))
    counts, step = count(meta), run_step(meta, fused_attention=True)
    return {
        "flops": counts.step.forward_flops + counts.step.backward_flops,
        "counted_bytes": step.peak_bytes + counts.optimizer_bytes + sum(counts.cache_bytes.values()),
    }


def _memory(phases: PhaseLog, kinds: tuple[str, ...], device: Device) -> float:
    measured = [phase for phase in phases.phases if phase.kind in kinds]
    peaks = [memory_reading("phase_peak_bytes", phase.memory, device).value for phase in measured]
    return max(peak for peak in peaks if peak is not None)


# --- all points -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure missing points; print the tables or write them and the plots into the documentation."""
    options = _options(arguments)
    if options.point is not None:
        sys.stdout.write(measure(Point.model_validate_json(options.point)).model_dump_json() + "\n")
        return 0
    names = options.only or list(AXES)
    points = [point for name in names for point in AXES[name].points(name, options.device)]
    measured = {line.point: line for line in read(options.out)}
    failed, started = 0, time.monotonic()
    for number, point in enumerate(points, start=1):
        if point in measured:
            continue
        line = _in_own_process(point, options.out)
        if line is None:
            failed += 1
            continue
        measured[point] = line
        result = f"{line.seconds:9.3f} s {line.memory_bytes / 2**20:9.1f} MiB"
        sys.stderr.write(
            f"{number}/{len(points)} {point.axis} {point.value} {point.label}: {result}, "
            f"{time.monotonic() - started:.0f} s so far\n"
        )
    for name in names:
        lines = [measured[point] for point in points if point.axis == name and point in measured]
        if lines and options.docs is not None:
            _document(name, lines, options.docs)
        elif lines:
            sys.stdout.write(f"\n{table(name, lines)}\n")
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure how time and memory grow with users, items, batch, length, encoders."
    )
    parser.add_argument("--only", action="append", choices=list(AXES), help="measure only this axis; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling/points.jsonl"), help="file of measured points")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked parts; plots go beside it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def read(out: Path) -> list[Measurement]:
    """Read the points measured so far, without a line that an interruption cut off."""
    lines = []
    for text in out.read_text().splitlines() if out.exists() else ():
        try:
            lines.append(Measurement.model_validate_json(text))
        except ValueError:
            continue
    return lines


def _in_own_process(point: Point, out: Path) -> Measurement | None:
    """Measure and store one point; print the reason and return ``None`` if that fails."""
    command = [sys.executable, __file__, "--point", point.model_dump_json()]
    try:
        done = subprocess.run(
            command, env=PATIENT | os.environ, capture_output=True, text=True, timeout=POINT_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"{point.axis} {point.value} {point.label}: longer than {POINT_LIMIT_S} s\n")
        return None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        sys.stderr.write(f"{point.axis} {point.value} {point.label}: {last}\n")
        return None
    line = Measurement.model_validate_json(done.stdout.splitlines()[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(line.model_dump_json() + "\n")
    return line


# --- tables and plots -------------------------------------------------------------------------------------------------


def growth(lines: Sequence[Measurement]) -> list[float | None]:
    """For the lines of one row, the exponent of the time's growth since the previous line; 1 is linear.

    ``None`` for the first line and between values that are not numbers.
    """
    exponents: list[float | None] = [None]
    for before, line in itertools.pairwise(lines):
        x, x_before = line.point.value, before.point.value
        numbers = isinstance(x, int) and isinstance(x_before, int)
        exponents.append(math.log(line.seconds / before.seconds) / math.log(x / x_before) if numbers else None)
    return exponents


def by_row(lines: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Group lines by row, in order of the axis."""
    rows: dict[str, list[Measurement]] = {}
    for line in lines:
        rows.setdefault(line.point.label, []).append(line)
    return rows


def table(name: str, lines: Sequence[Measurement]) -> str:
    """Return the Markdown table of one axis."""
    axis, parts = AXES[name], [part for part in lines[0].parts if part != "step_s"]
    head = ["row", axis.title, f"{axis.unit} (s)", "memory (MiB)", *(_HEADERS[part] for part in parts)]
    head += ["growth"] if any(isinstance(value, int) for value in axis.values) else []
    rows = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for label, own in by_row(lines).items():
        for line, exponent in zip(own, growth(own), strict=True):
            value = f"{line.point.value:,}" if isinstance(line.point.value, int) else _encoder_shape(line.point.value)
            cells = [label, value, f"{line.seconds:.3g}", f"{line.memory_bytes / 2**20:,.0f}"]
            cells += [_part(part, line.parts[part]) for part in parts]
            if "growth" in head:
                cells.append("" if exponent is None else f"{exponent:.2f}")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


_HEADERS = {
    "validate_s": "encoding items (s)",
    "rank_s": "ranking 512 users (s)",
    "loss_s": "loss of a step (ms)",
    "flops": "GFLOP a step",
    "counted_bytes": "counted peak (MiB)",
}


def _part(name: str, value: float) -> str:
    scale = {"loss_s": 1e-3, "flops": 1e9, "counted_bytes": 2**20}.get(name, 1.0)
    return f"{value / scale:,.0f}" if name == "counted_bytes" else f"{value / scale:.3g}"


def _encoder_shape(encoders: str) -> str:
    shape = ENCODERS[encoders]
    return f"{encoders} ({shape.depth} x {shape.width})"


def plot(name: str, lines: Sequence[Measurement]) -> bytes:
    """Plot time and memory along one axis as PNG; dashed: linear growth from the first point."""
    axis = AXES[name]
    with style():
        figure = new_figure(2 * COLUMN_INCHES, 2.3)
        panels = figure.subplots(1, 2)
        for colour, (label, own) in zip(COLOURS, by_row(lines).items(), strict=False):
            x = [axis.values.index(line.point.value) if name == "depth" else line.point.value for line in own]
            for axes, y in zip(panels, _curves(own), strict=True):
                axes.plot(x, y, "o-", ms=3, lw=1, color=colour, label=label)
                if name != "depth":
                    axes.plot([x[0], x[-1]], [y[0], y[0] * x[-1] / x[0]], "--", lw=0.6, color=SILVER, zorder=0)
        places = range(len(axis.values)) if name == "depth" else axis.values
        names = [f"{value:,}" if isinstance(value, int) else value for value in axis.values]
        for axes, title in zip(panels, (f"{axis.unit} (s)", "peak memory (MiB)"), strict=True):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.set_xlabel(axis.title)
            axes.set_ylabel(title)
            axes.set_xscale("linear" if name == "depth" else "log")
            axes.set_xticks(places, names)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_minor_locator(NullLocator())
        margins(figure, 0.6, 0.25, 0.4, 0.3, across=0.75)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False, fontsize=7)
        return save(figure, "png")


def _curves(own: Sequence[Measurement]) -> tuple[list[float], list[float]]:
    return [line.seconds for line in own], [max(line.memory_bytes, 2**20) / 2**20 for line in own]


def _document(name: str, lines: Sequence[Measurement], document: Path) -> None:
    place = document.with_suffix("") / f"{name}.png"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(plot(name, lines))
    figure = f"![{AXES[name].unit} time and memory against {AXES[name].title}]({place.parent.name}/{place.name})"
    put(f"{figure}\n\n{table(name, lines)}", document, name)


if __name__ == "__main__":
    sys.exit(main())

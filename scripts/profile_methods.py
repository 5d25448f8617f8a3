"""Where a training step of each method spends its time, and how far that is from the limits of this machine.

    python scripts/profile_methods.py --docs docs/lab/performance.md

A step is divided at the tensors between its parts (torch.profiler, ``record_function``); the whole step is timed
without the profiler. Limits: the step's FLOPs over the measured rate of matrix products, and a roofline
of its operators, each at the rate of products or of a copy, whichever takes longer. About two minutes on two cores.
With ``--device cuda`` every part ends with the GPU idle, and shares of operators are of its time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from workload import ENCODERS, TITLE_TOKENS, Size, make_trainer, put

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.devices import DeviceProfile, calibrate
from tpme.bench.counting.exact import run_step
from tpme.bench.counting.meta import MetaCell
from tpme.bench.counting.roofline import ADAM_BYTES
from tpme.bench.measure.clock import now, sync
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.task.batches import build_batch
from tpme.bench.task.loss import in_batch_loss
from tpme.bench.train.loop import Trainer

Device = Literal["cpu", "cuda"]
ADAPTING = ("fft", "adapter", "lora", "bitfit", "prompt", "iisan", "frozen")
SIZES = {
    **{name: Size(name, encoders="tiny", items=2000) for name in ADAPTING},
    "iisan (cached)": Size("iisan", cached=True, encoders="base", batch=64),
    "id": Size("id", encoders="base", batch=64),
}
"""Methods that run the encoders: 2 layers of width 128 on 197 image tokens. Cached: the states of base encoders."""
PARTS = (
    "data", "encoder forward", "encoder backward", "item encoder", "sequential encoder", "loss", "optimiser",
)  # fmt: skip
MARK = "part: "
ACTIVITIES = {"cpu": [ProfilerActivity.CPU], "cuda": [ProfilerActivity.CPU, ProfilerActivity.CUDA]}
WARMUP, STEPS = 2, 4
OPERATORS = 3
"""Number of operators listed: those with the most self time."""

TITLE_QUANTILES = (3, 15, 20, 23, 26, 29, 30, 30, 30, 30, 30)
"""Tokens of Amazon Scientific's titles, cut off at 30: minimum, every tenth of the titles, maximum."""
CHUNKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """One method: seconds of a step, shares of its parts (of 1), top operators, and its limits in seconds."""

    label: str
    step_s: float
    shares: dict[str, float]
    operators: list[tuple[str, float]]
    flops: int
    product_s: float
    roofline_s: float
    count: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile the methods, measure text in chunks, and print or document both."""
    parser = argparse.ArgumentParser(description="Where a step of each method goes, and how far it is from its limit.")
    parser.add_argument("--only", action="append", choices=list(SIZES), help="this method alone; may be repeated")
    parser.add_argument("--docs", type=Path, help="document whose marked parts are replaced")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    device: Device = options.device
    machine = calibrate(device)
    rows = []
    for label in options.only or SIZES:
        with tempfile.TemporaryDirectory(prefix="tpme-profile-") as folder:
            rows.append(profiled(label, SIZES[label], Path(folder), machine, device))
        sys.stderr.write(f"{label}: {rows[-1].step_s * 1e3:.1f} ms a step\n")
    tables = {"profile": f"{parts_table(rows)}\n\n{limits_table(rows, machine)}"}
    if device == "cpu":
        tables["text-chunks"] = chunks_table()
    for mark, text in tables.items():
        if options.docs is None:
            sys.stdout.write(f"{text}\n\n")
        else:
            put(text, options.docs, mark)
    return 0


# --- one method -------------------------------------------------------------------------------------------------------


def profiled(label: str, size: Size, folder: Path, machine: DeviceProfile, device: Device) -> Row:
    """Time and profile the training step of one method."""
    trainer = make_trainer(size, folder, PhaseLog(device, None, None), device)
    trainer.loader.steps = WARMUP + STEPS
    optimizer = trainer.optimizer()
    trainer.model.train()
    taken = []
    for batch in trainer.loader.epoch(1):
        started = now(device)
        trainer.step(batch, optimizer)
        taken.append(now(device) - started)
    with profile(activities=ACTIVITIES[device]) as profiler:
        order = np.random.default_rng(0).permutation(size.users)
        for step in range(WARMUP):
            staged_step(trainer, order[step * size.batch : (step + 1) * size.batch], optimizer)
    parts, operators = _read(profiler, device)
    whole = sum(parts.values())
    step = run_step(MetaCell(trainer.cell, DataShape.of(trainer.dataset)), fused_attention=True)
    flops = step.forward_flops + step.backward_flops
    rate, bandwidth = machine.rate("fp32"), machine.memory_bytes_per_s
    trained = sum(p.numel() for group in trainer.model.parameter_groups().values() for p in group)
    work = step.work.items()
    return Row(
        label=label,
        step_s=median(taken[WARMUP:]),
        shares={name: seconds / whole for name, seconds in parts.items()},
        operators=operators,
        flops=flops,
        product_s=flops / rate,
        roofline_s=sum(times * max(one / rate, moved / bandwidth) for (_, one, moved), times in work)
        + ADAM_BYTES * trained / bandwidth,
        count=sum(step.work.values()),
    )


def staged_step(trainer: Trainer, users: NDArray[np.int64], optimizer: torch.optim.Optimizer) -> None:
    """One training step on ``users`` (B,), cut at the tensors between its parts, each part under its own mark."""
    model, of = trainer.model, trainer.loader
    with _part("data", trainer.device):
        batch = build_batch(of.slots[users], of.log_p, of.store, of.protocol).to(trainer.device)
    with _part("encoder forward", trainer.device):
        states = model.hidden_states(batch.items)
    inputs = {modality: _cut(state, needed=state.requires_grad) for modality, state in states.items()}
    with _part("item encoder", trainer.device):
        vectors = model.item_encoder(inputs, batch.items.ids)
    items = _cut(vectors)
    with _part("sequential encoder", trainer.device):
        sequences = model.user_vectors(items[batch.slot[:, :-1]], batch.mask)
    users = _cut(sequences)
    with _part("loss", trainer.device):
        in_batch_loss(users, items, batch.candidates).backward()  # type: ignore[no-untyped-call]
    with _part("sequential encoder", trainer.device):
        sequences.backward(users.grad)
    with _part("item encoder", trainer.device):
        vectors.backward(items.grad)
    through = [modality for modality in states if states[modality].requires_grad]
    with _part("encoder backward", trainer.device):
        if through:
            torch.autograd.backward([states[m] for m in through], [inputs[m].grad for m in through])
    with _part("optimiser", trainer.device):
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _cut(tensor: Tensor, *, needed: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(needed)


@contextmanager
def _part(name: str, device: torch.device) -> Iterator[None]:
    with record_function(MARK + name):
        yield
        sync(device)


def _read(profiler: Any, device: Device) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Seconds of each part, and the operators with the most self time, with their shares of it."""
    averages = profiler.key_averages()
    parts = dict.fromkeys(PARTS, 0.0)
    for event in averages:
        if event.key.startswith(MARK):
            parts[event.key.removeprefix(MARK)] += event.cpu_time_total / 1e6
    of = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    # On a GPU every kernel stands there twice: for itself, and in the operator that started it.
    operators = [event for event in averages if event.device_type == torch.autograd.DeviceType.CPU]
    own = {event.key: getattr(event, of) for event in operators if not event.key.startswith(MARK)}
    most = sorted(own, key=own.__getitem__, reverse=True)[:OPERATORS]
    return parts, [(name.removeprefix("aten::"), own[name] / sum(own.values())) for name in most]


# --- text in length-sorted chunks -------------------------------------------------------------------------------------


def chunks_table() -> str:
    """Encoding the titles of a batch at once, all padded to 30 tokens, against chunks sorted by length."""
    rows = [
        "| titles at once | text encoder | pass | "
        + " | ".join(f"{n} chunk{'s' if n > 1 else ''}" for n in CHUNKS)
        + " |",
        f"|---:|---|---|{'---:|' * len(CHUNKS)}",
    ]
    for titles, encoders, backward in ((142, "mini", True), (142, "small", True), (256, "small", False)):
        taken = _chunk_times(titles, encoders, backward=backward)
        times = [f"{taken[0] * 1e3:.0f} ms", *(f"{taken[0] / seconds:.2f}x" for seconds in taken[1:])]
        shape = ENCODERS[encoders]
        name = "forward, backward" if backward else "forward"
        rows.append(f"| {titles} | {shape.depth} x {shape.width} | {name} | {' | '.join(times)} |")
    return "\n".join(rows)


def _chunk_times(titles: int, encoders: str, *, backward: bool) -> list[float]:
    """Seconds for each number of ``CHUNKS``: the fastest of a few passes, taken in turns."""
    size = replace(SIZES["fft"], encoders=encoders, modalities=("text",))
    with tempfile.TemporaryDirectory(prefix="tpme-profile-") as folder:
        trainer = make_trainer(size, Path(folder), PhaseLog("cpu", None, None))
    trainer.model.train()
    view, reads = trainer.model.views["text"], trainer.model.item_encoder.reads["text"]
    lengths = np.interp(np.linspace(0, 10, titles), np.arange(11), TITLE_QUANTILES).astype(np.int64)
    tokens = torch.randint(1000, 30000, (titles, TITLE_TOKENS))
    mask = torch.from_numpy((np.arange(TITLE_TOKENS) < lengths[:, None]).astype(np.int64))  # sorted already

    def encode(chunks: int) -> None:
        parts = []
        for rows in torch.arange(titles).tensor_split(chunks):
            longest = int(mask[rows[-1]].sum()) if chunks > 1 else TITLE_TOKENS
            parts.append(view.encode(reads, tokens=tokens[rows, :longest], token_mask=mask[rows, :longest]))
        if backward:
            torch.cat(parts).sum().backward()  # type: ignore[no-untyped-call]

    with torch.set_grad_enabled(backward):
        return fastest([lambda chunks=chunks: encode(chunks) for chunks in CHUNKS])


def fastest(works: Sequence[Callable[[], None]], rounds: int = 4) -> list[float]:
    """Seconds of the fastest of ``rounds`` calls of each, in turns, after one that does not count."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, times in zip(works, taken, strict=True):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return [min(times[1:]) for times in taken]


# --- tables -----------------------------------------------------------------------------------------------------------


def parts_table(rows: Sequence[Row]) -> str:
    """Shares of the parts of a step."""
    lines = [
        f"| method | step (ms) | {' | '.join(f'{part} (%)' for part in PARTS)} | most time in |",
        f"|---|---:|{'---:|' * len(PARTS)}---|",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * row.shares[part]:.1f}" for part in PARTS)
        operators = ", ".join(f"{name} {100 * share:.0f} %" for name, share in row.operators)
        lines.append(f"| {row.label} | {row.step_s * 1e3:.1f} | {shares} | {operators} |")
    return "\n".join(lines)


def limits_table(rows: Sequence[Row], machine: DeviceProfile) -> str:
    """How far each step is from its limits."""
    lines = [
        f"Measured here: {machine.rate('fp32') / 1e9:.0f} GFLOP/s in matrix products (fp32, "
        f"{torch.get_num_threads()} threads), {machine.memory_bytes_per_s / 1e9:.1f} GB/s in a copy.",
        "",
        "| method | GFLOP a step | operators | product rate (ms) | roofline (ms) | step (ms) | roofline / step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.label} | {row.flops / 1e9:.3g} | {row.count:,} | {row.product_s * 1e3:.3g} | "
            f"{row.roofline_s * 1e3:.3g} | {row.step_s * 1e3:.1f} | {row.roofline_s / row.step_s:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Write the tables of docs/scale.md: what a large study needs, and what limits a cell on many devices.

    python scripts/scale_tables.py --docs docs/scale.md            (about ten minutes on one core)
    python scripts/scale_tables.py --docs docs/scale.md --only sizes

``study`` and ``devices`` are numbers of ``tpme plan`` on the matrices in docs/scale/, for the profile h200. ``sizes``
takes bytes from small prepared data, from the records in results/ and from the plan. Nothing is measured in time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from workload import put

from tpme.bench.commands.plan_words import in_bytes, in_digits, in_time, scale_of
from tpme.bench.counting.devices import PROFILES
from tpme.bench.counting.modes import Tracker
from tpme.bench.record import CellResult, find_results, read_result
from tpme.bench.run.matrix import load_matrix
from tpme.bench.run.plan import MatrixPlan, PlannedCell, plan_matrix
from tpme.bench.task.prepare import prepare
from tpme.bench.task.ranking import rank_targets
from tpme.bench.task.sources.synthetic import Synthetic, generate

ROOT = Path(__file__).resolve().parents[1]
STUDY, DEVICES = ROOT / "docs" / "scale" / "study.toml", ROOT / "docs" / "scale" / "devices.toml"
H200 = PROFILES["h200"]
USERS, ITEMS, SAMPLE = 10_000_000, 1_000_000, 100_000
COUNTS, A_NODE = (1, 2, 4, 8, 16, 32, 64), 8
WIDTH = 64
ALIKE, ONE = 3, 'datasets=[{name="first",path="data/first"}]'
"""The data sets of the study are taken to be of the same size, so one is counted."""
FFT, IISAN = '{name="fft"}', '{name="iisan",cached=true}'


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, or write them between the marks of a document."""
    parser = argparse.ArgumentParser(description="The tables of docs/scale.md.")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked parts")
    parser.add_argument("--only", choices=TABLES, help="one table alone")
    options = parser.parse_args(arguments)
    for name, table in TABLES.items():
        if options.only in (None, name):
            text = table()
            if options.docs is None:
                sys.stdout.write(f"{text}\n\n")
            else:
                put(text, options.docs, name)
    return 0


def planned(matrix: Path, *settings: str, **options: int) -> MatrixPlan:
    """What ``tpme plan MATRIX --device-profile h200 --set SETTING ...`` counts, with options such as ``devices``."""
    with tempfile.TemporaryDirectory() as store:
        return plan_matrix(
            load_matrix(str(matrix), settings), store=Path(store), device=H200, console=Console(quiet=True), **options
        )


def markdown(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


# --- 1,200 cells -----------------------------------------------------------------------------------------------------


def study() -> str:
    """Time and caches of all cells of the study, on data of two sizes."""

    def rows() -> Iterator[Sequence[str]]:
        for users, items in ((12_076, 20_314), (USERS, ITEMS)):
            plan = planned(STUDY, ONE, users=users, items=items, devices=64, nodes=8)
            whole = plan.all_cells
            assert whole is not None
            caches = ALIKE * sum(cell.work.cache_bytes or 0 for cell in plan.cells if cell.work)
            times = (whole.device_s, whole.side_by_side_s, whole.one_by_one_s)
            records = ALIKE * whole.cells * (record + users * rank)
            hours = (in_time(ALIKE * seconds) for seconds in times)
            yield f"{users:,}", f"{items:,}", *hours, in_bytes(caches), in_bytes(records)

    record, rank = record_bytes()
    head = ("users", "items", "one device", "64 devices, side by side", "64 devices, one by one", "caches", "records")
    return markdown(head, rows())


# --- 10 million users ------------------------------------------------------------------------------------------------


def sizes() -> str:
    """What 10 million users and 1 million items take on disk, in memory and in evaluation."""
    plan = planned(STUDY, f"methods=[{FFT},{IISAN}]", ONE)
    user, item = prepared_bytes()
    encoding, cache = flops_an_item(plan.cells[0]), cache_bytes(plan.cells[1])
    record, rank = record_bytes()

    def rows() -> Iterator[Sequence[str]]:
        yield "prepared data, users and their items", f"{in_digits(user)} B a user", in_bytes(USERS * user)
        yield "prepared data, titles", f"{in_digits(item)} B an item", in_bytes(ITEMS * item)
        yield "prepared data, images of 224 pixels", "3 x 224 x 224 B an item", in_bytes(ITEMS * 3 * 224 * 224)
        yield "caches of `iisan`, 7 levels of 2 encoders", f"{in_digits(cache)} B an item", in_bytes(ITEMS * cache)
        yield f"item matrix, d = {WIDTH}", f"{4 * WIDTH} B an item", in_bytes(ITEMS * 4 * WIDTH)
        yield "a record without ranks", "mean of `results/`", in_bytes(record)
        yield "ranks of a record", f"{in_digits(rank)} B a user", in_bytes(USERS * rank)
        yield f"ranks of a record, {SAMPLE:,} users", f"{in_digits(rank)} B a user", in_bytes(SAMPLE * rank)
        yield "encoding the catalogue", f"{flop(encoding)} an item", work(ITEMS * encoding, 0, "bf16")
        for users, title in ((USERS, "all users"), (SAMPLE, f"{SAMPLE:,} users")):
            scores, each = users * ITEMS, score_bytes()
            yield f"ranking {title}", f"{2 * WIDTH} FLOP, {each} B a score", work(scores * 2 * WIDTH, scores * each)

    return markdown(("what", "by", f"{USERS:,} users, {ITEMS:,} items"), rows())


def prepared_bytes() -> tuple[float, float]:
    """Bytes of a user, with its items, and of an item, with its title, in a prepared synthetic data set."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        manifest = prepare(generate(Synthetic(users=2000, items=2000)), data, image_size=32, workers=1)
        size = {path.name: path.stat().st_size for path in data.iterdir()}
    users = sum(size[name] for name in ("sequences.npy", "offsets.npy", "users.txt"))
    items = sum(size[name] for name in ("titles.bin", "title_offsets.npy", "items.txt"))
    return users / manifest.users, items / manifest.items


def cache_bytes(cell: PlannedCell) -> float:
    """Bytes of an item in the feature caches of a cell."""
    assert cell.work is not None
    assert cell.work.cache_bytes is not None
    return cell.work.cache_bytes / 20_315  # as many rows as the assumed data has items, and one for padding


def flops_an_item(cell: PlannedCell) -> float:
    """Forward FLOPs of a step over its distinct items; the sequential encoder and the loss are a small part."""
    assert cell.work is not None
    words = dict(reversed(part.split(" ", 1)) for part in cell.work.batch.split(";")[0].split(", "))
    return cell.work.forward_flops / int(words["distinct items"])


def record_bytes() -> tuple[float, float]:
    """Bytes of a record and its samples, and bytes of a user's rank, on average over ``results/``."""
    pairs = [(path, read_result(path)) for path in find_results([ROOT / "results"])]
    others = [beside(path, result, "samples") + path.stat().st_size for path, result in pairs]
    ranked = [
        (size, result.dataset.users)
        for path, result in pairs
        if (size := beside(path, result, "ranks"))
        if result.dataset
    ]
    return sum(others) / len(others), sum(size for size, _ in ranked) / sum(users for _, users in ranked)


def beside(path: Path, result: CellResult, name: str) -> int:
    """Bytes of a file beside a record; 0 where it has none."""
    return (path.parent / result.files[name]).stat().st_size if name in result.files else 0


def score_bytes() -> int:
    """Bytes that ranking reads and writes for one score: counted by operator over 1,024 users and 8,192 items."""
    users, items = 1024, 8192
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(rows, WIDTH, generator=generator) for rows in (users, items + 1)]
    target = torch.arange(users) + 1
    with Tracker() as tracker:
        rank_targets(vectors[0], vectors[1], target, torch.zeros(users, 1, dtype=torch.int64))
    return round(sum(moved * times for (_, _, moved), times in tracker.work.items()) / (users * items))


def flop(number: float) -> str:
    """FLOPs with their unit."""
    scale, unit = scale_of([number], "FLOP")
    return f"{in_digits(number / scale)} {unit}"


def work(flops: float, moved: float, precision: str = "fp32") -> str:
    """FLOPs, and their time on one H200 by the roofline at the profile's efficiency."""
    rate = H200.matmul_flop_per_s["bf16" if precision == "bf16" else "fp32"]
    seconds = max(flops / rate, moved / H200.memory_bytes_per_s) / H200.efficiency
    return f"{flop(flops)}, {in_time(seconds)}"


# --- 1 to 64 devices -------------------------------------------------------------------------------------------------


def devices() -> str:
    """Steps of three rows, and of full fine-tuning with sharded encoders, on 1 to 64 devices."""
    head = ("row", "devices", "computation", "collectives", "sent (GB)", "speed-up", "memory (GB)")
    return markdown(head, (row for name in ROWS for row in device_rows(name)))


ROWS = {"fft": FFT, "fft, sharded": FFT, "lora": '{name="lora"}', "iisan (cached)": IISAN}
"""Rows of the table, with the methods of their commands."""


def device_rows(name: str, counts: Sequence[int] = COUNTS) -> Iterator[Sequence[str]]:
    """The rows of one method, a number of devices each; bold where the collectives take longer."""
    sharded = name.endswith("sharded")
    for count in counts:
        if sharded and count == 1:
            continue
        settings = [f"methods=[{ROWS[name]}]"]
        if sharded:
            settings += [f"training.devices={count}", "training.shard=true"]
        [cell] = planned(DEVICES, *settings, devices=count, nodes=max(1, count // A_NODE)).cells
        assert cell.work is not None
        assert cell.expected is not None
        on = cell.on_devices
        if on is None:
            memory = in_digits(cell.work.peak_bytes / 1e9)
            yield name, "1", in_time(cell.expected.step_s), "–", "–", "1", memory
            continue
        assert None not in (on.compute_s, on.collectives_s, on.speed_up, on.peak_bytes)
        compute_s, collectives_s, speed_up, peak_bytes = on.compute_s, on.collectives_s, on.speed_up, on.peak_bytes
        waiting = in_time(collectives_s)
        sent = in_digits(sum(on.traffic_bytes.values()) / 1e9)
        marked = f"**{waiting}**" if collectives_s > compute_s else waiting
        yield name, str(count), in_time(compute_s), marked, sent, in_digits(speed_up), in_digits(peak_bytes / 1e9)


def limits() -> str:
    """The number of devices at which adding up gradients takes as long as a device's share of the computation."""

    def rows() -> Iterator[Sequence[str]]:
        for cell in planned(DEVICES, f"methods=[{FFT},{ROWS['lora']}]").cells:
            assert cell.work is not None
            assert cell.expected is not None
            assert H200.link_bytes_per_s is not None
            rates = (H200.link_bytes_per_s, H200.node_link_bytes_per_s)
            bounds = (cell.expected.step_s * rate * H200.efficiency / (8 * cell.work.trainable) for rate in rates)
            parameters = f"{cell.work.trainable / 1e6:,.1f} M"
            yield cell.label, parameters, in_time(cell.expected.step_s), *(f"{1 + bound:,.0f}" for bound in bounds)

    return markdown(("row", "P", "t", "N within a node", "N between nodes"), rows())


TABLES: dict[str, Callable[[], str]] = {"study": study, "sizes": sizes, "devices": devices, "limits": limits}

if __name__ == "__main__":
    sys.exit(main())

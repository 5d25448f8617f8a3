"""Measure what large data costs: preparing, opening, the first steps of an epoch and a sampled evaluation.

    python scripts/size.py --docs docs/lab/size.md

For each number of users (a tenth as many items) it prepares the built-in catalogue, titles alone, opens it, and runs a
matrix with the rows ``id`` and ``frozen (cached)``, each cut to the first steps of one epoch and evaluated on a sample
of the users. Every line of the table is one part at one size, with its seconds and the peak of resident memory:

- *prepare*, *open* and *open again* run in processes of their own, and their peak is the whole process. Opening reads
  and hashes all content; again, it compares sizes and times of the files.
- the others are phases of the records, and their peak is what their process held over the interpreter and libraries.
- *growth* is the exponent of the seconds since the size before: 1 is linear, 0 does not grow. A part of ``LEAST_S``
  seconds or more that grows by more than ``MOST_GROWTH``, and memory that does, ends the script with 1 and is named.
  ``id`` updates the vector of every item in every step, and ranking compares every user of the sample with every item:
  both are linear in the items.

Points are stored as lines of ``--out``: an interrupted run continues with the first size that has none; delete the file
to start over. Data of one size is deleted before the next is made; ten million users need 4 GB of disk.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from workload import put

from tpme.bench.record import CellResult, Frozen, Phase, find_results, read_result

USERS = (100_000, 1_000_000, 10_000_000)
STEPS, EVALUATED = 1000, 100_000
LEAST_S, MOST_GROWTH = 5.0, 1.2
LEAST_BYTES = 2**30
"""Memory below this is the interpreter's and the libraries', and proves nothing."""
ROWS = ("id", "frozen (cached)")
PHASES = {"load": "load", "cache": "build the cache", "train": "train", "validate": "validate", "rank": "test"}

MATRIX = """
name = "size"
datasets = [{{ name = "size", path = "{data}" }}]
encoders = [{{ text = {{ source = "builtin:tiny-text" }} }}]
modalities = ["text"]
methods = ["id", {{ name = "frozen", cached = true }}]
time_limit_s = 86400

[training]
epochs = 1
users_per_batch = 128
max_steps_per_epoch = {steps}

[evaluation]
users = {evaluated}
"""


class Part(Frozen):
    """One part at one size: its seconds, and the peak of its memory where it is known."""

    users: int
    items: int
    name: str
    seconds: float
    peak_bytes: float | None


def measured(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a command to its end; returns its seconds, and the largest resident memory of a process of it, in bytes.

    Raises RuntimeError with the last line of its output where it fails.
    """
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: {output.read().decode(errors='replace').strip()[-500:]}")
    return seconds, usage.ru_maxrss * 1024.0


def parts_of(users: int, folder: Path, steps: int, evaluated: int) -> Iterator[Part]:
    """Measure all parts at one size, with data, store and records in ``folder``."""
    items = max(40, users // 10)
    data, run = folder / "data", folder / "run"
    environment = os.environ | {"TPME_STORE": str(folder / "store")}

    def part(name: str, seconds: float, peak: float | None) -> Part:
        return Part(users=users, items=items, name=name, seconds=seconds, peak_bytes=peak)

    tpme = [sys.executable, "-m", "tpme.bench.cli"]
    size = ["--users", str(users), "--items", str(items), "--modalities", "text"]
    yield part("prepare", *measured([*tpme, "prepare", "synthetic", str(data), *size], environment))
    opening = "import sys; from pathlib import Path; from tpme.bench.task.dataset import Dataset; "
    opening += "Dataset.open(sys.argv[1], Path(sys.argv[2]))"
    time.sleep(1.5)  # files as young as the clock's tick are read again
    for name in ("open", "open again"):
        command = [sys.executable, "-c", opening, str(data), str(folder / "store")]
        yield part(name, *measured(command, environment))
    matrix = folder / "size.toml"
    matrix.write_text(MATRIX.format(data=data, steps=steps, evaluated=evaluated), encoding="utf-8")
    yield part("whole run", *measured([*tpme, "run", str(matrix), "--out", str(run), "--no-report"], environment))
    results = {result.cell.label: result for result in map(read_result, find_results([run]))}
    for row in ROWS:
        if results[row].status != "ok":
            raise RuntimeError(f"{row}: {results[row].failure}")
        for name, seconds, peak in phases_of(results[row]):
            yield part(f"{row}: {name}", seconds, peak)


def phases_of(result: CellResult) -> Iterator[tuple[str, float, float | None]]:
    """Name, seconds and peak of each kind of phase that the table shows."""
    for kind, name in PHASES.items():
        phases = [phase for phase in result.phases if phase.kind == kind and phase.name != "libraries"]
        if phases:
            yield name, sum(phase.wall_s for phase in phases), _peak(phases)


def _peak(phases: Sequence[Phase]) -> float | None:
    peaks = [phase.memory.host_rss_bytes.value for phase in phases]
    return max((peak for peak in peaks if peak is not None), default=None)


def growth(before: Part, after: Part, value: Callable[[Part], float | None]) -> float | None:
    """The exponent with which a value grows with the users; ``None`` where one is missing or 0."""
    first, last = value(before), value(after)
    if not first or not last or first < 0 or last < 0:
        return None
    return math.log(last / first) / math.log(after.users / before.users)


def too_steep(parts: Sequence[Part]) -> list[str]:
    """What grows faster than the data, in words; parts that are short or small do not count."""
    found = []
    for before, after in _pairs(parts):
        seconds = growth(before, after, lambda part: part.seconds)
        peak = growth(before, after, lambda part: part.peak_bytes)
        if after.seconds >= LEAST_S and seconds is not None and seconds > MOST_GROWTH:
            found.append(f"{after.name}: seconds grow with exponent {seconds:.2f} up to {after.users:,} users")
        if (after.peak_bytes or 0) >= LEAST_BYTES and peak is not None and peak > MOST_GROWTH:
            found.append(f"{after.name}: memory grows with exponent {peak:.2f} up to {after.users:,} users")
    return found


def _pairs(parts: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    for name in dict.fromkeys(part.name for part in parts):
        yield from pairwise(sorted((part for part in parts if part.name == name), key=lambda part: part.users))


def table(parts: Sequence[Part]) -> str:
    """A Markdown table: a line for each part, and for each size its seconds, their growth and its peak."""
    sizes = sorted({part.users for part in parts})
    grown = {
        (after.name, after.users): growth(before, after, lambda part: part.seconds) for before, after in _pairs(parts)
    }
    heads = [f"{users:,} users, {max(40, users // 10):,} items" for users in sizes]
    lines = [f"| part | {' | '.join(heads)} |", f"|---|{'---|' * len(sizes)}"]
    for name in dict.fromkeys(part.name for part in parts):
        cells = []
        for users in sizes:
            part = next((part for part in parts if (part.name, part.users) == (name, users)), None)
            cells.append("–" if part is None else _cell(part, grown.get((name, users))))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(part: Part, exponent: float | None) -> str:
    peak = "" if part.peak_bytes is None else f", {part.peak_bytes / 1e9:.2f} GB"
    return f"{part.seconds:.3g} s{peak}" + ("" if exponent is None else f" (growth {exponent:.2f})")


def read(out: Path) -> list[Part]:
    """The parts measured so far, without a line that an interruption cut off."""
    parts = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        try:
            parts.append(Part.model_validate_json(line))
        except ValueError:
            continue
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the sizes that are missing; print the table, or write it into a document."""
    parser = argparse.ArgumentParser(description="Measure preparing, opening, training and evaluation of large data.")
    parser.add_argument("--users", type=int, nargs="+", default=USERS, help="numbers of users; items are a tenth")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each row")
    parser.add_argument("--evaluated", type=int, default=EVALUATED, help="users drawn for the evaluation")
    parser.add_argument("--folder", type=Path, help="where the data of one size is kept; by default a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/size/parts.jsonl"), help="file of measured parts")
    parser.add_argument("--docs", type=Path, help="document in which to replace the part between its marks 'size'")
    options = parser.parse_args(arguments)
    parts = read(options.out)
    for users in sorted(options.users):
        if any(part.users == users for part in parts):
            continue
        with tempfile.TemporaryDirectory(prefix="tpme-size-", dir=options.folder) as folder:
            new = list(_told(parts_of(users, Path(folder), options.steps, options.evaluated)))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(f"{part.model_dump_json()}\n" for part in new)
        parts += new
    parts = [part for part in parts if part.users in options.users]
    if options.docs is None:
        sys.stdout.write(f"{table(parts)}\n")
    else:
        put(table(parts), options.docs, "size")
    steep = too_steep(parts)
    sys.stderr.writelines(f"{line}\n" for line in steep)
    return 1 if steep else 0


def _told(parts: Iterator[Part]) -> Iterator[Part]:
    for part in parts:
        sys.stderr.write(f"{part.users:,} users, {part.name}: {_cell(part, None)}\n")
        yield part


if __name__ == "__main__":
    sys.exit(main())

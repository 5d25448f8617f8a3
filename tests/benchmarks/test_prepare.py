"""Preparing a catalogue with images: on all cores, streaming, in memory that does not grow with the catalogue.

Three thousand items by default; ``TPME_BENCH_ITEMS=20000 pytest tests/benchmarks/test_prepare.py`` takes Scientific's
number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tpme.bench.task.dataset import Dataset
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.iisan import read_iisan
from tpme.bench.workers import available_cores

ITEMS = int(os.environ.get("TPME_BENCH_ITEMS", "3000"))
FEW = 400
SIDE, PHOTO = 224, 500
DISTINCT = 100
"""So many photos are drawn; the other items show them again."""
PREPARE = """
import json, os, resource, sys
from pathlib import Path
from tpme.bench.measure.host import resident
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.iisan import read_iisan
prepare(read_iisan(Path(sys.argv[1])), Path(sys.argv[2]), image_size=int(sys.argv[3]))
own = resident(os.getpid()).peak
print(json.dumps([own, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""
"""Prepare in a process of its own; prints its peak of resident memory, and that of its largest worker."""


def release(folder: Path, items: int) -> Path:
    """A folder in the release format: every item has a photo, every user five items."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    names = [f"B{number:09d}" for number in range(items)]
    for number, name in enumerate(names):
        photo = folder / "images" / f"{name}.jpg"
        if number < DISTINCT:
            coarse = Image.fromarray(rng.integers(0, 256, (25, 25, 3), np.uint8))
            coarse.resize((PHOTO, PHOTO), Image.Resampling.BICUBIC).save(photo, quality=90)
        else:
            photo.hardlink_to(folder / "images" / f"{names[number % DISTINCT]}.jpg")
    (folder / "items.tsv").write_text("".join(f"{name}\ttitle of {name}\n" for name in names))
    users = (f"U{first}\t{' '.join(names[first : first + 5])}\n" for first in range(0, items - 4, 5))
    (folder / "users.tsv").write_text("".join(users))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return release(tmp_path_factory.mktemp("release"), ITEMS)


def one_process(source: Path, path: Path) -> None:
    """The plain way: one picture after the other, all of them in memory, saved at the end."""
    pictures = read_iisan(source).pictures
    assert pictures is not None
    images = [np.zeros((3, SIDE, SIDE), np.uint8), *(picture(SIDE) for picture in pictures)]
    np.save(path, np.stack(images))


def test_images_on_all_cores(source: Path, compare: Any, tmp_path: Path) -> None:
    def ours() -> None:
        prepare(read_iisan(source), tmp_path / "data", image_size=SIDE, force=True)

    cores = min(available_cores(), 4)  # beyond, starting the workers would show in so short a run
    if cores == 1:
        pytest.skip("needs more than one core")
    plain = tmp_path / "plain.npy"
    least = 1 + 0.4 * (cores - 1)
    name = f"preparing {ITEMS:,} items and images, {available_cores()} cores"
    compare(name, lambda: one_process(source, plain), ours, least, rounds=2 if ITEMS <= 4000 else 1)
    prepared = Dataset.open(tmp_path / "data").images
    assert prepared is not None
    assert np.array_equal(np.load(plain, mmap_mode="r"), prepared)


def test_memory_does_not_grow_with_the_items(
    source: Path, benchmark: Any, say: Callable[[str], None], note: Callable[..., None], tmp_path: Path
) -> None:
    few = release(tmp_path / "few", FEW)
    before = peaks(few, tmp_path / "data-few")
    after = benchmark.pedantic(peaks, (source, tmp_path / "data-all"), rounds=1)
    told = [f"{number:,} items {own / 2**20:.0f} + {worker / 2**20:.0f} MiB" for number, (own, worker) in
            ((FEW, before), (ITEMS, after))]  # fmt: skip
    images = (ITEMS - FEW) * 3 * SIDE**2
    say(f"peak of preparing, parent + largest worker: {', '.join(told)}; {images / 2**20:.0f} MiB more images")
    more = [most - least for least, most in zip(before, after, strict=True)]
    note(
        f"memory of preparing {images / 2**20:.0f} MiB more images, a process",
        "a tenth of them",
        f"{max(more) / 2**20:.0f} MiB",
    )
    assert max(more) <= 0.1 * images


def peaks(source: Path, destination: Path) -> list[int]:
    """Bytes: what ``PREPARE`` prints."""
    command = [sys.executable, "-c", PREPARE, str(source), str(destination), str(SIDE)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: list[int] = json.loads(done.stdout)
    return found

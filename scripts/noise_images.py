"""Write a noise image for every item of a catalogue, for measuring time and memory without the real images.

    python scripts/noise_images.py data/scientific/items.tsv images.zip

The images are small; ``tpme prepare`` resizes them for the encoder. Ranks over them are meaningless.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 16


def main(items: Path, archive: Path) -> None:
    """Write a zip archive with ``ITEM.png`` for the first column of every line of ``items``; always the same bytes."""
    rng = np.random.default_rng(0)
    partial = archive.with_name(f".{archive.name}.partial")
    with zipfile.ZipFile(partial, "w") as file:
        for line in items.read_text(encoding="utf-8").splitlines():
            if item := line.partition("\t")[0].strip():
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(image, "png")
                file.writestr(zipfile.ZipInfo(f"{item}.png"), image.getvalue())
    partial.replace(archive)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} ITEMS.TSV ARCHIVE.ZIP")
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""What the launcher hands to the process of one cell, and how the two talk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tpme.bench.record import Cell, EncoderSpec, Frozen


class Job(Frozen):
    """One attempt at one cell: what to run, on which files, and where the record goes."""

    cell: Cell
    cell_id: str
    attempt: int
    code_version: str
    dataset_path: Path
    store: Path
    folder: Path
    """The folder of the cell: records, ranks, samples and logs of its attempts."""
    methods_path: tuple[Path, ...] = ()
    cache_limit_bytes: int
    time_limit_s: float

    def file(self, suffix: str) -> Path:
        """``attempt-N`` + ``suffix`` in the cell's folder."""
        return self.folder / f"attempt-{self.attempt}{suffix}"


def time_limit_message(limit_s: float) -> str:
    """What the record of a cell says that took too long."""
    return f"took longer than its time limit of {limit_s:g} s; raise time_limit_s or --time-limit"


def progress_line(what: str, share: float) -> str:
    """One progress event, as the cell writes it to its standard output."""
    return json.dumps({"what": what, "share": round(share, 4)})


def parse_progress(line: str) -> tuple[str, float] | None:
    """The event of a line, or ``None`` for a line that is none."""
    try:
        event: Any = json.loads(line)
        return str(event["what"]), float(event["share"])
    except (ValueError, KeyError, TypeError):
        return None


def pinned(spec: EncoderSpec) -> EncoderSpec:
    """``spec`` with a digest of its content as its revision where it is a folder: other weights are another cell."""
    from tpme.bench.task.encoders import encoder_digest, encoder_source

    if not Path(encoder_source(spec.source)).is_dir():
        return spec
    return spec.model_copy(update={"revision": encoder_digest(spec)[:12]})

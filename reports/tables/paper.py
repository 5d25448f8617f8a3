"""Paper view: what the IISAN paper prints beside what was measured here, with the ratio.

Shown for rows of the matrix ``iisan-paper`` with the encoders that the paper used.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath
from typing import NamedTuple

from tpme.bench.quantities import MISSING, PREFIXES, number, quantity
from tpme.bench.record import Cell, CellResult
from tpme.reports.data.section import Section
from tpme.reports.data.trials import Line
from tpme.reports.tables import fields
from tpme.reports.tables.fields import Field, value_of
from tpme.reports.tables.table import Column, Entry, Table

SOURCE = "Fu et al., IISAN, SIGIR 2024 (abstract, and README of the authors' release)"
MATRIX, ENCODERS = "iisan-paper", ("bert-base-uncased", "vit-base-patch16-224")


class Range(NamedTuple):
    """A printed range; a single number is both of its ends."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:g}–{self.high:g}"


class Printed(NamedTuple):
    """One row of the paper."""

    epoch_time_s: Range
    """Training time of an epoch."""
    memory_gb: Range
    """GPU memory."""


PRINTED = {
    "fft": Printed(Range(443, 443), Range(47, 47)),
    "adapter": Printed(Range(350, 380), Range(37, 39)),
    "lora": Printed(Range(350, 380), Range(37, 39)),
    "iisan (cached)": Printed(Range(22, 22), Range(3, 3)),
}
"""By label of the row; Adapter and LoRA share their ranges."""


def paper(section: Section) -> Table:
    """Epoch time and memory, printed and measured; no rows for any other matrix."""
    rows = [
        str(name)
        for name, line in section.summary.iterrows()
        if line["label"] in PRINTED and all(_is_of_the_paper(result.cell) for result in section.behind[str(name)])
    ]
    whole = {name: _of_a_whole_epoch(section.behind[name][0]) for name in rows}
    costs = section.summary[["epoch_time_s", "memory_bytes"]].astype(float)
    time_s = {name: float(costs["epoch_time_s"][name]) * whole[name] for name in rows}
    gigabyte, size, _ = PREFIXES["bytes"][0]
    memory_gb = {name: float(costs["memory_bytes"][name]) / size for name in rows}
    time, memory = quantity("epoch_time_s"), quantity("memory_bytes")
    columns = [
        fields.method(section),
        *_beside("epoch_time_s", time.header, time.unit, time_s),
        *_beside("memory_gb", memory.header, gigabyte, memory_gb),
    ]
    notes = [
        f"Paper: {SOURCE}, on the authors' GPU; rounded there, and one range for Adapter and LoRA. Its conditions are "
        "those of the protocol 'paper': padded slots encoded, fp16 autocast, 32 users a batch (IISAN 64).",
        f"Measured: protocol '{section.group.key['protocol']}', {section.group.key['precision']}, "
        f"on {section.group.key['device_key']}. Ratio: measured over printed; to both ends of a range.",
    ]
    if any(share > 1 for share in whole.values()):
        notes.append("T was measured on epochs cut short and is scaled to all users.")
    return fields.table_of(section, "paper", "The paper's figures and the measured ones", columns, rows, notes)


def _is_of_the_paper(cell: Cell) -> bool:
    encoders = tuple(PurePosixPath(spec.source).name for spec in (cell.text_encoder, cell.image_encoder) if spec)
    return cell.matrix == MATRIX and encoders == ENCODERS


def _of_a_whole_epoch(result: CellResult) -> float:
    """Steps of a whole epoch over the steps run; 1 unless the matrix cuts epochs."""
    training = result.cell.training
    if training.max_steps_per_epoch is None or result.dataset is None:
        return 1.0
    return max(1.0, math.ceil(result.dataset.users / training.users_per_batch) / training.max_steps_per_epoch)


def _beside(key: str, symbol: str, unit: str, measured: dict[str, float]) -> list[Field]:
    """Printed, measured, and their ratio; programs get both ends of a range. ``key`` is the field of ``Printed``."""

    def of(line: Line) -> Range:
        value: Range = getattr(PRINTED[line["label"]], key)
        return value

    def ratio(name: str, line: Line) -> Entry:
        value, (low, high) = measured[name], of(line)
        if math.isnan(value):
            return Entry(MISSING)
        ends = dict.fromkeys(f"{value / end:.2f}" for end in (high, low))
        return Entry("–".join(ends), value / high)

    return [
        (Column(f"paper_{key}_low", f"{symbol}, paper ({unit})"), lambda _, line: Entry(str(of(line)), of(line).low)),
        (Column(f"paper_{key}_high", machine_only=True), lambda _, line: Entry("", of(line).high)),
        (
            Column(f"measured_{key}", f"{symbol}, measured ({unit})"),
            lambda name, _: Entry(number(measured[name]), value_of(measured[name])),
        ),
        (Column(f"ratio_{key}_low", "Ratio"), ratio),
        (
            Column(f"ratio_{key}_high", machine_only=True),
            lambda name, line: Entry("", value_of(measured[name] / of(line).low)),
        ),
    ]

"""What a matrix asks of its encoders, checked before anything runs; most of it is about precomputed states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec, Modality

if TYPE_CHECKING:
    from tpme.methods.base import Method


def pinned(spec: EncoderSpec | None) -> EncoderSpec | None:
    """``spec`` with its content as revision. Raises UserError for a file of states that cannot be used."""
    if spec is None:
        return None
    from tpme.bench.task.encoders import pin_revision
    from tpme.bench.task.precomputed import StatesFile

    if spec.precomputed:
        StatesFile.open(spec).check_values()
    return pin_revision(spec)


def check_items(specs: Sequence[EncoderSpec], folder: Path) -> None:
    """Raise UserError where a file of states lacks an item of the data set in ``folder``, if that is prepared."""
    from tpme.bench.task.dataset import item_names
    from tpme.bench.task.precomputed import StatesFile

    given = [spec for spec in specs if spec.precomputed]
    if given and (folder / "dataset.json").is_file():
        names = item_names(folder)
        for spec in given:
            StatesFile.open(spec).rows_of(names)


def check_cached(name: str, method: Method, modalities: tuple[Modality, ...]) -> None:
    """Raise UserError where ``method`` leaves no encoder frozen, so that there is nothing to cache."""
    from tpme.bench.train.build import used_modalities

    if not method.frozen_encoders(used_modalities(method, modalities)):
        raise UserError(f"method '{name}' cannot be cached: it leaves no encoder frozen; remove cached = true")


def check_readable(cell: Cell, method: Method) -> None:
    """Raise UserError for an encoder in a folder whose configuration says that it cannot be read."""
    from tpme.bench.task.checkpoints import encoder_source
    from tpme.bench.task.encoders import encoder_shape
    from tpme.bench.train.build import encoder_specs

    for modality, spec in encoder_specs(cell, method).items():
        if not spec.precomputed and Path(encoder_source(spec.source)).is_dir():  # no query of the hub at this point
            encoder_shape(spec, modality)


def check_dtypes(cell: Cell, method: Method) -> None:
    """Raise UserError where ``method`` trains through an encoder whose weights are not to be in float32."""
    from tpme.bench.train.build import encoder_specs

    specs = encoder_specs(cell, method)
    frozen = method.frozen_encoders(tuple(specs))
    for modality, spec in specs.items():
        if spec.dtype != "fp32" and modality not in frozen:
            raise UserError(
                f"method '{cell.method}' trains through the {modality} encoder, whose weights must then be in float32; "
                f"remove dtype = '{spec.dtype}' (training.precision sets that of the computation)"
            )


def check_states(cell: Cell, method: Method) -> None:
    """Raise UserError where ``method`` needs more of an encoder than the file of states that ``cell`` names for it."""
    import torch

    from tpme.bench.counting.meta import MetaEncoders
    from tpme.bench.train.build import EncoderUse, encoder_specs
    from tpme.methods.base import TaskShape

    given = EncoderUse.of(cell, method).given
    if not given:
        return
    shapes = {modality: MetaEncoders().shape(spec, modality) for modality, spec in encoder_specs(cell, method).items()}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        task = TaskShape(cell.training.embedding_dim, 1, shapes, cell.training.title_tokens)
        reads = method.item_encoder(task).reads
    for modality, spec in given.items():
        if reads[modality].tokens == "all":
            raise UserError(
                f"method '{cell.method}' reads every token of the {modality} encoder, but '{spec.source}' holds one "
                "vector a state"
            )
        lacking = [level for level in reads[modality].levels if level > shapes[modality].depth]
        if lacking:
            raise UserError(
                f"method '{cell.method}' reads hidden state {lacking[0]} of the {modality} encoder, but "
                f"'{spec.source}' holds {shapes[modality].depth + 1}, numbered from 0"
            )

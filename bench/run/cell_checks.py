"""What a matrix asks of its methods and encoders, checked before anything runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, EncoderSpec, Modality
from tpme.bench.redact import without_home

SHARD_HOOKS = ("before_training", "begin_stage", "after_backward", "after_step", "optimizer", "param_groups")
"""Hooks that work on whole weights or gradients."""

if TYPE_CHECKING:
    from tpme.bench.counting.batch import DataShape
    from tpme.bench.counting.meta import MetaCell, MetaEncoders
    from tpme.methods.base import Method


@runtime_checkable
class ChecksItsRun(Protocol):
    """A method whose procedure needs more than its model does, such as a package or a number of users."""

    def check_run(self, users: int) -> None:
        """Raise UserError where the procedure cannot run with so many training users."""


def pinned(spec: EncoderSpec | None) -> EncoderSpec | None:
    """``spec`` with its content as revision, and ``~`` for the home folder: its source stands in published records.

    Raises UserError for a file of states that cannot be used.
    """
    if spec is None:
        return None
    from tpme.bench.task.encoders import pin_revision
    from tpme.bench.task.precomputed import StatesFile

    if spec.precomputed:
        StatesFile.open(spec).check_values()
    return pin_revision(spec.model_copy(update={"source": without_home(spec.source)}))


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


class MetaCells:
    """The cells of a matrix on ``meta``, each built once for all that is checked and counted before it runs.

    Cells that differ in their seed or learning rates alone are one. ``methods_path``: folders with further methods.
    """

    def __init__(self, methods_path: Sequence[Path] = ()) -> None:
        from tpme.bench.counting.meta import MetaEncoders

        self.methods_path, self.encoders = methods_path, MetaEncoders()
        self._built: dict[str, MetaCell] = {}

    def build(self, cell: Cell, data: DataShape) -> MetaCell:
        """The cell on a data set of this shape. Raises as ``MetaCell``, and what a method raises that needs values."""
        from tpme.bench.counting.meta import MetaCell

        key = cost_key(cell)
        if key not in self._built:
            self._built[key] = MetaCell(cell, data, self.encoders, self.methods_path)
        return self._built[key]

    def built(self, cell: Cell) -> MetaCell | None:
        """The cell as it was built; ``None`` for a method that needs values, of which nothing is known before."""
        return self._built.get(cost_key(cell))


def check_cells(
    cells: Iterable[Cell], shapes: Mapping[str, DataShape], cache_limit_bytes: int, metas: MetaCells
) -> None:
    """Build the model of every cell on ``meta``, to find options and encoders that do not fit before anything runs.

    Args:
        cells: of a matrix. shapes: of the data sets, by name. cache_limit_bytes: of the matrix. metas: builds them.

    Raises:
        UserError: also for an encoder whose configuration cannot be read, and for a feature cache above the limit;
            other errors are left to the cell, because a method may need values.
    """
    from tpme.methods.registry import blaming, create

    for cell in {cost_key(cell): cell for cell in cells}.values():
        method = create(cell.method, cell.options, metas.methods_path)
        with blaming(cell.method):
            if isinstance(method, ChecksItsRun):
                method.check_run(shapes[cell.dataset].users)
            check_devices(cell, method)
            _check_dtypes(cell, method)
            _check_states(cell, method, metas.encoders)
        try:
            meta = metas.build(cell, shapes[cell.dataset])
        except UserError:
            raise
        except Exception:
            continue
        _check_cache_size(cell, meta.cache_bytes, cache_limit_bytes)


def check_devices(cell: Cell, method: Method) -> None:
    """Raise UserError where ``cell`` cannot be trained by as many devices as it names."""
    from tpme.methods.base import Method

    training, name = cell.training, cell.method
    if training.devices == 1:
        return
    if training.users_per_batch < training.devices:
        raise UserError(
            f"devices = {training.devices}, but a batch has {training.users_per_batch} users (users_per_batch): each "
            "device needs one; lower devices or raise users_per_batch"
        )
    if training.cuda_graphs:
        raise UserError(
            f"devices = {training.devices}: steps of several devices are no CUDA graph; turn cuda_graphs off"
        )
    if type(method).run is not Method.run:
        raise UserError(
            f"method '{name}' has a training procedure of its own (run), which one device follows; set devices = 1"
        )
    if training.shard:
        _check_shard(cell, method)


def _check_shard(cell: Cell, method: Method) -> None:
    """Raise UserError where the encoders of ``cell`` cannot be sharded."""
    from tpme.methods.base import Method

    for setting, on in (("compile", cell.training.compile), ("precision = 'fp16'", cell.training.precision == "fp16")):
        if on:
            raise UserError(f"shard = true and {setting} exclude each other; turn one off")
    hooks = [name for name in SHARD_HOOKS if getattr(type(method), name) is not getattr(Method, name)]
    if hooks:
        raise UserError(
            f"method '{cell.method}' reads or changes weights between the steps ({hooks[0]}), of which each device "
            "would hold only a part; set shard = false"
        )


def cost_key(cell: Cell) -> str:
    """Equal for cells that cost the same: what changes neither work nor memory is left out."""
    settings = cell.model_dump(
        mode="json", exclude={"seed", "lr", "lr_trial", "lr_trials", "device", "dataset_fingerprint"}
    )
    for unrelated in ("epochs", "patience"):
        del settings["training"][unrelated]
    return json.dumps(settings, sort_keys=True)


def _check_cache_size(cell: Cell, sizes: Mapping[Modality, int], limit: int) -> None:
    """Raise UserError where the feature cache of an encoder would be larger than the matrix allows."""
    for modality, size in sizes.items():
        if size > limit:
            raise UserError(
                f"method '{cell.method}' on data set '{cell.dataset}': the feature cache of the {modality} encoder "
                f"needs {size:,} bytes, more than the limit (cache_limit_bytes), {limit:,}; raise it or remove "
                "cached = true"
            )


def _check_dtypes(cell: Cell, method: Method) -> None:
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


def _check_states(cell: Cell, method: Method, encoders: MetaEncoders) -> None:
    """Raise UserError where ``method`` needs more of an encoder than the file of states that ``cell`` names for it."""
    import torch

    from tpme.bench.train.build import EncoderUse, encoder_specs
    from tpme.methods.base import TaskShape

    given = EncoderUse.of(cell, method).given
    if not given:
        return
    shapes = {modality: encoders.shape(spec, modality) for modality, spec in encoder_specs(cell, method).items()}
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

"""What a matrix would cost, before anything runs: exact counters and, for a device, expected time and memory.

Each distinct cell (seeds and learning rates cost the same) is counted on ``meta``: once with math attention, which
gives the counters that a record keeps, and once with the attention kernel that CUDA would choose, which gives memory
and time. The peak is that of a simulated step, operator by operator, with everything the cell holds besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from rich.console import Console
from rich.text import Text

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.devices import DeviceProfile
from tpme.bench.counting.exact import Counts, Step, count, planned_peak, run_step
from tpme.bench.counting.meta import RELEASED, MetaCell
from tpme.bench.counting.roofline import expected_step_s
from tpme.bench.errors import UserError, one_line
from tpme.bench.limits import resolved
from tpme.bench.quantities import memory_reading
from tpme.bench.record import Cell, CellResult, Frozen, Modality
from tpme.bench.run.cell_checks import MetaCells, check_cells, cost_key
from tpme.bench.run.job import Job
from tpme.bench.run.launch import choose_device, jobs_of, prepare_datasets
from tpme.bench.run.matrix import DatasetEntry, MatrixFile, PreparedDataset, expand
from tpme.bench.run.plan_together import AllCells, DeviceGroup, Fit, OnDevices, check_group, fit, is_gpu, plan_together
from tpme.bench.run.preflight import check_disk, check_inputs, device_memory, memory_warning
from tpme.bench.run.remaining import Remaining, ended_well, is_finished, latest_attempt, remaining

NOT_PREPARED = "not prepared"
"""In place of the fingerprint of a data set that is not here."""


class Expected(Frozen):
    """A cell on a device: roofline of every operator at the profile's efficiency, data loading hidden behind it."""

    step_s: float
    epoch_s: float
    fits: Fit


class MeasuredCost(Frozen):
    """Costs in the finished records of the same cell: medians, and the most memory of all."""

    records: int
    epoch_s: float | None
    memory_bytes: float | None
    memory_source: str | None
    step_flops: float | None
    """Forward and backward, of the canonical batch, as recorded."""


class Work(Frozen):
    """What a cell costs. Bytes are of one step on the target, FLOPs are exact (1 multiply-add = 2 FLOPs)."""

    batch: str
    trainable: int
    stored_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    cache_bytes: int | None
    """Of the feature caches of all encoders."""
    cache_bytes_by_encoder: dict[Modality, int] = {}
    saved_bytes: int
    """Kept by autograd for the backward pass, with the target's fused attention."""
    saved_bytes_math: int
    """The same with math attention: what a record keeps."""
    peak_bytes: int
    """Of all tensors alive at one time; see ``Expected.fits``."""
    forward_flops: int
    backward_flops: int
    epoch_steps: float
    """Full batches an epoch, the last one by its share; 0 where nothing trains."""
    epoch_flops: float
    uncounted: tuple[str, ...]
    """Operators without a FLOP formula; their work is missing above."""


class PlannedCell(Frozen):
    """One distinct cell of a matrix."""

    label: str
    cell: Cell
    work: Work | None
    problem: str | None = None
    """Why it could not be counted."""
    expected: Expected | None = None
    on_devices: OnDevices | None = None
    """On several devices, where those are planned."""
    measured: MeasuredCost | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Planned peak of each device that trains it."""
        if self.on_devices and self.on_devices.peak_bytes:
            return self.on_devices.peak_bytes
        return self.work.peak_bytes if self.work else None


class MatrixPlan(Frozen):
    """The costs of all distinct cells of a matrix."""

    schema_version: Literal[1] = 1
    matrix: str
    device: DeviceProfile | None
    assumptions: tuple[str, ...]
    cells: tuple[PlannedCell, ...]
    remaining: Remaining | None = None
    """What of the matrix is finished; ``None`` where it is planned for data of another size."""
    warnings: tuple[str, ...] = ()
    """What of it this machine has no room for."""
    all_cells: AllCells | None = None
    """Every cell on the planned devices; ``None`` where these differ, or a time is not known."""

    @property
    def on_gpu(self) -> bool:
        """Whether it is planned for a GPU; elsewhere the peak is that of tensors alone."""
        return self.device is not None and is_gpu(self.device)


def plan_matrix(
    matrix: MatrixFile,
    *,
    store: Path,
    device: DeviceProfile | None = None,
    users: int | None = None,
    items: int | None = None,
    devices: int | None = None,
    nodes: int = 1,
    runs: Path | None = None,
    methods_path: Sequence[Path] = (),
    console: Console,
) -> MatrixPlan:
    """Plan every distinct cell of ``matrix``.

    Args:
        matrix: as read. store: where the built-in catalogue is. device: to plan time and fit for.
        users, items: plan for a data set of this size. Without them, one that is not prepared here is taken to be
            Amazon Scientific. devices: that train one cell together; by default as the matrix says (``training``).
            nodes: over which these are spread. runs: run folder whose records are set beside the plan. console: for
            progress.

    Raises:
        UserError: the matrix is wrong, or an encoder's configuration is not available.
    """
    datasets, shapes = {}, {}
    for entry in matrix.datasets:
        datasets[entry.name], shapes[entry.name] = _data(matrix, entry, store, users, items, console)
    distinct: dict[str, Cell] = {}
    expanded = expand(matrix, datasets, device="cuda", methods_path=methods_path)

    def group_of(cell: Cell) -> DeviceGroup:
        return DeviceGroup(cell.training.devices if devices is None else devices, nodes)

    for cell in expanded:
        check_group(group_of(cell), cell, shapes[cell.dataset].users)
    metas = MetaCells(methods_path)
    check_cells(expanded, shapes, matrix.cache_limit_bytes, metas)
    prepared = {name: data.path for name, data in datasets.items() if data.fingerprint != NOT_PREPARED}
    unread = _unread()
    check_inputs(expanded, prepared, metas, without=unread)
    for cell in expanded:
        distinct.setdefault(cost_key(cell), cell)
    recorded = list(ended_well(runs)) if runs else []
    cells = []
    for key, cell in distinct.items():
        with console.status(Text(f"Counting {cell.label} ...")):
            cells.append(_plan_cell(cell, shapes[cell.dataset], metas, device, group_of(cell)))
        measured = _measured_cost([result for result in recorded if cost_key(result.cell) == key])
        cells[-1] = cells[-1].model_copy(update={"measured": measured})
    sources = [f"Data set '{name}': {shape.describe()}." for name, shape in shapes.items()]
    plan = MatrixPlan(
        matrix=matrix.name,
        device=device,
        assumptions=tuple(sources),
        cells=tuple(cells),
        all_cells=_all_cells(expanded, dict(zip(distinct, cells, strict=True))),
    )
    if users or items:
        return plan
    kind = choose_device("auto")
    here = [cell.model_copy(update={"device": kind}) for cell in expanded]
    run = runs or Path("runs") / matrix.name
    jobs = jobs_of(here, matrix, datasets, run, store, methods_path)
    latest = [latest_attempt(job).result for job in jobs]
    missing = [job for job, result in zip(jobs, latest, strict=True) if not is_finished(result, job)]
    known = [job for job in missing if job.cell.dataset in prepared and not unread & _sources(job.cell)]
    warnings = [*_disk_warnings(known, metas), *(_memory_warnings(cells, kind) if device is None else ())]
    return plan.model_copy(update={"remaining": remaining(jobs, latest, run), "warnings": tuple(warnings)})


def _unread() -> set[str]:
    """Encoders that can be planned although their files are not in the local cache: a plan asks no hub for them."""
    from huggingface_hub import try_to_load_from_cache

    return {name for name in RELEASED if not isinstance(try_to_load_from_cache(name, "config.json"), str)}


def _sources(cell: Cell) -> set[str]:
    return {spec.source for spec in (cell.text_encoder, cell.image_encoder) if spec is not None}


def _memory_warnings(cells: Sequence[PlannedCell], kind: str) -> list[str]:
    """The rows that this machine's device, ``cpu`` or ``cuda``, has no room for."""
    memory, name = device_memory(kind)
    sizes = [(cell.label, cell.peak_bytes) for cell in cells if cell.peak_bytes]
    return [memory_warning(label, size, memory, name) for label, size in sizes if memory and size > memory]


def _disk_warnings(missing: Sequence[Job], metas: MetaCells) -> list[str]:
    """What the store of this machine has no room for."""
    try:
        check_disk(missing, metas)
    except UserError as error:
        return [str(error)]
    return []


def _data(
    matrix: MatrixFile, entry: DatasetEntry, store: Path, users: int | None, items: int | None, console: Console
) -> tuple[PreparedDataset, DataShape]:
    """A data set as the matrix and as the counters see it: the prepared one, or an assumed one."""
    from tpme.bench.task.dataset import Dataset

    here = entry.path is None or (resolved(entry.path) / "dataset.json").is_file()
    if here and users is None and items is None:
        [data] = prepare_datasets(matrix.model_copy(update={"datasets": (entry,)}), store, console).values()
        return data, DataShape.of(Dataset.open(data.path))
    both: tuple[Modality, ...] = ("text", "image")
    modalities = tuple(modality for modality in both if any(getattr(pair, modality) for pair in matrix.encoders))
    return PreparedDataset(entry.path or store, NOT_PREPARED, modalities), DataShape.assumed(users, items)


# --- one cell --------------------------------------------------------------------------------------------------------


def _plan_cell(
    cell: Cell, data: DataShape, metas: MetaCells, device: DeviceProfile | None, group: DeviceGroup
) -> PlannedCell:
    try:
        meta = metas.build(cell, data)
        counts, step = count(meta), run_step(meta, fused_attention=True)
    except UserError:
        raise
    except Exception as error:  # a method that needs values: its row says so, the others are planned
        return PlannedCell(label=cell.label, cell=cell, work=None, problem=one_line(error))
    meta.model.zero_grad(set_to_none=True)
    work = _work(meta, counts, step, device)
    expected = _expect(work, step, device) if device else None
    together = None
    if group.devices > 1:
        together = plan_together(meta, counts, group, device, expected.step_s if expected else None)
    return PlannedCell(label=cell.label, cell=cell, work=work, expected=expected, on_devices=together)


def _all_cells(cells: Sequence[Cell], planned: Mapping[str, PlannedCell]) -> AllCells | None:
    """The training of all cells of a matrix on the devices that are planned for one."""
    groups = {(on.devices, on.nodes) for plan in planned.values() if (on := plan.on_devices)}
    if len(groups) != 1:
        return None
    [(devices, _)] = groups
    alone, together = [], []
    for cell in cells:
        plan = planned[cost_key(cell)]
        if plan.work is None or plan.expected is None or plan.on_devices is None:
            return None
        steps = cell.training.epochs * plan.work.epoch_steps
        alone.append(steps * plan.expected.step_s)
        if (step_s := plan.on_devices.step_s) is None and plan.on_devices.problem is None:
            return None
        together.append(alone[-1] if step_s is None else steps * step_s)
    return AllCells(
        cells=len(cells),
        device_s=sum(alone),
        side_by_side_s=max(sum(alone) / devices, *alone),
        one_by_one_s=sum(together),
    )


def _work(meta: MetaCell, counts: Counts, step: Step, device: DeviceProfile | None) -> Work:
    whole = min(meta.cell.training.users_per_batch, meta.data.users)
    batches = min(meta.schedule.steps_per_epoch, meta.data.users / whole) if counts.trainable else 0.0
    return Work(
        batch=counts.batch,
        trainable=counts.trainable,
        stored_bytes=counts.stored_bytes,
        weight_bytes=counts.weight_bytes,
        gradient_bytes=counts.step.gradient_bytes,
        optimizer_bytes=counts.optimizer_bytes,
        cache_bytes=sum(counts.cache_bytes.values()) or None,
        cache_bytes_by_encoder=counts.cache_bytes,
        saved_bytes=step.saved_bytes,
        saved_bytes_math=counts.step.saved_bytes,
        peak_bytes=planned_peak(
            counts, step, device.memory_bytes if device else None, device.workspace_bytes if device else 0
        ),
        forward_flops=counts.step.forward_flops,
        backward_flops=counts.step.backward_flops,
        epoch_steps=batches,
        epoch_flops=batches * (counts.step.forward_flops + counts.step.backward_flops),
        uncounted=counts.step.uncounted,
    )


def _expect(work: Work, step: Step, device: DeviceProfile) -> Expected:
    step_s = expected_step_s(step, work.trainable, device)
    return Expected(step_s=step_s, epoch_s=step_s * work.epoch_steps, fits=fit(work.peak_bytes, device))


# --- what was measured -----------------------------------------------------------------------------------------------


def _measured_cost(results: list[CellResult]) -> MeasuredCost | None:
    if not results:
        return None
    peaks = [memory_reading("measured_peak_bytes", result.pass_memory, result.cell.device) for result in results]
    most = max(peaks, key=lambda peak: peak.value or 0.0)
    return MeasuredCost(
        records=len(results),
        epoch_s=_median([result.pass_time_s.value for result in results]),
        memory_bytes=most.value,
        memory_source=None if most.value is None else most.source,
        step_flops=_median(map(_step_flops, results)),
    )


def _step_flops(result: CellResult) -> float | None:
    parts = [result.counters.get(name) for name in ("forward_flops", "backward_flops")]
    values = [part.value for part in parts if part is not None and part.value is not None]
    return sum(values) if len(values) == len(parts) else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None

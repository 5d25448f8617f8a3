"""Cells as tasks of a Ray cluster, whose nodes share no files: what cells read and leave goes through its object store.

The launcher puts each folder that cells read into the object store once, in chunks; a node unpacks it once into its own
store. A feature cache is built once in the cluster, by a task of its own, and is handed to the other nodes. The files
of an attempt come back as bytes, and the launcher writes its record last. Cells end with the launcher, as they do on
one machine; the same command runs those that are missing. One whose node is lost runs again on another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tpme.bench.errors import UserError, one_line
from tpme.bench.limits import resolved
from tpme.bench.measure.environment import host_mark
from tpme.bench.record import CellResult, Status, write_result
from tpme.bench.run.attempt import lost_result, remove_files, write_lost
from tpme.bench.run.engines.inputs_away import inputs_of, methods_of
from tpme.bench.run.engines.parcels import write_chunks
from tpme.bench.run.engines.profile import RunProfile
from tpme.bench.run.engines.ray_caches import Caches
from tpme.bench.run.engines.ray_cluster import Node, check_room, cluster_address, connected, nodes
from tpme.bench.run.engines.ray_node import CacheOrder, Check, Order, Portion, check_node, node_name, run_cell
from tpme.bench.run.engines.ray_tasks import POLL_S, Packer, Task, Tasks
from tpme.bench.run.job import Job
from tpme.bench.run.process import deferred_signals, raise_signal
from tpme.bench.run.progress import Screen
from tpme.bench.writing import make_folder, write_atomically

MOST_QUEUED = 500
"""Tasks that Ray knows of at a time."""
RETRIES = 2
"""Further tries of a cell whose node was lost."""
GONE = (NodeDiedError, WorkerCrashedError, TaskUnschedulableError)
"""How the check of a node ends that has gone meanwhile."""
CHECK_S = 120.0
"""For the checks of all nodes; one that takes longer is checked by its first cell."""


class RayEngine:
    """Runs cells as tasks of a Ray cluster.

    Args:
        profile: the address, and the cores of a cell. same_node: the seeds of a cell stay on one node.

    Raises:
        UserError: nothing listens at the address, or the profile asks for what only Slurm has.
    """

    here, shared = False, False

    def __init__(self, profile: RunProfile, same_node: bool = False) -> None:
        for name in ("partition", "time_s", "constraint", "container", "extra"):
            if getattr(profile, name) != RunProfile.model_fields[name].default:
                raise UserError(f"[run] {name}: it is for Slurm; Ray has no such setting")
        self.profile, self.same_node = profile, same_node
        self.address = cluster_address(profile.address)

    def check(self, attempts: Sequence[Job]) -> None:
        """See ``Engine.check``. What the nodes have is known once Ray is connected."""
        devices = max((job.cell.training.devices for job in attempts if job.cell.device == "cpu"), default=1)
        if devices > self.profile.cpus:
            raise UserError(f"training.devices = {devices}: more than run.cpus = {self.profile.cpus} of the profile")

    def run(self, attempts: Sequence[Job], screen: Screen, lock: int) -> Iterator[tuple[Job, CellResult]]:
        """See ``Engine.run``. Signals end the cells."""
        with deferred_signals() as caught, connected(self.address):
            cells = _Cells(attempts, screen, self._share, self.same_node)
            try:
                yield from cells.results(caught)
            finally:
                cells.tasks.cancel()
        if caught:
            raise_signal(caught[0])

    def _share(self, job: Job) -> Portion:
        """What a cell owns of a node."""
        return Portion(self.profile.cpus, job.cell.training.devices if job.cell.device == "cuda" else 0)


class _Cells:
    """The cells of a matrix on the connected cluster."""

    def __init__(
        self, attempts: Sequence[Job], screen: Screen, share: Callable[[Job], Portion], same_node: bool
    ) -> None:
        self.waiting, self.screen, self.share, self.same_node = list(attempts), screen, share, same_node
        self.tasks, self.packer = Tasks(screen), Packer()
        self.caches = Caches(attempts, self.packer)
        self.mark = _mark(attempts[0].folder.parent.parent)
        self.losses: dict[Path, int] = {}
        self.anchors: dict[str, str | None] = {}
        """With ``same_node``: the node of each group of seeds, ``None`` while its first cell waits for one."""

    def results(self, caught: Sequence[int]) -> Iterator[tuple[Job, CellResult]]:
        """Run them; gives each with its record. Raises UserError where the cluster cannot."""
        able, holders = self._checked_nodes(caught)
        if caught:
            return
        self.caches.start(self.tasks, self._order, holders, ship=len(able) > 1)
        while (self.waiting or self.tasks.running) and not caught:
            self._submit()
            self.screen.state(self.tasks.state(len(self.waiting)))
            for task in self.tasks.ended():
                if isinstance(task.order, CacheOrder):
                    self.caches.take(task)
                elif (result := self._result(task)) is not None:
                    yield task.order.job, result

    def _checked_nodes(self, caught: Sequence[int]) -> tuple[list[Node], dict[str, str]]:
        """The nodes that can run cells, and which of them has a feature cache, by its name.

        Raises UserError where no node has room for a cell, or one has another version of the code.
        """
        shares, there = {self.share(job) for job in self.waiting}, nodes()
        check_room(shares, there)
        able = [node for node in there if any(node.has(share) for share in shares)]
        first = self.waiting[0]
        versions = {job.cell.method: job.code_version for job in self.waiting}
        methods = tuple(self.packer.parcel(given) for given in methods_of(first.methods_path).values())
        check = Check(self.mark, versions, methods, self.caches.names)
        asked = {
            ray.remote(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            )(check_node).remote(check): node
            for node in able
        }
        until_s = time.monotonic() + CHECK_S
        answers: list[Any] = []
        while len(answers) < len(asked) and time.monotonic() < until_s and not caught:
            answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_S)
        holders: dict[str, str] = {}
        for answer in answers:
            node = asked[answer]
            try:
                problem, caches = ray.get(answer)
            except GONE:
                continue
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                raise UserError(f"node {node.name} cannot run cells: {one_line(cause)}") from None
            if problem is not None:
                raise UserError(problem)
            holders |= dict.fromkeys(caches, node.id)
        return able, holders

    def _order(self, job: Job) -> Order:
        parcels = {place: self.packer.parcel(given) for place, given in inputs_of(job).items()}
        return Order(job, parcels, self.mark, self.share(job))

    # --- submitting ---------------------------------------------------------------------------------------------------

    def _submit(self) -> None:
        """Hand cells to Ray, in their order, as far as what they need is there."""
        for task in self.tasks.running.values():
            self._anchor(task)
        for job in list(self.waiting):
            if len(self.tasks.running) >= MOST_QUEUED:
                return
            group = _group(job) if self.same_node else ""
            if not self.caches.are_ready(job) or (group in self.anchors and self.anchors[group] is None):
                continue
            node = self.anchors.setdefault(group, None) if self.same_node else None
            order = dataclasses.replace(self._order(job), caches=self.caches.of(job))
            self.tasks.start(run_cell, order, job.cell.label, node)
            self.waiting.remove(job)

    def _anchor(self, task: Task) -> None:
        """With ``same_node``: let the other seeds of a cell follow it to its node."""
        if self.same_node and task.node is not None and not isinstance(task.order, CacheOrder):
            self.anchors[_group(task.order.job)] = task.node

    # --- what becomes of them -----------------------------------------------------------------------------------------

    def _result(self, task: Task) -> CellResult | None:
        """The record of a cell that ended, written with its files; ``None`` for one that runs again."""
        self._anchor(task)
        try:
            if task.error is not None:
                raise task.error
            return _written(task)
        except OutOfMemoryError:
            return _failed(task, "killed", "Ray ended it because its node ran out of memory")
        except RayTaskError as error:
            cause = error.cause or error
            return _failed(task, "error", str(cause) if isinstance(cause, UserError) else one_line(cause))
        except RayError as error:
            return self._lost(task, error)

    def _lost(self, task: Task, error: RayError) -> CellResult | None:
        """Let a cell run again whose node, or whose process of Ray, was lost; a record where that happens each time."""
        job = task.order.job
        self.anchors.pop(_group(job), None)
        self.losses[job.folder] = losses = self.losses.get(job.folder, 0) + 1
        if losses > RETRIES:
            kind = type(error).__name__
            return _failed(task, "killed", f"its node was lost, as in {RETRIES} tries before ({kind})")
        self.screen.print(f"{job.cell.label}: node {_name(task)} was lost; the cell runs again elsewhere")
        self.waiting.append(job)
        return None


def _written(task: Task) -> CellResult:
    """Write the files of an attempt as they arrive, then its record. Raises RayError where they are lost by now."""
    job, files = task.order.job, task.files
    assert files is not None
    assert files.record is not None
    result = CellResult.model_validate_json(files.record, strict=True)
    if result.cell_id != job.cell_id or not all(_is_own(name, job) for name in files.sizes):
        raise UserError(f"node {_name(task)}: it answers with files of another attempt than {job.file('')}")
    remove_files(job)  # of the same attempt of a launcher that was killed
    make_folder(job.folder)
    try:
        write_chunks(job.folder, {f".{name}": size for name, size in files.sizes.items()}, map(ray.get, task.chunks))
        for name in files.sizes:
            (job.folder / f".{name}").replace(job.folder / name)
        write_result(result, job.file(".json"))
    except BaseException:
        remove_files(job)
        raise
    return result


def _is_own(name: str, job: Job) -> bool:
    return Path(name).name == name and name.startswith(f"{job.file('').name}.")


def _failed(task: Task, status: Status, message: str) -> CellResult:
    """Write the record of an attempt that left none, with what is known as its log."""
    job, message = task.order.job, f"{message}; on node {_name(task)}"
    wall_s = (datetime.now(UTC) - task.began).total_seconds()
    result = lost_result(job, status, message, wall_s, task.began)
    write_atomically(job.file(".log"), f"{message}\n".encode())
    write_lost(job, result)
    return result


def _name(task: Task) -> str:
    return "unknown" if task.node is None else node_name(task.node)


def _group(job: Job) -> str:
    """Equal for the seeds of a cell."""
    return job.cell.model_copy(update={"seed": 0}).model_dump_json()


def _mark(run: Path) -> str:
    """A mark of a run folder of this machine, for the folders of its cells on the nodes."""
    return hashlib.sha256(f"{host_mark()} {resolved(run)}".encode()).hexdigest()[:12]

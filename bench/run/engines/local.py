"""Cells on this machine: one at a time, one on each of several GPUs, or several beside each other on a CPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from tpme.bench.errors import UserError
from tpme.bench.measure.environment import CELLS_BESIDE
from tpme.bench.record import CellResult
from tpme.bench.run.attempt import run_job
from tpme.bench.run.job import Job
from tpme.bench.run.live import LiveLog
from tpme.bench.run.process import deferred_signals, raise_signal
from tpme.bench.run.progress import Screen

GPUS = "CUDA_VISIBLE_DEVICES"
NO_CORES = not hasattr(os, "sched_setaffinity")


@dataclass(frozen=True)
class Slot:
    """What a cell owns while it runs: some cores, and a GPU by its name in ``CUDA_VISIBLE_DEVICES``."""

    cores: tuple[int, ...]
    gpu: str | None = None


class LocalEngine:
    """Runs cells as processes of this machine.

    Args:
        jobs: cells beside each other on the CPU. gpus: names of the GPUs, where cells run on them: each takes as many
            as it has ``training.devices``. live: logs epochs.

    Raises:
        UserError: more jobs than cores.
    """

    here, shared = True, False

    def __init__(self, jobs: int = 1, gpus: Sequence[str] = (), live: LiveLog | None = None) -> None:
        self.places = _places(len(gpus) or jobs, gpus)
        self.live = live

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError where a cell wants more devices than it can get: GPUs, or cores for its ranks on the CPU."""
        for device in dict.fromkeys(job.cell.device for job in jobs):
            devices = max(job.cell.training.devices for job in jobs if job.cell.device == device)
            if devices == 1:
                continue
            if device == "cuda":
                there, what = len(visible_gpus()), "GPUs are visible (CUDA_VISIBLE_DEVICES)"
            else:
                there, what = len(self.places[0].cores), "cores are there for a cell, and each rank needs one"
            if devices > there:
                raise UserError(f"training.devices = {devices}: {there} {what}; lower training.devices")

    def run(self, attempts: Sequence[Job], screen: Screen, lock: int) -> Iterator[tuple[Job, CellResult]]:
        """See ``Engine.run``."""
        if len(self.places) > 1:
            yield from self._beside(attempts, screen, lock)
            return
        for job in attempts:
            with screen.cell(job.cell.label) as show:
                result = run_job(job, show=show, live=self.live, lock=lock)
            yield job, result

    def _beside(self, attempts: Sequence[Job], screen: Screen, lock: int) -> Iterator[tuple[Job, CellResult]]:
        free = _Free(self.places)
        with deferred_signals() as caught:

            def work(job: Job) -> CellResult:
                devices = job.cell.training.devices if job.cell.device == "cuda" else 1
                with free.taken(devices) as places, screen.cell(job.cell.label) as show:
                    variables = self._variables(places)
                    return run_job(job, show=show, live=self.live, lock=lock, variables=variables, caught=caught)

            with ThreadPoolExecutor(len(self.places), thread_name_prefix="tpme-cell") as pool:
                waiting: dict[Future[CellResult], Job] = {pool.submit(work, job): job for job in attempts}
                try:
                    while waiting and not caught:
                        for future in wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED).done:
                            yield waiting.pop(future), future.result()
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
        if caught:
            raise_signal(caught[0])

    def _variables(self, places: Sequence[Slot]) -> dict[str, str]:
        """Variables for a cell in ``places``; binds this thread, and so the processes it starts, to their cores."""
        if not NO_CORES:
            os.sched_setaffinity(0, [core for place in places for core in place.cores])
        told = {CELLS_BESIDE: str(len(self.places) // len(places))}
        gpus = [place.gpu for place in places if place.gpu is not None]
        return told | ({GPUS: ",".join(gpus)} if gpus else {})


class _Free:
    """The places that no cell has."""

    def __init__(self, places: Sequence[Slot]) -> None:
        self.places, self.changed = list(places), threading.Condition()

    @contextmanager
    def taken(self, number: int) -> Iterator[list[Slot]]:
        """Wait for ``number`` places, and have them for the block."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.places) >= number)
            mine = [self.places.pop() for _ in range(number)]
        try:
            yield mine
        finally:
            with self.changed:
                self.places += mine
                self.changed.notify_all()


def _places(number: int, gpus: Sequence[str]) -> tuple[Slot, ...]:
    """The cores of this process in ``number`` parts of the same size, each with one of the GPUs."""
    cores = sorted(os.sched_getaffinity(0)) if not NO_CORES else list(range(os.cpu_count() or 1))
    if number > len(cores):
        what = f"{number} GPUs" if gpus else f"--jobs {number}"
        raise UserError(f"{what}: every cell needs a core, and there are {len(cores)}")
    size = len(cores) // number
    parts = [tuple(cores[place * size : (place + 1) * size]) for place in range(number)]
    return tuple(Slot(part, gpus[place] if gpus else None) for place, part in enumerate(parts))


def local_engine(device: str, jobs: int | None, live: LiveLog | None) -> LocalEngine:
    """The engine of this machine for cells on ``device``; on GPUs ``jobs`` is their number.

    Raises UserError for ``jobs`` on GPUs, and for more jobs than cores.
    """
    if device == "cpu":
        return LocalEngine(jobs or 1, live=live)
    if jobs is not None:
        raise UserError("--jobs: it is for cells on the CPU; with GPUs, every GPU runs a cell (CUDA_VISIBLE_DEVICES)")
    gpus = visible_gpus()
    return LocalEngine(gpus=gpus if len(gpus) > 1 else (), live=live)


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that cells may use, as ``CUDA_VISIBLE_DEVICES`` names them; CUDA is not started."""
    import torch

    named = [name.strip() for name in os.environ.get(GPUS, "").split(",") if name.strip()]
    number = torch.cuda.device_count()
    return tuple(named[:number] if named else map(str, range(number)))

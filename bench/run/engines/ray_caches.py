"""Feature caches in a Ray cluster: each is built once, on some node, and handed to the others through the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpme.bench.errors import UserError
from tpme.bench.run.cell_checks import MetaCells, cost_key
from tpme.bench.run.engines.inputs_away import Input
from tpme.bench.run.engines.parcels import MANIFEST, Parcel
from tpme.bench.run.engines.ray_node import CacheOrder, Order, build_cache
from tpme.bench.run.engines.ray_tasks import Packer, Task, Tasks
from tpme.bench.run.job import Job

if TYPE_CHECKING:
    from tpme.bench.task.features import FeatureJob


class Caches:
    """The feature caches of a matrix that is about to run.

    Args:
        attempts: its cells. packer: of what the launcher's own store has already.
    """

    def __init__(self, attempts: Sequence[Job], packer: Packer) -> None:
        self.packer = packer
        self.jobs: dict[str, list[FeatureJob]] = {}
        """By the name of the cache: what cells need of it, for each method that starts from weights."""
        self._first: dict[str, Job] = {}
        self._here: dict[str, Path] = {}
        self._needs: dict[Path, tuple[str, ...]] = {}
        self._parcels: dict[str, Parcel | None] = {}
        """Of caches that are there; ``None`` for one that could not be built, or that no other node wants."""
        cached = [job for job in attempts if job.cell.cached]
        if cached:
            self._find(cached)

    def _find(self, cached: Sequence[Job]) -> None:
        metas, found = MetaCells(cached[0].methods_path), {}
        for job in cached:
            key = f"{cost_key(job.cell)} {job.cell.seed}"  # which draws random weights
            if key not in found:
                found[key] = _feature_jobs(job, metas)
            self._needs[job.folder] = tuple(folder.name for folder in found[key])
            for folder, cache in found[key].items():
                self._add(job, folder, cache)

    def _add(self, job: Job, folder: Path, cache: FeatureJob) -> None:
        known = self.jobs.setdefault(folder.name, [])
        self._first.setdefault(folder.name, job)
        if (folder / MANIFEST).exists():
            self._here[folder.name] = folder
        if cache.initial not in [other.initial for other in known]:
            known.append(cache)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all of them."""
        return tuple(self.jobs)

    def start(
        self, tasks: Tasks, order: Callable[[Job], Order], holders: dict[str, str], *, ship: bool, label: str = "cache"
    ) -> None:
        """Pack what the launcher has, and start the builders of the others.

        Args:
            tasks: takes them. order: that of a cell. holders: ids of nodes that have a cache, by its name.
            ship: whether there is another node to hand them to.
        """
        for name, jobs in self.jobs.items():
            if name in self._here and name not in holders:
                folder = self._here[name]
                files = sorted(path.name for path in folder.iterdir() if path.suffix in (".npy", ".safetensors"))
                self._parcels[name] = self.packer.parcel(Input(name, folder, (*files, MANIFEST)))
                continue
            cell = order(self._first[name])
            features = tuple(job.model_dump(mode="json") for job in jobs)
            build = CacheOrder(cell.job, cell.parcels, cell.run, cell.share, key=name, features=features, ship=ship)
            tasks.start(build_cache, build, label, holders.get(name))

    def take(self, task: Task) -> None:
        """Keep what a builder has left, if anything."""
        assert isinstance(task.order, CacheOrder)
        files = task.files if task.error is None else None
        parcel = Parcel(task.order.key, files.sizes, tuple(task.chunks)) if files and files.sizes else None
        self._parcels[task.order.key] = parcel

    def are_ready(self, job: Job) -> bool:
        """Whether nobody is building what a cell trains on."""
        return all(name in self._parcels for name in self._needs.get(job.folder, ()))

    def of(self, job: Job) -> tuple[Parcel, ...]:
        """The parcels of the caches of a cell."""
        names = self._needs.get(job.folder, ())
        return tuple(parcel for name in names if (parcel := self._parcels[name]) is not None)


def _feature_jobs(job: Job, metas: MetaCells) -> dict[Path, FeatureJob]:
    """The caches of a cell by their folders; none of a method that needs values: its cells build their own."""
    from tpme.bench.counting.batch import DataShape
    from tpme.bench.run.preflight import feature_jobs
    from tpme.bench.task.dataset import Dataset

    try:
        meta = metas.build(job.cell, DataShape.of(Dataset.open(job.dataset_path)))
    except UserError:
        raise
    except Exception:
        return {}
    return feature_jobs(job, meta)

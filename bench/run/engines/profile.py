"""The profile of a run: the engine that runs its cells and what it asks of a cluster, and the engine made of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, Strict, ValidationError

from tpme.bench.errors import UserError, missing_extra
from tpme.bench.limits import Number, Switch
from tpme.bench.names import Line
from tpme.bench.parsing import read_toml
from tpme.bench.record import Frozen
from tpme.bench.run.engines import Engine
from tpme.bench.run.engines.local import local_engine
from tpme.bench.run.live import LiveLog
from tpme.bench.run.settings import problem

EngineName = Literal["local", "slurm", "ray"]
EXTRAS = {"slurm": "submitit", "ray": "ray"}
"""The package of each extra that an engine of the same name needs."""


class RunProfile(Frozen):
    """The table ``[run]`` of a profile file: where cells run, and what each of them gets there."""

    on: EngineName = "local"
    gpus: Annotated[int, Strict(), Field(ge=0, le=1024)] = 0
    """Of a cell, on one node; 0: cells run on the CPU."""
    cpus: Number = 1
    """Cores of a cell."""
    partition: Line | None = None
    time_s: Number | None = None
    """Time limit of a job; by default that of its cells, and a margin."""
    constraint: Line | None = None
    """Features that a node must have."""
    container: Line | None = None
    """Command that starts Python in a container on a node: ``apptainer exec --nv tpme.sif python3``."""
    address: Line | None = None
    """Of a Ray cluster: ``HOST:PORT`` of its head node; by default ``RAY_ADDRESS``, else one on this machine."""
    extra: dict[str, Switch | Annotated[int, Strict()] | Line] = {}
    """Further options of sbatch without the dashes: ``{ account = "lab", mem = "32G", exclusive = true }``."""


class _ProfileFile(Frozen):
    run: RunProfile


def load_profile(path: Path | None, on: str | None) -> RunProfile:
    """The profile in a TOML file, or the default one; ``on`` takes the place of its engine.

    Raises UserError for a file that is no profile, and for an engine that does not exist.
    """
    raw = {"run": {}} if path is None else _read(path)
    if on is not None and on not in get_args(EngineName):
        raise UserError(f"--on {on}: choose {', '.join(get_args(EngineName))}")
    try:
        profile = _ProfileFile.model_validate(raw).run
    except ValidationError as error:
        raise UserError(f"{path}: {problem(error, _ProfileFile)}") from None
    return profile if on is None else profile.model_copy(update={"on": on})


def _read(path: Path) -> dict[str, object]:
    try:
        return read_toml(path)
    except FileNotFoundError:
        raise UserError(f"--profile {path}: no such file; it holds a table [run]") from None


def device_of(profile: RunProfile, name: str) -> str:
    """``cpu`` or ``cuda``: the device of the cells, for the value ``name`` of ``--device``.

    On this machine ``auto`` looks for a GPU. Elsewhere the profile decides: this machine need not have one.

    Raises UserError for a device that there is not, and for one that contradicts the profile.
    """
    from tpme.bench.run.launch import choose_device

    if profile.on == "local" or name not in ("auto", "cpu", "cuda"):
        return choose_device(name)
    asked = "cuda" if profile.gpus else "cpu"
    if name not in ("auto", asked):
        raise UserError(f"--device {name}: the profile asks for gpus = {profile.gpus}, so cells run on {asked}")
    return asked


def make_engine(
    profile: RunProfile,
    *,
    device: str,
    jobs: int | None = None,
    live: LiveLog | None = None,
    same_node: bool = False,
) -> Engine:
    """The engine that ``profile`` names.

    Args:
        profile: as read. device: of the cells, ``cpu`` or ``cuda``. jobs: cells beside each other on this machine.
        live: logs epochs, on this machine alone. same_node: the seeds of a cell stay on one node.

    Raises:
        UserError: its extra is not installed, the cluster cannot be reached or cannot run such cells, or an option
            that it does not have.
    """
    if profile.address is not None and profile.on != "ray":
        raise UserError(f'[run] address: it is for Ray, and cells run on {profile.on}; set on = "ray"')
    if profile.on == "local":
        return local_engine(device, jobs, live)
    if jobs is not None:
        raise UserError(
            f"--jobs: it is for cells on this machine; with --on {profile.on} the cluster says how many run"
        )
    if live is not None:
        raise UserError(
            f"--log: it is for cells on this machine; with --on {profile.on} export the records (tpme export)"
        )
    if find_spec(EXTRAS[profile.on]) is None:
        raise missing_extra(f"--on {profile.on}", EXTRAS[profile.on], profile.on)
    if profile.on == "slurm":
        from tpme.bench.run.engines.slurm import SlurmEngine

        return SlurmEngine(profile, same_node=same_node)
    from tpme.bench.run.engines.ray import RayEngine

    return RayEngine(profile, same_node=same_node)

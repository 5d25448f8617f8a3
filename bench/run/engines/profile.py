"""The profile of a run: the engine that runs its cells, and what it asks of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, Strict, ValidationError

from tpme.bench.errors import UserError
from tpme.bench.limits import Number, Switch
from tpme.bench.names import Line
from tpme.bench.parsing import read_toml
from tpme.bench.record import Frozen
from tpme.bench.run.settings import problem

EngineName = Literal["local", "slurm", "ray"]


class RunProfile(Frozen):
    """The table ``[run]`` of a profile file: where cells run, and what each of them gets there."""

    on: EngineName = "local"
    gpus: Annotated[int, Strict(), Field(ge=0, le=1024)] = 0
    """Of a cell, on each of its nodes; 0: cells run on the CPU."""
    cpus: Number = 1
    """Cores of a cell, on each of its nodes."""
    nodes: Annotated[int, Strict(), Field(ge=1, le=1024)] = 1
    """That train a cell together; ``training.devices`` are spread evenly over them."""
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

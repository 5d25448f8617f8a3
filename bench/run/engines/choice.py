"""The engine of a run and the device of its cells, as the profile and the options of the command line ask."""

from __future__ import annotations

from importlib.util import find_spec

from tpme.bench.errors import UserError, missing_extra
from tpme.bench.run.engines import Engine
from tpme.bench.run.engines.local import local_engine
from tpme.bench.run.engines.profile import RunProfile
from tpme.bench.run.live import LiveLog

EXTRAS = {"slurm": "submitit", "ray": "ray"}
"""The package of each extra that an engine of the same name needs."""


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
    if profile.nodes > 1 and profile.on != "slurm":
        raise UserError(
            f'[run] nodes = {profile.nodes}: cells run on {profile.on}, each on one node; it takes on = "slurm"'
        )
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

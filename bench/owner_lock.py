"""Locks of folders that several machines share: a file that is created exclusively and names its owner.

The kernel ends a lock of ``flock`` with its process, but on many shared file systems it does not reach other machines.
This one does, and outlives its owner. It is broken only where the owner is known to be dead: by the kernel that ran
it, or by the scheduler, which says that its job does not run. Of any other owner nobody here can tell, so the user
decides. On a file system of one machine ``flock`` is enough, and no such file is made.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from tpme.bench.errors import UserError
from tpme.bench.record import Frozen
from tpme.bench.slurm_commands import SlurmError, is_running
from tpme.bench.writing import make_folder

NETWORK = frozenset(
    {
        *("afs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "panfs", "smb3", "wekafs"),
        *("fuse.ceph-fuse", "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs"),
    }
)
"""File systems that machines share, as Linux names them."""
POLL_S, ASK_S = 0.2, 15.0
"""Time between two looks at a lock that somebody holds, and between two questions about its owner."""
NAMED_S = 5.0
"""Time for an owner to write its name, on a file system where a file cannot appear with its content."""
UNKNOWN = "-"
"""In place of what a machine does not say of itself."""


class OwnedError(UserError):
    """Somebody else holds the lock."""


class Owner(Frozen):
    """A process that holds a lock."""

    host: str
    machine: str
    """Machine id, boot id and namespace of process ids, in which ``pid`` is valid."""
    pid: int
    started: int
    """Clock ticks from boot to its start."""
    job: str | None = None
    """Of Slurm."""
    restarts: int = 0
    """How often the job was requeued before."""
    mark: str
    """Differs between any two locks."""

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            mark=secrets.token_hex(8),
        )

    def is_dead(self) -> bool:
        """Whether it is known to have ended; False, too, where nobody can tell."""
        mine, other = _machine().split(), self.machine.split()
        if mine == other and UNKNOWN not in mine[1:]:
            return _started(self.pid) != self.started
        same_machine = self.host == socket.gethostname() and mine[0] == other[0] != UNKNOWN
        if same_machine and UNKNOWN not in (mine[1], other[1]) and mine[1] != other[1]:
            return True  # it was started anew since
        if self.job is None:
            return False
        try:
            return not is_running(self.job, self.restarts)
        except SlurmError:
            return False

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def shared_by_machines(folder: Path) -> bool:
    """Whether other machines may work in a folder: in a job of Slurm, and on a network's file system."""
    return "SLURM_JOB_ID" in os.environ or on_network(folder)


def on_network(folder: Path) -> bool:
    """Whether a folder lies on a file system that machines share."""
    return _file_system(folder) in NETWORK


@contextlib.contextmanager
def owned(path: Path, *, force: bool = False, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file ``path``, where machines share its folder, or somebody holds it already.

    Args:
        path: the file. force: whatever the file system. waiting: called before waiting for the lock; without, a lock
            that somebody holds is an error.

    Raises:
        OwnedError: somebody holds it who is not known to be dead; the message says who, and what to do.
    """
    if not (force or shared_by_machines(path.parent) or os.path.lexists(path)):
        yield
        return
    owner = Owner.here()
    make_folder(path.parent)
    while not _create(path, owner):
        _wait(path, waiting)
    try:
        yield
    finally:
        if read_owner(path) == owner:
            path.unlink(missing_ok=True)


def read_owner(path: Path) -> Owner | None:
    """Who holds a lock; ``None`` for nobody. Raises UserError for a file that does not say so in time."""
    until_s = time.monotonic() + NAMED_S
    while True:
        try:
            return Owner.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            if time.monotonic() > until_s:
                raise UserError(
                    f"{path}: a lock that does not name its owner; delete it if nothing uses this folder"
                ) from None
        time.sleep(POLL_S)


def _create(path: Path, owner: Owner) -> bool:
    """Create the file with its content, in one step, unless there is one; returns whether it was created."""
    own = path.with_name(f"{path.name}.{owner.mark}")
    try:
        own.write_text(owner.model_dump_json())
        try:
            os.link(own, path)
        except FileExistsError:
            # A file server makes a link twice where its answer was lost: the second time it finds this one.
            return own.stat().st_nlink == 2
        except OSError:
            return _create_without_links(path, owner)
        return True
    finally:
        own.unlink(missing_ok=True)


def _create_without_links(path: Path, owner: Owner) -> bool:
    """Create the file, and then write it: others may see it empty for a moment."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(owner.model_dump_json())
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        raise
    return True


def _wait(path: Path, waiting: Callable[[], None] | None) -> None:
    """Return when the lock is free, and break it where its owner is dead; raises UserError where not to wait."""
    told, asked_s = False, -ASK_S
    while (owner := read_owner(path)) is not None:
        if time.monotonic() - asked_s >= (POLL_S if owner.machine == _machine() else ASK_S):
            asked_s = time.monotonic()
            if owner.is_dead():
                _break(path, owner)
                return
        if waiting is None:
            raise OwnedError(f"{path}: held by {owner}; wait for it, or delete this file if that has surely ended")
        if not told:
            from tpme.bench.console import complain  # loads what a cell does not need

            waiting()
            complain(UserError(f"waiting for {owner}, which holds {path}; if that has surely ended, delete the file"))
            told = True
        time.sleep(POLL_S)


def _break(path: Path, dead: Owner) -> None:
    """Remove the lock of a dead owner, unless somebody else did and holds it now: one process at a time breaks it."""
    with owned(path.with_name(f"{path.name}.breaking"), force=True, waiting=lambda: None):
        if read_owner(path) == dead:
            path.unlink(missing_ok=True)


def _machine() -> str:
    words = []
    for file in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with contextlib.suppress(OSError):
            words.append(Path(file).read_text().strip())
            continue
        words.append("-")
    with contextlib.suppress(OSError):
        words.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(word or "-" for word in words)


def _started(pid: int) -> int | None:
    """When a living process was started, in clock ticks from boot; ``None`` for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _file_system(folder: Path) -> str:
    """The kind of file system on which a folder lies, or will; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    place = os.path.realpath(folder)
    mounted = ""
    kind = ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(mounted):
            mounted, kind = point, after.split()[0]
    return kind

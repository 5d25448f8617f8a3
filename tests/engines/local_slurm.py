"""A real Slurm on this machine: a controller and two nodes of two cores each, that are this machine both."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("one", "two")
MAX_ARRAY_SIZE = 40
CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
MaxArraySize={most}
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=one,two Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=two MaxTime=10 State=UP
"""
"""No accounting, as on many clusters. A requeued job waits for its old credential to expire, hence ``cred_expire``."""


class NoSlurmError(Exception):
    """Why no Slurm can run here."""


class LocalSlurm:
    """Starts and stops it; the environment variable ``SLURM_CONF`` leads every command to it."""

    def __init__(self, folder: Path) -> None:
        for program in ("slurmctld", "slurmd", "sbatch", "munged"):
            if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
                raise NoSlurmError(f"needs Slurm and munge (slurm-wlm, munge): {program} is absent")
        _start_munge()
        self.folder, self.config = folder, folder / "slurm.conf"
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        text = CONFIG.format(
            folder=folder,
            user=getpass.getuser(),
            host=socket.gethostname().partition(".")[0],
            ports=_free_ports(3),
            most=MAX_ARRAY_SIZE,
        )
        self.config.write_text(text)

    def start(self) -> None:
        """Start the controller and the nodes; raises NoSlurmError where they do not come up."""
        self.start_controller()
        for node in NODES:
            self.command("slurmd", "-N", node)
        until_s = time.monotonic() + 30
        while self.nodes() != {"idle"}:
            if time.monotonic() > until_s:
                log = (self.folder / "slurmctld.log").read_text()[-2000:]
                self.stop()
                raise NoSlurmError(f"needs Slurm, and its nodes did not come up: {log}")
            time.sleep(0.2)

    def start_controller(self) -> None:
        """Start the controller, with the state that it left."""
        self.command("slurmctld")

    def stop_controller(self) -> None:
        """Kill the controller."""
        _end(self.folder / "slurmctld.pid")

    def stop(self) -> None:
        """Stop everything."""
        self.command("scancel", f"--user={getpass.getuser()}")
        for node in NODES:
            _end(self.folder / f"slurmd-{node}.pid")
        self.stop_controller()

    def nodes(self) -> set[str]:
        """The states of the nodes; none while the controller does not answer."""
        return set(self.command("sinfo", "--noheader", "--Node", "--format=%T").split())

    def command(self, *command: str) -> str:
        """Run a command of Slurm; returns what it prints."""
        environment = os.environ | {
            "SLURM_CONF": str(self.config),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _start_munge() -> None:
    """Let munge run; only root can start it."""
    if Path("/run/munge/munge.socket.2").exists() and _encodes():
        return
    if os.getuid():
        raise NoSlurmError("needs munge to run, and only root can start it")
    with contextlib.suppress(OSError):
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(["runuser", "-u", "munge", "--", "munged", "--force"], capture_output=True, check=False)
    until_s = time.monotonic() + 10
    while not _encodes():
        if time.monotonic() > until_s:
            raise NoSlurmError("needs munge, and it did not start")
        time.sleep(0.1)


def _encodes() -> bool:
    return subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _end(pid_file: Path) -> None:
    """End a daemon and wait for its end."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        return
    until_s = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < until_s:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)

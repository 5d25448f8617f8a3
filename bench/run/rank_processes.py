"""Start the processes that train one cell together on this machine, its ranks, and end them together.

Each is a child of this process with a log of its own and the variables that torchrun sets. torchrun itself would be a
further process between launcher and ranks that loads torch, survives a killed launcher, and knows neither the time
limit nor the lock of a run folder.

A rank that fails takes the others with it: they wait for it, in a collective that may never end. They get
``process.GRACE_S`` to fail by themselves, which leaves them time to say what they know, and are killed then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tpme.bench.lifetimes import MARK, Launcher, end_cell
from tpme.bench.run import process
from tpme.bench.run.process import PATIENT, OutputWatch, Supervision, kill_session, raise_signal, wait_for_signal
from tpme.bench.workers import LISTENER

LOOPBACK, THREADS = "127.0.0.1", "OMP_NUM_THREADS"


@dataclass(frozen=True)
class RanksOfNode:
    """This machine among those that train a cell together, by default the only one.

    ranks: of the whole cell. number: from 0, of ``nodes``, each with the same number of ranks. address, port: where
    rank 0 listens. listener: on which it does so, on the node of rank 0.
    """

    ranks: int
    number: int
    nodes: int
    address: str
    port: int
    listener: socket.socket | None = None

    @classmethod
    @contextlib.contextmanager
    def first(cls, ranks: int, nodes: int = 1) -> Iterator[Self]:
        """The node of rank 0, which listens on a free port within the block; to others only where there are others."""
        name = LOOPBACK if nodes == 1 else socket.gethostname()
        with socket.create_server((LOOPBACK if nodes == 1 else "", 0)) as listener:
            yield cls(ranks, 0, nodes, name, listener.getsockname()[1], listener)

    @property
    def own(self) -> range:
        """The ranks that run on this node."""
        here = self.ranks // self.nodes
        return range(self.number * here, (self.number + 1) * here)


@dataclass(frozen=True)
class RanksEnding:
    """How the ranks of a node ended."""

    codes: Mapping[int, int | None]
    """By rank; a negative one is the signal that ended it, ``None`` that it had to be killed."""
    timed_out: bool
    last: str
    """What the first of them said last that it was doing."""

    @property
    def well(self) -> bool:
        """Whether all of them ended well."""
        return set(self.codes.values()) == {0}


def run_ranks(
    command: Callable[[int], Sequence[str]],
    node: RanksOfNode,
    log: Callable[[int], Path],
    how: Supervision,
    stopped: Callable[[], bool] = lambda: False,
) -> RanksEnding:
    """Run the ranks of this node to their end, at most ``how.limit_s``, as ``run_process`` runs one process.

    Args:
        command: of a rank. log: of a rank. how: shows and hears the first rank.
        stopped: asked now and then whether the cell has failed on another node.

    Raises:
        KeyboardInterrupt, SystemExit: SIGINT, or SIGTERM or SIGHUP, came meanwhile; the ranks have been ended.
    """
    deadline = time.monotonic() + how.limit_s
    launcher = Launcher.here(deadline, how.lock)
    started: list[subprocess.Popen[bytes]] = []
    with how.signals() as caught:
        try:
            environment = PATIENT | os.environ | _shared(how.variables, len(node.own)) | {MARK: launcher.mark}
            for one in _started(command, node, log, environment, how.lock):
                started.append(one)
            watch = OutputWatch(started[0], how.show, how.hear)
            timed_out = watch.until(deadline, caught, lambda: any(one.poll() for one in started[1:]) or stopped())
            if any(one.poll() == -signal.SIGTERM for one in started) and not caught:
                wait_for_signal(caught)
            if caught or timed_out:
                for one in started:
                    one.send_signal(signal.SIGINT if caught else signal.SIGTERM)
            _await(started)
            codes = {rank: one.poll() for rank, one in zip(node.own, started, strict=True)}
        finally:
            for one in started:
                kill_session(one)
            end_cell(launcher)
    if caught:
        raise_signal(caught[0])
    return RanksEnding(codes, timed_out, watch.last[0])


def _started(
    command: Callable[[int], Sequence[str]],
    node: RanksOfNode,
    log: Callable[[int], Path],
    environment: Mapping[str, str],
    lock: int | None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the ranks of a node, each with its share of the cores of this process; yields each at once."""
    for local, rank in enumerate(node.own):
        told = {
            "RANK": rank, "WORLD_SIZE": node.ranks, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": len(node.own),
            "MASTER_ADDR": node.address, "MASTER_PORT": node.port,
        }  # fmt: skip
        passed = [] if lock is None else [lock]
        if rank == 0 and node.listener is not None:
            told[LISTENER] = node.listener.fileno()
            passed.append(node.listener.fileno())
        with log(rank).open("wb") as errors, _bound(local, len(node.own)):
            yield subprocess.Popen(
                command(rank),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if local == 0 else subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env=_loopback(node) | dict(environment) | {name: str(value) for name, value in told.items()},
                pass_fds=passed,
            )


def _shared(variables: Mapping[str, str], ranks: int) -> dict[str, str]:
    """The variables of each of so many ranks: threads that an engine names are those of all of them."""
    threads = variables.get(THREADS, "")
    return dict(variables) | ({THREADS: str(max(1, int(threads) // ranks))} if threads.isdecimal() else {})


def _loopback(node: RanksOfNode) -> dict[str, str]:
    """Let gloo connect the ranks of one machine within it: the name of a host need not lead to an address."""
    return {"GLOO_SOCKET_IFNAME": "lo"} if node.nodes == 1 and sys.platform == "linux" else {}


@contextlib.contextmanager
def _bound(place: int, places: int) -> Iterator[None]:
    """Bind this thread, and so what it starts, to a share of its cores within the block."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    size = len(cores) // places
    os.sched_setaffinity(0, sorted(cores)[place * size : (place + 1) * size] or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _await(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the processes time to end."""
    until_s = time.monotonic() + process.GRACE_S
    for one in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(max(0.0, until_s - time.monotonic()))

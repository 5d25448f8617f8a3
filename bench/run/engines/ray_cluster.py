"""A Ray cluster: reached or refused in a moment, quiet, and what its nodes have."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray

from tpme.bench.errors import UserError, one_line
from tpme.bench.run.engines.ray_node import Portion, node_name

ADDRESS = "RAY_ADDRESS"
REACH_S, CONNECT_S = 5.0, 20.0
START = "start one with 'ray start --head', or give its address ([run] address, or RAY_ADDRESS)"


@dataclass(frozen=True)
class Node:
    """A living node, and what it has in all."""

    id: str
    name: str
    cores: int
    gpus: int

    def has(self, share: Portion) -> bool:
        """Whether it could ever give ``share`` to a task."""
        return self.cores >= share.cores and self.gpus >= share.gpus


def cluster_address(given: str | None) -> str:
    """The address of the cluster to use: as given, that of the environment, or one that runs on this machine.

    Raises UserError where nothing listens there: Ray itself tries for minutes.
    """
    address = given or os.environ.get(ADDRESS) or "auto"
    if address == "auto":
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise UserError(
            f"Ray address {address}: give HOST:PORT of the head node, such as 10.0.0.1:6379, and run this on a machine "
            "of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"Ray address {address}: cannot be reached ({error}); {START}") from None
    return address


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster; tasks end with the block.

    Raises UserError where Ray refuses, of another version, say, or does not answer.
    """
    outcome: list[BaseException | None] = []

    def connect() -> None:
        try:
            # Its log lines, and those of its nodes, say what the records say.
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except BaseException as error:
            outcome.append(error)
        else:
            outcome.append(None)

    # In a thread of its own, because where something else listens Ray waits for minutes, deaf to signals; it also keeps
    # Ray from handling this process's SIGTERM.
    thread = threading.Thread(target=connect, daemon=True, name="tpme-connect")
    thread.start()
    thread.join(CONNECT_S)
    if not outcome:
        raise UserError(f"Ray address {address}: what listens there does not answer as a Ray cluster; {START}")
    if (error := outcome[0]) is not None:
        if isinstance(error, ConnectionError) and address == "auto":
            raise UserError(f"--on ray: no Ray cluster runs on this machine; {START}")
        raise UserError(f"Ray address {address}: {one_line(error, 400)}")
    with contextlib.suppress(AttributeError):
        ray._private.worker._worker_logs_enabled = False  # the only switch for the logs of nodes that die
    try:
        yield
    finally:
        ray.shutdown()


def nodes() -> list[Node]:
    """The living nodes."""
    return [_node(facts) for facts in ray.nodes() if facts["Alive"]]


def _node(facts: dict[str, Any]) -> Node:
    has = facts["Resources"]
    return Node(facts["NodeID"], node_name(facts["NodeID"]), int(has.get("CPU", 0)), int(has.get("GPU", 0)))


def check_room(shares: set[Portion], there: list[Node]) -> None:
    """Raise UserError where no node could ever run a cell that owns one of ``shares``."""
    for share in sorted(shares, key=lambda share: (share.gpus, share.cores)):
        if not any(node.has(share) for node in there):
            has = "; ".join(f"{node.name} {_in_words(node.cores, node.gpus)}" for node in there) or "none"
            raise UserError(
                f"--on ray: a cell needs {_in_words(share.cores, share.gpus)} on one node, and no node has that "
                f"({has}); lower [run] cpus or training.devices, or add such a node first"
            )


def _in_words(cores: int, gpus: int) -> str:
    return f"{cores} CPU{'s' if cores != 1 else ''}" + (f" and {gpus} GPU{'s' if gpus != 1 else ''}" if gpus else "")

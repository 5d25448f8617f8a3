"""The processes that train one cell together: who they are, and the few collectives that a step needs.

Rank r of N is one process with one device. ``torch.distributed`` connects them: gloo on CPUs, NCCL on GPUs. A single
process is ``Ranks.alone()``; every operation is then the identity, and costs nothing.

Each rank computes N times its part of the loss, and gradients are averaged over the ranks: a term that every rank
computes alike, such as a regulariser, then counts once, as on one device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tpme.bench.errors import UserError, one_line
from tpme.bench.train.timing import StepTimer
from tpme.bench.workers import LISTENER

JOIN_S = 300.0
"""Time for all ranks to connect; they start together, but one may load torch from a slow disk."""
WAIT = timedelta(days=7)
"""How long a rank waits in a collective: rank 0 may build caches for hours. Whoever started the ranks ends them."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process."""
_Collective = Callable[..., Any]
# The names up to torch 2.12 and after it.
_all_gather: _Collective = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: _Collective = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Ranks:
    """The processes that train one cell together; a single one is the default.

    Attributes:
        rank, size: this process is number ``rank``, from 0, of ``size``. device: its own.
        sent: bytes that this rank has sent, by kind of collective; see ``bench/counting/traffic.py``.
        timer: where set, it is lapped before and after every wait for other ranks.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.sent: dict[str, int] = {}
        self.timer: StepTimer | None = None
        self._hosts: dist.ProcessGroup | None = None
        self.common: torch.Generator | None = None
        """Within ``own_draws``: the generator that draws the same numbers on all ranks."""

    def __deepcopy__(self, _memo: object) -> Ranks:
        """Return itself: the copy of a model belongs to the same process."""
        return self

    @classmethod
    def alone(cls, device: torch.device | None = None) -> Ranks:
        """One process, not connected to any other."""
        return cls(0, 1, device or torch.device("cpu"))

    @classmethod
    def join(cls, devices: int, device_kind: str) -> Ranks:
        """Connect this process to the others; it was started as torchrun starts processes.

        Args:
            devices: how many ranks there are to be. device_kind: ``cpu`` or ``cuda``.

        Raises UserError in one line: variables that are missing or do not fit, too few GPUs, nobody at the address.
        """
        rank, size, local = _placed(devices)
        if device_kind == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"rank {rank}: its node has {torch.cuda.device_count()} CUDA devices, and it needs number {local}; "
                    "lower devices or use more nodes"
                )
            device, backend = torch.device("cuda", local), "nccl"
            torch.cuda.set_device(device)
        else:
            device, backend = torch.device("cpu"), "gloo"
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            store = _store(rank, size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
            ranks = cls(rank, size, device)
            ranks._hosts = dist.new_group(backend="gloo", timeout=WAIT) if backend == "nccl" else dist.group.WORLD
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"rank {rank} of {size} cannot join the others at {address}: {one_line(error)}") from None
        return ranks

    @property
    def peers(self) -> Ranks | None:
        """The ranks that work is shared with; ``None`` where there is one."""
        return self if self.size > 1 else None

    def leave(self) -> None:
        """Disconnect from the others."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # --- objects, on the host -----------------------------------------------------------------------------------------

    def objects(self, value: Any) -> list[Any] | None:
        """The ``value`` of every rank, in order, on rank 0; ``None`` on the others. Values are pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self._hosts)
        return found

    def from_first(self, value: Any) -> Any:
        """The ``value`` of rank 0, on all ranks."""
        if self.size == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0, group=self._hosts)
        return found[0]

    def wait(self) -> None:
        """Wait until all ranks are here, for hours if need be."""
        if self.size > 1:
            dist.barrier(group=self._hosts)

    @contextmanager
    def first(self) -> Iterator[None]:
        """Let rank 0 run the block before the others: it writes the files that the others then find.

        Where rank 0 fails the others wait on, and whoever started the ranks ends them.
        """
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    # --- tensors, on the device ---------------------------------------------------------------------------------------

    def all_gather(self, own: Tensor) -> Tensor:
        """The equally shaped tensors (m, ...) of all ranks, (N m, ...) in their order, without a graph."""
        if self.size == 1:
            return own
        found = own.new_empty(self.size * len(own), *own.shape[1:])
        with self._waiting("all-gather", (self.size - 1) * own.numel() * own.element_size()):
            _all_gather(found, own.contiguous())
        return found

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """This rank's part (m, ...) of the sum over the ranks of tensors (N m, ...)."""
        if self.size == 1:
            return whole
        own = whole.new_empty(len(whole) // self.size, *whole.shape[1:])
        with self._waiting("reduce-scatter", (self.size - 1) * own.numel() * own.element_size()):
            _reduce_scatter(own, whole.contiguous())
        return own

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the ranks, without a graph, as a new tensor."""
        if self.size == 1:
            return values
        found = values.detach().clone(memory_format=torch.contiguous_format)
        with self._waiting("sum", ring_bytes(self.size, found)):
            dist.all_reduce(found)
        return found

    def begin_sum(self, values: Tensor) -> dist.Work:
        """Begin to sum ``values`` in place over the ranks; ``finish`` waits for it."""
        self.count("all-reduce", ring_bytes(self.size, values))
        return cast("dist.Work", dist.all_reduce(values, async_op=True))

    def finish(self, work: dist.Work) -> None:
        """Wait for the end of what ``begin_sum`` began; on a GPU, the stream waits and not the host."""
        with self._waiting("all-reduce", 0):
            work.wait()

    def count(self, kind: str, sent: int) -> None:
        """Count bytes that this rank sends."""
        self.sent[kind] = self.sent.get(kind, 0) + sent

    @contextmanager
    def _waiting(self, kind: str, sent: int) -> Iterator[None]:
        self.count(kind, sent)
        if self.timer is None:
            yield
            return
        self.timer.lap()
        yield
        self.timer.lap()

    # --- random numbers -----------------------------------------------------------------------------------------------

    @contextmanager
    def own_draws(self, seed: str) -> Iterator[None]:
        """Let the generator of the device draw other numbers on each rank, for dropout, within the block.

        ``common`` goes on with what it would have drawn, the same on all ranks, and after the block it does so itself.
        """
        if self.size == 1:
            yield
            return
        default = _default_generator(self.device)
        self.common = torch.Generator(self.device)
        self.common.set_state(default.get_state())
        default.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} rank {self.rank}".encode()).digest()[:6]))
        try:
            yield
        finally:
            default.set_state(self.common.get_state())
            self.common = None


def ring_bytes(size: int, values: Tensor) -> int:
    """Bytes that each of ``size`` ranks sends to sum ``values`` in a ring: 2 (N - 1) / N of them."""
    return 2 * (size - 1) * values.numel() * values.element_size() // size


def _store(rank: int, size: int) -> TCPStore:
    """Where the ranks meet: rank 0 listens, on a socket that it was given or on the port that all are told."""
    address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=JOIN_S)
    socket = int(os.environ[LISTENER]) if rank == 0 and LISTENER in os.environ else None
    return TCPStore(address, port, size, rank == 0, timeout, multi_tenant=True, master_listen_fd=socket)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _placed(devices: int) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK. Raises UserError where they are missing or do not fit."""
    lacking = [name for name in ENVIRONMENT if name not in os.environ]
    if lacking:
        raise UserError(f"devices = {devices}: {lacking[0]} is not set; start every rank as torchrun does")
    try:
        rank, size, local = (int(os.environ[name]) for name in ENVIRONMENT[:3])
    except ValueError as error:
        raise UserError(f"devices = {devices}: {', '.join(ENVIRONMENT[:3])} must be whole numbers ({error})") from None
    if size != devices or not 0 <= rank < size or not 0 <= local < size:
        raise UserError(
            f"devices = {devices}, but this process is rank {rank} of {size} (local rank {local}); start as many "
            "processes as devices"
        )
    return rank, size, local

"""Tasks of Ray as the launcher sees them: where each runs, how far it is, what it leaves, and how it was lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tpme.bench.run.engines.inputs_away import Input
from tpme.bench.run.engines.parcels import Parcel, file_sizes, read_chunks
from tpme.bench.run.engines.ray_node import Event, Files, Order, Shown, Started
from tpme.bench.run.process import GRACE_S
from tpme.bench.run.progress import Screen

POLL_S = 0.5


@dataclass(eq=False)
class Task:
    """A task under way.

    node: id of its node, once it runs. files: what it left, in ``chunks`` of the object store. error: why it did not.
    """

    order: Order
    label: str
    stream: Any
    node: str | None = None
    files: Files | None = None
    chunks: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    began: datetime = field(default_factory=lambda: datetime.now(UTC))
    shown: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    show: Callable[[str, float], None] = lambda *_: None

    def take(self, screen: Screen) -> bool:
        """Take its next event, which is there; returns whether it has ended."""
        try:
            value = next(self.stream)
            if self.files is not None:
                self.chunks.append(value)  # it stays where it is
                return False
            event = ray.get(value)
        except StopIteration:
            if self.files is None or len(self.chunks) != self.files.chunks:
                self.error = ray.exceptions.ObjectLostError("", None, "")
            return True
        except Exception as error:
            self.error = error
            return True
        if isinstance(event, Started):
            self.node, self.began = event.node, datetime.now(UTC)
            self.show = self.shown.enter_context(screen.cell(self.label))
        elif isinstance(event, Shown):
            self.show(event.what, event.share)
        elif isinstance(event, Files):
            self.files = event
        return False


class Tasks:
    """The tasks that Ray has, waiting or running."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.running: dict[Any, Task] = {}

    def start(
        self, function: Callable[[Any], Iterator[Event]], order: Order, label: str, node: str | None = None
    ) -> None:
        """Submit ``function(order)``, which owns the share of the order; ``node``: there, while that lives."""
        remote = ray.remote(
            num_cpus=order.share.cores,
            num_gpus=order.share.gpus,
            num_returns="streaming",
            max_retries=0,  # the launcher starts it again, and knows what of it is there
            scheduling_strategy="SPREAD" if node is None else NodeAffinitySchedulingStrategy(node, soft=True),
        )(function)
        stream = remote.remote(order)
        self.running[stream] = Task(order, label, stream)

    def ended(self, wait_s: float = POLL_S) -> Iterator[Task]:
        """Wait a moment for events; gives the tasks that end with them."""
        if not self.running:
            return
        ready, _ = ray.wait(list(self.running), timeout=wait_s, fetch_local=False)
        for stream in ready:
            if self.running[stream].take(self.screen):
                task = self.running.pop(stream)
                task.shown.close()
                yield task

    def state(self, waiting: int) -> str:
        """How many tasks run and wait, beside ``waiting`` cells that Ray does not know of yet."""
        started = sum(task.node is not None for task in self.running.values())
        return f"{started} running, {len(self.running) - started + waiting} waiting"

    def cancel(self) -> None:
        """Cancel all tasks, and wait for their processes to end, as long as these have time to."""
        for stream in self.running:
            with contextlib.suppress(Exception):
                ray.cancel(stream)
        until_s = time.monotonic() + GRACE_S + 2
        while self.running and time.monotonic() < until_s:
            for _ in self.ended():
                pass
        for task in self.running.values():
            task.shown.close()


class Packer:
    """Puts folders into the object store, each once."""

    def __init__(self) -> None:
        self._packed: dict[Input, Parcel] = {}

    def parcel(self, given: Input) -> Parcel:
        """The parcel of an input. Raises UserError where a file of it changes meanwhile."""
        if given not in self._packed:
            sizes = file_sizes(given.folder, given.files)
            chunks = tuple(map(ray.put, read_chunks(given.folder, sizes)))
            self._packed[given] = Parcel(given.name, sizes, chunks)
        return self._packed[given]

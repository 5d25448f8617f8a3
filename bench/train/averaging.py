"""Averages the gradients of all ranks in a few large buffers, while the backward pass is still running.

Parameters are put into buffers in reverse order, about the order in which their gradients are ready. As soon as a
buffer is complete, and all before it, its sum over the ranks begins; so every rank begins them in the same order.
After the backward pass the gradients are views of the buffers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpme.bench.train.ranks import Ranks

BUFFER_BYTES = 25 * 2**20
"""Of a buffer: large enough for the link's rate, small enough to begin before the backward pass ends."""


class _Buffer:
    """The gradients of some parameters side by side, and behind them, for each, 1 where this rank has one."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        like = parameters[0]
        self.flat = torch.ones(
            sum(p.numel() for p in parameters) + len(parameters), dtype=like.dtype, device=like.device
        )
        *gradients, self.present = torch.split(self.flat, [*(p.numel() for p in parameters), len(parameters)])
        self.views = [part.view(p.shape) for part, p in zip(gradients, parameters, strict=True)]
        self.reset()

    def reset(self) -> None:
        """Begin a step: no gradient is there."""
        self.lacking = set(range(len(self.parameters)))
        self.work: dist.Work | None = None


class GradientMean:
    """Averages the gradients of ``parameters`` over the ranks in every backward pass between ``begin`` and ``finish``.

    A parameter that has a gradient on no rank gets none, as on one device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.ranks, self.running = ranks, False
        groups: dict[tuple[torch.dtype, torch.device], list[list[nn.Parameter]]] = {}
        for parameter in reversed(list(parameters)):
            filling = groups.setdefault((parameter.dtype, parameter.device), [[]])
            if sum(p.numel() for p in filling[-1]) * parameter.element_size() >= buffer_bytes:
                filling.append([])
            filling[-1].append(parameter)
        self.buffers = [_Buffer(part) for filling in groups.values() for part in filling]
        self._place = {
            parameter: (buffer, number) for buffer in self.buffers for number, parameter in enumerate(buffer.parameters)
        }
        hooks: list[Any] = [p.register_post_accumulate_grad_hook(self._ready) for p in self._place]  # type: ignore[no-untyped-call]
        self._hooks = hooks
        self._next = 0

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """The next backward pass is that of a step."""
        self.running, self._next = True, 0
        for buffer in self.buffers:
            buffer.reset()

    def finish(self) -> None:
        """Wait until every gradient is the mean over the ranks."""
        self.running = False
        for buffer in self.buffers[self._next :]:
            for number in buffer.lacking:
                buffer.views[number].zero_()
                buffer.present[number] = 0
            self._launch(buffer)
        for buffer in self.buffers:
            assert buffer.work is not None
            self.ranks.finish(buffer.work)
            buffer.work = None
            if buffer.lacking:
                self._take_over(buffer)
            buffer.present.fill_(1)

    def _take_over(self, buffer: _Buffer) -> None:
        """Give parameters without a gradient of their own that of other ranks."""
        anywhere = buffer.present.tolist()  # waits for the device; all ranks lack the same, save in rare methods
        for number in buffer.lacking:
            if anywhere[number]:
                buffer.parameters[number].grad = buffer.views[number]

    def _ready(self, parameter: Tensor) -> None:
        """Called when the gradient of a parameter is complete."""
        if not self.running:
            return
        buffer, number = self._place[parameter]  # type: ignore[index]
        assert parameter.grad is not None
        torch.mul(parameter.grad, 1 / self.ranks.size, out=buffer.views[number])
        parameter.grad = buffer.views[number]
        buffer.lacking.discard(number)
        while self._next < len(self.buffers) and not self.buffers[self._next].lacking:
            self._launch(self.buffers[self._next])
            self._next += 1

    def _launch(self, buffer: _Buffer) -> None:
        buffer.work = self.ranks.begin_sum(buffer.flat)

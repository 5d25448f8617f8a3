"""Phases of a cell, each with its time, peak memory and energy.

The timeline has no gaps: a phase begins where the previous one ended. Work between two phases (bookkeeping, and the
instruments' own: collecting garbage, returning free memory, resetting peaks) is charged to the neighbour that is *not*
training. A training phase therefore contains training alone, and the times add up to the wall time of the cell.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tpme.bench.measure.clock import is_cuda, now, sync
from tpme.bench.measure.contention import CROWDED, SOURCE, CoreWait
from tpme.bench.measure.gpu import GpuWindow, idle_flags, unreadable
from tpme.bench.measure.host import HostMemory, HostPeak, SampledHost, keep_free_memory, release_free_memory
from tpme.bench.measure.nvml import Device, Nvml, NvmlError
from tpme.bench.measure.sampler import PERIOD_S, Column, SampledCurve, Sampler
from tpme.bench.measure.torch_memory import NO_CUDA, peaks, release_cached, reserved_bytes, reset_peaks
from tpme.bench.record import Flag, GpuFacts, Memory, Phase, PhaseKind, Reading

_GROWN = 1.01
"""Memory is returned before a training phase where it exceeds what the last one left by more than this factor."""


class PhaseLog:
    """Records the phases of one cell.

    Args:
        device: Where the work runs.
        sampler: A running one, which reads between a phase's two ends, or None.
        nvml: Opened before CUDA started, or None.
        origin_s: The ``time.perf_counter`` of the cell's start; by default now.
    """

    def __init__(
        self, device: object, sampler: Sampler | None, nvml: Nvml | None, origin_s: float | None = None
    ) -> None:
        self.phases: list[Phase] = []
        self.samples: SampledCurve | None = None
        """The sampler's curve; set when ``measuring`` ends."""
        self._device, self._sampler = device, sampler
        self._origin_s = time.perf_counter() if origin_s is None else origin_s
        self._end_s = self._origin_s
        self._open: str | None = None
        self.open_kind: PhaseKind | None = None
        """Kind of the phase that is open."""
        self.meet: Callable[[], None] | None = None
        """Waits for the other ranks of the cell; called at both ends of a training phase, so that all measure it."""
        self._baseline_bytes: int | None = None
        self._host = HostMemory(exclude=(sampler.pid,) if sampler else ())
        self._left: dict[PhaseKind, tuple[int, int]] = {}
        self._wait, self._waits = CoreWait(), list[tuple[float | None, float]]()
        """Per training phase: the longest wait for a core, and the wall time (seconds)."""
        self._gpu: GpuWindow | None = None
        self._no_gpu, self._idle_flags = NO_CUDA, list[Flag]()
        if is_cuda(device):
            self._attach(nvml)
        else:
            keep_free_memory()

    def _attach(self, nvml: Nvml | None) -> None:
        if nvml is None:
            self._no_gpu = "NVML was not opened"
            return
        try:
            gpu = select_gpu(nvml, self._device)
        except NvmlError as error:
            self._no_gpu = error.reason
            return
        idle = nvml.idle[gpu.uuid]
        self._gpu, self._idle_flags = GpuWindow(gpu, idle), idle_flags(idle)

    def baseline(self) -> None:
        """Take the current host memory as the baseline; call it after all imports, before data and model are loaded."""
        release_free_memory()
        self._baseline_bytes = self._host.tree_bytes()

    @contextmanager
    def phase(self, kind: PhaseKind, name: str = "") -> Iterator[None]:
        """Measure the block as one phase, recorded even if it raises. Raises RuntimeError if phases nest."""
        if self._open is not None:
            raise RuntimeError(f"phases cannot nest: '{name or kind}' begins while '{self._open}' is open")
        self._open, self.open_kind = name or kind, kind
        try:
            start_s = self._begin(kind)
            try:
                yield
                self._meet(kind)
            except BaseException:
                # The device may be lost or its context broken: a further error must not hide the cause.
                with contextlib.suppress(RuntimeError):
                    sync(self._device)
                self._finish(kind, name, start_s, time.perf_counter())
                raise
            self._finish(kind, name, start_s, now(self._device))
        finally:
            self._open = self.open_kind = None

    def _meet(self, kind: PhaseKind) -> None:
        if self.meet is not None and kind == "train":
            sync(self._device)
            self.meet()

    def finish(self) -> float:
        """Extend the last phase until now; returns the wall time of the cell so far (seconds)."""
        self._end_s = time.perf_counter()
        if self.phases:
            last = self.phases[-1]
            wall_s = self._end_s - self._origin_s - last.start_s
            self.phases[-1] = last.model_copy(update={"wall_s": wall_s})
        return self._end_s - self._origin_s

    def training_memory(self, first: int = 0) -> Memory:
        """The peaks over all training phases from number ``first`` on, instrument by instrument."""
        training = [phase.memory for phase in self.phases[first:] if phase.kind == "train"]
        return Memory(**{name: largest([getattr(memory, name) for memory in training]) for name in Memory.model_fields})

    def flags(self) -> list[Flag]:
        """Warnings about these measurements, for the record."""
        flags = list(self._idle_flags)
        if not is_cuda(self._device):
            flags.append(Flag(code="cpu-memory", message="CPU run: memory is resident memory over the baseline"))
        elif self._gpu is None:
            flags.append(Flag(code="no-nvml", message=f"no NVML readings: {self._no_gpu}"))
        others = max((phase.gpu.other_processes for phase in self.phases if phase.gpu), default=0)
        if others:
            shared = self._while_training(lambda facts: facts.other_processes > 0)
            flags.append(Flag(code="foreign-process", message=f"up to {others} other processes used the GPU{shared}"))
        throttled: dict[str, float] = {}
        for facts in self._training_facts():
            for cause, share in facts.throttled.items():
                throttled[cause] = max(throttled.get(cause, 0.0), share)
        if throttled:
            worst = ", ".join(f"{cause} in {share:.0%} of readings" for cause, share in throttled.items())
            where = self._while_training(lambda facts: bool(facts.throttled))
            flags.append(Flag(code="throttled", message=f"the GPU's clock was held down{where}: {worst}"))
        waited = self._core_wait()
        if waited.value is not None and waited.value > CROWDED:
            wait = f"a thread waited for a core for {waited.value:.0%} of the training time"
            flags.append(Flag(code="crowded", message=f"{wait}: do not compare the times of this run"))
        if self.samples is not None:
            flags += [Flag(code="sampler", message=note) for note in self.samples.notes]
        return flags

    def counters(self) -> dict[str, Reading]:
        """The sampler's cost, the wait for CPU cores, and, on a GPU, its state during training."""
        counters: dict[str, Reading] = {}
        if self.samples is not None:
            counters["sampler_core_share"] = _or_missing(
                self.samples.cpu_fraction, "processor time of the sampler, of one core", "the sampler ended early"
            )
        if self._waits:
            counters["core_wait_fraction"] = self._core_wait()
        if self._gpu is None:
            return counters
        facts = self._training_facts()
        summaries: tuple[tuple[str, str, Callable[[Sequence[float]], float]], ...] = (
            ("utilisation_percent", "mean", lambda values: sum(values) / len(values)),
            ("temperature_c", "maximum", max),
            ("sm_clock_mhz", "lowest median", min),
        )
        for name, how, combine in summaries:
            values = [value for phase in facts if (value := getattr(phase, name)) is not None]
            counters[f"gpu_{name}"] = _or_missing(
                combine(values) if values else None, f"NVML, {how} of the training phases", "it was not sampled"
            )
        return counters

    def _core_wait(self) -> Reading:
        counted = [(waited, wall_s) for waited, wall_s in self._waits if waited is not None]
        if not counted:
            reason = "this system does not count it" if self._waits else "there was no training phase"
            return Reading.missing(SOURCE, reason)
        return Reading(value=sum(waited for waited, _ in counted) / sum(wall_s for _, wall_s in counted), source=SOURCE)

    def _training_facts(self) -> list[GpuFacts]:
        return [phase.gpu for phase in self.phases if phase.kind == "train" and phase.gpu]

    def _while_training(self, affected: Callable[[GpuFacts], bool]) -> str:
        """Names the training phases for which ``affected`` holds; their steps are kept."""
        training = [phase for phase in self.phases if phase.kind == "train"]
        names = [phase.name or phase.kind for phase in training if phase.gpu and affected(phase.gpu)]
        return f" while training ({', '.join(names)})" if names else ""

    def _begin(self, kind: PhaseKind) -> float:
        """Reset all peaks and close the gap since the last phase; returns the start time."""
        self._release_leftovers(kind)
        reset_peaks(self._device)
        self._host.start_window()
        self._meet(kind)
        self._mark = self._sampler.mark() if self._sampler else 0
        if self._gpu is not None:
            self._gpu.start()
        self._wait.start_window()
        start_s = now(self._device)
        if self.phases and self.phases[-1].kind != "train":
            last = self.phases[-1]
            self.phases[-1] = last.model_copy(update={"wall_s": start_s - self._origin_s - last.start_s})
            self._end_s = start_s
        return start_s

    def _release_leftovers(self, kind: PhaseKind) -> None:
        """Return memory that earlier phases freed but the allocators keep, so as not to charge this phase for it.

        Training must then fetch returned memory again, page by page. So once training has begun, memory is returned
        only before the first phase of each kind, before a training phase if other phases left more than training did,
        and on a CPU before every phase but training, because a process keeps what training freed. The reading of any
        other phase that begins with more than the last one of its kind left is marked invalid.
        """
        left = self._left.get(kind) if "train" in self._left else None
        if left is not None and kind != "train" and not is_cuda(self._device):
            release_free_memory()
        kept = [max(0, now - int(_GROWN * before)) for now, before in zip(self._held(), left or (0, 0), strict=True)]
        if left is None or (kind == "train" and any(kept)):
            release_free_memory()
            release_cached(self._device)
            kept = [0, 0]
        self._kept_host, self._kept_device = kept

    def _held(self) -> tuple[int, int]:
        return self._host.tree_bytes(), reserved_bytes(self._device)

    def _finish(self, kind: PhaseKind, name: str, start_s: float, end_s: float) -> None:
        if kind == "train":
            self._waits.append((self._wait.waited_s(), end_s - start_s))
        self._host.end_window()
        allocated, reserved = peaks(self._device)
        rows = self._sampler.rows_since(self._mark) if self._sampler else {}
        host = self._host.peak(_sampled_host(rows))
        held = None if reserved.value is None else int(reserved.value)
        gpu = self._gpu.end(end_s - start_s, rows, held) if self._gpu else unreadable(self._no_gpu)
        self.phases.append(
            Phase(
                kind=kind,
                name=name,
                start_s=self._end_s - self._origin_s,
                wall_s=end_s - self._end_s,
                memory=Memory(
                    torch_allocated_bytes=allocated,
                    torch_reserved_bytes=_doubted(reserved, self._kept_device),
                    nvml_device_bytes=_doubted(gpu.device_bytes, self._kept_device),
                    nvml_process_bytes=_doubted(gpu.process_bytes, self._kept_device),
                    host_rss_bytes=_doubted(self._over_baseline(host), self._kept_host),
                ),
                energy_j=gpu.energy_j,
                gpu=gpu.facts,
            )
        )
        self._end_s = end_s
        if not (self._kept_host or self._kept_device):
            self._left[kind] = self._held()

    def _over_baseline(self, peak: HostPeak) -> Reading:
        if self._baseline_bytes is None:
            return Reading.missing(peak.source, "the baseline was not taken yet")
        return Reading(value=peak.bytes - self._baseline_bytes, source=f"{peak.source}, over the baseline")


@contextmanager
def measuring(device: object, period_s: float = PERIOD_S, nvml: Nvml | None = None) -> Iterator[PhaseLog]:
    """Start all instruments for one cell in the right order, and stop them on any exit.

    Enter it before anything starts CUDA in this process. On leaving, the phases are complete and ``samples`` is set.

    Args:
        device: Where the work will run.
        period_s: Of the sampler.
        nvml: An open session, which stays open; by default, for a CUDA device, one is opened and closed here.
    """
    origin_s = time.perf_counter()
    uuid, opened = None, None
    if is_cuda(device):
        nvml = nvml or (opened := Nvml.open())
        with contextlib.suppress(NvmlError):  # PhaseLog reports it
            uuid = select_gpu(nvml, device).uuid
    sampler = Sampler(uuid, period_s)
    try:
        with sampler:
            log = PhaseLog(device, sampler, nvml, origin_s)
            try:
                yield log
            finally:
                log.finish()
                log.samples = sampler.stop(origin_s)
    finally:
        if opened is not None:
            opened.close()


def select_gpu(nvml: Nvml, device: object) -> Device:
    """NVML's device for a torch CUDA device, by its UUID; starts CUDA. Raises NvmlError."""
    import torch

    index = torch.device(str(device)).index
    ordinal = torch.cuda.current_device() if index is None else index
    return nvml.select(ordinal, str(torch.cuda.get_device_properties(ordinal).uuid), os.environ)


def largest(readings: Sequence[Reading], of: str = "training phases") -> Reading:
    """The largest of several windows; valid only if all are, because an unread one may hold the true maximum."""
    if not readings:
        return Reading.missing("maximum over the training phases", "no training phase was recorded")
    found = max(readings, key=lambda reading: -1.0 if reading.value is None else reading.value)
    bad = [reading for reading in readings if not reading.valid]
    if not bad or len(readings) == 1:
        return found
    reason = f"in {len(bad)} of {len(readings)} {of}: {bad[0].reason}"
    return Reading(value=found.value, source=found.source, valid=False, reason=reason)


def _doubted(reading: Reading, kept_bytes: int) -> Reading:
    """The reading, marked invalid where the phase began with memory that earlier phases had freed."""
    if reading.value is None or not kept_bytes:
        return reading
    reason = f"up to {kept_bytes / (1 << 20):.0f} MiB of it were freed by an earlier phase and kept by the allocator"
    reasons = f"{reading.reason}; {reason}" if reading.reason else reason
    return Reading(value=reading.value, source=reading.source, valid=False, reason=reasons)


def _sampled_host(rows: Mapping[str, Column]) -> SampledHost | None:
    if not rows or not len(rows["t_s"]):
        return None
    return SampledHost(int(rows["host_bytes"].max()), int(rows["children_peak_bytes"].max()))


def _or_missing(value: float | None, source: str, reason: str) -> Reading:
    return Reading.missing(source, reason) if value is None else Reading(value=value, source=source)

"""Resident memory of this process and its descendants, with a peak that does not depend on sampling.

Linux keeps a high-water mark of resident memory per process (``VmHWM``), which can be reset
(``/proc/PID/clear_refs``), so each window has its own peak. Three traps:

* The mark of a child is lost when it ends. ``RUSAGE_CHILDREN.ru_maxrss`` keeps the largest child ever reaped, but a
  child started by ``vfork`` and ``exec`` (every ``subprocess`` call) inherits its *parent's* peak in that value: after
  ``subprocess.run(["true"])`` it equals the parent's peak. It is therefore used only where it exceeds that peak;
  otherwise the sampler, which reads the marks of living children, provides the value.
* Freed memory stays resident while the allocator keeps it (``keep_free_memory``, ``release_free_memory``).
* Peaks of several processes need not coincide: their sum is an upper bound, and the source says that it is a sum.
  Shared pages count once in every process that maps them.

Imports the standard library only, to keep the sampler's process small.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

HAS_PROC = Path("/proc/self/statm").exists()
_HAS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""
_INEXACT_BYTES = 4 << 20
"""Error of the kernel's count of resident pages, which it keeps per core."""


@dataclass(frozen=True)
class Resident:
    """Resident memory of one process (bytes): now, and its peak since the mark was reset."""

    now: int
    peak: int


@dataclass(frozen=True)
class HostPeak:
    """Peak resident memory of the process tree over one window (bytes), and how it was measured."""

    bytes: int
    source: str


@dataclass(frozen=True)
class SampledHost:
    """Maxima over a sampler's rows of one window (bytes).

    ``tree_bytes``: resident memory summed over the tree; ``children_peak_bytes``: the sum of the high-water marks of
    the children alive at one time.
    """

    tree_bytes: int
    children_peak_bytes: int


def parse_status(text: bytes) -> Resident | None:
    """Parse ``/proc/PID/status``; None for a process without resident memory (a zombie, a kernel thread)."""
    fields = {}
    for name in (b"VmHWM:", b"VmRSS:"):
        at = text.find(name)
        if at < 0:
            return None
        fields[name] = int(text[at + len(name) : text.index(b"kB", at)]) * 1024
    return Resident(now=fields[b"VmRSS:"], peak=fields[b"VmHWM:"])


def resident(pid: int) -> Resident | None:
    """Resident memory of one process; None if it has ended. Without ``/proc`` the peak is the current value."""
    if HAS_PROC:
        try:
            return parse_status(Path(f"/proc/{pid}/status").read_bytes())
        except OSError:
            return None
    import psutil

    try:
        held = int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None
    return Resident(now=held, peak=held)


def descendants(root: int, exclude: Collection[int] = ()) -> list[int]:
    """Process ids of all living descendants of ``root``, without those in ``exclude`` and their descendants."""
    pids: list[int] = []
    queue = [root]
    while queue:
        for child in _children(queue.pop()):
            if child not in exclude:
                pids.append(child)
                queue.append(child)
    return pids


def _children(pid: int) -> list[int]:
    """Direct children, from the kernel's lists per thread: far cheaper than reading all processes."""
    if not _HAS_CHILDREN:
        import psutil

        try:
            return [child.pid for child in psutil.Process(pid).children()]
        except psutil.Error:
            return []
    pids: list[int] = []
    try:
        with os.scandir(f"/proc/{pid}/task") as threads:
            for thread in threads:
                pids += map(int, read_small(f"{thread.path}/children").split())
    except OSError:
        return pids
    return pids


def read_small(path: str) -> bytes:
    """Read a small ``/proc`` file, several times faster than ``open`` does; empty if its process has ended."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(handle, 1 << 16)
    except OSError:
        return b""
    finally:
        os.close(handle)


def keep_free_memory() -> None:
    """From now on, the C allocator of this process keeps what is freed, until ``release_free_memory``.

    By default glibc returns every freed tensor above 32 MiB to the system. The next one of that size then comes from
    the kernel page by page, which took a quarter of a training step of base encoders (docs/lab/step.md). With other C
    libraries nothing changes.
    """
    library = _c_library()
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def release_free_memory() -> None:
    """Return memory that the C allocator keeps, but does not use, to the system.

    Otherwise a phase is charged for memory that an earlier phase freed. Works with glibc; on other systems only
    Python's garbage is collected.
    """
    gc.collect()
    library = _c_library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has none of that name
        return None


class HostMemory:
    """Resident memory of this process and its descendants, window by window.

    Args:
        exclude: Processes of the measurement itself (the sampler).
    """

    def __init__(self, exclude: Collection[int] = ()) -> None:
        self._root = os.getpid()
        self._exclude = frozenset(exclude)
        self._own_peak_ever = 0
        self._reset_works = HAS_PROC
        self.start_window()
        self.end_window()

    def tree_bytes(self) -> int:
        """Resident memory of the tree now."""
        return sum(memory.now for pid in self._tree() if (memory := resident(pid)) is not None)

    def start_window(self) -> None:
        """Start a window: reset the mark of every process to its current memory."""
        own = self._own()
        self._own_peak_ever = max(self._own_peak_ever, own.peak)
        for pid in self._tree():
            reset = _reset_mark(pid)
            if pid == self._root:
                self._reset_works = reset
        self._at_start = self._own()
        self._tree_at_start = self.tree_bytes()
        self._reaped_before = _largest_reaped_child()

    def end_window(self) -> None:
        """End the window: later allocations do not count in ``peak``."""
        self._at_end = self._own()
        self._own_peak_ever = max(self._own_peak_ever, self._at_end.peak)
        living = (resident(pid) for pid in self._tree()[1:])
        self._children_at_end = [memory for memory in living if memory is not None]
        self._reaped_at_end = _largest_reaped_child()

    def peak(self, sampled: SampledHost | None = None) -> HostPeak:
        """The peak of resident memory between ``start_window`` and ``end_window``.

        Args:
            sampled: Maxima of a sampler, which also saw children that ended inside the window.
        """
        seen = sampled or SampledHost(0, 0)
        if not HAS_PROC:
            at_end = self._at_end.now + sum(child.now for child in self._children_at_end)
            when = "sampled" if sampled else "at the window's two ends"
            source = f"resident memory of the process tree, {when} (this system has no high-water mark to reset)"
            return HostPeak(max(self._tree_at_start, at_end, seen.tree_bytes), source)
        living = sum(child.peak for child in self._children_at_end)
        children = max(living, seen.children_peak_bytes, self._ended_child())
        return HostPeak(max(self._own_window_peak() + children, seen.tree_bytes), self._source(bool(children)))

    def _ended_child(self) -> int:
        """The peak of a child that ended inside the window; 0 where the kernel's value may be inherited."""
        inherited = self._own_peak_ever + _INEXACT_BYTES
        return self._reaped_at_end if self._reaped_at_end > max(self._reaped_before, inherited) else 0

    def _own_window_peak(self) -> int:
        if self._reset_works or self._at_end.peak > self._at_start.peak:
            return self._at_end.peak
        # The mark could not be reset and was not exceeded: only the two ends of the window are known.
        return max(self._at_start.now, self._at_end.now)

    def _source(self, with_children: bool) -> str:
        mark = "VmHWM" if self._reset_works else "VmHWM, which cannot be reset here: a smaller peak may be missed"
        whose = "process tree, peaks of its processes summed" if with_children else "process"
        return f"peak resident memory of the {whose} ({mark})"

    def _own(self) -> Resident:
        own = resident(self._root)
        if own is None:
            raise RuntimeError("this process cannot read its own resident memory")
        return own

    def _tree(self) -> list[int]:
        return [self._root, *descendants(self._root, self._exclude)]


def _reset_mark(pid: int) -> bool:
    """Reset the high-water mark of a process to its current memory; False where that is not allowed."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _largest_reaped_child() -> int:
    """The largest peak of any child ever reaped (bytes); see the module docstring."""
    if not HAS_PROC:
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

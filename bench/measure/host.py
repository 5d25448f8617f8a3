"""Resident memory of this process and everything it started, with a peak that no sampling can miss.

Linux keeps a high-water mark of resident memory for each process (``VmHWM``) and lets it be reset
(``/proc/PID/clear_refs``), so that each window has a peak of its own. Three traps shape what follows:

* A child that ended takes its mark along. ``RUSAGE_CHILDREN.ru_maxrss`` remembers the largest child ever reaped,
  but a child started by ``vfork`` and ``exec`` (every ``subprocess`` call) inherits its *parent's* peak in there:
  after ``subprocess.run(["true"])`` it reads as much as the parent ever held. It is therefore believed only where
  it exceeds that; below, the sampler (which reads the marks of living children) is the witness.
* Memory that was freed stays resident while the allocator keeps it: ``release_free_memory``.
* Peaks of several processes need not coincide. Their sum is an upper bound, and is called one. Shared pages count
  once in every process that maps them.

Imports the standard library only, so that the sampler's process stays small.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

HAS_PROC = Path("/proc/self/statm").exists()
_HAS_CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children").exists()
_INEXACT_BYTES = 4 << 20
"""The kernel counts resident pages per core and may be off by this much."""


@dataclass(frozen=True)
class Resident:
    """Resident memory of one process (bytes): now, and the most since its mark was reset."""

    now: int
    peak: int


@dataclass(frozen=True)
class HostPeak:
    """Peak resident memory of the process tree over one window (bytes), and how it was obtained."""

    bytes: int
    source: str


@dataclass(frozen=True)
class SampledHost:
    """What a sampler saw of the tree inside a window (bytes).

    ``tree_bytes``: the largest resident sum; ``children_peak_bytes``: the largest sum of the marks of the children
    that lived at one time.
    """

    tree_bytes: int
    children_peak_bytes: int


def parse_status(text: bytes) -> Resident | None:
    """``/proc/PID/status`` -> resident memory; None for a process without any (a zombie, a kernel thread)."""
    fields = {}
    for name in (b"VmHWM:", b"VmRSS:"):
        at = text.find(name)
        if at < 0:
            return None
        fields[name] = int(text[at + len(name) : text.index(b"kB", at)]) * 1024
    return Resident(now=fields[b"VmRSS:"], peak=fields[b"VmHWM:"])


def resident(pid: int) -> Resident | None:
    """Resident memory of one process; None when it has ended. Without ``/proc`` the peak is the current value."""
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
    """Process ids of all living descendants of ``root``; those in ``exclude`` are left out with their own children."""
    found: list[int] = []
    queue = [root]
    while queue:
        for child in _children(queue.pop()):
            if child not in exclude:
                found.append(child)
                queue.append(child)
    return found


def _children(pid: int) -> list[int]:
    """Direct children. The kernel lists them per thread, which is far cheaper than reading all processes."""
    if not _HAS_CHILDREN:
        import psutil

        try:
            return [child.pid for child in psutil.Process(pid).children()]
        except psutil.Error:
            return []
    found: list[int] = []
    try:
        with os.scandir(f"/proc/{pid}/task") as threads:
            for thread in threads:
                found += map(int, read_small(f"{thread.path}/children").split())
    except OSError:
        return found
    return found


def read_small(path: str) -> bytes:
    """A small ``/proc`` file at once, several times faster than ``open``; empty when its process has ended."""
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


def release_free_memory() -> None:
    """Give memory that is free, but kept by the C allocator, back to the system.

    Without it a phase would be charged for what an earlier phase freed. Only glibc can be asked; on other
    systems only Python's garbage is collected.
    """
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


class HostMemory:
    """Resident memory of this process and its descendants, window by window.

    Args:
        exclude: Processes that belong to the measurement, not to what is measured (the sampler).
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
        held = (resident(pid) for pid in self._tree())
        return sum(one.now for one in held if one is not None)

    def start_window(self) -> None:
        """Start a window: every process's mark is reset to what it holds now."""
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
        """End the window: what is allocated from here on does not count in ``peak``."""
        self._at_end = self._own()
        self._own_peak_ever = max(self._own_peak_ever, self._at_end.peak)
        living = (resident(pid) for pid in self._tree()[1:])
        self._children_at_end = [one for one in living if one is not None]
        self._reaped_at_end = _largest_reaped_child()

    def peak(self, sampled: SampledHost | None = None) -> HostPeak:
        """The most that was resident between ``start_window`` and ``end_window``.

        Args:
            sampled: What a sampler saw; it witnesses children that ended inside the window.
        """
        seen = sampled or SampledHost(0, 0)
        if not HAS_PROC:
            at_end = self._at_end.now + sum(one.now for one in self._children_at_end)
            when = "sampled" if sampled else "at the window's two ends"
            source = f"resident memory of the process tree, {when} (this system keeps no mark that could be reset)"
            return HostPeak(max(self._tree_at_start, at_end, seen.tree_bytes), source)
        children = max(sum(one.peak for one in self._children_at_end), seen.children_peak_bytes, self._ended_child())
        most = max(self._own_window_peak() + children, seen.tree_bytes)
        return HostPeak(most, self._source(bool(children)))

    def _ended_child(self) -> int:
        """The peak of a child that ended inside the window, where the kernel's record of it can be believed."""
        inherited = self._own_peak_ever + _INEXACT_BYTES
        return self._reaped_at_end if self._reaped_at_end > max(self._reaped_before, inherited) else 0

    def _own_window_peak(self) -> int:
        if self._reset_works or self._at_end.peak > self._at_start.peak:
            return self._at_end.peak
        # The mark could not be reset and was not passed: all that is known are the window's two ends.
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
    """Reset the high-water mark of a process to what it holds now; False where the system does not allow it."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _largest_reaped_child() -> int:
    """The largest peak of any child ever reaped (bytes); see the trap in the module's text."""
    if not HAS_PROC:
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

"""Host memory: peaks per window, children included, nothing charged that was only kept by the allocator."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tpme.bench.measure import host
from tpme.bench.measure.host import HostMemory, SampledHost, parse_status, resident

MIB = 1 << 20
pytestmark = pytest.mark.alone
linux = pytest.mark.skipif(not host.HAS_PROC, reason="needs Linux's /proc")
PRELUDE = """
import ctypes, json, os, subprocess, sys
from tpme.bench.measure.host import HostMemory, release_free_memory, resident
MIB = 1 << 20
def grab(mib):
    return bytearray(b"x") * (mib * MIB)
"""


def hold(mib: int) -> mmap.mmap:
    """Resident memory that goes back to the system with the object, whatever the C allocator keeps."""
    block = mmap.mmap(-1, mib * MIB)
    block[::4096] = b"x" * (len(block) // 4096)
    return block


def test_status_is_parsed_in_bytes() -> None:
    text = b"Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t     300 kB\nVmRSS:\t     200 kB\nThreads:\t1\n"
    assert parse_status(text) == host.Resident(now=200 * 1024, peak=300 * 1024)


def test_a_zombie_has_no_memory() -> None:
    assert parse_status(b"Name:\tpython\nState:\tZ (zombie)\n") is None


@linux
def test_a_peak_freed_before_the_end_counts_in_its_window_and_only_there() -> None:
    memory = HostMemory()
    before = memory.tree_bytes()
    memory.start_window()
    block = hold(100)
    del block
    memory.end_window()
    assert memory.peak().bytes - before > 95 * MIB
    memory.start_window()
    memory.end_window()
    assert memory.peak().bytes - before < 50 * MIB


@linux
def test_what_comes_after_the_end_of_a_window_does_not_count() -> None:
    memory = HostMemory()
    memory.start_window()
    memory.end_window()
    before = memory.peak().bytes
    block = hold(100)
    assert memory.peak().bytes == before
    del block


@linux
def test_the_peak_of_a_living_child_counts_though_it_has_freed_it() -> None:
    code = "b = bytearray(b'x') * (100 << 20); del b; print('done', flush=True); input()"
    memory = HostMemory()
    memory.start_window()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        memory.end_window()
        freed = resident(child.pid)
        own = resident(os.getpid())
        child.communicate(b"\n")
    assert freed is not None
    assert own is not None
    assert freed.now < 60 * MIB
    assert memory.peak().bytes - own.now > 95 * MIB
    assert "process tree" in memory.peak().source


@linux
def test_an_excluded_child_does_not_count() -> None:
    code = "b = bytearray(b'x') * (100 << 20); print('done', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with_child, without = HostMemory().tree_bytes(), HostMemory(exclude=(child.pid,)).tree_bytes()
        child.communicate(b"\n")
    assert with_child - without > 95 * MIB


@linux
def test_a_child_that_lived_and_died_inside_the_window_counts(fresh: Callable[[str], Any]) -> None:
    output = fresh(
        PRELUDE
        + """
memory = HostMemory()
memory.start_window()
subprocess.run([sys.executable, "-c", "b = bytearray(b'x') * (150 << 20)"], check=True)
memory.end_window()
print(json.dumps([resident(os.getpid()).now, memory.peak().bytes]))
"""
    )
    own, peak = output
    assert peak - own > 150 * MIB


@linux
def test_a_small_program_does_not_inherit_the_peak_of_the_process_that_started_it(fresh: Callable[[str], Any]) -> None:
    output = fresh(
        PRELUDE
        + """
block = grab(300)
memory = HostMemory()
memory.start_window()
subprocess.run(["true"], check=True)
memory.end_window()
import resource
kernel = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([resident(os.getpid()).now, memory.peak().bytes, kernel]))
"""
    )
    own, peak, kernel = output
    assert peak - own < 20 * MIB
    if kernel < 250 * MIB:
        pytest.skip("this kernel does not hand a parent's peak on: there was no trap to fall into")


@linux
def test_what_a_sampler_saw_of_ended_children_counts() -> None:
    memory = HostMemory()
    memory.start_window()
    memory.end_window()
    alone = memory.peak().bytes
    seen = memory.peak(SampledHost(tree_bytes=0, children_peak_bytes=70 * MIB))
    assert seen.bytes == alone + 70 * MIB
    assert memory.peak(SampledHost(tree_bytes=alone + 90 * MIB, children_peak_bytes=0)).bytes == alone + 90 * MIB


KEPT = (
    PRELUDE
    + """
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def allocate_and_free():
    # Too small for memory of their own; the last one stays, so that the heap cannot simply shrink.
    blocks = [libc.malloc(20_000) for _ in range(10_000)]
    for block in blocks:
        ctypes.memset(block, 1, 20_000)
    for block in blocks[:-1]:
        libc.free(block)
memory = HostMemory()
memory.start_window()
allocate_and_free()
memory.end_window()
first = memory.peak().bytes
RELEASE
memory.start_window()
memory.end_window()
print(json.dumps([first, memory.peak().bytes]))
"""
)


@linux
def test_freed_memory_is_not_charged_to_the_next_window(fresh: Callable[[str], Any]) -> None:
    if not hasattr(host._c_library(), "malloc_trim"):
        pytest.skip("only glibc can be asked to hand memory back")
    kept_first, kept_second = fresh(KEPT.replace("RELEASE", ""))
    first, second = fresh(KEPT.replace("RELEASE", "release_free_memory()"))
    assert kept_second > 0.9 * kept_first, "the allocator kept nothing, so this shows nothing"
    assert first - second > 150 * MIB


@linux
def test_large_tensors_are_kept_until_they_are_released(fresh: Callable[[str], Any]) -> None:
    """Otherwise every tensor above 32 MiB would come from the kernel anew, page by page."""
    if not hasattr(host._c_library(), "mallopt"):
        pytest.skip("only glibc can be asked to keep memory")
    code = """
import resource
from tpme.bench.measure.host import keep_free_memory
KEEP
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = libc.malloc(64 * MIB)
        ctypes.memset(block, 1, 64 * MIB)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
faults()
kept, held = faults(), resident(os.getpid()).now
release_free_memory()
print(json.dumps([kept, held - resident(os.getpid()).now]))
"""
    plain, _ = fresh(PRELUDE + code.replace("KEEP", ""))
    kept, released = fresh(PRELUDE + code.replace("KEEP", "keep_free_memory()"))
    assert plain > 100 * max(1, kept)
    assert released > 50 * MIB


@linux
def test_a_mark_that_cannot_be_reset_is_said_and_not_taken_for_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    block = hold(200)  # leaves a mark that is no business of the window's
    del block
    monkeypatch.setattr(host, "_reset_mark", lambda pid: False)
    memory = HostMemory()
    memory.start_window()
    memory.end_window()
    own = resident(os.getpid())
    assert own is not None
    assert own.peak - own.now > 150 * MIB
    assert memory.peak().bytes - own.now < 50 * MIB
    assert "cannot be reset" in memory.peak().source


def test_without_proc_psutil_takes_over_and_the_source_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = HostMemory().tree_bytes()
    monkeypatch.setattr(host, "HAS_PROC", False)
    monkeypatch.setattr(host, "_HAS_CHILDREN", False)
    memory = HostMemory()
    memory.start_window()
    memory.end_window()
    assert memory.peak().bytes == pytest.approx(expected, rel=0.2)
    assert "two ends" in memory.peak().source
    assert memory.peak(SampledHost(10 * expected, 0)).bytes == 10 * expected


@pytest.mark.parametrize("children_file", [True, False])
def test_descendants_are_found_to_the_last_generation(monkeypatch: pytest.MonkeyPatch, children_file: bool) -> None:
    if children_file and not host._HAS_CHILDREN:
        pytest.skip("this kernel does not list children")
    monkeypatch.setattr(host, "_HAS_CHILDREN", children_file)
    inner = "import os; print(os.getpid(), flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        pids = host.descendants(os.getpid())
        spared = host.descendants(os.getpid(), exclude=(child.pid,))
        child.communicate(b"\n")
    assert {child.pid, grandchild} <= set(pids)
    assert not {child.pid, grandchild} & set(spared)


def test_a_process_that_is_gone_has_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert resident(child.pid) is None
    assert host.descendants(child.pid) == []

"""Waiting for a core is seen, whoever takes it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from tpme.bench.measure import contention
from tpme.bench.measure.contention import CoreWait

pytestmark = pytest.mark.alone
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's scheduler interface")


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@linux
def test_a_neighbour_on_the_same_core_is_seen() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:  # inherits the core
            time.sleep(0.3)
            wait = CoreWait()
            spin(1.0)
            shared = wait.waited_s()
            neighbour.kill()
    finally:
        os.sched_setaffinity(0, cores)
    assert shared is not None
    assert shared > 0.2


@linux
def test_a_sleeping_thread_does_not_wait() -> None:
    wait = CoreWait()
    time.sleep(0.5)
    waited = wait.waited_s()
    assert waited is not None
    assert waited < 0.25


def test_where_it_is_not_counted_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "_waits", dict)
    assert CoreWait().waited_s() is None

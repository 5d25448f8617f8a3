"""Worker processes: none is left behind, whenever Ctrl-C comes."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.context import SpawnProcess

import psutil
import pytest

from tpme.bench.workers import worker_processes


def workers() -> list[psutil.Process]:
    alive = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in alive if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.alone
def test_ctrl_c_while_a_process_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has started and that nobody has noted yet would wait for work for ever, and we for it."""
    start = SpawnProcess.start

    def interrupted(process: SpawnProcess) -> None:
        start(process)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # whoever can be interrupted is so now

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    over = threading.Event()
    other = threading.Thread(target=over.wait)  # as that of a progress bar: signals that others block come to it
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), worker_processes(2) as submit:
            submit(abs, -1)
        assert workers() == []
    finally:
        over.set()
        other.join()


def test_what_a_worker_raises_arrives_and_no_process_is_left() -> None:
    with worker_processes(2) as submit:
        assert submit(abs, -1).result() == 1
        assert isinstance(submit(abs, "text").exception(), TypeError)
    assert workers() == []

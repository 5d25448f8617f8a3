"""Starts commands of tpme by forking a process that has everything loaded: a launcher in milliseconds.

Its argument is the process that started it, with which it ends, and what it starts. It reads a request a line (JSON)
from its standard input and answers with a line. Cells are stubs (``stub_cell.py``).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent
SHIM = str(HERE / "shim")
sys.path.insert(0, SHIM)
sys.path.insert(0, str(HERE))

import sitecustomize as shim  # noqa: E402

from tpme.bench.lifetimes import die_with_parent  # noqa: E402


def load() -> None:
    """Import what commands import while they run."""
    for name in ("bench.cli", "bench.run.launch", "bench.task.prepare", "bench.task.sources.synthetic", "bench.claims"):
        importlib.import_module(f"tpme.{name}")
    for name in ("reports.report", "reports.data.export", "reports.gate.formats", "reports.gate.check"):
        importlib.import_module(f"tpme.{name}")
    import stub_launcher

    stub_launcher.install()


def start(request: dict) -> int:
    """Fork a process that runs one command."""
    zygote, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = 70
    try:
        die_with_parent(zygote)
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for target, name in ((1, "out"), (2, "err")):
            handle = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, target)
            os.close(handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        import tempfile

        tempfile.tempdir = None
        if plan := os.environ.get(shim.VARIABLE):
            shim.install(shim.Plan(json.loads(plan)), "launcher")
        sys.argv = ["tpme", *request["arguments"]]
        from tpme.bench.cli import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, timeout_s: float) -> int | None:
    """Its exit code, negative for a signal; ``None`` where it has not ended in time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    load()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = wait(request["wait"], request["timeout_s"]) if "wait" in request else start(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

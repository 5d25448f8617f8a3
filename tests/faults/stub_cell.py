"""A cell without torch: it writes what a real one writes, in the same order and by the same functions, in a moment.

Bound to its launcher like ``tpme.bench.run.cell``. STUB_FILES holds what is in its files; STUB_RAN takes a line for
each cell that starts. With ``cached`` it has a feature cache built by a process of its own, which it verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tpme.bench.lifetimes import die_with_launcher
from tpme.bench.run.events import progress_events, telling
from tpme.bench.writing import write_atomically

REBUILT = {"code": "rebuilt", "message": "the feature cache was damaged and was built again"}


def feature_cache(store: Path) -> list[dict[str, str]]:
    """Have the cache built if it is missing or damaged, as ``tpme.bench.train.cached`` does; returns flags."""
    from tpme.bench.task.feature_files import forget_progress

    folder = store / "features" / "stub"
    damaged = False
    for _ in range(2):
        manifest = folder / "manifest.json"
        try:
            digests = json.loads(manifest.read_bytes())["sha256"]
            if all(sha256(folder / name) == digest for name, digest in digests.items()):
                forget_progress(folder)
                return [REBUILT] if damaged else []
        except (OSError, ValueError, KeyError):
            pass
        damaged = manifest.exists()
        build(folder)
    raise RuntimeError("damaged again")


def build(folder: Path) -> None:
    """Fork a builder (``stub_builder.py``); raises RuntimeError with its last line."""
    parent, (told, tell) = os.getpid(), os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(tell, 2)
        if "sitecustomize" in sys.modules and (plan := sys.modules["sitecustomize"].CURRENT) is not None:
            plan.role, plan.calls, plan.busy = "builder", 0, False
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            from stub_builder import main as build_cache

            build_cache(folder, parent)
            os._exit(0)
        except SystemExit as stop:
            os.write(2, str(stop.code).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    os.close(tell)
    with open(told) as output:
        lines = output.read().strip().splitlines()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise RuntimeError(f"building the feature cache failed: {lines[-1] if lines else f'exit code {code}'}")


def child(path: Path) -> None:
    """A process of the method itself, in a session of its own, that ignores what asks it to end."""
    stubborn = "import os, signal, sys, time; signal.signal(15, 1); open(sys.argv[1], 'w').write(str(os.getpid()))"
    command = [sys.executable, "-c", f"{stubborn}; time.sleep(600)", str(path)]
    subprocess.Popen(command, start_new_session=True, env=os.environ | {"TPME_FAULT": ""})
    while not path.exists():
        time.sleep(0.01)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Cell:
    """One attempt: the job file is its argument."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.folder = job, Path(job["folder"])
        self.name = f"attempt-{job['attempt']}"
        self.given = Path(os.environ["STUB_FILES"]) / job["cell_id"]

    def work(self) -> list[dict[str, str]]:
        """What a cell does before its record: returns flags."""
        if "child" in self.job["cell"]["options"]:
            child(Path(os.environ["STUB_RAN"] + ".child"))
        flags = feature_cache(Path(self.job["store"])) if self.job["cell"]["cached"] else []
        write_atomically(self.folder / "procedure" / "part", b"a part of the procedure")
        write_atomically(self.folder / f".{self.name}.adapter-0", bytes(100))
        return flags

    def record(self, status: str, message: str, flags: list[dict[str, str]]) -> None:
        """Write ranks and samples, publish the adapter, write the record."""
        files = {}
        for name in ("samples", "ranks") if status == "ok" else ("samples",):
            files[name] = f"{self.name}.{name}.npz"
            write_atomically(self.folder / files[name], (self.given / f"{name}.npz").read_bytes())
        if status == "ok":
            files["adapter"] = f"{self.name}.adapter.safetensors"
            os.replace(self.folder / f".{self.name}.adapter-0", self.folder / files["adapter"])
        content = json.loads((self.given / "json").read_bytes()) | {
            "attempt": self.job["attempt"],
            "status": status,
            "failure": None if status == "ok" else {"phase": "train", "message": message},
            "time_limit_s": self.job["time_limit_s"],
            "flags": flags,
            "files": files,
            "digests": {name: sha256(self.folder / file) for name, file in files.items()},
        }
        path = self.folder / f"{self.name}.json"
        if path.exists():
            raise FileExistsError(path)
        write_atomically(path, json.dumps(content, indent=1).encode())
        if status == "ok":
            shutil.rmtree(self.folder / "procedure", ignore_errors=True)


def main() -> None:
    launcher = die_with_launcher()
    assert launcher is not None
    job = json.loads(Path(sys.argv[1]).read_bytes())
    with open(os.environ["STUB_RAN"], "a") as ran:
        ran.write(f"{Path(job['folder']).name} {os.getpid()}\n")

    def stop(_number: int, _frame: object) -> None:
        if time.monotonic() < launcher.deadline_s:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise TimeoutError

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cell, flags = Cell(job), []
    with progress_events() as progress, telling(progress):
        signal.signal(signal.SIGTERM, stop)
        progress("train", 1.0)
        status, message = "ok", ""
        try:
            flags = cell.work()
        except RuntimeError as error:
            status, message = "error", str(error)
        except TimeoutError:
            limit = f"{job['time_limit_s']:g}"
            status, message = "timeout", f"took longer than its time limit of {limit} s; raise time_limit_s"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cell.record(status, message, flags)


if __name__ == "__main__":
    main()

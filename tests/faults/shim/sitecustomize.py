"""Counts what a Python process does to files below some folders, and lets one of these calls fail.

Python imports a ``sitecustomize`` on its path at its start, so a process of a test needs nothing but this folder in
PYTHONPATH and a plan in TPME_FAULT (JSON, see ``Plan``). Only calls through Python's ``os``, ``fcntl`` and ``open`` are
seen; writing is Python's own (``_pyio``), so that every write is an ``os.write``.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import json
import os
import re
import signal
import sys
import time

VARIABLE = "TPME_FAULT"
ROLES = {
    "cell": ("stub_cell.py", "tpme.bench.run.cell"),
    "builder": ("tpme.bench.train.feature_builder",),
    "sampler": ("tpme.bench.measure.sampler_process",),
    "worker": ("multiprocessing.spawn", "--multiprocessing-fork"),
}
PATHS = {"open": 1, "mkdir": 1, "rmdir": 1, "unlink": 1, "remove": 1, "chmod": 1, "replace": 2, "rename": 2}
HANDLES = ("write", "fsync", "ftruncate", "fchmod", "flock")
FILLING = ("open", "mkdir", "write", "replace", "rename", "ftruncate", "fsync")
"""Calls that need space."""
LASTING = {"ENOSPC": FILLING, "EROFS": (*FILLING, "rmdir", "unlink", "remove", "chmod", "fchmod")}
"""Calls that fail from then on, in all processes."""
_REAL = {name: getattr(os, name) for name in (*PATHS, *HANDLES) if name != "flock"} | {"flock": fcntl.flock}
_OPEN = io.open


class Plan:
    """What is counted and what fails.

    roots: folders below which calls count. trace: file that takes a line a call. fault: ``None``, or role, number of
    the call, what happens, and a file that is made when it does; its name is ``hit``.
    """

    def __init__(self, content: dict) -> None:
        self.roots, self.trace, self.fault = content["roots"], content.get("trace"), content.get("fault")
        self.journal = content.get("journal")
        self.role, self.calls, self.busy = "other", 0, False

    def below(self, path: object) -> str | None:
        """The path if it is below one of the roots."""
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")
            text = os.path.abspath(os.fsdecode(path))
        except (OSError, TypeError, ValueError):
            return None
        return text if any(text == root or text.startswith(root + "/") for root in self.roots) else None

    def call(self, name: str, path: str, run):
        """One call: count it, let it fail if it is the one, else do it."""
        self.calls += 1
        number = self.calls
        if self.trace is not None:
            self._note(self.trace, f"{self.role} {number} {name} {plain(path)}\n")
        fault = self.fault
        if fault is None:
            return run()
        if fault["kind"] in LASTING and name in LASTING[fault["kind"]] and os.path.exists(fault["hit"]):
            number = getattr(errno, fault["kind"])
            raise OSError(number, os.strerror(number), *([] if name in HANDLES else [path]))
        if (fault["role"], fault["number"]) != (self.role, number):
            return run()
        if not self._hit(fault["hit"], f"{os.getpid()} {os.getppid()} {name} {plain(path)}"):
            return run()  # another process of this role was there first
        return self._fail(fault["kind"], name, path, run)

    def _fail(self, kind: str, name: str, path: str, run):
        if kind == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "kill after":
            run()
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "ended":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind == "barrier":
            while not os.path.exists(self.fault["hit"] + ".go"):
                time.sleep(0.005)
        elif kind.startswith("clock "):
            jump(float(kind.split()[1]))
        else:
            number = getattr(errno, kind)
            raise OSError(number, os.strerror(number), *([] if name in HANDLES else [path]))
        return run()

    def _hit(self, path: str, text: str) -> bool:
        try:
            handle = _REAL["open"](path + ".part", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        _REAL["write"](handle, text.encode())
        os.close(handle)
        _REAL["rename"](path + ".part", path)
        return True

    def _note(self, path: str, line: str) -> None:
        handle = _REAL["open"](path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _REAL["write"](handle, line.encode())
        os.close(handle)

    # --- a power cut ------------------------------------------------------------------------------------------------

    def before(self, name: str, path: str, second: str | None) -> None:
        """Keep what a rename or a removal takes away: until the folder is synced, a power cut brings it back."""
        if self.journal is None or name not in ("replace", "rename", "unlink", "remove"):
            return
        gone = second if name in ("replace", "rename") else path
        if gone is not None and os.path.isfile(gone):
            kept = f"{self.journal}.{os.getpid()}.{self.calls}"
            os.link(gone, kept)
            self._note(self.journal, json.dumps(["kept", gone, kept]) + "\n")

    def after(self, name: str, path: str, second: str | None) -> None:
        """Note what was done."""
        if self.journal is not None:
            self._note(self.journal, json.dumps([name, path, second]) + "\n")


def plain(path: str) -> str:
    """A path without the random ends of temporary names, and without what differs from run to run."""
    path = re.sub(r"\.[a-z0-9_]{8}(?=$|/)", ".TEMPORARY", path)
    return re.sub(r"(tpme-[a-z]+)-[a-z0-9_]{8}(?=$|/)", r"\1-TEMPORARY", path)


def jump(seconds: float) -> None:
    """Let the clock on the wall jump: a suspended laptop, a time server."""
    import datetime

    real_time, real = time.time, datetime.datetime

    class Jumped(real):
        @classmethod
        def now(cls, tz=None):
            return real.now(tz) + datetime.timedelta(seconds=seconds)

    time.time = lambda: real_time() + seconds
    datetime.datetime = Jumped
    for module in list(sys.modules.values()):
        if getattr(module, "datetime", None) is real:
            module.datetime = Jumped


CURRENT: Plan | None = None
"""The plan of this process."""


def install(plan: Plan, role: str) -> None:
    """Count the calls of this process from now on."""
    global CURRENT
    CURRENT = plan
    plan.role, plan.calls = role, 0

    def counted(name: str, run, path: object, second: object, *arguments, **settings):
        found = None if plan.busy else plan.below(second if name in ("replace", "rename") else path)
        if found is None:
            return run()
        plan.busy = True
        try:
            first = found if second is None else os.path.abspath(os.fsdecode(path))

            def real():
                plan.before(name, first, None if second is None else found)
                done = run()
                plan.after(name, first, None if second is None else found)
                return done

            return plan.call(name, found, real)
        finally:
            plan.busy = False

    def wrap(name: str, module: object) -> None:
        original = _REAL[name]

        def wrapped(*arguments, **settings):
            path = arguments[0]
            if settings.get("dir_fd") is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{settings['dir_fd']}"), os.fsdecode(path))
            second = arguments[1] if PATHS.get(name) == 2 else None
            called = "read" if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else name
            return counted(called, lambda: original(*arguments, **settings), path, second)

        setattr(module, name, wrapped)

    for name in (*PATHS, *HANDLES):
        wrap(name, fcntl if name == "flock" else os)

    def opened(file, mode="r", *arguments, **settings):
        if plan.busy or plan.below(file) is None:
            return _OPEN(file, mode, *arguments, **settings)
        if set(mode) & set("wax+"):
            import _pyio

            return _pyio.open(file, mode, *arguments, **settings)
        return counted("read", lambda: _OPEN(file, mode, *arguments, **settings), file, None)

    builtins.open = io.open = opened


def of_this_process() -> str:
    """The role of a process by its command line."""
    line = sys.orig_argv
    return next((role for role, words in ROLES.items() if any(w in part for w in words for part in line)), "other")


if os.environ.get(VARIABLE):
    install(Plan(json.loads(os.environ[VARIABLE])), of_this_process())

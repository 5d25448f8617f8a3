"""What an injection is, and where and how one is carried out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, attempt_number, read_result
from tpme.bench.side_files import damage

HERE = Path(__file__).parent
KINDS = ("kill before", "kill after", "ended", "ENOSPC", "EDQUOT", "EIO")
"""What every call is hit by; the shim knows others."""
REFUSALS = ("ENOSPC", "EDQUOT", "EROFS")
"""Kinds of faults that only these calls have:"""
FILLING = ("open", "mkdir", "write", "replace", "rename", "ftruncate", "fsync")
WAIT_S = 120.0
MATRIX = """
name = "faults"
seeds = [{seeds}]
time_limit_s = {limit_s}
datasets = [{{ name = "stub", path = "nowhere" }}]
encoders = [{{ text = {{ source = "builtin:tiny-text" }} }}]
methods = [{methods}]
"""
PLAIN, MORE, CACHED = '{ name = "plain" }', '{ name = "more" }', '{ name = "stored", cached = true }'
SECOND = {"matrix": MORE, "cache": CACHED}
"""What the second cell of a scenario is; the first is plain, and finished."""


@dataclass(frozen=True)
class Fault:
    """One call of one process that fails. The number counts the calls of processes of that role."""

    scenario: str
    role: str
    number: int
    call: str
    path: str
    kind: str

    def __str__(self) -> str:
        return f"{self.scenario}/{self.role}/{self.number}/{self.call}/{self.kind}".replace(" ", "-")


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code, negative for a signal, and what it said."""

    code: int | None
    out: str
    err: str


class Zygote:
    """The process that starts commands (``zygote.py``)."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "zygote.log").open("wb")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "zygote.py"), str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        assert self._read() == "ready"

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the zygote has ended: {Path(self.log.name).read_text()[-2000:]}")
        return line.strip()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


class Scene:
    """A folder in which one command runs: ``run`` and ``store``, or ``data``, and a folder for temporary files."""

    def __init__(self, zygote: Zygote, root: Path, scenario: str = "matrix", *, methods: str | None = None) -> None:
        self.zygote, self.root, self.scenario, self.identity = zygote, root, scenario, uuid.uuid4().hex
        self.run_folder, self.store, self.data = root / "run", root / "store", root / "data"
        self.ran, self.temporary, self.hit = root / "ran", root / "tmp", root / "hit"
        for folder in (root, self.temporary):
            folder.mkdir(exist_ok=True)
        self.matrix = root / "matrix.toml"
        self.write_matrix(methods or f"{PLAIN}, {SECOND.get(scenario, MORE)}")
        self.given: dict[str, dict[str, str]] = {}
        """The cells that are finished before anything runs here, as ``finished`` gives them."""
        self.memory: set[str] = set()
        """Blocks of shared memory that were there before."""

    def write_matrix(self, methods: str, seeds: str = "0", limit_s: int = 100) -> None:
        self.matrix.write_text(MATRIX.format(methods=methods, seeds=seeds, limit_s=limit_s))

    @property
    def command(self) -> list[str]:
        if self.scenario == "prepare":
            few = ["--users", "40", "--items", "200", "--image-size", "8", "--workers", "2"]
            return ["prepare", "synthetic", str(self.data), *few]
        where = ["--out", str(self.run_folder), "--store", str(self.store), "--device", "cpu", "--no-report"]
        return ["run", str(self.matrix), *where]

    @property
    def roots(self) -> list[str]:
        places = (self.run_folder, self.store, self.data, self.root / f".{self.data.name}.preparing", self.temporary)
        return [str(path) for path in places]

    def start(self, fault: Fault | None = None, arguments: list[str] | None = None, **plan: Any) -> Command:
        """Start the command, or another one, with a fault or none; ``plan``: see the shim."""
        content: dict[str, Any] = {"roots": self.roots} | plan
        if fault is not None:
            hit = str(self.hit)
            content["fault"] = {"role": fault.role, "number": fault.number, "kind": fault.kind, "hit": hit}
        environment = {
            "TPME_FAULT": json.dumps(content) if fault is not None or plan else "",
            "PYTHONPATH": f"{HERE / 'shim'}{os.pathsep}{HERE}",
            "FAULT_SCENE": self.identity,
            "STUB_RAN": str(self.ran),
            "STUB_FILES": str(self.root.parent / "files"),
            "TMPDIR": str(self.temporary),
            "COLUMNS": "200",
        }
        name = f"{len(list(self.root.glob('*.out')))}"
        out, err = self.root / f"{name}.out", self.root / f"{name}.err"
        request = {"arguments": arguments or self.command, "env": environment, "cwd": str(self.root)}
        pid = self.zygote.ask(request | {"out": str(out), "err": str(err)})
        return Command(self.zygote, pid, out, err)

    def run(self, fault: Fault | None = None, arguments: list[str] | None = None, **plan: Any) -> Done:
        return self.start(fault, arguments, **plan).wait()

    def wait_for_hit(self, patience_s: float = 60.0) -> list[str]:
        """Until a process stands at the barrier: its pid, its parent's, the call and the path."""
        until = time.monotonic() + patience_s
        while not self.hit.exists():
            if time.monotonic() > until:
                raise AssertionError("nobody came to the barrier")
            time.sleep(0.005)
        return self.hit.read_text().split(" ", 3)

    def go(self) -> None:
        """Let the process at the barrier go on."""
        Path(f"{self.hit}.go").touch()

    # --- what is there ----------------------------------------------------------------------------------------------

    def files(self) -> set[str]:
        """Every file below the folders, by its path; only the names of latest attempts have no number."""
        found = set()
        for root in map(Path, self.roots):
            for path in root.rglob("*") if root.exists() else ():
                if not path.is_dir():
                    found.add(str(path.relative_to(self.root)))
        return found

    def cells(self) -> dict[str, tuple[Path, CellResult | None]]:
        """The latest record of every cell, by the name of its folder; ``None`` for one that cannot be used."""
        latest: dict[str, tuple[Path, CellResult | None]] = {}
        for folder in sorted(self.run_folder.glob("cells/*")):
            path = max(folder.glob("attempt-*.json"), key=attempt_number, default=None)
            if path is not None and attempt_number(path):
                with contextlib.suppress(UserError):
                    record = read_result(path)
                    latest[folder.name] = (path, None if damage(path, record) else record)
                    continue
                latest[folder.name] = (path, None)
        return latest

    def finished(self) -> dict[str, dict[str, str]]:
        """Of every cell that ended well: SHA-256 of each of its files that are to stay."""
        return {
            name: {file.name: sha256(file) for file in path.parent.glob("attempt-*") if ".job." not in file.name}
            for name, (path, record) in self.cells().items()
            if record is not None and record.status == "ok"
        }

    def started(self) -> list[str]:
        """The cells that were started so far, in order."""
        return [line.split()[0] for line in self.ran.read_text().splitlines()] if self.ran.exists() else []

    def processes(self) -> list[psutil.Process]:
        """What still runs of all that was started here, without the command itself, which is forked."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("FAULT_SCENE") == self.identity:
                    found.append(process)
        return found


@dataclass
class Command:
    """A command that runs."""

    zygote: Zygote
    pid: int
    out: Path
    err: Path

    def wait(self, timeout_s: float = WAIT_S) -> Done:
        code = self.zygote.ask({"wait": self.pid, "timeout_s": timeout_s})
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.zygote.ask({"wait": self.pid, "timeout_s": timeout_s})
        return Done(code, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

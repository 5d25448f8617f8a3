"""The one oracle that judges every injection: the same command again completes, and nothing was lost or is left."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from faults.scenes import FILLING, REFUSALS, Done, Fault, Scene, sha256

from tpme.bench.record import attempt_number

MEMORY = Path("/dev/shm")
PATIENCE_S = 5.0
"""Longest time in which what a command started ends, once the command has ended."""


@dataclass(frozen=True)
class Untouched:
    """What a run that nothing disturbs leaves: its files, and the calls that each role makes."""

    files: frozenset[str]
    trace: tuple[tuple[str, int, str, str], ...]

    def faults(self, scenario: str, role: str, kind: str) -> list[Fault]:
        """Every call of a role, with this kind of fault where it can have it: a read leaves nothing to die after."""
        return [
            Fault(scenario, of, number, call, path, kind)
            for of, number, call, path in self.trace
            if of == role and (call in FILLING if kind in REFUSALS else kind != "kill after" or call != "read")
        ]


def judge(scene: Scene, untouched: Untouched, first: Done, fault: Fault | None, *, hit: bool = True) -> list[str]:
    """Run the same command again, and say all that is wrong then. ``first``: how the disturbed one ended."""
    wrong = []
    if hit and not scene.hit.exists():
        wrong.append(f"not hit: {first}")
    wrong += half_written(scene)
    wrong += untrue(scene, first, fault)
    before, ran = scene.finished(), scene.started()
    wrong += changed(scene.given, before)
    again = scene.run()
    if again.code != 0 or sentences(again):
        wrong.append(f"the same command again: {again}")
    wrong += differing_files(scene, untouched)
    wrong += changed(before, scene.finished())
    runs = scene.started()
    wrong += [f"{name}: a finished cell ran again" for name in runs if name in scene.given]
    wrong += [f"{name}: a finished cell ran again" for name in runs[len(ran) :] if name in before]
    if first.code == 0 and len(runs) > len(ran):
        wrong.append(f"it said that all was done, and {runs[len(ran) :]} was not: {first}")
    return wrong + left_behind(scene)


def changed(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """Files of finished cells that are not the same bytes any more."""
    return [
        f"{name}: {file} of a finished cell changed"
        for name, files in before.items()
        for file, digest in files.items()
        if after.get(name, {}).get(file) != digest
    ]


def half_written(scene: Scene) -> list[str]:
    """Files under their final names that are not whole."""
    wrong = [f"{path}: half a record" for path, record in scene.cells().values() if record is None]
    for name in ("cells.json", "matrix.json"):
        if (path := scene.run_folder / name).exists():
            with contextlib.suppress(ValueError):
                json.loads(path.read_bytes())
                continue
            wrong.append(f"{path}: half a file")
    for manifest in scene.store.glob("features/*/manifest.json"):
        digests = json.loads(manifest.read_bytes())["sha256"]
        wrong += [f"{name}: half a cache" for name, of in digests.items() if sha256(manifest.parent / name) != of]
    if (scene.data / "dataset.json").exists():
        from tpme.bench.task.dataset import damage_of

        if (problem := damage_of(scene.data, scene.root / "memory")) is not None:
            wrong.append(problem)
    return wrong


def sentences(done: Done) -> list[str]:
    """The lines on standard error, without those of bars, which end with two times."""
    return [line for line in done.err.splitlines() if not re.search(r"( [-\d]+:[-\d]+:[-\d]+){2}\s*$", line)]


def untrue(scene: Scene, done: Done, fault: Fault | None) -> list[str]:
    """What was said that is not one true sentence. No scene that is judged comes near its time limit."""
    if done.code is None:
        return [f"it hangs: {done}"]
    wrong, lines = [], sentences(done)
    if len(lines) > 1 or (done.code == 2 and not lines) or "Traceback" in done.out:
        wrong.append(f"not one sentence: {done}")
    if lines and not lines[0].startswith("tpme: "):
        wrong.append(f"not a sentence of tpme: {done.err[-1500:]}")
    failed = [record for _, record in scene.cells().values() if record and record.status != "ok"]
    wrong += ["a timeout before the time had passed" for record in failed if record.status == "timeout"]
    if fault is None or fault.kind not in (*REFUSALS, "EIO"):
        return wrong
    reason = os.strerror(getattr(errno, fault.kind))
    if done.code == 2 and not (reason in done.err and str(scene.root) in done.err):
        wrong.append(f"the path or the reason is not named: {done.err}")
    for failure in (record.failure for record in failed):
        if failure is None or reason not in failure.message or "/" not in failure.message:
            wrong.append(f"a failure that does not name the path and '{reason}': {failure}")
    return wrong


def differing_files(scene: Scene, untouched: Untouched) -> list[str]:
    """How the set of files differs from that of an untouched run; earlier attempts have a record that is not ok."""
    files = set()
    for name in scene.files():
        folder, _, file = name.rpartition("/")
        match = re.fullmatch(r"attempt-(\d+)\.(.+)", file)
        if match is None:
            files.add(name)
            continue
        latest = max(map(attempt_number, (scene.root / folder).glob("attempt-*.json")), default=0)
        if int(match[1]) == latest:
            files.add(f"{folder}/attempt-1.{match[2]}")
        elif not (scene.root / folder / f"attempt-{match[1]}.json").exists():
            files.add(name)
    missing, extra = untouched.files - files, files - untouched.files
    return [f"files missing: {sorted(missing)}; too many: {sorted(extra)}"] if missing or extra else []


def left_behind(scene: Scene) -> list[str]:
    """Processes, shared memory and locks that are left."""
    until = time.monotonic() + PATIENCE_S
    while (alive := scene.processes()) and time.monotonic() < until:
        time.sleep(0.02)
    while (memory := list(filter(is_left, shared_memory() - scene.memory))) and time.monotonic() < until:
        time.sleep(0.1)  # what a process has left that was killed, a tracker of its own removes
    wrong = [f"a process is left: {process}" for process in alive]
    wrong += [f"shared memory is left: {name}" for name in memory]
    for lock in (path for name in (".lock", "lock", ".claimed") for path in scene.root.rglob(name)):
        handle = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wrong.append(f"{lock}: held")
        finally:
            os.close(handle)
    return wrong


def shared_memory() -> set[str]:
    """Names of the blocks of shared memory on this machine."""
    return set(os.listdir(MEMORY))


def is_left(name: str) -> bool:
    """Whether a block of shared memory is there that no process has mapped, of another test or of anybody else."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"{MEMORY}/{name}" in maps.read_text():
                return False
    return (MEMORY / name).exists()


def readable(scene: Scene) -> list[str]:
    """Whether report, export and check succeed on the run."""
    wrong, run = [], str(scene.run_folder)
    for arguments in (
        ["report", run, "--out", str(scene.root / "report")],
        ["export", run, "--out", str(scene.root / "table.csv")],
        ["check", run, "--baseline", run],
    ):
        done = scene.run(arguments=arguments)
        if done.code != 0 or done.err:
            wrong.append(f"{' '.join(arguments)}: {done}")
    return wrong

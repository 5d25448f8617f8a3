"""The suite: scenes, the untouched runs that they are compared with, and the count of injections."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from faults.oracle import Untouched, judge, left_behind, readable, sentences, shared_memory
from faults.scenes import PLAIN, SECOND, Done, Fault, Scene, Zygote

PLACES = {"launcher": "matrix", "cell": "matrix", "builder": "cache", "worker": "prepare"}
"""The scenario in which there is such a process."""
READABLE = 0.05
"""Share of the injections after which report, export and check are run, too."""


class Suite:
    """Scenes, the untouched runs they are compared with, and the count of injections.

    seed: of everything that is drawn.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.zygote = folder, seed, Zygote(folder)
        self.numbers = iter(range(10**9))
        self.untouched: dict[str, Untouched] = {}
        self.given: dict[str, dict[str, str]] = {}
        self.injections = 0

    def drawn(self, what: object) -> random.Random:
        """Random numbers for one injection, the same for the same seed and name."""
        return random.Random(f"{self.seed} {what}")

    def scene(self, scenario: str, **settings: Any) -> Scene:
        """A new scene. Of a matrix the first cell is finished, the second one and its cache are not."""
        scene = Scene(self.zygote, self.folder / f"scene-{next(self.numbers)}", scenario, **settings)
        scene.memory = shared_memory()
        if scenario in SECOND and not settings:
            shutil.copytree(self._template(), scene.run_folder, copy_function=shutil.copy2)
            scene.given = self.given
        return scene

    def _template(self) -> Path:
        template = self.folder / "template"
        if not template.exists():
            scene = Scene(self.zygote, self.folder / "first", methods=PLAIN)
            done = scene.run()
            assert (done.code, done.err) == (0, ""), done
            shutil.copytree(scene.run_folder, template)
            self.given = scene.finished()
        return template

    def of(self, scenario: str) -> Untouched:
        """The untouched run of a scenario, with a trace of its calls."""
        if scenario not in self.untouched:
            scene = self.scene(scenario)
            trace = scene.root / "trace"
            done = scene.run(trace=str(trace))
            assert (done.code, sentences(done)) == (0, []), done
            lines = (line.split(" ", 3) for line in trace.read_text().splitlines())
            calls = [(role, int(number), call, path) for role, number, call, path in lines]
            # One of two workers makes at least half of the calls, whoever is given more work.
            most = sum(role == "worker" for role, *_ in calls) // 2
            calls = [call for call in calls if call[0] != "worker" or call[1] <= most]
            assert left_behind(scene) == []
            self.untouched[scenario] = Untouched(frozenset(scene.files()), tuple(dict.fromkeys(calls)))
        return self.untouched[scenario]

    def inject(self, fault: Fault) -> list[str]:
        """Carry out one injection; returns what is wrong, each with the words that repeat it."""
        scene = self.scene(fault.scenario)
        untouched = self.of(fault.scenario)
        done = scene.run(fault)
        wrong = judge(scene, untouched, done, fault)
        if fault.scenario in SECOND and self.drawn(fault).random() < READABLE:
            wrong += readable(scene)
        self.injections += 1
        if not wrong:
            shutil.rmtree(scene.root)
        return [f"TPME_FAULT_SEED={self.seed} TPME_FAULT_ONLY={fault} ({fault.path}): {problem}" for problem in wrong]

    def calls(self, role: str, kind: str = "barrier") -> list[Fault]:
        """Every call of a role, where there is one."""
        return self.of(PLACES[role]).faults(PLACES[role], role, kind)

    @contextlib.contextmanager
    def at(self, fault: Fault, act: Callable[[Scene, int, int], None]) -> Iterator[tuple[Scene, Done]]:
        """Hold a process at a call, do something there to it, its parent or its files, and let it go on."""
        scene = self.scene(fault.scenario)
        command = scene.start(replace(fault, kind="barrier"))
        pid, parent, *_ = scene.wait_for_hit()
        act(scene, int(pid), int(parent))
        scene.go()
        done = command.wait()
        self.injections += 1
        yield scene, done

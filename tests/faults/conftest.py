"""The suite of injected faults: one set of scenes a worker, and the figures of a run for docs/reliability.md."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.suite import Suite

SEED = int(os.environ.get("TPME_FAULT_SEED", "18"))
ONLY = os.environ.get("TPME_FAULT_ONLY")
"""The name of one injection, as a failure prints it."""
FIGURES = os.environ.get("TPME_FAULT_FIGURES")
"""File that takes a line of JSON a test: kind of fault, injections, whether it failed, seconds, and when it ended."""


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    suite = Suite(tmp_path_factory.mktemp("faults"), SEED)
    yield suite
    suite.zygote.close()


@pytest.fixture(autouse=True)
def _counted(suite: Suite, request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what repeats a test, and note how many injections it made, and how long they took."""
    print(f"TPME_FAULT_SEED={SEED} pytest '{request.node.nodeid}'")
    before, began, failed = suite.injections, time.monotonic(), request.session.testsfailed
    yield
    if FIGURES:
        facts = {
            "what": (request.node.get_closest_marker("about") or pytest.mark.about("other")).args[0],
            "injections": suite.injections - before,
            "failed": request.session.testsfailed - failed,
            "seconds": time.monotonic() - began,
            "ended": time.time(),
        }
        with Path(FIGURES).open("a") as file:
            file.write(json.dumps(facts) + "\n")

"""The progress of several runs: steps done of all and the time left, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tpme.bench.run.countdown import Countdown, duration_text


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def log_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_a_minute_with_steps_and_time_left() -> None:
    clock, console = Clock(), Console(file=io.StringIO(), width=40)
    countdown = Countdown(4, console, clock)
    with countdown.shown():
        for run in range(3):
            for share in (0.25, 0.5, 0.75, 1.0):
                clock.now_s += 10
                countdown.show(f"lora, {'base' if run % 2 == 0 else 'head'}: epoch 1/2", share)
            countdown.step()
    assert log_of(console) == [
        "run 2 of 4, about 2 min left: lora, head: epoch 1/2, 50%",
        "run 3 of 4, about 40 s left: lora, base: epoch 1/2, 100%",
    ]


def test_the_time_left_grows_with_runs_that_are_added() -> None:
    clock = Clock()
    countdown = Countdown(2, Console(file=io.StringIO()), clock)
    assert countdown.left_s() is None, "nothing is known before a run has ended"
    clock.now_s = 30
    countdown.step()
    assert countdown.left_s() == 30
    countdown.total += 4
    assert countdown.left_s() == 150
    clock.now_s = 75
    assert countdown.left_s() == 120, "a run that takes longer than the others does not count below zero"


def test_a_terminal_shows_one_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    countdown = Countdown(2, console)
    with countdown.shown():
        countdown.show("lora, base: epoch 1/2", 0.5)
    countdown.step()
    with countdown.shown():  # again, as where cells are measured again
        countdown.show("lora, head: [/b] load", 0.0)
    assert isinstance(console.file, io.StringIO)
    assert "run 2 of 2" in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text

"""Methods that own the procedure: their figures, and the comparisons that docs/procedures.md quotes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from plain_record import result

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, CellResult, Reading
from tpme.methods.base import Validation
from tpme.methods.parts.federation import Round

SHAPE = {"encoders": "wide", "users": 2}


def test_when_an_estimation_has_paid_for_itself(script: Any) -> None:
    payoff = script("light_peft_payoff")
    steps = {
        "lora": [6.0, 4.0],
        "lora, six projections": [7.0, 7.0],
        "estimation": [9.0, 9.0],
        "light-peft": [2.0, 4.0],
    }
    seconds = {row: np.array(values) for row, values in steps.items()}
    facts = dict.fromkeys(steps, payoff.Facts(2.0**21, 3e9, 2.0**20, 2.0**20, 1e3))
    text = payoff.report(seconds, facts | {"light-peft": payoff.Facts(2.0**20, 2e9, 2.0**20, 2.0**20, 1e3)}, SHAPE)
    assert "| T, s a step | 5 | 7 | 3 | 1.67 | 2.33 |" in text
    assert "| M, MiB | 2 | 2 | 1 | 2.00 | 2.00 |" in text
    assert "| GFLOP a step | 3 | 3 | 2 | 1.50 | 1.50 |" in text
    first, second, third = text.splitlines()[-3:]
    assert "`lora` takes 1.67 (" in first
    assert "paid for itself after 4.5 epochs" in first
    assert "paid for itself after 2.2 epochs" in second
    assert "estimation takes 1.80 (" in third
    slower = payoff.report(seconds | {"light-peft": np.array([6.0, 6.0])}, facts, SHAPE)
    assert "does not pay for itself" in slower


@pytest.mark.slow
def test_rows_take_turns_in_processes_of_their_own(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("light_peft_payoff").main(["--encoders", "built-in", "--turns", "1"]) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    values = {row[0].strip(): [float(cell.replace(",", "")) for cell in row[1:]] for row in table[2:]}
    assert all(ratio > 1 for name in ("GFLOP a step", "weights, MiB") for ratio in values[name][3:])
    assert all(second > 0 for second in values["T, s a step"])


@pytest.mark.slow
def test_what_light_peft_cut_is_drawn_from_a_run(script: Any, world: Any, tmp_path: Path) -> None:
    matrix = world.matrix([{"name": "light-peft", "options": {"heads": 0.5, "round_units_to": 1}}])
    world.run(matrix, tmp_path / "run", save_adapters=True)
    figures = script("procedure_figures")
    titles = [axes.get_title() for axes in figures.light_peft(tmp_path / "run").axes]
    assert titles[0] == "heads: 2 of 4 kept"
    assert titles[1] == "feed-forward units: 43 of 64 kept"
    assert len(titles) == 6
    assert figures.main(["light-peft", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "light-peft.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="with an adapter; run its matrix with --save-adapters"):
        figures.light_peft(tmp_path / "empty")


def projected(method: str, options: dict[str, Any], reached: float, held: float) -> CellResult:
    """A record whose encoders are ``reached`` / 2 and ``reached`` from the anchor after two epochs."""
    counters = {
        f"{modality}_{name}": Reading(value=value, source="report()")
        for modality in ("text", "image")
        for name, value in (("distance_epoch_1", reached / 2), ("distance_epoch_2", reached), ("rows_at_radius", held))
    }
    cell = Cell(method=method, options=options, dataset="d", dataset_fingerprint="f", modalities=("text", "image"))
    return result(cell=cell, counters=counters)


def test_distances_from_the_anchor_are_drawn_from_records(script: Any, tmp_path: Path) -> None:
    results = [
        projected("tpgm", {}, 0.02, 0.7),
        projected("ftp", {"annealing": 0.0, "radius_lr": 1000.0}, 0.2, 0.0),
        projected("ftp", {}, 0.04, 0.5),
        projected("fft", {}, 0.3, 0.0),
    ]
    for place, one in enumerate(results):
        (tmp_path / f"run/cells/{place}").mkdir(parents=True)
        (tmp_path / f"run/cells/{place}/attempt-1.json").write_text(one.model_dump_json())
    figures = script("procedure_figures")
    assert figures.main(["ftp", str(tmp_path / "run"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "ftp.png").read_bytes().startswith(b"\x89PNG")
    text, image, shares = figures.projection(tmp_path / "run").axes
    for axes in (text, image):
        assert {line.get_label(): list(line.get_ydata()) for line in axes.lines} == {
            "ftp": [0.0, 0.02, 0.04],
            "no radius (fft)": [0.0, 0.1, 0.2],
            "tpgm": [0.0, 0.01, 0.02],
        }
    assert [bar.get_width() for bar in shares.patches] == [0.5, 0.0, 0.7] * 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished cell of 'ftp' or 'tpgm'"):
        figures.projection(tmp_path / "empty")


def test_the_figure_of_a_federation_shows_bytes_by_round_and_what_they_buy(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = script("procedure_figures")
    monkeypatch.setattr(script("federation_figure"), "_federated", lambda _folder, _options: (rounds, 0.25))

    found = [None, Validation(0.1, 0.05), None, Validation(0.3, 0.1)]
    rounds = [Round(20, 10**6, 10**6, 2.0, 1.0, one) for one in found]
    sent, quality = figures.fedpeptao(tmp_path).axes
    assert [line.get_ydata().tolist() for line in sent.lines[:2]] == [[2, 4, 6, 8], [0.5, 1, 1.5, 2]]
    assert [list(axis) for axis in quality.lines[0].get_data()] == [[4, 8], [0.1, 0.3]]
    assert figures.main(["fedpeptao", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "fedpeptao.png").stat().st_size > 10_000


# --- searches ---------------------------------------------------------------------------------------------------------


TRIALS = {("gp", 1): [(1000, 0.1), (100, 0.2), (10, 0.3)], ("random", 1): [(1000, 0.1), (100, 0.2), (500, None)]}


def searched(engine: str, seed: int) -> Any:
    """What the comparison of searches reads of a record."""
    values = {"procedure_search_s": 60.0, "procedure_trials": 3.0, "procedure_winner": 2.0}
    for number, (parameters, ndcg) in enumerate(TRIALS[engine, seed], start=1):
        values |= {f"trial_{number:03}_parameters": parameters, f"trial_{number:03}_ndcg_10": ndcg}
    return SimpleNamespace(counters={name: SimpleNamespace(value=value) for name, value in values.items()})


def test_a_search_is_judged_by_the_area_that_its_trials_dominate(script: Any) -> None:
    module = script("search_comparison")
    found = {key: searched(*key) for key in TRIALS}
    areas = module.shares({key: module.trials_of(result) for key, result in found.items()})
    # A box of two decades by 0.2: the first trial is its worst corner, the second its middle, the third the best.
    assert areas["gp", 1].tolist() == pytest.approx([0, 0.25, 1])
    assert areas["random", 1].tolist() == pytest.approx([0, 0.25, 0.25])
    text = module.comparison(found)
    assert "| 1 | 3 | 1.000 | 0.250 | 0.3000 | 0.2000 |" in text
    assert text.splitlines()[-1].startswith("Not shown to be better than random search of the same budget: `gp`")


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([0.1] * 6, "Better than random search of the same budget: `gp` dominates more in 6 of 6 seeds, mean diff"),
        ([-0.1] * 6, "Worse than random search of the same budget: `gp` dominates more in 0 of 6 seeds"),
        ([0.1, 0.2, -0.1, 0.0], "Not shown to be better than random search of the same budget"),
    ],
)
def test_chance_is_not_called_better(script: Any, differences: list[float], words: str) -> None:
    assert script("search_comparison").verdict(differences, "gp").startswith(words)


def test_the_figure_of_a_search_draws_its_records(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("procedure_figures")
    monkeypatch.setattr(script("search_figure"), "searches", lambda _run: {key: searched(*key) for key in TRIALS})
    assert module.main(["autopeft", str(tmp_path), "--out", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "autopeft.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_search_is_refused(script: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished cell with a search; run scripts"):
        script("search_comparison").searches(tmp_path)

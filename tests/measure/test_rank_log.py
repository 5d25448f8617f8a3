"""One record from what several ranks have measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from plain_record import CELL, result

from tpme.bench.measure.environment import CELLS_BESIDE, environment
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.measure.rank_log import RankLog, job_environment, of_job
from tpme.bench.quantities import memory_reading
from tpme.bench.record import CellResult, Environment, Flag, GpuFacts, Memory, Phase, Reading, write_result
from tpme.bench.run.cell_ranks import join
from tpme.bench.train.ranks import Ranks

if TYPE_CHECKING:
    from tpme.bench.run.job import Job

ENVIRONMENT = environment("cpu").model_copy(update={"cpu_threads": 1, "device_name": "a core"})


def memory(host: float | None, cuda: float | None = None) -> Memory:
    def reading(value: float | None) -> Reading:
        return Reading.missing("instrument", "not read") if value is None else Reading(value=value, source="instrument")

    fields = dict.fromkeys(Memory.model_fields, reading(cuda))
    return Memory(**fields | {"host_rss_bytes": reading(host)})


def phase(kind: str, name: str = "", host: float | None = 1.0, **changes: Any) -> Phase:
    energy = Reading(value=10.0, source="counter of the GPU")
    settings = {"start_s": 0.0, "wall_s": 1.0, "memory": memory(host), "energy_j": energy} | changes
    return Phase(kind=kind, name=name, **settings)  # type: ignore[arg-type]


def log(rank: int, *phases: Phase, **changes: Any) -> RankLog:
    settings: dict[str, Any] = {
        "environment": ENVIRONMENT,
        "training_memory": phases[-1].memory if phases else None,
        "first": 0,
        "counters": {},
        "flags": (),
        "collective_s": Reading(value=0.5, source="clock"),
    }
    return RankLog(rank=rank, phases=phases, **(settings | changes))


def merged(*logs: RankLog) -> CellResult:
    flags = logs[0].flags
    plain = result(phases=logs[0].phases, training_memory=logs[0].training_memory, flags=flags)
    return of_job(plain, logs, job_environment([one.environment for one in logs]))


def test_memory_is_that_of_the_rank_with_the_most_and_energy_the_sum(tmp_path: Any) -> None:
    first = log(0, phase("cache", "text", 9.0), phase("train", "epoch 1", 2.0, wall_s=3.0))
    second = log(1, phase("train", "epoch 1", 5.0, wall_s=4.0))
    job = merged(first, second)
    assert [one.kind for one in job.phases] == ["cache", "train"]
    train = job.phases[1]
    assert train.memory.host_rss_bytes.value == 5.0
    assert train.wall_s == 3.0
    assert (train.energy_j.value, train.energy_j.source) == (20.0, "counter of the GPU, sum over the ranks")
    assert job.phases[0] == first.phases[0]
    assert memory_reading("memory_bytes", job.training_memory, "cpu").value == 5.0
    facts = job.ranks
    assert [rank.rank for rank in facts] == [0, 1]
    assert [rank.peak_memory.host_rss_bytes.value for rank in facts] == [9.0, 5.0]
    assert [rank.training_energy_j.value for rank in facts] == [10.0, 10.0]
    assert facts[1].collective_s.value == 0.5
    write_result(job, tmp_path / "attempt-1.json")


def test_phases_are_joined_by_name_and_not_by_place() -> None:
    first = log(0, phase("train", "epoch 1", 1.0), phase("export", "", 1.0), phase("export", "", 1.0))
    second = log(1, phase("load", "", 7.0), phase("train", "epoch 1", 2.0), phase("export"), phase("export", "", 3.0))
    assert [one.memory.host_rss_bytes.value for one in merged(first, second).phases] == [2.0, 1.0, 3.0]


def test_what_one_rank_could_not_read_is_not_known_of_the_job() -> None:
    lost = Reading.missing("counter of the GPU", "the driver died")
    job = merged(log(0, phase("train", host=3.0)), log(1, phase("train", host=None, energy_j=lost)))
    held = job.phases[0].memory.host_rss_bytes
    assert (held.value, held.valid, held.reason) == (3.0, False, "in 1 of 2 ranks: not read")
    assert (job.phases[0].energy_j.value, job.phases[0].energy_j.reason) == (None, "the driver died")


def test_the_state_of_all_gpus() -> None:
    def gpu(use: float, clock: float, throttled: dict[str, float]) -> GpuFacts:
        return GpuFacts(
            utilisation_percent=use, temperature_c=50 + use, sm_clock_mhz=clock, other_processes=0, throttled=throttled
        )

    def counted(use: float, clock: float) -> dict[str, Reading]:
        values = {"gpu_utilisation_percent": use, "gpu_sm_clock_mhz": clock, "core_wait_fraction": use / 100}
        return {name: Reading(value=value, source="NVML") for name, value in values.items()}

    job = merged(
        log(0, phase("train", gpu=gpu(20, 1000, {})), counters=counted(20, 1000)),
        log(1, phase("train", gpu=gpu(30, 900, {"heat": 0.5})), counters=counted(30, 900)),
    )
    assert job.phases[0].gpu == gpu(25, 900, {"heat": 0.5}).model_copy(update={"temperature_c": 80})
    values = {name: reading.value for name, reading in job.counters.items()}
    assert values == {"gpu_utilisation_percent": 25, "gpu_sm_clock_mhz": 900, "core_wait_fraction": 0.3}


def test_a_flag_of_another_rank_names_it_once() -> None:
    cpu, hot = Flag(code="cpu-memory", message="CPU run"), Flag(code="throttled", message="the clock was held down")
    job = merged(log(0, phase("train"), flags=(cpu,)), *(log(n, phase("train"), flags=(cpu, hot)) for n in (1, 2)))
    assert job.flags == (cpu, Flag(code="throttled", message="rank 1: the clock was held down"))


def gpus(**changes: str) -> Environment:
    told = {"device_kind": "cuda", "device_name": "H200", "driver": "570", "cpu_threads": 8}
    return ENVIRONMENT.model_copy(update=told | changes)


def test_the_key_of_a_device_names_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = job_environment([ENVIRONMENT, ENVIRONMENT])
    assert (pair.device_key, pair.devices) == ("a core, 2 ranks of 1 thread", ("a core", "a core"))
    assert job_environment([gpus(), gpus()]).device_key == "2 x H200, driver 570, 8 threads each"
    unlike = job_environment([gpus(), gpus(device_name="H100"), gpus()])
    assert unlike.device_key == "2 x H200 + 1 x H100, driver 570, 8 threads each"
    assert unlike.devices == ("H200", "H100", "H200")
    nodes = [gpus(hostname_hash="a"), gpus(hostname_hash="b")]
    assert job_environment(nodes).device_key == "2 x H200, driver 570, 8 threads each, 2 nodes"
    monkeypatch.setenv(CELLS_BESIDE, "2")
    assert job_environment([ENVIRONMENT] * 2).device_key == "a core, 2 ranks of 1 thread, 2 cells at a time"


def test_ranks_meet_at_both_ends_of_training_and_nowhere_else() -> None:
    phases, met = PhaseLog("cpu", None, None), list[str | None]()
    phases.meet = lambda: met.append(phases.open_kind)
    for kind in ("load", "train", "validate", "train"):
        with phases.phase(kind):  # type: ignore[arg-type]
            met.append("work")
    assert met == ["work", "train", "work", "train", "work", "train", "work", "train"]
    met.clear()
    with pytest.raises(ZeroDivisionError), phases.phase("train"):  # noqa: PT012
        met.clear()
        raise ZeroDivisionError
    assert met == []


def test_the_ranks_that_meet_are_those_of_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(0, 2, torch.device("cpu"))
    monkeypatch.setattr(Ranks, "join", lambda *_: ranks)
    monkeypatch.setattr(Ranks, "objects", lambda _self, own: [own, own])
    monkeypatch.setattr(Ranks, "from_first", lambda _self, value: value)
    cell = CELL.model_copy(update={"training": CELL.training.model_copy(update={"devices": 2})})
    phases = PhaseLog("cpu", None, None)
    joined, environments = join(cast("Job", SimpleNamespace(cell=cell)), phases)
    assert (joined, len(environments), phases.meet) == (ranks, 2, ranks.wait)


def test_the_time_of_an_epoch_begins_and_ends_when_all_ranks_are_there() -> None:
    phases, late = PhaseLog("cpu", None, None), iter((1.0, 2.0))
    clock = [0.0]

    def wait() -> None:
        clock[0] += next(late)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpme.bench.measure.phases.now", lambda _device: clock[0])
        patch.setattr("tpme.bench.measure.phases.time.perf_counter", lambda: clock[0])
        phases = PhaseLog("cpu", None, None)
        phases.meet = wait
        with phases.phase("load"):
            pass
        with phases.phase("train"):
            clock[0] += 10.0
    assert [one.wall_s for one in phases.phases] == [1.0, 12.0]

"""One record from what several ranks have measured, each on its own device.

Memory is that of the rank with the most, energy the sum over the ranks, the state of the GPUs the mean of their use and
the worst of the rest. No source is counted twice: each rank reads the energy counter of its own GPU, and the memory of
its own process tree. Pages that processes share, such as a memory map of the data, count in each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tpme.bench.measure.environment import with_neighbours
from tpme.bench.measure.phases import largest
from tpme.bench.record import CellResult, Environment, Flag, GpuFacts, Memory, Phase, RankFacts, Reading


@dataclass(frozen=True)
class RankLog:
    """What one rank has measured; ``first`` is the first phase that counts for T and M."""

    rank: int
    environment: Environment
    phases: tuple[Phase, ...]
    training_memory: Memory | None
    first: int
    counters: Mapping[str, Reading]
    flags: tuple[Flag, ...]
    collective_s: Reading

    @property
    def facts(self) -> RankFacts:
        """As the record keeps it."""
        after_baseline = [phase.memory for phase in self.phases if phase.memory.host_rss_bytes.value is not None]
        training = [phase for phase in self.phases[self.first :] if phase.kind == "train"]
        return RankFacts(
            rank=self.rank,
            hostname_hash=self.environment.hostname_hash,
            node=self.environment.node,
            device_name=self.environment.device_name,
            cpu_threads=self.environment.cpu_threads,
            training_memory=self.training_memory,
            peak_memory=highest_memory(after_baseline, "phases"),
            training_energy_j=total([phase.energy_j for phase in training], "the training phases"),
            collective_s=self.collective_s,
            counters=dict(self.counters),
        )


# --- readings --------------------------------------------------------------------------------------------------------


def total(readings: Sequence[Reading], over: str) -> Reading:
    """The sum of readings of one kind; missing if one of them is, because a part of a sum says nothing."""
    if not readings:
        return Reading.missing(f"sum over {over}", "there is nothing to add")
    source = f"{readings[0].source}, sum over {over}"
    missing = next((reading for reading in readings if reading.value is None), None)
    if missing is not None:
        return Reading.missing(source, missing.reason or "not measured")
    bad = next((reading for reading in readings if not reading.valid), None)
    value = sum(reading.value or 0.0 for reading in readings)
    return Reading(value=value, source=source, valid=bad is None, reason=bad.reason if bad else None)


def highest_memory(memories: Sequence[Memory], of: str = "ranks") -> Memory:
    """The largest of several windows or ranks, instrument by instrument; missing where there are none."""
    readings = {name: [getattr(memory, name) for memory in memories] for name in Memory.model_fields}
    return Memory(**{name: largest(found, of) for name, found in readings.items()})


# --- the whole job ---------------------------------------------------------------------------------------------------


def of_job(result: CellResult, logs: Sequence[RankLog], environment: Environment) -> CellResult:
    """The record of rank 0 with what all ranks have measured; ``environment`` is that of the job.

    Of an attempt that failed it is the record of the first rank that did, and ``logs`` holds that rank alone.
    """
    return result.model_copy(
        update={
            "environment": environment,
            "phases": job_phases(logs),
            "training_memory": job_memory(logs),
            "counters": result.counters | job_counters(logs),
            "flags": (*result.flags, *further_flags(logs)),
            "ranks": tuple(log.facts for log in logs),
        }
    )


def job_phases(logs: Sequence[RankLog]) -> tuple[Phase, ...]:
    """The phases of rank 0 with the memory, energy and GPUs of all ranks.

    Ranks do the same work in the same phases; one that only rank 0 has, such as building a cache, stays as it is.
    """
    others = [_by_name(log.phases) for log in logs[1:]]
    merged = []
    for key, phase in _by_name(logs[0].phases).items():
        same = [phase, *(phases[key] for phases in others if key in phases)]
        merged.append(phase if len(same) == 1 else _merged(same))
    return tuple(merged)


def _by_name(phases: Iterable[Phase]) -> dict[tuple[str, str, int], Phase]:
    """Phases by kind, name and how often there was one of both before."""
    seen: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, str, int], Phase] = {}
    for phase in phases:
        found[phase.kind, phase.name, seen[phase.kind, phase.name]] = phase
        seen[phase.kind, phase.name] += 1
    return found


def _merged(same: Sequence[Phase]) -> Phase:
    gpus = [phase.gpu for phase in same if phase.gpu is not None]
    return same[0].model_copy(
        update={
            "memory": highest_memory([phase.memory for phase in same]),
            "energy_j": total([phase.energy_j for phase in same], "the ranks"),
            "gpu": _merged_gpus(gpus) if gpus else None,
        }
    )


def _merged_gpus(gpus: Sequence[GpuFacts]) -> GpuFacts:
    throttled: dict[str, float] = {}
    for gpu in gpus:
        for cause, share in gpu.throttled.items():
            throttled[cause] = max(throttled.get(cause, 0.0), share)
    return GpuFacts(
        utilisation_percent=_combined([gpu.utilisation_percent for gpu in gpus], _mean),
        temperature_c=_combined([gpu.temperature_c for gpu in gpus], max),
        sm_clock_mhz=_combined([gpu.sm_clock_mhz for gpu in gpus], min),
        other_processes=max(gpu.other_processes for gpu in gpus),
        throttled=throttled,
    )


def job_memory(logs: Sequence[RankLog]) -> Memory | None:
    """Peaks of training: those of the rank with the most."""
    memories = [log.training_memory for log in logs]
    known = [memory for memory in memories if memory is not None]
    return highest_memory(known) if known and len(known) == len(memories) else None


def job_counters(logs: Sequence[RankLog]) -> dict[str, Reading]:
    """The mean use of the GPUs; of any other counter of the instruments the worst of the ranks."""
    counters = {}
    for name, reading in logs[0].counters.items():
        how, combine = _COMBINED.get(name, ("maximum", max))
        value = _combined([log.counters[name].value for log in logs if name in log.counters], combine)
        if value is not None:
            reading = Reading(value=value, source=f"{reading.source}; {how} of the ranks")
        counters[name] = reading
    return counters


def further_flags(logs: Sequence[RankLog]) -> tuple[Flag, ...]:
    """Of each kind of flag that rank 0 does not have the one of the first rank that has it, with that rank."""
    found = {flag.code: flag for flag in logs[0].flags}
    for log in logs[1:]:
        for flag in log.flags:
            found.setdefault(flag.code, flag.model_copy(update={"message": f"rank {log.rank}: {flag.message}"}))
    return tuple(flag for flag in found.values() if flag not in logs[0].flags)


def job_environment(environments: Sequence[Environment]) -> Environment:
    """The environment of rank 0 with the devices of all; its key names their number."""
    first, ranks = environments[0], len(environments)
    names = Counter(one.device_name for one in environments)
    threads = f"{first.cpu_threads} thread{'s' if first.cpu_threads > 1 else ''}"
    if first.device_kind == "cuda":
        devices = " + ".join(f"{number} x {name}" for name, number in names.items())
        key = f"{devices}, driver {first.driver or 'unknown'}, {threads} each"
    else:
        key = f"{' + '.join(names)}, {ranks} ranks of {threads}"
    nodes = len({(one.hostname_hash, one.node) for one in environments})
    key += f", {nodes} nodes" if nodes > 1 else ""
    return first.model_copy(
        update={"device_key": with_neighbours(key), "devices": tuple(one.device_name for one in environments)}
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_COMBINED: Mapping[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "gpu_utilisation_percent": ("mean", _mean),
    "gpu_sm_clock_mhz": ("minimum", min),
}
"""How the counters of all ranks become one, where it is not their maximum."""


def _combined(values: Sequence[float | None], combine: Callable[[Sequence[float]], float]) -> float | None:
    known = [value for value in values if value is not None]
    return combine(known) if known else None

"""The line that says how fine the instruments were: noise floor of the device, cost of harness and sampler."""

from __future__ import annotations

from tpme.reports.data.load import counter_values
from tpme.reports.data.section import Section


def instruments(section: Section) -> str:
    """Noise floor, overhead and sampler, each the largest that the records of the section carry."""
    time, memory, overhead, sampler = (
        _largest(section, name)
        for name in ("noise_time_ratio", "noise_memory_ratio", "overhead_ratio", "sampler_core_share")
    )
    where = (
        "the noisiest of these devices"
        if len({recorded.device_key for recorded in section.records}) > 1
        else "this device"
    )
    told = [f"Noise floor of {where}: "]
    if time is None or memory is None:
        told[0] += "not measured (tpme doctor --noise)"
    else:
        told[0] += f"time ±{time:.1%}, memory ±{memory:.1%} between runs of the same cell"
    if overhead is not None:
        told.append(f"the harness adds {overhead:.2%} to an epoch")
    if sampler is not None:
        told.append(f"the sampler took at most {sampler:.1%} of one core")
    return "; ".join(told).replace("%", " %") + "."


def _largest(section: Section, name: str) -> float | None:
    return max(counter_values((recorded.result for recorded in section.records), name), default=None)

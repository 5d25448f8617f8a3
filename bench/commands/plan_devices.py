"""What ``tpme plan`` shows of cells that several devices train together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tpme.bench.commands.plan_words import FITS, in_bytes, in_digits, in_time, plain_table, row_label, scale_of
from tpme.bench.quantities import MISSING

if TYPE_CHECKING:
    from tpme.bench.counting.devices import DeviceProfile
    from tpme.bench.run.plan import MatrixPlan, PlannedCell
    from tpme.bench.run.plan_together import OnDevices

NOT_KNOWN = "not known"


def group_words(planned: PlannedCell) -> str:
    """The devices that train a cell together, in words; empty for a single one."""
    on = planned.on_devices
    if on is None:
        return ""
    return f"{on.devices} devices on {on.nodes} node{'s' if on.nodes > 1 else ''}"


def devices_table(cells: list[PlannedCell], device: DeviceProfile | None, peak: str) -> Table:
    """A row for each cell: memory, traffic and, for a device, times of a step, speed-up and efficiency.

    Args:
        cells: on the same number of devices. device: their profile. peak: header of the planned peak.
    """
    plans = [planned.on_devices for planned in cells if planned.on_devices and planned.on_devices.problem is None]
    size, size_unit = scale_of((plan.peak_bytes or 0 for plan in plans), "B")
    sent, sent_unit = scale_of((sum(plan.traffic_bytes.values()) for plan in plans), "B")
    table = plain_table("Method", f"{peak}\n{size_unit}", f"Sent\n/step {sent_unit}")
    if device is not None:
        for name in ("Compute\n/step", "Collect.\n/step", "Epoch\ntime", "Speed-\nup", "Effi-\nciency", "Fits"):
            table.add_column(name, justify="right", no_wrap=True)
    for planned in cells:
        if planned.work is None or planned.on_devices is None or planned.on_devices.problem:
            table.add_row(row_label(planned, cells), *[MISSING] * (len(table.columns) - 1))
            continue
        row: list[str | Text] = _sizes(planned.on_devices, size, sent)
        if device is not None:
            row += _times(planned.on_devices, planned.work.epoch_steps)
        table.add_row(row_label(planned, cells), *row)
    return table


def _sizes(on: OnDevices, size: float, sent: float) -> list[str | Text]:
    return [in_digits((on.peak_bytes or 0) / size), in_digits(sum(on.traffic_bytes.values()) / sent)]


def _times(on: OnDevices, epoch_steps: float) -> list[str | Text]:
    epoch_s = None if on.step_s is None else on.step_s * epoch_steps
    times = (on.compute_s, on.collectives_s, epoch_s)
    return [
        *(NOT_KNOWN if time is None else in_time(time) for time in times),
        NOT_KNOWN if on.speed_up is None else in_digits(on.speed_up),
        NOT_KNOWN if on.speed_up is None else f"{on.speed_up / on.devices:.0%}",
        FITS[on.fits] if on.fits else MISSING,
    ]


def devices_notes(plan: MatrixPlan) -> list[str]:
    """What was assumed of cells on several devices, which rows train on one, and what the whole matrix takes."""
    on = [planned.on_devices for planned in plan.cells if planned.on_devices]
    if not on:
        return []
    notes = [
        "Together: items and users of a step are dealt out evenly; a row is the device with most work. Sent: by each "
        "device, in rings. Collectives: nothing of them is overlapped with the computation, which is an upper bound."
    ]
    if plan.device is not None:
        notes.append(_links(plan.device, max(plan.nodes for plan in on)))
    for problem in dict.fromkeys(plan.problem for plan in on if plan.problem):
        labels = [cell.label for cell in plan.cells if cell.on_devices and cell.on_devices.problem == problem]
        notes.append(f"On one device alone: {', '.join(dict.fromkeys(labels))}: {problem}.")
    if (whole := plan.all_cells) is not None:
        total, beside, after = map(in_time, (whole.device_s, whole.side_by_side_s, whole.one_by_one_s))
        group = group_words(plan.cells[0])
        notes.append(
            f"All epochs of all cells ({whole.cells:,}): {total} of one device. On {group}: {beside} side by side, "
            f"each on one device; {after} one after the other, each on all of them. Caches, evaluation and start-up "
            "are not included."
        )
    return notes


def _links(device: DeviceProfile, nodes: int) -> str:
    """The rates of the links that the collectives use."""
    if device.link_bytes_per_s is None:
        return (
            f"Time of collectives is not known: the device profile '{device.name}' has no link_bytes_per_s; a profile "
            "in a TOML file may give it."
        )
    links = f"{in_bytes(device.link_bytes_per_s)}/s within a node"
    if nodes > 1:
        links += f", {in_bytes(device.node_link_bytes_per_s)}/s between nodes"
    return f"Links: {links}, at {device.efficiency:.0%}; the slowest one bounds the ring."

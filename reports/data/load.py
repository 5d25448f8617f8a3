"""Read records into a table: ``load(paths)`` returns a row for every cell, units in the column names.

Of a run folder only the cells of its last matrix count, of a cell its newest version and latest attempt. Ranks and
samples stay in their files: the columns ``ranks_path`` and ``samples_path`` name them, ``load_ranks`` and
``load_samples`` read them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from tpme.bench.errors import UserError
from tpme.bench.parsing import read_json
from tpme.bench.record import (
    CELLS_FILE,
    CellResult,
    Phase,
    RecordError,
    cell_id,
    find_attempts,
    find_results,
    read_result,
)
from tpme.bench.side_files import Samples, damage, side_file
from tpme.reports.data.columns import row_of
from tpme.reports.data.trials import select_trials
from tpme.reports.data.user_ranks import REPORTED, mean_gains

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Recorded:
    """One record and its path."""

    path: Path
    result: CellResult
    device_key: str
    """That of the record, or of its neighbours where the attempt ended before it knew the device."""
    superseded: int = 0
    """Number of older records of the same cell on the same device that this one replaces."""
    latest: bool = True
    """False for an earlier attempt, and for a record that a later run on the same device replaced."""

    def beside(self, name: str) -> str | None:
        """Path of the file ``ranks`` or ``samples`` beside the record, checked; None where there is none."""
        file = side_file(self.path, self.result, name)
        return None if file is None else str(file)


def load(paths: Iterable[Path | str], *, history: bool = False) -> pd.DataFrame:
    """One row a cell from the records below ``paths`` (folders or record files); ``history`` as in ``read``.

    Rows that are learning-rate trials of one method carry ``selected``, ``search_trials`` and ``search_wall_s``
    (see ``tpme.reports.data.trials``). ``recall_10``, ``ndcg_10`` and the other cut-offs are means over the test users.
    Missing values are NaN or None; the ``*_reason`` column beside them says why.

    Raises:
        UserError: there is no record, or one cannot be read; the message names the file.
    """
    return with_quality(to_frame(read(paths, history=history)))


def read(paths: Iterable[Path | str], *, history: bool = False) -> list[Recorded]:
    """The latest record of each cell below ``paths``, sorted by path.

    Args:
        paths: folders or record files.
        history: also the cells of earlier matrices of a run folder (``cells.json`` names those of the last one), and
            the cells as older versions of the measured code ran them.

    Raises:
        UserError: there is no record, or one cannot be read; the message names the file.
    """
    roots = [Path(path) for path in paths]
    found = find_results(roots)
    records = _latest(found if history else of_last_matrix(found, roots), history)
    if not records:
        where = ", ".join(str(root) for root in roots)
        if found:
            raise UserError(f"{where}: no cell of the last matrix has ended; 'tpme report --all' shows earlier ones")
        raise UserError(f"{where}: no records (attempt-*.json) in there; name a folder that 'tpme run' wrote")
    return records


def read_every(paths: Iterable[Path | str]) -> list[Recorded]:
    """The records of ``read``, followed by all others below ``paths``, which are not ``latest``.

    Damaged ones that a later attempt at their cell has replaced are left out.
    """
    roots = [Path(path) for path in paths]
    latest = _latest(of_last_matrix(find_results(roots), roots), history=False)
    known = {recorded.path.resolve() for recorded in latest}
    files = {path.resolve(): path for path in find_attempts(roots)}
    if not files:
        return read(roots)  # says what is missing
    last = set(find_results(roots))
    others = [path for resolved, path in files.items() if resolved not in known]
    results = {path: read_result(path) for path in others if path in last or _is_whole(path)}
    keys = _device_keys({recorded.path: recorded.result for recorded in latest} | results)
    return [*latest, *(Recorded(path, results[path], keys[path], latest=False) for path in sorted(results))]


def _is_whole(path: Path) -> bool:
    try:
        return damage(path, read_result(path), ("ranks", "samples")) is None
    except RecordError:
        return False


def to_frame(records: Sequence[Recorded]) -> pd.DataFrame:
    """The table of ``load`` without the test quality, from records already read; row ``i`` is ``records[i]``."""
    # What ended before it knew its data has that of its neighbours.
    known = [recorded.result.dataset for recorded in records if recorded.result.dataset is not None]
    users = {data.fingerprint: data.users for data in known}
    return select_trials(_with_builds(pd.DataFrame([_row(recorded, users) for recorded in records])))


def with_quality(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of cells with test Recall and NDCG at the reported cut-offs; NaN for a cell without ranks."""
    names = [f"{metric}_{k}" for metric, k in REPORTED]
    return frame.join(pd.DataFrame(list(map(mean_gains, frame["ranks_path"])), columns=names, index=frame.index))


def thin(samples: Samples, most: int = 400) -> tuple[Array, Array]:
    """Time and memory of at most ``most`` samples; the largest of neighbours stays, so no peak is lost.

    Samples without a reading are left out.
    """
    read = np.isfinite(samples.sample_bytes)
    time_s, used = samples.sample_t_s[read], samples.sample_bytes[read]
    stride = max(1, math.ceil(len(used) / most))
    starts = np.arange(0, len(used), stride)
    ends = np.minimum(starts + stride, len(used)) - 1
    return time_s[ends], np.maximum.reduceat(used, starts) if len(used) else used


def stretches(result: CellResult, name: Callable[[Phase], str]) -> list[tuple[str, float, float]]:
    """Name, start and end (seconds) of the phases of a cell; neighbours with the same name are merged."""
    ordered = sorted(result.phases, key=lambda phase: phase.start_s)
    runs = [(key, list(phases)) for key, phases in groupby(ordered, key=name)]
    return [(key, phases[0].start_s, phases[-1].start_s + phases[-1].wall_s) for key, phases in runs]


def counter_values(results: Iterable[CellResult], name: str) -> list[float]:
    """The valid values of a counter, one for each record that has one."""
    readings = (result.counters.get(name) for result in results)
    return [reading.value for reading in readings if reading and reading.valid and reading.value is not None]


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Suspend garbage collection: all records stay alive, and every pass would scan those read before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.unfreeze()  # moves all to the oldest generation at once; each younger one would scan it
            gc.enable()


def _with_builds(frame: pd.DataFrame) -> pd.DataFrame:
    """The table in which every cell that trains on a cache has the peak of the build, whichever cell did it.

    Cells of one device that quote the same build time and size trained on the same cache.
    """
    frame = frame.assign(**{name: frame[name].astype(float) for name in ("peak_bytes", "cache_peak_bytes")})
    same = frame.groupby(["device_key", "cache_build_s", "cache_bytes"])  # without a cache: NaN
    built = same["cache_peak_bytes"].transform("max")
    higher = built > frame["peak_bytes"].fillna(0)
    return frame.assign(
        cache_peak_bytes=built,
        cache_built=same["cache_built"].transform("max").fillna(False).astype(bool),
        peak_bytes=frame["peak_bytes"].mask(higher, built),
        peak_phase=frame["peak_phase"].mask(higher, "cache"),
    )


def _row(recorded: Recorded, users: Mapping[str, int]) -> dict[str, Any]:
    return {
        "path": str(recorded.path),
        "superseded": recorded.superseded,
        **row_of(recorded.result, recorded.device_key, users.get(recorded.result.cell.dataset_fingerprint)),
        "ranks_path": recorded.beside("ranks"),
        "samples_path": recorded.beside("samples"),
    }


# --- which records ------------------------------------------------------------------------------------------


def of_last_matrix(paths: Iterable[Path], roots: Sequence[Path]) -> list[Path]:
    """The records that are of the last matrix of their run folder, or were named themselves."""
    last: dict[Path, frozenset[str] | None] = {}
    named = {root.absolute() for root in roots}

    def is_current(path: Path) -> bool:
        path = path.absolute()  # from within "cells" the path would not say where it lies
        folder = path.parent
        if folder.parent.name != "cells" or not {path, folder}.isdisjoint(named):
            return True
        run = folder.parent.parent
        if run not in last:
            last[run] = _cells_of(run)
        names = last[run]
        return names is None or folder.name in names

    return [path for path in paths if is_current(path)]


def _cells_of(run: Path) -> frozenset[str] | None:
    """The folders of the cells of a run folder's last matrix; None where it does not say."""
    try:
        return frozenset(read_json(run / CELLS_FILE)["cells"])
    except FileNotFoundError:
        return None
    except (UserError, KeyError, TypeError):
        raise UserError(f"{run / CELLS_FILE}: not readable; delete it, or run the matrix again") from None


def _latest(paths: Iterable[Path], history: bool) -> list[Recorded]:
    """The newest record of each cell on each device, sorted by path; with ``history`` of each version of its code."""
    files = {path.resolve(): path for path in paths}
    with _collector_paused():
        results = {path: read_result(path) for path in sorted(files.values())}
    keys = _device_keys(results)
    latest: dict[tuple[str, ...], Recorded] = {}
    for path, result in results.items():
        who = result.source.name if result.source else ""
        identity = keys[path], who, result.cell_id if history else cell_id(result.cell, "any version")
        old = latest.get(identity)
        superseded = 0 if old is None else old.superseded + 1
        newest = Recorded(path, result, keys[path]) if old is None or _age(result) >= _age(old.result) else old
        latest[identity] = replace(newest, superseded=superseded)
    return sorted(latest.values(), key=lambda recorded: recorded.path)


def _age(result: CellResult) -> tuple[str, int]:
    return result.started_at, result.attempt


def _device_keys(results: dict[Path, CellResult]) -> dict[Path, str]:
    """Device key of every record; one that ended before it knew its device takes that of its run, if unique."""
    known: dict[tuple[Path | None, str], set[str]] = {}
    for path, result in results.items():
        if result.environment is not None:
            for scope in (path.parent.parent, None):
                known.setdefault((scope, result.cell.device), set()).add(result.environment.device_key)
    keys = {}
    for path, result in results.items():
        if result.environment is not None:
            keys[path] = result.environment.device_key
            continue
        candidates = (known.get((scope, result.cell.device), set()) for scope in (path.parent.parent, None))
        keys[path] = next(
            (next(iter(names)) for names in candidates if len(names) == 1), f"unknown {result.cell.device} device"
        )
    return keys

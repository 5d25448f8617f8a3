"""pytest plug-in: ``tpme_contract`` checks a method, ``tpme_cell`` runs a cell, ``tpme_recorded`` reads what a Recorder
wrote, the marker ``tpme`` limits the cost of either; ``tpme_check`` compares records with a baseline.

    def test_my_method(tpme_contract):
        tpme_contract("norms", methods_path="methods")

    @pytest.mark.tpme(max_params=60_000, max_saved_bytes=40_000_000)
    def test_cost(tpme_cell):
        cell = tpme_cell("norms", methods_path="methods")
        assert cell.counters["forward_flops"] < 2e10

    @pytest.mark.tpme(max_params=60_000)
    def test_own_loop(tpme_recorded, tpme_check, tmp_path):
        train(folder=tmp_path)  # with a Recorder
        tpme_recorded(tmp_path)
        tpme_check(tmp_path, baseline="baseline.json")

Exact counters are the same on every machine, so such a test cannot flake. Where pytest-benchmark is installed, the
times of the training steps go into its table and its JSON, with memory and counters in ``extra_info``.

pytest loads this module in every session, so all imports of this package happen inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tpme.bench.contract.checks import CheckResult
    from tpme.bench.record import CellResult
    from tpme.reports.data.load import Recorded
    from tpme.reports.gate.verdict import GateReport

LIMITS: dict[str, tuple[str, ...]] = {
    "max_params": ("trainable_parameters",),
    "max_saved_bytes": ("saved_bytes",),
    "max_flops": ("forward_flops", "backward_flops"),
    "max_stored_bytes": ("stored_bytes",),
    "max_cache_bytes": ("cache_bytes",),
}
"""Keywords of the marker, and the counters whose sum each of them limits."""
SMALL = (
    "datasets.synthetic.users=200",
    "datasets.synthetic.items=120",
    "training.users_per_batch=16",
    "training.epochs=2",
)
"""Settings laid over the preset ``demo`` where a test names no matrix."""
_UNUSED = "is marked tpme(...), but ran no cell: nothing was measured; call the fixture tpme_cell or tpme_recorded"


@dataclass(frozen=True)
class MeasuredCell:
    """A finished cell: its record, its exact counters by name, and its step times without warm-up (seconds)."""

    result: CellResult
    counters: Mapping[str, float]
    step_s: npt.NDArray[np.float64]


RunCell = Callable[..., MeasuredCell]
ReadCell = Callable[["str | Path"], MeasuredCell]
RunContract = Callable[..., "list[CheckResult]"]
RunCheck = Callable[..., "GateReport"]


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", f"tpme({', '.join(f'{name}=...' for name in LIMITS)}): limits of a cell")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a marker that sets no limit."""
    limits = _limits(item)
    if limits is not None and "_tpme_cells" not in getattr(item, "fixturenames", ()):
        pytest.fail(f"{item.name} {_UNUSED}", pytrace=False)


@pytest.fixture
def _tpme_cells(request: pytest.FixtureRequest) -> Iterator[Callable[[MeasuredCell], MeasuredCell]]:
    """Takes every cell that a test measures or reads, and holds it to the marker's limits; a marked test needs one."""
    cells: list[MeasuredCell] = []

    def take(cell: MeasuredCell) -> MeasuredCell:
        cells.append(cell)
        if len(cells) == 1:
            _report_benchmark(request, cell)
        _check_limits(request.node, cell)
        return cell

    yield take
    if _limits(request.node) is not None and not cells:
        pytest.fail(f"{request.node.name} {_UNUSED}", pytrace=False)


@pytest.fixture
def tpme_cell(
    request: pytest.FixtureRequest, tmp_path: Path, _tpme_cells: Callable[[MeasuredCell], MeasuredCell]
) -> RunCell:
    """A function that runs one cell in its own process and returns what it measured.

    ``tpme_cell(method, *, matrix=None, options=None, cached=False, methods_path=(), settings=(), device="cpu")``:
    ``matrix`` is a preset or TOML file that gives one data set, one pair of encoders and one seed; its methods are
    replaced by ``method``. Folders are relative to the root of the tests.
    """
    numbers = count()

    def run(method: str, **settings: Any) -> MeasuredCell:
        return _tpme_cells(_run(method, tmp_path / f"tpme-{next(numbers)}", request.config.rootpath, **settings))

    return run


@pytest.fixture
def tpme_recorded(request: pytest.FixtureRequest, _tpme_cells: Callable[[MeasuredCell], MeasuredCell]) -> ReadCell:
    """A function that reads the record of a ``Recorder`` and returns what it measured.

    ``tpme_recorded(path)``: the record, which is ``run.path``, or a run folder with one cell, of which the last attempt
    counts. A training that failed fails the test.
    """

    def read(path: str | Path) -> MeasuredCell:
        from tpme.bench.errors import UserError
        from tpme.reports.gate.measures import read_records

        try:
            records = read_records([request.config.rootpath / path])
        except UserError as error:
            pytest.fail(f"tpme_recorded: {error}", pytrace=False)
        if len(records) != 1:
            pytest.fail(f"tpme_recorded: {path} holds {len(records)} cells; name the record of one", pytrace=False)
        return _tpme_cells(_measured("tpme_recorded", records[0]))

    return read


@pytest.fixture
def tpme_check(request: pytest.FixtureRequest) -> RunCheck:
    """A function that compares records with a baseline, as ``tpme check`` does, and returns its report.

    ``tpme_check(runs, *, baseline, require=(), time_threshold=0.1, ...)``: ``runs`` is a run folder or several,
    ``baseline`` a file of ``tpme baseline`` or a run folder; thresholds are named as the options of ``tpme check``. The
    test fails where that command does not end with exit code 0: for what regressed, and for what may have.
    """

    def check(
        runs: str | Path | Sequence[str | Path],
        *,
        baseline: str | Path,
        require: str | Sequence[str] = (),
        **policy: Any,
    ) -> GateReport:
        from tpme.bench.commands.gate import policy_of
        from tpme.bench.errors import UserError
        from tpme.reports.gate.check import check_runs
        from tpme.reports.gate.formats import plain

        root, kinds = request.config.rootpath, [require] if isinstance(require, str) else require
        try:
            report = check_runs(_folders(runs, root), root / baseline, policy_of(kinds, **policy))
        except UserError as error:
            pytest.fail(f"tpme_check: {error}", pytrace=False)
        if report.exit_code:
            pytest.fail(plain(report), pytrace=False)
        return report

    return check


@pytest.fixture
def tpme_contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunContract]:
    """A function that runs the contract suite on a method, as ``tpme method check`` does, and returns every result.

    ``tpme_contract(method, *, options=None, methods_path=(), slow=False)``: a check that the method does not pass fails
    the test with one line. Folders are relative to the root of the tests.
    """
    import gc

    def run(
        method: str,
        *,
        options: Mapping[str, Any] | None = None,
        methods_path: str | Path | Sequence[str | Path] = (),
        slow: bool = False,
    ) -> list[CheckResult]:
        from tpme.bench.contract.checks import check_method
        from tpme.bench.contract.world import SmallWorld
        from tpme.bench.errors import UserError

        world, folders = SmallWorld(tmp_path / "tpme-contract"), _folders(methods_path, request.config.rootpath)
        try:
            results = list(check_method(world, method, options, methods_path=folders, slow=slow))
        except UserError as error:
            pytest.fail(f"tpme_contract: {error}", pytrace=False)
        failed = [str(result) for result in results if result.status == "failed"]
        if failed:
            pytest.fail("\n".join(failed), pytrace=False)
        if not any(result.status == "passed" for result in results):
            pytest.fail(f"tpme_contract: no check ran: {results[0].message}", pytrace=False)
        return results

    yield run
    gc.unfreeze()  # the suite calls gc.freeze()


def _folders(methods_path: str | Path | Sequence[str | Path], root: Path) -> list[Path]:
    return [root / path for path in ([methods_path] if isinstance(methods_path, str | Path) else methods_path)]


def _run(
    method: str,
    folder: Path,
    root: Path,
    *,
    matrix: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    cached: bool = False,
    methods_path: str | Path | Sequence[str | Path] = (),
    settings: Sequence[str] = (),
    device: str = "cpu",
    store: Path | None = None,
) -> MeasuredCell:
    from rich.console import Console

    from tpme.bench.errors import UserError
    from tpme.bench.run.launch import run_matrix, store_folder
    from tpme.bench.run.matrix import MethodEntry, load_matrix, presets
    from tpme.reports.gate.measures import read_records

    try:
        if matrix is None:
            source = load_matrix("demo", [*SMALL, *settings])
        else:
            source = load_matrix(str(matrix) if str(matrix) in presets() else str(root / matrix), settings)
        entry = MethodEntry(name=method, options=dict(options or {}), cached=cached)
        results = run_matrix(
            source.model_copy(update={"methods": (entry,)}),
            folder,
            store=store_folder(store),
            device=device,
            methods_path=_folders(methods_path, root),
            console=Console(quiet=True),
        )
    except UserError as error:
        pytest.fail(f"tpme_cell: {error}", pytrace=False)
    if len(results) != 1:
        pytest.fail(f"tpme_cell: the matrix gives {len(results)} cells, tpme_cell runs one", pytrace=False)
    (recorded,) = read_records([folder])
    return _measured("tpme_cell", recorded)


def _measured(fixture: str, recorded: Recorded) -> MeasuredCell:
    """The cell of a record; fails the test where its training did not finish."""
    from tpme.reports.gate.measures import counters
    from tpme.reports.gate.readings import step_times

    result = recorded.result
    if result.status != "ok":
        message = result.failure.message if result.failure else "no message"
        pytest.fail(f"{fixture}: {result.cell.method} ended as {result.status}: {message}", pytrace=False)
    return MeasuredCell(result, counters(result), step_times(recorded))


def _limits(item: pytest.Item) -> dict[str, float] | None:
    """The marker's limits; fails the test for an unknown one."""
    marker = item.get_closest_marker("tpme")
    if marker is None:
        return None
    unknown = [*map(repr, marker.args), *(name for name in marker.kwargs if name not in LIMITS)]
    if unknown or not marker.kwargs:
        problem = f"{unknown[0]} is not a limit" if unknown else "it sets no limit"
        pytest.fail(f"{item.name}: marker tpme: {problem}; choose from {', '.join(LIMITS)}", pytrace=False)
    return dict(marker.kwargs)


def _check_limits(item: pytest.Item, cell: MeasuredCell) -> None:
    label, broken = cell.result.cell.label, []
    for name, limit in (_limits(item) or {}).items():
        missing = [counter for counter in LIMITS[name] if counter not in cell.counters]
        if missing:
            reading = cell.result.counters.get(missing[0])
            reason = reading.reason if reading is not None else "the cell does not count it"
            broken.append(f"{name}={limit:,}: {missing[0]} of {label} is not known: {reason}")
            continue
        value = sum(cell.counters[counter] for counter in LIMITS[name])
        if value > limit:
            broken.append(f"{label} has {' + '.join(LIMITS[name])} = {value:,.0f}, the limit is {name}={limit:,}")
    if broken:
        pytest.fail("\n".join(broken), pytrace=False)


# --- pytest-benchmark ----------------------------------------------------------------------------------------


def _report_benchmark(request: pytest.FixtureRequest, cell: MeasuredCell) -> None:
    """Hand the step times to pytest-benchmark, unless the test uses it itself: its fixture works once."""
    config = request.config
    if not config.pluginmanager.hasplugin("benchmark") or "benchmark" in request.fixturenames:
        return
    if config.getoption("benchmark_skip", False) or not len(cell.step_s):
        return
    marker = request.node.get_closest_marker("benchmark")
    options = {} if marker is None else marker.kwargs
    request.node.add_marker(pytest.mark.benchmark(**options, timer=_replayed(cell.step_s)), append=False)
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(_extra_info(cell))
    benchmark.pedantic(_step, rounds=len(cell.step_s), iterations=1)


def _step() -> None:
    """Stands for a training step, which the cell ran in its own process."""


def _replayed(step_s: Sequence[float] | npt.NDArray[np.float64]) -> Callable[[], float]:
    """A clock that makes every round last as long as the training step did: 0, first, 0, second, ..."""
    times = iter([moment for seconds in step_s for moment in (0.0, float(seconds))])

    def training_step_clock() -> float:
        return next(times)

    return training_step_clock


def _extra_info(cell: MeasuredCell) -> dict[str, Any]:
    from tpme.reports.gate.readings import memory

    environment = cell.result.environment
    return {
        "tpme_cell": cell.result.cell.label,
        "device": environment.device_key if environment else None,
        "memory": memory(cell.result),
        "counters": dict(cell.counters),
    }

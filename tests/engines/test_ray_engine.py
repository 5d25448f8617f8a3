"""Cells on a real Ray cluster of two nodes on this machine, each with a store of its own: no files are shared."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest
from plain_record import CELL
from rich.console import Console

from tpme.bench.errors import UserError
from tpme.bench.record import Cell, CellResult, cell_id, read_result
from tpme.bench.run.engines import choice, parcels
from tpme.bench.run.engines.choice import make_engine
from tpme.bench.run.engines.profile import RunProfile
from tpme.bench.run.job import Job
from tpme.bench.run.launch import _run_missing, locked_run
from tpme.bench.run.progress import Screen
from tpme.bench.run.remaining import latest_attempt
from tpme.bench.run.version import code_version
from tpme.bench.task.fingerprint import sha256_of

if TYPE_CHECKING:
    from tpme.bench.run.live import LiveLog

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")

from tpme.bench.run.engines import ray as engine  # noqa: E402
from tpme.bench.run.engines import ray_cluster  # noqa: E402
from tpme.bench.run.engines.ray_cluster import cluster_address, connected  # noqa: E402
from tpme.bench.run.engines.ray_node import Order, Portion  # noqa: E402
from tpme.bench.run.engines.ray_tasks import Task  # noqa: E402

pytestmark = pytest.mark.slow
MEMORY = 100 * 2**20
TESTS = Path(__file__).parents[1]
RANKS = os.urandom(100_000)
STUB = """
import json, os, signal, sys, time
from pathlib import Path
from tpme.bench.lifetimes import die_with_launcher
die_with_launcher()
from plain_record import result
from tpme.bench.measure.environment import environment
from tpme.bench.record import write_result
from tpme.bench.run.job import Job
job = Job.model_validate_json(Path(sys.argv[1]).read_text())
seed = job.cell.seed
names = ("OMP_NUM_THREADS", "TPME_NODE", "TPME_CELLS_BESIDE", "TPME_STORE", "CUDA_VISIBLE_DEVICES")
told = {name: os.environ.get(name) for name in names} | {"data": str(job.dataset_path), "pid": os.getpid()}
log = Path(os.environ["STUB_LOG"])
with log.open("a") as ran:
    ran.write(json.dumps({"seed": seed, **told}) + "\\n")
job.file(".ranks.npz").write_bytes((job.dataset_path / "titles.bin").read_bytes())
if job.cell.options.get("does") == "lose" and (log.parent / f"hold-{seed}").exists():
    os.kill(os.getppid(), signal.SIGKILL)
until = time.monotonic() + 300
while time.monotonic() < until and (log.parent / f"hold-{seed}").exists():
    time.sleep(0.02)
own = {name: getattr(job, name) for name in ("cell", "cell_id", "attempt", "code_version")} | {"wall_s": time.time()}
write_result(result(**own, environment=environment("cpu")), job.file(".json"))
"""
"""Says what it was told, and writes its record once its file ``hold-SEED`` is gone."""


@dataclass
class Two:
    """A cluster of two nodes: ``one`` has a core, ``two`` has two and what passes for a GPU."""

    cluster: Any
    folder: Path

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def engine(self, same_node: bool = False, **settings: Any) -> engine.RayEngine:
        return engine.RayEngine(RunProfile(on="ray", address=self.address, **settings), same_node=same_node)

    def add(self, name: str, **has: Any) -> Any:
        own = {"TPME_STORE": str(self.folder / name), "STUB_LOG": str(self.folder / "log"), "PYTHONPATH": str(TESTS)}
        return self.cluster.add_node(node_name=name, env_vars=own, object_store_memory=MEMORY, **has)

    def ran(self) -> list[dict[str, Any]]:
        """What cells said as they started, in that order."""
        log = self.folder / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def hold(self, *seeds: int) -> None:
        for seed in seeds:
            (self.folder / f"hold-{seed}").touch()

    def left(self, stubs: Path) -> list[Path]:
        """What is left on nodes of the cells of a run."""
        return [*self.folder.glob(f"*/ray/{engine._mark(stubs / 'run')}-*")]

    def release(self) -> None:
        for path in self.folder.glob("hold-*"):
            path.unlink()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    from ray.cluster_utils import Cluster

    made = Two(Cluster(), tmp_path_factory.mktemp("nodes"))
    try:
        made.add("one", num_cpus=1, include_dashboard=False)
        made.add("two", num_cpus=2, num_gpus=1)
        yield made
    finally:
        made.cluster.shutdown()


@pytest.fixture
def two(cluster: Two) -> Iterator[Two]:
    """The cluster, where no cell has run."""
    (cluster.folder / "log").unlink(missing_ok=True)
    yield cluster
    cluster.release()


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cells of the engine are ``STUB``; gives a folder for the run."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    (tmp_path / "data" / "titles.bin").write_bytes(RANKS)
    run_stubs(tmp_path, monkeypatch)
    return tmp_path


def run_stubs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the cells of this process's engine be the stub in a folder."""
    command = [sys.executable, str(folder / "stub.py")]

    def run_stub(order: Order) -> Iterator[Any]:
        from tpme.bench.run import attempt
        from tpme.bench.run.engines.ray_node import run_cell

        attempt.command = lambda job_file, *_: [*command, str(job_file)]
        yield from run_cell(order)

    monkeypatch.setattr(engine, "run_cell", run_stub)


def jobs(folder: Path, seeds: Sequence[int], **changes: Any) -> list[Job]:
    module = find_spec("tpme.methods.fft")
    assert module is not None
    version = code_version(Path(str(module.origin)))
    cells = [Cell.model_validate(CELL.model_dump() | {"method": "fft", "seed": seed} | changes) for seed in seeds]
    return [
        Job(
            cell=cell,
            cell_id=cell_id(cell, version),
            code_version=version,
            dataset_path=folder / "data",
            store=folder,
            folder=folder / "run" / "cells" / f"cell-{cell.seed}",
            cache_limit_bytes=1,
            time_limit_s=400,
        )
        for cell in cells
    ]


def run(on: engine.RayEngine, all_jobs: Sequence[Job], said: io.StringIO | None = None) -> dict[int, CellResult]:
    """Run those jobs that are missing, as a launcher does; gives the records of all."""
    screen = Screen(Console(file=said or io.StringIO(), width=200), len(all_jobs))
    with locked_run(all_jobs[0].folder.parents[1]) as lock:
        results = _run_missing(all_jobs, [latest_attempt(job) for job in all_jobs], on, screen, lock)
    for job in all_jobs:
        result = results[job.folder]
        assert read_result(job.folder / f"attempt-{result.attempt}.json") == result
    return {job.cell.seed: results[job.folder] for job in all_jobs}


def beside(act: Callable[[], None]) -> threading.Thread:
    """``act`` in another thread, while the engine has the main one."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_cells_run_on_nodes_that_share_no_files(two: Two, stubs: Path) -> None:
    two.hold(1, 2, 3)

    def release() -> None:
        until(lambda: len(two.ran()) == 3)
        two.release()

    thread = beside(release)
    results = run(two.engine(), all_jobs := jobs(stubs, range(1, 7)))
    thread.join()
    ran = two.ran()
    assert sorted(cell["seed"] for cell in ran) == [1, 2, 3, 4, 5, 6]
    assert {cell["TPME_NODE"] for cell in ran[:3]} == {"one", "two"}
    for cell in ran:
        node, result = cell["TPME_NODE"], results[cell["seed"]]
        assert cell["TPME_STORE"] == str(two.folder / node)
        assert cell["data"] == str(two.folder / node / "shipped" / "data-f")
        assert (cell["OMP_NUM_THREADS"], cell["TPME_CELLS_BESIDE"]) == ("1", {"one": "1", "two": "2"}[node])
        assert result.environment is not None
        assert result.environment.node == node
        assert result.environment.device_key.endswith("2 cells at a time") == (node == "two")
        assert not psutil.pid_exists(cell["pid"])
    for job in all_jobs:
        assert sorted(path.name for path in job.folder.iterdir()) == [
            f"attempt-1{e}" for e in (".json", ".log", ".ranks.npz")
        ]
        assert job.file(".ranks.npz").read_bytes() == RANKS
    assert not [*two.folder.glob("*/ray/*"), *two.folder.glob("*/shipped/.*")]


def test_a_cell_owns_cores_and_gpus(two: Two, stubs: Path) -> None:
    results = run(two.engine(cpus=2), jobs(stubs, [1]))
    run(two.engine(gpus=1), jobs(stubs, [2], device="cuda"))
    cores, gpu = two.ran()
    assert (cores["OMP_NUM_THREADS"], cores["TPME_CELLS_BESIDE"], cores["TPME_NODE"]) == ("2", "1", "two")
    assert (gpu["CUDA_VISIBLE_DEVICES"], gpu["TPME_CELLS_BESIDE"], gpu["TPME_NODE"]) == ("0", "1", "two")
    assert results[1].status == "ok"


def test_cells_of_a_node_that_is_lost_run_again_elsewhere(two: Two, stubs: Path) -> None:
    lost, said = two.add("lost", num_cpus=1), io.StringIO()
    two.hold(3, 4, 5, 6)

    def lose() -> None:
        until(
            lambda: (
                len({cell["seed"] for cell in two.ran()}) == 6 and (stubs / "run/cells/cell-2/attempt-1.json").exists()
            )
        )
        first = {cell["seed"]: cell["pid"] for cell in two.ran() if cell["TPME_NODE"] == "lost"}
        two.cluster.remove_node(lost, allow_graceful=False)
        until(lambda: not any(map(psutil.pid_exists, first.values())))  # it ends with its node
        held = next(seed for seed in (3, 4, 5, 6) if seed not in first)
        (two.folder / f"hold-{held}").unlink()  # which makes room for one that was lost
        until(lambda: len(two.ran()) > 6)
        two.release()

    thread = beside(lose)
    results = run(two.engine(), all_jobs := jobs(stubs, range(1, 7)), said)
    thread.join()
    assert {result.status for result in results.values()} == {"ok"}
    ran = Counter(cell["seed"] for cell in two.ran())
    again = [seed for seed, times in ran.items() if times > 1]
    assert again
    assert {cell["TPME_NODE"] for cell in two.ran() if cell["seed"] in again} > {"lost"}
    assert ran[1] == ran[2] == 1
    assert said.getvalue().count("node lost was lost; the cell runs again elsewhere") == len(again)
    assert "raylet" not in said.getvalue()
    before = [job.file(".json").read_bytes() for job in all_jobs]
    run(two.engine(), all_jobs)
    assert [job.file(".json").read_bytes() for job in all_jobs] == before
    assert sum(ran.values()) == len(two.ran())


def test_a_cell_that_loses_its_node_each_time_is_a_failed_row(two: Two, stubs: Path) -> None:
    two.hold(1)
    results = run(two.engine(), all_jobs := [*jobs(stubs, [1], options={"does": "lose"}), *jobs(stubs, [2])])
    assert (results[1].status, results[2].status) == ("killed", "ok")
    assert results[1].failure is not None
    last = [cell["TPME_NODE"] for cell in two.ran() if cell["seed"] == 1]
    assert len(last) == engine.RETRIES + 1
    assert results[1].failure.message.endswith(f"(WorkerCrashedError); on node {last[-1]}")
    assert results[1].failure.message in all_jobs[0].file(".log").read_text()
    two.release()
    assert run(two.engine(), all_jobs)[1].attempt == 2  # such a cell is not finished
    assert not two.left(stubs)


def test_ctrl_c_ends_the_cells_and_the_same_command_runs_the_others(two: Two, stubs: Path) -> None:
    two.hold(2, 3, 4, 5)
    all_jobs = jobs(stubs, range(1, 6))
    run(two.engine(), all_jobs[:1])
    finished = all_jobs[0].file(".json")

    def interrupt() -> None:
        until(lambda: len(two.ran()) == 4)  # the cluster has room for three
        os.kill(os.getpid(), signal.SIGINT)

    thread = beside(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(two.engine(), all_jobs)
    thread.join()
    assert not any(psutil.pid_exists(cell["pid"]) for cell in two.ran())
    assert [path.name for path in finished.parents[1].iterdir()] == ["cell-1"]
    assert not two.left(stubs)
    before, ended = finished.read_bytes(), {cell["seed"] for cell in two.ran()} - {1}
    two.release()
    results = run(two.engine(), all_jobs)
    assert {result.status for result in results.values()} == {"ok"}
    assert finished.read_bytes() == before
    assert Counter(cell["seed"] for cell in two.ran()) == {seed: 1 + (seed in ended) for seed in range(1, 6)}


LAUNCHER = """
from pathlib import Path
import pytest
from engines import test_ray_engine as here
here.run_stubs(Path({folder!r}), pytest.MonkeyPatch())
profile = here.RunProfile(on="ray", address={address!r})
here.run(here.engine.RayEngine(profile), here.jobs(Path({folder!r}), [1, 2, 3]))
"""


def test_the_cells_of_a_killed_launcher_end_and_the_same_command_runs_them(two: Two, stubs: Path) -> None:
    two.hold(2, 3)
    all_jobs = jobs(stubs, [1, 2, 3])
    code = LAUNCHER.format(folder=str(stubs), address=two.address)
    launcher = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(TESTS)})
    until(lambda: all_jobs[0].file(".json").exists() and len(two.ran()) == 3)
    launcher.kill()
    launcher.wait()
    until(lambda: not any(psutil.pid_exists(cell["pid"]) for cell in two.ran()))
    finished = all_jobs[0].file(".json").read_bytes()
    two.release()
    results = run(two.engine(), all_jobs)
    assert {(result.status, result.attempt) for result in results.values()} == {("ok", 1)}
    assert all_jobs[0].file(".json").read_bytes() == finished
    assert Counter(cell["seed"] for cell in two.ran()) == {1: 1, 2: 2, 3: 2}
    assert not two.left(stubs)


def test_the_seeds_of_a_cell_stay_on_one_node(two: Two, stubs: Path) -> None:
    results = run(two.engine(same_node=True), jobs(stubs, range(4)))
    assert {result.status for result in results.values()} == {"ok"}
    assert len({cell["TPME_NODE"] for cell in two.ran()}) == 1


def test_what_no_node_can_run_is_refused_before_anything_runs(two: Two, stubs: Path) -> None:
    with pytest.raises(UserError, match="a cell needs 3 CPUs on one node, and no node has that"):
        run(two.engine(cpus=3), jobs(stubs, [1]))
    with pytest.raises(UserError, match=r"1 CPU and 2 GPUs on one node.*two 2 CPUs and 1 GPU"):
        run(two.engine(gpus=2), jobs(stubs, [1], device="cuda", training={"devices": 2}))
    other = [job.model_copy(update={"code_version": "0" * 12}) for job in jobs(stubs, [1])]
    with pytest.raises(UserError, match="has another version of tpme, or of method 'fft'"):
        run(two.engine(), other)
    assert not two.ran()
    assert not (stubs / "run" / "cells").exists()


def test_a_matrix_runs_end_to_end(two: Two, world: Any, harness: ModuleType, tmp_path: Path) -> None:
    """Real cells: cached and uncached, with a method, data and encoders from folders that no node has."""
    methods = tmp_path / "methods"
    methods.mkdir()
    (methods / "_helper.py").write_text('"""Helper."""\nfrom tpme.methods.lst import LST as Base\n')
    (methods / "mine.py").write_text(
        '"""A method of the tests."""\nfrom ._helper import Base\n\n\nclass Mine(Base):\n    pass\n\n\nMETHOD = Mine\n'
    )
    rows = [{"name": "mine", "cached": [False, True]}]  # which starts from the encoder's weights
    file = world.write(tmp_path / "matrix.toml", world.matrix(rows, seeds=[1, 2], modalities=["text"]))
    (tmp_path / "run.toml").write_text(f'[run]\non = "ray"\naddress = "{two.address}"\n')
    folder, store = tmp_path / "run", tmp_path / "store"
    command = ["run", str(file), "--profile", str(tmp_path / "run.toml"), "--methods-path", str(methods)]
    command += ["--out", str(folder), "--store", str(store), "--no-report"]
    done = harness.tpme(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    records = {path: read_result(path) for path in folder.glob("cells/*/attempt-*.json")}
    assert len(records) == 4
    for path, result in records.items():
        assert result.cell.text_encoder is not None
        assert result.cell.text_encoder.source == str(world.text)
        assert str(two.folder) not in path.read_text()  # no folder of a node
        for name, digest in result.digests.items():
            assert sha256_of(path.parent / result.files[name]) == digest
    caches = [result.cache for result in records.values() if result.cache is not None]
    assert [cache.built_by_attempt for cache in caches] == [False, False]  # but by a task of its own
    assert len({path.read_bytes() for path in two.folder.glob("*/features/*/manifest.json")}) == 1
    before = {path: path.read_bytes() for path in records}
    again = harness.tpme(*command)
    assert again.returncode == 0
    assert {path: path.read_bytes() for path in folder.glob("cells/*/attempt-*.json")} == before


# --- without a cluster -----------------------------------------------------------------------------------------------


def test_an_address_that_cannot_be_reached_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=f"Ray address {address}: cannot be reached"):
            cluster_address(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"Ray address {address}: cannot be reached"):
            cluster_address(None)
    for wrong in ("head", "head:port", "http://head:8265", "ray://head:10001"):
        with pytest.raises(UserError, match="give HOST:PORT"):
            cluster_address(wrong)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            RuntimeError("Version mismatch: Python: 3.11\nThis process: Python: 3.12"),
            "Version mismatch: Python: 3.11 This",
        ),
        (ConnectionError("Could not find any running Ray instance."), "no Ray cluster runs on this machine"),
        (None, "does not answer as a Ray cluster"),
    ],
)
def test_a_cluster_that_refuses_is_one_line(
    raised: Exception | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        if raised is None:
            time.sleep(0.5)
        else:
            raise raised

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray_cluster, "CONNECT_S", 0.1 if raised is None else 10)
    with pytest.raises(UserError, match=said) as error, connected("auto"):
        pass
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ray.exceptions.OutOfMemoryError("..."), "killed", "Ray ended it because its node ran out of memory"),
        (ray.exceptions.RayTaskError("f", "...", UserError("a clear line")), "error", "a clear line"),
        (ray.exceptions.RayTaskError("f", "...", OSError(28, "full")), "error", "full"),
    ],
)
def test_what_ends_a_task_is_a_failed_row(error: Exception, status: str, said: str, stubs: Path) -> None:
    [job] = jobs(stubs, [1])
    cells = engine._Cells([job], Screen(Console(file=io.StringIO()), 1), lambda _: Portion(1, 0), False)
    result = cells._result(Task(Order(job, {}, "", Portion(1, 0)), "fft", None, error=error))
    assert result is not None
    assert result.failure is not None
    assert (result.status, said in result.failure.message) == (status, True)
    assert read_result(job.file(".json")) == result


@pytest.mark.parametrize(("chunk", "files"), [(3, {"a": 7, "below/b": 0, "c": 5}), (100, {"a": 1}), (5, {})])
def test_a_parcel_is_unpacked_as_it_was_packed(
    chunk: int, files: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parcels, "CHUNK", chunk)
    for name, size in files.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(os.urandom(size))
    sizes = parcels.file_sizes(tmp_path / "here", files)
    chunks = tuple(parcels.read_chunks(tmp_path / "here", sizes))
    assert len(chunks) == parcels.number_of_chunks(sizes)
    assert all(len(part) == chunk for part in chunks[:-1])
    fetched = []

    def fetch(part: bytes) -> bytes:
        fetched.append(part)
        return part

    for _ in range(2):  # the second time it is there
        there = parcels.unpack(parcels.Parcel("p", sizes, chunks), tmp_path / "node", fetch)
        assert {name: (there / name).read_bytes() for name in files} == {
            name: (tmp_path / "here" / name).read_bytes() for name in files
        }
    assert len(fetched) == len(chunks)
    if chunks:
        with pytest.raises(ValueError, match="bytes are missing"):
            parcels.unpack(parcels.Parcel("q", sizes, chunks[:-1]), tmp_path / "node", bytes)
        assert [path.name for path in (tmp_path / "node").iterdir()] == ["p"]


def test_a_cache_is_put_where_none_is(tmp_path: Path) -> None:
    cache = tmp_path / "here"
    cache.mkdir()
    for name in ("states.npy", "manifest.json"):
        (cache / name).write_text(name)
    sizes = parcels.file_sizes(cache, ["states.npy", "manifest.json"])
    parcel = parcels.Parcel("k", sizes, tuple(parcels.read_chunks(cache, sizes)))
    there = tmp_path / "features" / "k"
    there.mkdir(parents=True)
    (there / "states.npy").write_text("of a build that was interrupted")
    for _ in range(2):
        parcels.unpack_cache(parcel, there, bytes)
        assert [(there / name).read_text() for name in sizes] == list(sizes)
        assert {path.name for path in there.iterdir()} <= {"lock", *sizes}
        parcel = parcels.Parcel("k", sizes, ())  # now nothing is fetched


@pytest.mark.parametrize("name", ["partition", "constraint", "container"])
def test_settings_of_slurm_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"\\[run\\] {name}: it is for Slurm"):
        engine.RayEngine(RunProfile(on="ray", **{name: "x"}))


def test_more_ranks_than_cores_of_a_cell_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cluster_address", lambda _: "head:6379")
    [job] = jobs(tmp_path, [1])
    training = job.cell.training.model_copy(update={"devices": 2})
    job = job.model_copy(update={"cell": job.cell.model_copy(update={"training": training})})
    engine.RayEngine(RunProfile(on="ray", cpus=2)).check([job])
    with pytest.raises(UserError, match=r"training.devices = 2: more than run.cpus = 1 of the profile$"):
        engine.RayEngine(RunProfile(on="ray")).check([job])


def test_an_address_is_for_ray_alone() -> None:
    with pytest.raises(UserError, match=r"\[run\] address: it is for Ray"):
        make_engine(RunProfile(address="head:6379"), device="cpu")


def test_logging_and_jobs_are_refused() -> None:
    with pytest.raises(UserError, match="--jobs"):
        make_engine(RunProfile(on="ray"), device="cpu", jobs=2)
    with pytest.raises(UserError, match="--log"):
        make_engine(RunProfile(on="ray"), device="cpu", live=cast("LiveLog", object()))


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--on ray needs ray: pip install .*\[ray\]"):
        make_engine(RunProfile(on="ray"), device="cpu")

"""Made-up records: valid ``CellResult`` files with ranks and samples, as a run would leave them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tpme.bench.record import (
    CacheFacts,
    Cell,
    CellResult,
    DatasetFacts,
    EncoderFacts,
    EncoderSpec,
    Environment,
    Epoch,
    Failure,
    Flag,
    Inference,
    LearningRates,
    Memory,
    Parameters,
    Phase,
    Reading,
    Representation,
    Timings,
    cell_id,
    read_result,
    write_result,
)

CODE = "c0ffee1234567890"
TEXT = EncoderSpec(source="builtin:tiny-text")
IMAGE = EncoderSpec(source="builtin:tiny-image")


def memory(peak: float, device: str = "cpu", process_valid: bool = True) -> Memory:
    """All readings of one window; on a GPU the device reads 0.5 GB more than the process."""
    absent = Reading.missing("not measured", "no GPU")
    if device == "cpu":
        rss = Reading(value=peak, source="VmHWM over the baseline")
        return Memory(
            torch_allocated_bytes=absent,
            torch_reserved_bytes=absent,
            nvml_device_bytes=absent,
            nvml_process_bytes=absent,
            host_rss_bytes=rss,
        )
    process = Reading(value=peak, source="NVML process peak")
    if not process_valid:
        process = Reading.missing("NVML process peak", "pid not visible in the container")
    return Memory(
        torch_allocated_bytes=Reading(value=0.8 * peak, source="torch"),
        torch_reserved_bytes=Reading(value=0.9 * peak, source="torch"),
        nvml_device_bytes=Reading(value=peak + 5e8, source="NVML device delta"),
        nvml_process_bytes=process,
        host_rss_bytes=Reading(value=1e9, source="VmHWM over the baseline"),
    )


def inference_facts(flops: float, rate: float, peak: float = 3e8, device: str = "cpu", **changes: Any) -> Inference:
    """Inference of a model with so many FLOPs an item that encodes so many items a second."""
    spread = (1.0, 1.02, 0.98, 1.06, 0.97)
    facts: dict[str, Any] = {
        "flops_per_item": Reading(value=flops, source="1 multiply-add = 2 FLOPs, one pass over 256 items"),
        "single": Timings(size=1, run_s=tuple(4 * share / rate for share in spread), passes=3),
        "batch": Timings(size=256, run_s=tuple(256 * share / rate for share in spread)),
        "user": Timings(size=1, run_s=tuple(1e-3 * share for share in spread), passes=20),
        "memory": memory(peak, device),
        "loaded_bytes": Reading(value=1.2e7, source="all parameters and buffers of the prepared model"),
    }
    return Inference(**{**facts, **changes})


class Factory:
    """Writes records below ``root`` the way a run does: ``cells/<cell id>/attempt-N.json`` and its ``.npz`` files."""

    def __init__(self, root: Path, users: int = 300, items: int = 500) -> None:
        self.root = root
        self.users = users
        self.items = items

    def cell(self, method: str = "lora", **changes: Any) -> Cell:
        """A cell of the demo; keyword arguments replace its fields."""
        fields: dict[str, Any] = {
            "method": method,
            "dataset": "demo",
            "dataset_fingerprint": "ab" * 32,
            "modalities": ("text", "image"),
            "text_encoder": TEXT,
            "image_encoder": IMAGE,
            "seed": 1,
            "matrix": "demo",
            "baseline": method in ("frozen", "id", "popularity"),
        }
        return Cell(**{**fields, **changes})

    def write(
        self,
        method: str = "lora",
        *,
        time: float | None = 10.0,
        millions: float | None = 1.0,
        peak: float | None = 2e9,
        skill: float = 0.1,
        status: str = "ok",
        attempt: int = 1,
        valid_recall: float | None = None,
        failure: Failure | None = None,
        flags: tuple[Flag, ...] = (),
        code: str = CODE,
        device_key: str = "cpu: test, 2 threads",
        with_environment: bool = True,
        node: str | None = None,
        process_valid: bool = True,
        time_reading: Reading | None = None,
        started_at: str = "2026-01-01T00:00:00+00:00",
        inference: Inference | None = None,
        representation: Representation | None = None,
        all_in_s: float | None = None,
        **cell: Any,
    ) -> Path:
        """Write one attempt and return the path of its record. ``skill`` moves targets to the top of the ranking."""
        what = self.cell(method, **cell)
        name = cell_id(what, code)
        folder = self.root / "cells" / name
        folder.mkdir(parents=True, exist_ok=True)
        if status != "ok" and failure is None:
            failure = Failure(phase="train", message=f"{status}: it was made up; run it again", epoch=2, step=7)
        epochs = self._epochs(time, skill if valid_recall is None else valid_recall, what) if time else ()
        measured = memory(peak, what.device, process_valid) if peak else None
        reading = Reading(value=time, source="median of epochs") if time else Reading.missing("clock", "no epoch ended")
        result = CellResult(
            cell_id=name,
            attempt=attempt,
            cell=what,
            code_version=code,
            status=status,  # type: ignore[arg-type]
            failure=failure,
            started_at=started_at,
            wall_s=3.0 + 5 * (time or 1.0),
            environment=environment(device_key, what.device, node) if with_environment else None,
            dataset=self._dataset(),
            text_encoder=None if what.cached else facts("builtin:tiny-text"),
            image_encoder=None if what.cached else facts("builtin:tiny-image"),
            parameters=self._parameters(millions) if millions is not None else None,
            phases=self._phases(time or 1.0, peak or 1e8, what.device),
            epochs=epochs,
            best_epoch=3 if epochs else None,
            epoch_time_s=time_reading or reading,
            all_in_s=None if all_in_s is None else Reading(value=all_in_s, source="phases"),
            training_memory=measured,
            cache=self._cache() if what.cached else None,
            inference=inference,
            representation=representation,
            flags=flags,
            files=self._files(folder, attempt, what.seed, skill, time or 1.0, peak or 1e8, status),
        )
        path = folder / f"attempt-{attempt}.json"
        write_result(result, path)
        return path

    def _epochs(self, time: float, recall: float, cell: Cell) -> tuple[Epoch, ...]:
        curve = (0.5, 0.8, 1.0, 0.9)
        return tuple(
            Epoch(
                index=index,
                train_s=time,
                steps=10,
                loss=5.0 / index,
                valid_recall_10=share * recall,
                valid_ndcg_10=0.6 * share * recall,
            )
            for index, share in enumerate(curve, start=1)
        )

    def _dataset(self) -> DatasetFacts:
        return DatasetFacts(
            name="demo",
            fingerprint="ab" * 32,
            users=self.users,
            items=self.items,
            interactions=8 * self.users,
            items_never_trained=60,
            modalities=("text", "image"),
        )

    def _cache(self) -> CacheFacts:
        return CacheFacts(
            build_s=4.2,
            bytes=12_000_000,
            items=self.items,
            dtype="float16",
            built_by_attempt=True,
            encoders={"text": facts("builtin:tiny-text"), "image": facts("builtin:tiny-image")},
        )

    def _parameters(self, millions: float) -> Parameters:
        count = round(millions * 1e6)
        return Parameters(
            trainable=count,
            trainable_max=count,
            total=count + 3_000_000,
            by_group={"method": count},
            stored_bytes=4 * count,
        )

    def _phases(self, time: float, peak: float, device: str) -> tuple[Phase, ...]:
        kinds = (("load", 0.5, 0.4), ("train", 4 * time, 1.0), ("validate", 0.2 * time, 0.7), ("rank", 0.4, 0.6))
        start, phases = 0.0, []
        for kind, wall_s, share in kinds:
            energy = Reading.missing("NVML energy", "no counter")
            phases.append(
                Phase(
                    kind=kind,  # type: ignore[arg-type]
                    start_s=start,
                    wall_s=wall_s,
                    memory=memory(share * peak, device),
                    energy_j=energy,
                )
            )
            start += wall_s
        return tuple(phases)

    def _files(
        self, folder: Path, attempt: int, seed: int, skill: float, time: float, peak: float, status: str
    ) -> dict[str, str]:
        generator = np.random.default_rng([seed, round(1000 * skill)])
        hits = generator.random(self.users) < skill
        near = generator.geometric(0.15, self.users)
        far = generator.integers(1, self.items + 1, self.users)
        fixed = np.random.default_rng(99)  # the test users and their targets are the same for everyone
        files = {"samples": f"samples-{attempt}.npz"}
        steps = 40
        ramp = np.linspace(0, 1, 120)
        np.savez(
            folder / files["samples"],
            step_s=time / 10 * generator.lognormal(0, 0.08, steps),
            step_epoch=np.repeat(np.arange(1, 5), steps // 4),
            sample_t_s=ramp * 5 * time,
            sample_bytes=peak * (1 - np.exp(-12 * ramp)) * (0.97 + 0.03 * generator.random(120)),
        )
        if status == "ok":
            files["ranks"] = f"ranks-{attempt}.npz"
            np.savez(
                folder / files["ranks"],
                rank=np.where(hits, np.minimum(near, self.items), far).astype(np.int32),
                target=fixed.integers(1, self.items + 1, self.users),
                cold=fixed.random(self.users) < 0.2,
                in_history=fixed.random(self.users) < 0.05,
            )
        return files


def environment(device_key: str, device: str, node: str | None = None) -> Environment:
    return Environment(
        python="3.12.1",
        platform="Linux-6.1-x86_64",
        hostname_hash="0" * 8,
        packages={"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"},
        device_kind=device,  # type: ignore[arg-type]
        device_name="Test CPU" if device == "cpu" else "NVIDIA Test",
        device_key=device_key,
        driver=None if device == "cpu" else "560.1",
        cpu_threads=2,
        allocator="default",
        deterministic=False,
        git_revision="1234abcd",
        git_dirty=False,
        node=node,
    )


def facts(source: str) -> EncoderFacts:
    return EncoderFacts(
        source=source,
        revision=None,
        architecture="BertModel",
        weights="pretrained",
        width=64,
        depth=4,
        parameters=1_500_000,
    )


DEMO: tuple[tuple[str, float, float, float, float], ...] = (
    ("fft", 22.1, 3.1, 1.9e9, 0.31),
    ("adapter", 17.5, 0.21, 1.52e9, 0.30),
    ("lora", 18.9, 0.05, 1.60e9, 0.29),
    ("bitfit", 19.8, 0.03, 1.49e9, 0.27),
    ("prompt", 20.3, 0.02, 1.71e9, 0.25),
    ("iisan", 9.0, 0.15, 0.52e9, 0.30),
)


def write_demo(factory: Factory) -> Path:
    """A run with everything in it: seeds, trials, a cached twin, the rows without adaptation, every kind of end."""
    shared = Flag(code="cpu-memory", message="M is resident memory of the process tree: the cells ran on a CPU")
    for method, time, millions, peak, skill in DEMO:
        for seed in (1, 2, 3):
            for trial, rate in enumerate((2e-4, 4e-4)):
                factory.write(
                    method,
                    time=time * (1 + 0.01 * seed),
                    millions=millions,
                    peak=peak * (1 + 0.005 * seed),
                    skill=skill - 0.04 * (trial != len(method) % 2),
                    flags=(shared,),
                    inference=inference_facts(2.1e8 if method == "prompt" else 2e8, 1000 / (time + 10 * seed)),
                    seed=seed,
                    lr=LearningRates(method=rate),
                    lr_trial=trial,
                    lr_trials=2,
                )
    one = {"flags": (shared,), "seed": 1}
    light = inference_facts(3e5, 60_000, looked_up=("text", "image"))
    for seed in (1, 2, 3):
        cached = {"cached": True, "inference": light, "flags": (shared,), "seed": seed}
        factory.write("iisan", time=1.2, millions=0.15, peak=0.2e9, skill=0.3, **cached)
    factory.write("frozen", time=6.1, millions=0.01, peak=0.4e9, skill=0.2, inference=inference_facts(2e8, 52), **one)
    noisy = Flag(code="throttled", message="the clock was throttled in 3 of 8 epochs")
    looked_up = {"inference": inference_facts(0, 2e6), "flags": (shared, noisy), "seed": 1}
    factory.write("id", time=0.9, millions=0.04, peak=0.1e9, skill=0.12, **looked_up)
    factory.write("popularity", time=None, millions=0.0, peak=0.05e9, skill=0.03, **one)
    oom = Failure(phase="train", message="the allocator asked for 1.5 GB; use a smaller batch", bytes_requested=10**9)
    factory.write("dyt", status="oom", time=None, millions=0.4, peak=2.4e9, failure=oom, **one)
    factory.write("pyra", status="diverged", time=15.0, millions=0.3, peak=1.5e9, **one)
    factory.write("dapt", status="timeout", time=80.0, millions=0.3, peak=1.5e9, **one)
    factory.write("<script>", status="error", time=None, millions=None, peak=None, with_environment=False, seed=1)
    factory.write("a_b&c%", time=12.0, millions=0.5, peak=1.1e9, skill=0.28, options={"rank": 4}, **one)
    return factory.root


@pytest.fixture
def peaks_of() -> Callable[..., Memory]:
    return memory


@pytest.fixture
def spoil_memory() -> Callable[[Path, str], None]:
    """``spoil_memory(record, why)``: M of a CPU record keeps its value, and is not to be trusted."""

    def spoil(path: Path, why: str) -> None:
        result = read_result(path)
        assert result.training_memory is not None
        rss = result.training_memory.host_rss_bytes.model_copy(update={"valid": False, "reason": why})
        spoilt = result.training_memory.model_copy(update={"host_rss_bytes": rss})
        path.write_text(result.model_copy(update={"training_memory": spoilt}).model_dump_json())

    return spoil


@pytest.fixture
def factory(tmp_path: Path) -> Factory:
    return Factory(tmp_path / "run")


@pytest.fixture
def make_factory() -> Callable[..., Factory]:
    return Factory


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run; do not write into it."""
    return write_demo(Factory(tmp_path_factory.mktemp("demo") / "demo"))


# --- a browser -----------------------------------------------------------------------------------------------

CHROMIUM_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; skips the calling test, saying so, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium is installed (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, headless=True, args=list(CHROMIUM_FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="session")
def written(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the demo run."""
    from tpme.reports.report import write_report

    out = tmp_path_factory.mktemp("page")
    write_report([demo_run], out, formats=("html",))
    return out / "index.html"


@pytest.fixture
def tab(browser: Any, written: Path) -> Iterator[Any]:
    """A tab on the page; at the end nothing may have been logged, asked of the network or popped up."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    trouble: list[str] = []
    opened.on("console", lambda message: trouble.append(f"console: {message.text}"))
    opened.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    opened.on("request", lambda request: request.url.startswith(("file:", "blob:")) or trouble.append(request.url))
    opened.on("dialog", lambda dialog: (trouble.append("a dialog"), dialog.dismiss()))
    opened.goto(written.as_uri())
    yield opened
    opened.close()
    assert trouble == []

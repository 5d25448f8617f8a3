"""``tpme plan``: the counters of a matrix without running it, for a device, and against records."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tpme.bench.commands.plan import render
from tpme.bench.counting.devices import PROFILES, DeviceProfile
from tpme.bench.errors import UserError
from tpme.bench.record import find_results, read_result
from tpme.bench.run.matrix import MatrixFile, load_matrix
from tpme.bench.run.plan import MatrixPlan, plan_matrix

ROOT = Path(__file__).resolve().parents[1]
EXACT = ("forward_flops", "backward_flops", "gradient_bytes", "weight_bytes", "optimizer_bytes", "stored_bytes")


def shown(plan: MatrixPlan) -> list[str]:
    screen = io.StringIO()
    render(plan, Console(file=screen, width=100, color_system=None))
    return screen.getvalue().splitlines()


def test_the_plan_is_what_the_records_say(card_run: Any, world: Any, harness: ModuleType) -> None:
    matrix, folder, results = card_run
    plan = plan_matrix(matrix, store=world.store, runs=folder, console=harness.quiet())
    assert [cell.label for cell in plan.cells] == list(results)
    for cell in plan.cells:
        record = results[cell.label]
        for name in EXACT:
            assert getattr(cell.work, name) == record.counters[name].value, (cell.label, name)
        assert cell.work.saved_bytes_math == record.counters["saved_bytes"].value
        assert cell.work.peak_bytes == record.counters["planned_peak_bytes"].value
        assert cell.work.trainable == record.parameters.trainable
        assert cell.measured.records == 1
        assert cell.measured.step_flops == cell.work.forward_flops + cell.work.backward_flops
        assert cell.measured.epoch_s == record.epoch_time_s.value
    lines = shown(plan)
    assert any(line.startswith("Plan against measured") for line in lines)
    assert max(map(len, lines)) <= 100
    names = [line[: max(map(len, results))].strip() for line in lines]
    assert {label: names.count(label) for label in results} == dict.fromkeys(results, 3), "one line in each table"


def test_seeds_and_learning_rates_are_planned_once(planned: Any, world: Any, harness: ModuleType) -> None:
    matrix = world.matrix([{"name": "frozen", "lr": [1e-3, 1e-4]}], seeds=[1, 2, 3])
    plan = plan_matrix(matrix, store=world.store, console=harness.quiet())
    assert len(plan.cells) == 1


def test_an_epoch_is_its_users(planned: Any) -> None:
    [whole] = planned(["frozen"], training={"max_steps_per_epoch": None}).cells
    [cut] = planned(["frozen"], training={"max_steps_per_epoch": 1}).cells
    step = whole.work.forward_flops + whole.work.backward_flops
    assert whole.work.epoch_steps == 60 / 32
    assert whole.work.epoch_flops == step * 60 / 32
    assert cut.work.epoch_flops == step


def test_a_device_bounds_time_and_memory(planned: Any) -> None:
    device = PROFILES["cpu-generic"].model_copy(update={"operator_s": 1e-12})
    [cell] = planned(["fft"], device=device).cells
    slower = {
        "memory_bytes_per_s": device.memory_bytes_per_s / 2,
        "matmul_flop_per_s": {"fp32": device.rate("fp32") / 2},
    }
    [half] = planned(["fft"], device=device.model_copy(update=slower)).cells
    assert half.expected.step_s == pytest.approx(2 * cell.expected.step_s)
    fast = {"memory_bytes_per_s": 1e30, "matmul_flop_per_s": {"fp32": 1e9}}
    [compute] = planned(["fft"], device=device.model_copy(update=fast)).cells
    flops = cell.work.forward_flops + cell.work.backward_flops
    # Fused attention computes its probabilities again in the backward pass.
    assert flops < compute.expected.step_s * 1e9 * device.efficiency < 1.2 * flops
    fast = {"memory_bytes_per_s": 1e9, "matmul_flop_per_s": {"fp32": 1e30}}
    [memory] = planned(["fft"], device=device.model_copy(update=fast)).cells
    assert memory.expected.step_s * 1e9 * device.efficiency > 2 * cell.work.saved_bytes, "written once, read once"
    [bound] = planned(["fft"], device=device.model_copy(update={"operator_s": 1.0})).cells
    assert bound.expected.step_s > 100, "a step of many operators is bound by starting them"


def test_what_fits_on_a_gpu(planned: Any) -> None:
    device = PROFILES["rtx4090"].model_copy(update={"workspace_bytes": 1})
    [cell] = planned(["fft"], device=device).cells
    assert cell.expected.fits == "yes"
    peak = cell.work.peak_bytes
    for size, fits in ((int(peak * 1.2), "yes"), (int(peak * 1.05), "tight"), (int(peak * 0.9), "no")):
        [sized] = planned(["fft"], device=device.model_copy(update={"memory_bytes": size})).cells
        assert sized.expected.fits == fits


def test_on_a_cpu_nothing_is_said_to_fit(card_run: Any, planned: Any) -> None:
    record = card_run[2]["fft"]
    measured = record.training_memory.host_rss_bytes.value
    [cell] = planned(["fft"], training={"epochs": 2}).cells
    between = int((cell.work.peak_bytes + measured) / 2)
    assert cell.work.peak_bytes < between < measured, "the tensors fit, the process does not"
    device = PROFILES["cpu-generic"].model_copy(update={"memory_bytes": between})
    plan = planned(["fft"], training={"epochs": 2}, device=device)
    assert plan.cells[0].expected.fits == "unknown"
    text = " ".join(" ".join(shown(plan)).split())
    assert "Tensors" in text
    assert "Peak" not in text
    assert "On a CPU only tensors are planned." in text
    assert "not known until a cell of it has run" in text
    too_small = device.model_copy(update={"memory_bytes": cell.work.peak_bytes - 1})
    assert planned(["fft"], device=too_small).cells[0].expected.fits == "no"


def test_the_docs_say_how_far_tensors_are_from_the_process_on_a_cpu() -> None:
    ratios = [
        memory.value / plan.value
        for result in map(read_result, find_results([ROOT / "results"]))
        if result.status == "ok" and result.cell.device == "cpu" and result.training_memory is not None
        if (plan := result.counters.get("planned_peak_bytes")) and plan.value
        if (memory := result.training_memory.host_rss_bytes).value
    ]
    assert min(ratios) > 1, "tensors are a lower bound"
    assert f"{min(ratios):.1f} to {max(ratios):.0f} times" in (ROOT / "docs" / "measuring.md").read_text()


def test_what_does_not_fit_beside_the_cache_stays_on_the_host(planned: Any) -> None:
    method = {"name": "iisan", "cached": True}
    [roomy] = planned([method]).cells
    small = PROFILES["rtx4090"].model_copy(update={"memory_bytes": roomy.work.cache_bytes, "workspace_bytes": 0})
    [tight] = planned([method], device=small).cells
    assert roomy.work.peak_bytes - tight.work.peak_bytes == pytest.approx(roomy.work.cache_bytes, abs=512)


def test_a_method_that_needs_values_does_not_stop_the_others(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    body = """
    def adapt(self, model, schedule):
        float(next(model.encoders.parameters()).sum())
    """
    harness.write_method(tmp_path, "needy", body)
    matrix = world.matrix(["needy", "frozen"])
    plan = plan_matrix(matrix, store=world.store, methods_path=[tmp_path], console=harness.quiet())
    assert [cell.work is None for cell in plan.cells] == [True, False]
    assert "meta" in plan.cells[0].problem
    assert any(line.startswith("Could not be counted: needy") for line in shown(plan))


# --- without data, without network ---------------------------------------------------------------------------------


def paper(*methods: str) -> MatrixFile:
    """The paper's matrix, only these methods of it."""
    matrix = load_matrix("iisan-paper")
    return matrix.model_copy(update={"methods": tuple(entry for entry in matrix.methods if entry.name in methods)})


def no_network(*_args: object, **_settings: object) -> None:
    raise AssertionError("the planner asked the network")


def test_the_papers_matrix_needs_neither_data_nor_network(
    harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    device: DeviceProfile = PROFILES["h200"]
    plan = plan_matrix(paper("lora", "iisan"), store=tmp_path, device=device, console=harness.quiet())
    lora, uncached, cached = plan.cells
    assert (lora.work.trainable, cached.work.trainable) == (796_736, 4_113_877)
    assert cached.work.cache_bytes == 2 * 20_315 * 7 * 768 * 2
    assert lora.work.epoch_steps == 12_076 / 32
    assert uncached.work.epoch_steps == 12_076 / 64
    # Reference: 37-39 GB for LoRA, 3 GB for IISAN cached, with unfused attention and both encoders left on the GPU.
    assert 15e9 < lora.work.peak_bytes < 37e9
    assert uncached.work.peak_bytes < lora.work.peak_bytes / 3
    assert cached.work.peak_bytes < uncached.work.peak_bytes / 5
    assert lora.work.saved_bytes < lora.work.saved_bytes_math
    assert cached.expected.epoch_s < uncached.expected.epoch_s < lora.expected.epoch_s
    assert "assumed" in plan.assumptions[0]
    lines = shown(plan)
    assert max(map(len, lines)) <= 100
    assert any("Amazon Scientific" in line for line in lines)


def test_released_encoders_need_no_network_where_the_data_is_prepared(
    world: Any, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_names: None)
    pair = {"text": {"source": "bert-base-uncased"}, "image": {"source": str(world.image)}}
    matrix = world.matrix([{"name": "frozen", "cached": True}], encoders=[pair])
    plan = plan_matrix(matrix, store=tmp_path, runs=tmp_path, console=harness.quiet())
    assert (len(plan.cells), plan.warnings) == (1, ())
    pair["image"] = {"source": "google/vit-base-patch16-224"}
    with pytest.raises(UserError, match=r"its images are 32 pixels wide, but the encoder 'google/vit.*' reads 224"):
        plan_matrix(world.matrix(["lora"], encoders=[pair]), store=tmp_path, console=harness.quiet())


def test_a_data_set_of_another_size(harness: ModuleType, tmp_path: Path) -> None:
    settings = {"store": tmp_path, "console": harness.quiet()}
    small, large = (
        plan_matrix(paper("iisan"), users=users, items=items, **settings).cells[1].work
        for users, items in ((1000, 5000), (2000, 50_000))
    )
    assert large.epoch_flops == 2 * small.epoch_flops
    assert large.cache_bytes / small.cache_bytes == 50_001 / 5_001
    assert large.saved_bytes == small.saved_bytes


# --- the command ---------------------------------------------------------------------------------------------------


def test_no_number_is_cut_on_a_narrow_screen(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    file = world.write(tmp_path / "matrix.toml", world.matrix(["fft"]))
    told = harness.tpme_here("plan", str(file), "--store", str(world.store), env={"COLUMNS": "40"}, cwd=tmp_path)
    assert "fft" in told.stdout
    assert "…" not in told.stdout


def test_json_from_the_command_line(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    matrix = world.write(tmp_path / "small.toml", world.matrix(["frozen", "popularity"]))
    ran = harness.tpme_here(
        "plan", str(matrix), "--json", "--device-profile", "h100", "--store", str(world.store),
        "--set", "training.precision=bf16", cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    plan = MatrixPlan.model_validate(json.loads(ran.stdout))
    assert [cell.label for cell in plan.cells] == ["frozen", "popularity"]
    assert plan.cells[0].cell.training.precision == "bf16"
    assert plan.device == PROFILES["h100"]


def test_wrong_arguments_are_one_line(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    matrix = str(world.write(tmp_path / "small.toml", world.matrix(["popularity"])))
    for arguments, told in (
        (("--device-profile", "h300"), "h300"),
        (("--runs", "nowhere"), "nowhere"),
        (("--set", "training.precision=fp8"), "precision"),
    ):
        ran = harness.tpme_here("plan", matrix, *arguments, cwd=tmp_path)
        assert ran.returncode == 2
        assert ran.stderr.startswith("tpme: ")
        assert told in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


def test_the_plan_lists_what_is_finished(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    matrix = world.matrix(["id", "popularity"], seeds=[1, 2])
    world.run(matrix.model_copy(update={"seeds": (1,)}), tmp_path / "run")
    plan = plan_matrix(matrix, store=world.store, runs=tmp_path / "run", console=harness.quiet())
    assert plan.remaining is not None
    assert [(row.cell.label, row.cells, row.missing) for row in plan.remaining.rows] == [
        ("id", 2, 1),
        ("popularity", 2, 1),
    ]
    assert plan.remaining.text.startswith("2 of 4 cells finished, 2 to run; expected time ")
    assert plan.remaining.text in " ".join(" ".join(shown(plan)).split())
    assert plan_matrix(matrix, store=world.store, users=10, console=harness.quiet()).remaining is None


def test_the_plan_says_what_this_machine_has_no_room_for(
    world: Any, harness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = world.matrix([{"name": "frozen", "cached": True}])
    monkeypatch.setattr("tpme.bench.run.plan.device_memory", lambda _kind: (1000, "a small machine"))
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10))
    plan = plan_matrix(matrix, store=tmp_path, runs=tmp_path, console=harness.quiet())
    disk, memory = plan.warnings
    assert "the feature caches to be built need" in disk
    assert memory.startswith("frozen (cached) will probably run out of memory")
    assert disk in " ".join(" ".join(shown(plan)).split())
    elsewhere = plan_matrix(matrix, store=tmp_path, device=PROFILES["h200"], console=harness.quiet())
    assert elsewhere.warnings == (disk,), "the memory of this machine does not matter there"

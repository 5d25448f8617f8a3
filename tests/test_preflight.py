"""What data and machine must offer is checked before the first cell."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_nvml import GIB, FakeGpu, fake_nvml
from rich.console import Console

from tpme.bench.counting import meta
from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import UserError
from tpme.bench.measure.nvml import Nvml
from tpme.bench.record import Cell
from tpme.bench.run import preflight
from tpme.bench.run.launch import run_matrix
from tpme.bench.run.matrix import MatrixFile
from tpme.bench.run.plan import plan_matrix
from tpme.bench.run.preflight import device_memory
from tpme.bench.task.dataset import Dataset


def refused(world: Any, run: Path, **changes: Any) -> str:
    """The message that stops a matrix, of which nothing has run."""
    methods = changes.pop("methods", ["lora"])
    with pytest.raises(UserError) as error:
        world.run(world.matrix(methods, **changes), run)
    assert not run.exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def copied(source: Path, target: Path, *without: str) -> dict[str, str]:
    """An encoder's folder without some of its files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*without))
    return {"source": str(target)}


# --- data and encoders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", {"name": "iisan", "cached": True}])
def test_images_of_another_size_stop_the_run(world: Any, tmp_path: Path, method: Any) -> None:
    entry = {"name": "wide", "synthetic": {"users": 40, "items": 50}, "image_size": 64}
    message = refused(world, tmp_path / "run", methods=["popularity", method], datasets=[entry])
    assert message.startswith("data set 'wide': its images are 64 pixels wide, but the encoder ")
    assert "reads 32; choose an encoder of that size" in message


def test_images_that_no_row_reads_may_have_any_size(world: Any, tmp_path: Path) -> None:
    entry = {"name": "wide", "synthetic": {"users": 40, "items": 50}, "image_size": 64}
    assert len(world.jobs(world.matrix(["popularity", "id"], datasets=[entry]), tmp_path)) == 2


def test_titles_that_the_encoder_cannot_read_stop_the_run(world: Any, tmp_path: Path) -> None:
    tiny = [{"text": {"source": "builtin:tiny-text"}, "image": {"source": str(world.image)}}]
    message = refused(world, tmp_path / "run", encoders=tiny, training={"title_tokens": 500})
    assert message == "title_tokens is 500, but 'builtin:tiny-text' reads at most 32"


def test_an_encoder_without_tokenizer_or_weights_stops_the_run(world: Any, tmp_path: Path) -> None:
    run, image = tmp_path / "run", {"source": str(world.image)}
    mute = copied(world.text, tmp_path / "mute", "tokenizer*")
    assert "mute': cannot be loaded from there" in refused(world, run, encoders=[{"text": mute, "image": image}])
    light = copied(world.image, tmp_path / "light", "*.safetensors")
    pair = {"text": {"source": str(world.text)}, "image": light}
    assert "light': no model.safetensors there" in refused(world, run, encoders=[pair])
    pair["image"] = light | {"weights": "random"}
    assert world.jobs(world.matrix(["lora"], encoders=[pair]), run)


def test_a_misspelt_encoder_ends_with_2_before_the_first_cell(world: Any, harness: ModuleType, tmp_path: Path) -> None:
    file = world.write(tmp_path / "m.toml", world.matrix(["lora", "popularity"]))
    for command in ("run", "plan"):
        ran = harness.tpme_here(
            command, str(file), "--store", str(world.store), "--set", "encoders.text.source=builtin:tiny-txt",
            cwd=tmp_path,
        )  # fmt: skip
        assert ran.returncode == 2
        assert "no such built-in encoder" in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


# --- disk and memory ------------------------------------------------------------------------------------------------


def dry(world: Any, matrix: MatrixFile, run: Path) -> str:
    """The output of a dry run."""
    console = Console(file=io.StringIO(), width=200)
    run_matrix(matrix, run, store=world.store, device="cpu", dry_run=True, console=console)
    assert not run.exists()
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_caches_that_do_not_fit_on_the_disk_stop_the_run(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = world.matrix([{"name": "iisan", "cached": True}, {"name": "frozen", "cached": True}, "lora"])
    world = type(world)(world.text, world.image, world.data, tmp_path / "store")  # with no cache in it
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))
    with pytest.raises(
        UserError, match=r"/store: the feature caches to be built need [\d,]+ bytes there \(most: "
    ) as error:
        dry(world, matrix, tmp_path / "run")
    free = int(str(error.value).partition("need ")[2].partition(" bytes")[0].replace(",", ""))
    assert "3 to run" in dry(world, matrix, tmp_path / "run")
    free -= 1
    with pytest.raises(UserError, match="feature caches"):
        world.run(matrix, tmp_path / "run")
    assert "1 to run" in dry(world, world.matrix(["lora"]), tmp_path / "run")


def test_every_cell_is_built_once_for_all_checks(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    class Counted(MetaCell):
        def __init__(self, cell: Cell, *arguments: Any, **settings: Any) -> None:
            built.append(cell.label)
            super().__init__(cell, *arguments, **settings)

    monkeypatch.setattr(meta, "MetaCell", Counted)
    matrix = world.matrix(["lora", {"name": "frozen", "cached": True}], seeds=[1, 2])
    assert "4 to run" in dry(world, matrix, tmp_path / "run")
    assert built == ["lora", "frozen (cached)"]
    built.clear()
    plan_matrix(matrix, store=world.store, console=Console(quiet=True))
    assert built == ["lora", "frozen (cached)"]


def test_a_row_that_does_not_fit_into_memory_is_announced(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = world.matrix(["lora", "popularity"])
    assert "out of memory" not in dry(world, matrix, tmp_path / "run")
    monkeypatch.setattr(preflight, "device_memory", lambda _device: (1_000_000, "a small machine"))
    told = dry(world, matrix, tmp_path / "run")
    assert "lora will probably run out of memory: its tensors alone are planned to take " in told
    assert "popularity will" not in told


def test_several_devices_each_hold_their_share(world: Any, tmp_path: Path) -> None:
    """On the CPU they share its memory, so a batch takes as much in all, and the weights are there several times."""
    [alone] = world.jobs(world.matrix(["fft"]), tmp_path)
    pair = [
        alone.cell.model_copy(
            update={"device": device, "training": alone.cell.training.model_copy(update={"devices": 2})}
        )
        for device in ("cpu", "cuda")
    ]
    data = DataShape.of(Dataset.open(world.data))
    whole, together, each = (preflight._planned_bytes(MetaCell(cell, data), 10**6) for cell in (alone.cell, *pair))
    assert each < whole < together < 2 * whole
    assert together == 2 * each


def test_the_memory_of_a_gpu_is_read_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml.open(fake_nvml(FakeGpu(total=24 * GIB)))
    monkeypatch.setattr(Nvml, "open", classmethod(lambda _cls: nvml))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device_memory("cuda") == (24 * GIB, "the GPU (NVIDIA Fake 80GB)")
    monkeypatch.setattr(Nvml, "open", classmethod(lambda _cls: Nvml(None, "no driver")))
    assert device_memory("cuda") == (None, "")

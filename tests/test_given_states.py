"""``source = "states:FILE"``: rows on exported states are those on the encoder, through runs, plans and reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import quiet, tpme, write_method
from safetensors.torch import save_file

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.meta import MetaCell
from tpme.bench.errors import UserError
from tpme.bench.record import CellResult, EncoderSpec
from tpme.bench.run.launch import make_jobs
from tpme.bench.run.plan import plan_matrix
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import encoder_shape, load_encoder
from tpme.bench.task.items import Reads
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate
from tpme.bench.task.tokens import tokenise


@torch.no_grad()
def export(world: Any, modality: str, path: Path, dtype: torch.dtype = torch.float16) -> Path:
    """Save all hidden states of an encoder of the world, in another order than the data set's."""
    dataset = Dataset.open(world.data)
    spec = EncoderSpec(source=str(world.text if modality == "text" else world.image))
    depth = encoder_shape(spec, modality).depth
    tokens = tokenise(dataset, spec.source, None, 8, world.store) if modality == "text" else None
    items = ItemStore(dataset, tokens=tokens, images=modality == "image").gather(np.arange(1, len(dataset.item_names)))
    # A ViT's final state has passed its norm; IISAN reads it as the level L of none.
    reads = Reads(tuple(range(depth + 1)) if modality == "text" else tuple(range(depth)), final=modality == "image")
    view = load_encoder(spec, modality).view
    states = view.encode(reads, tokens=items.tokens, token_mask=items.token_mask, image=items.image)
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(1))
    names = [dataset.item_names[1 + int(row)] for row in order]
    save_file({"states": states[order].to(dtype)}, path, {"items": json.dumps(names)})
    return path


def given(world: Any, **files: Path) -> list[dict[str, Any]]:
    """The pair of encoders of a matrix, with these files in place of some."""
    sources = {"text": str(world.text), "image": str(world.image)}
    sources |= {modality: f"states:{path}" for modality, path in files.items()}
    return [{modality: {"source": source} for modality, source in sources.items()}]


@pytest.fixture(scope="module")
def text_states(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(world, "text", tmp_path_factory.mktemp("states") / "text.safetensors")


def ranks(result: CellResult, folder: Path) -> list[int]:
    [path] = folder.rglob(f"cells/*{result.cell_id}/{result.files['ranks']}")
    return list(np.load(path)["rank"])


@pytest.mark.parametrize("method", [pytest.param("frozen", marks=pytest.mark.slow), "iisan"])
def test_exported_states_give_the_ranks_of_the_cached_row(
    world: Any, tmp_path: Path, text_states: Path, method: str
) -> None:
    training = {"epochs": 2, "max_steps_per_epoch": None}
    rows = [{"name": method, "cached": True}]
    [cached] = world.run(world.matrix(rows, training=training), tmp_path / "cached")
    matrix = world.matrix(rows, training=training, encoders=given(world, text=text_states))
    [result] = world.run(matrix, tmp_path / "given")
    assert (cached.status, result.status) == ("ok", "ok"), (cached.failure, result.failure)
    # The builder encodes on other threads than the export, so a state may round to its other neighbour.
    assert [epoch.loss for epoch in result.epochs] == pytest.approx([epoch.loss for epoch in cached.epochs], rel=1e-3)
    same = np.equal(ranks(result, tmp_path / "given"), ranks(cached, tmp_path / "cached"))
    assert same.mean() >= 0.95
    facts = result.text_encoder
    assert (facts.architecture, facts.depth, facts.parameters) == ("states", 2, 0)
    assert facts.revision == result.cell.text_encoder.revision is not None
    assert set(result.cache.parts) == {"image"}
    assert not result.cache.built_by_attempt  # that of the first row


def test_a_table_is_read_without_cached_beside_an_encoder_that_trains(world: Any, tmp_path: Path) -> None:
    """Image states beside a text encoder whose last layer trains, as on the frozen image encoder itself."""
    body = """
    def frozen_encoders(self, modalities):
        return tuple(modality for modality in modalities if modality == "image")

    def adapt(self, model, schedule):
        model.views["text"].layers[-1].requires_grad_(True)
    """
    write_method(tmp_path / "methods", "trains_text", body)
    file = export(world, "image", tmp_path / "image.safetensors", torch.float32)
    rows = ["trains_text"]
    settings = {"methods_path": [tmp_path / "methods"]}
    plain = world.tell(world.matrix(rows), tmp_path / "plain", **settings)
    result = world.tell(world.matrix(rows, encoders=given(world, image=file)), tmp_path / "given", **settings)
    assert result.status == "ok", result.failure
    assert [epoch.loss for epoch in result.epochs] == pytest.approx([epoch.loss for epoch in plain.epochs], rel=1e-6)
    assert (result.cache, result.image_encoder.architecture) == (None, "states")
    assert result.text_encoder == plain.text_encoder
    assert {flag.message for flag in result.flags if flag.code == "cache-placement"} == {
        "precomputed states are kept in host memory"
    }


@pytest.fixture(scope="module")
def titles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without images."""
    folder = tmp_path_factory.mktemp("titles") / "data"
    prepare(replace(generate(Synthetic(users=60, items=60)), pictures=None), folder)
    return folder


def sounds(data: Path, path: Path, states: int = 3, width: int = 16) -> Path:
    """Made-up states in the order of ``items.txt``, as docs/data.md writes them."""
    rows = len((data / "items.txt").read_text().splitlines())
    np.save(path, np.random.default_rng(1).standard_normal((rows, states, width)).astype(np.float16))
    return path


@pytest.mark.slow
def test_states_stand_in_for_what_the_data_set_lacks(world: Any, tmp_path: Path, titles: Path) -> None:
    """Audio states in the place of images, beside a text encoder: the whole command, from matrix to report."""
    file = sounds(titles, tmp_path / "audio.npy")
    matrix = world.matrix(
        [{"name": "iisan", "cached": [False, True]}, "frozen"],
        datasets=[{"name": "titles", "path": str(titles)}],
        encoders=given(world, image=file),
    )
    path = world.write(tmp_path / "matrix.toml", matrix)
    store = ("--store", str(world.store))
    planned = tpme("plan", str(path), *store, "--json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plans = {cell["label"]: cell["work"] for cell in json.loads(planned.stdout)["cells"]}
    assert set(plans["iisan (cached)"]["cache_bytes_by_encoder"]) == {"text"}
    assert plans["iisan"]["cache_bytes"] is None
    done = tpme("run", str(path), *store, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [
        done.stdout.index(start) for start in ("\nBest Recall@10: ", "\nTrust: one seed a row", "\nQuality and cost of")
    ]
    assert said == sorted(said)
    folder = tmp_path / "runs" / "small" / "report"
    report = "".join((folder / name).read_text() for name in ("report.md", "details.md")).replace("\\_", "_")
    assert f"states:{tmp_path.name}/audio.npy@" in report
    assert re.search(r"audio.npy@\w+: 3 hidden states of width 16", report)
    assert str(tmp_path) not in report
    for record in (tmp_path / "runs").rglob("attempt-1.json"):
        result = CellResult.model_validate_json(record.read_bytes())
        assert result.cell.modalities == ("text", "image")
        assert result.dataset.modalities == ("text",)
        assert result.image_encoder.architecture == "states"
        planned_work = plans[result.cell.label]
        assert result.counters["forward_flops"].value == planned_work["forward_flops"]
    # The same content, so the same cells; other content makes others.
    again = tpme("run", str(path), *store, "--device", "cpu", cwd=tmp_path)
    assert again.returncode == 0
    assert len(list((tmp_path / "runs").rglob("cells/*/attempt-*.json"))) == 3
    np.save(file, np.load(file) + 1)
    jobs = make_jobs(matrix, tmp_path / "runs" / "small", world.store, device="cpu", console=quiet())
    assert not [job for job in jobs if job.folder.exists()]


def test_all_encoders_may_be_files_and_nothing_is_cached(world: Any, tmp_path: Path, titles: Path) -> None:
    files = {"text": sounds(titles, tmp_path / "a.npy"), "image": sounds(titles, tmp_path / "b.npy")}
    matrix = world.matrix(
        [{"name": "iisan", "cached": True}],
        datasets=[{"name": "titles", "path": str(titles)}],
        encoders=given(world, **files),
    )
    result = world.tell(matrix, tmp_path / "run")
    assert result.status == "ok", result.failure
    assert (result.cache, result.parameters.total) == (None, result.parameters.trainable)
    assert "cache_bytes" not in result.counters
    [planned] = plan_matrix(matrix, store=world.store, console=quiet()).cells
    assert planned.work.cache_bytes is None
    assert result.counters["planned_peak_bytes"].value == planned.work.peak_bytes
    [job] = world.jobs(matrix, tmp_path)
    rows = len(Dataset.open(titles).item_names)
    assert MetaCell(job.cell, DataShape.of(Dataset.open(titles))).given_bytes == 2 * rows * 2 * 16 * 2  # levels 0 and 2


def test_towers_follow_their_own_rules(world: Any, tmp_path: Path, titles: Path) -> None:
    """IISAN's inter tower needs states of equal width and number, its intra towers do not."""
    matrix = {
        "datasets": [{"name": "titles", "path": str(titles)}],
        "encoders": given(world, image=sounds(titles, tmp_path / "audio.npy", states=7, width=24)),
    }
    with pytest.raises(UserError, match=r"inter tower needs encoders of equal width and depth; .* image 6 of 24"):
        world.jobs(world.matrix(["iisan"], **matrix), tmp_path)
    result = world.tell(world.matrix([{"name": "iisan", "options": {"inter": False}}], **matrix), tmp_path / "run")
    assert result.status == "ok", result.failure


DEEP = """
    decoupled = True

    def item_encoder(self, task):
        from tpme.bench.task.items import Reads
        from tpme.bench.task.recommender import ItemEncoder
        return ItemEncoder({m: Reads(**READS) for m in task.encoders})
"""


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lora", {}, "method 'lora' adapts the image encoder, but 'states:.*' holds only its states"),
        ("fft", {}, "method 'fft' adapts the image encoder"),
        ("deep", {"levels": (0, 3)}, "reads hidden state 3 of the image encoder, but 'states:.*' holds 3, numbered"),
        ("tokens", {"final": True, "tokens": "all"}, "reads every token of the image encoder, but 'states:.*' holds"),
    ],
)
def test_what_needs_more_than_states_is_refused_in_one_line(
    world: Any, tmp_path: Path, titles: Path, method: str, options: dict[str, Any], message: str
) -> None:
    write_method(tmp_path / "methods", method, DEEP.replace("READS", repr(options)))
    methods_path = [tmp_path / "methods"] if options else []
    matrix = world.matrix(
        [method],
        datasets=[{"name": "titles", "path": str(titles)}],
        encoders=given(world, image=sounds(titles, tmp_path / "audio.npy")),
        modalities=["image"],
    )
    with pytest.raises(UserError, match=message) as refused:
        world.jobs(matrix, tmp_path, methods_path)
    assert "\n" not in str(refused.value)


def test_a_matrix_with_states_of_another_data_set_is_refused(world: Any, tmp_path: Path, titles: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros((7, 16), np.float16))
    matrix = world.matrix(
        ["frozen"],
        datasets=[{"name": "titles", "path": str(titles)}],
        encoders=given(world, image=tmp_path / "few.npy"),
    )
    with pytest.raises(UserError, match=r"few.npy: 7 rows for a data set of"):
        world.jobs(matrix, tmp_path)


def test_without_a_file_of_states_a_data_set_has_its_own_modalities(world: Any, tmp_path: Path, titles: Path) -> None:
    data = [{"name": "titles", "path": str(titles)}]
    [job] = world.jobs(world.matrix(["frozen"], datasets=data), tmp_path)
    assert job.cell.modalities == ("text",)
    with pytest.raises(UserError, match="data set 'titles' has no image"):
        world.jobs(world.matrix(["frozen"], datasets=data, modalities=["image"]), tmp_path)


def test_states_that_changed_since_the_matrix_was_read_are_refused(world: Any, tmp_path: Path, titles: Path) -> None:
    file = sounds(titles, tmp_path / "audio.npy")
    data = [{"name": "titles", "path": str(titles)}]
    job = world.job(world.matrix(["frozen"], datasets=data, encoders=given(world, image=file)), tmp_path / "run")
    np.save(file, np.load(file) + 1)
    from tpme.bench.run.inputs import check_encoders

    with pytest.raises(UserError, match="changed since the matrix was read"):
        check_encoders({"image": job.cell.image_encoder})

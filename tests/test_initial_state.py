"""Item encoders that start from the encoders' weights: stored with a feature cache, and read by every cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import write_method

from tpme.bench.errors import UserError
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Modality
from tpme.bench.run.cell import CellRun
from tpme.bench.run.inputs import feature_job
from tpme.bench.task import features
from tpme.bench.task.features import FeatureJob, feature_folder, is_built, read_initial, read_manifest
from tpme.bench.train.feature_builder import build_features
from tpme.bench.train.loop import Trainer
from tpme.methods.base import TaskShape
from tpme.methods.registry import create

TEXT: Modality = "text"


@pytest.fixture
def job(world: Any, tmp_path: Path) -> Any:
    """``job(cached=True, dropout=0.2)``: the job of a cell of LST on titles, with a store of its own."""

    def make(*, cached: bool = True, **options: Any) -> Any:
        matrix = world.matrix([{"name": "lst", "cached": cached, "options": options}], modalities=["text"])
        folder = tmp_path / f"cell-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return world.job(matrix, folder, store=tmp_path / "store")

    return make


def cache_of(job: Any, **options: Any) -> tuple[FeatureJob, Path]:
    """The cache that a cell reads, and its folder."""
    method = create("lst", job.cell.options)
    shape = features.load_encoder(job.cell.text_encoder, TEXT).view.shape
    reads = method.item_encoder(TaskShape(16, 1, {TEXT: shape})).reads[TEXT]
    made = feature_job(job, method, TEXT, job.cell.text_encoder, reads)
    return made, feature_folder(made, job.cell.dataset_fingerprint)


def prepared(job: Any) -> tuple[CellRun, Trainer]:
    run = CellRun(job, PhaseLog("cpu", None, None), lambda _what, _share: None)
    return run, run.prepare()


@pytest.mark.slow
def test_a_cached_cell_starts_where_the_uncached_one_does(job: Any) -> None:
    _, plain = prepared(job(cached=False))
    run, cached = prepared(job())  # its caches are built by another process
    assert list(plain.model.views) == [TEXT]
    assert not cached.model.views
    assert run.facts.cache is not None
    assert run.facts.cache.built_by_attempt
    own, other = cached.model.item_encoder.state_dict(), plain.model.item_encoder.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    random = prepared(job(init="random"))[1].model.item_encoder.state_dict()
    assert not torch.equal(random["ladders.text.down.0.weight"], own["ladders.text.down.0.weight"])


def test_other_options_share_the_states_and_have_a_start_of_their_own(job: Any) -> None:
    first, folder = cache_of(job())
    before = build_features(first)
    written = (folder / "states.npy").stat().st_mtime_ns
    second, same = cache_of(job(reduction=2))
    assert same == folder
    assert is_built(first, folder)
    assert not is_built(second, folder)
    after = build_features(second)
    assert (folder / "states.npy").stat().st_mtime_ns == written
    assert (after.build_s, after.bytes) == (before.build_s, before.bytes)
    assert len(after.initial_s) == 2
    assert build_features(first) == after == read_manifest(folder), "nothing is built again"
    for of in (first, second):
        expected = create("lst", of.initial.options).initial_state({TEXT: features.load_encoder(of.encoder, TEXT).view})
        stored = read_initial(folder, of.initial)
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], value) for name, value in expected.items())


@pytest.mark.parametrize("change", [{"method": "other"}, {"options": {"dropout": 0.3}}, {"code_version": "other"}])
def test_what_a_start_depends_on_names_its_file(job: Any, change: dict[str, Any]) -> None:
    initial = cache_of(job())[0].initial
    assert initial is not None
    assert initial.model_copy(update=change).file != initial.file
    assert initial.model_copy(update={"methods_path": (Path("elsewhere"),)}).file == initial.file


def test_a_changed_start_is_found(job: Any) -> None:
    made, folder = cache_of(job())
    build_features(made)
    path = folder / made.initial.file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: its checksum does not match"):
        read_initial(folder, made.initial)


def test_weights_that_stay_on_disk_are_no_start(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "weight_budget", lambda device: 1)
    with pytest.raises(UserError, match=r"read from disk layer by layer.*method 'lst' cannot start from its weights"):
        build_features(cache_of(job())[0])


def test_a_fork_has_the_same_start_or_is_refused(job: Any) -> None:
    of = job()
    build_features(cache_of(of)[0])
    run, trainer = prepared(of)
    run.facts.trainer = trainer
    start = {name: value.clone() for name, value in trainer.model.item_encoder.state_dict().items()}
    name = "ladders.text.layers.0.query.weight"
    fork = run.fork(create("lst", {}), seed=77)
    assert torch.equal(fork.model.item_encoder.state_dict()[name], start[name])
    with pytest.raises(UserError, match="a fork starts from weights that are not cached; set cached = false"):
        run.fork(create("lst", {"dropout": 0.3}), seed=77)


def test_a_name_that_the_item_encoder_does_not_have(tiny: Any, tmp_path: Path) -> None:
    body = "\n    def initial_state(self, views):\n        return {'nothing': torch.zeros(1)}\n"
    write_method(tmp_path, "misnames", body)
    with pytest.raises(ValueError, match=r"initial_state\(\) names 'nothing'"):
        tiny.build("misnames", methods_path=[tmp_path])

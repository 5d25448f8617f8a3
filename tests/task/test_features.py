"""The feature cache: equal to the encoders it replaces, resumable, checked, and refused before it is too large."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tpme.bench.errors import UserError
from tpme.bench.measure.phases import measuring
from tpme.bench.record import EncoderSpec
from tpme.bench.task import feature_files, features, placement
from tpme.bench.task.batches import ItemStore, build_batch, log_popularity
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.features import FeatureJob, build, feature_folder, open_cache
from tpme.bench.task.items import Reads
from tpme.bench.task.placement import place
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate
from tpme.bench.task.tokens import tokenise
from tpme.bench.train.cached import stored_states

TEXT = EncoderSpec(source="builtin:tiny-text")
IMAGE = EncoderSpec(source="builtin:tiny-image")
CPU = torch.device("cpu")


@pytest.fixture
def job(tmp_path: Path) -> FeatureJob:
    prepare(generate(Synthetic(users=40, items=50)), tmp_path / "data", image_size=32, workers=1)
    return FeatureJob(
        dataset=tmp_path / "data",
        store=tmp_path / "store",
        modality="text",
        encoder=TEXT,
        reads=Reads((0, 2, 4)),
        title_tokens=16,
        device="cpu",
        seed=0,
        limit_bytes=10**9,
    )


def of_images(job: FeatureJob) -> FeatureJob:
    """The cache of the image encoder beside that of ``job``."""
    image = {"modality": "image", "encoder": IMAGE, "reads": Reads((0, 2, 4), final=True)}
    return job.model_copy(update=image)


def where(job: FeatureJob) -> Path:
    return feature_folder(job, Dataset.open(job.dataset).manifest.fingerprint)


def test_cached_states_are_the_encoders_own_in_half_precision(job: FeatureJob) -> None:
    manifest = build(job)
    states = open_cache(where(job))
    dataset = Dataset.open(job.dataset)
    store = ItemStore(dataset, tokens=tokenise(dataset, TEXT.source, None, 16, job.store))
    items = store.gather(np.arange(1, dataset.manifest.items + 1, dtype=np.int64))
    with torch.no_grad():
        own = load_encoder(TEXT, "text").view.encode(
            job.reads, tokens=items.tokens, token_mask=items.token_mask, image=None
        )
    assert states.dtype == torch.float16
    torch.testing.assert_close(states[1:].float(), own, atol=5e-3, rtol=2e-3)
    assert not states[0].any()
    assert manifest.bytes == states.numel() * 2
    image = of_images(job)
    assert build(image).encoder.parameters > 0
    assert open_cache(where(image)).shape == (dataset.manifest.items + 1, 4, 64)


def test_an_encoder_that_does_not_fit_is_read_from_disk_and_gives_the_same_cache(
    job: FeatureJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    for whole in (job, of_images(job)):
        build(whole)
        other = whole.model_copy(update={"store": job.store.with_name("other")})
        held: list[bool] = []

        def watched(*args: Any, held: list[bool] = held, **settings: Any) -> Any:
            encoder = load_encoder(*args, **settings)
            weights = list(encoder.view.layers[0].parameters())
            held.append(any(weight.device.type != "meta" for weight in weights))
            return encoder

        with monkeypatch.context() as patched:
            patched.setattr(features, "weight_budget", lambda device: 1)
            patched.setattr(features, "load_encoder", watched)
            build(other)
        assert held == [False]
        torch.testing.assert_close(open_cache(where(other)), open_cache(where(whole)), atol=2e-3, rtol=2e-3)
    assert 2**20 < features.weight_budget(torch.device("cpu")) < 2**50


def test_an_interrupted_build_goes_on_and_gives_the_same(job: FeatureJob, monkeypatch: pytest.MonkeyPatch) -> None:
    build(job)
    other = job.model_copy(update={"store": job.store.with_name("other")})
    monkeypatch.setattr(features, "ITEMS_PER_CHUNK", 8)
    monkeypatch.setattr(feature_files, "SAVE_EVERY_S", 0.0)
    seen: list[float] = []

    def stop(share: float) -> None:
        seen.append(share)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(other, stop)
    resumed: list[float] = []
    manifest = build(other, resumed.append)
    assert resumed[0] > seen[0]
    states, again = open_cache(where(job)), open_cache(where(other))
    torch.testing.assert_close(again.float(), states.float(), atol=2e-2, rtol=2e-2)
    assert manifest.peak_bytes.valid


def test_every_reader_of_a_cache_gets_what_its_build_took(job: FeatureJob) -> None:
    manifest = build(job)
    peak = manifest.peak_bytes
    assert peak.source.startswith("peak resident memory of the process")
    assert peak.source.endswith("over the baseline")
    assert peak.value is not None
    assert 0 <= peak.value < 2**31
    assert build(job) == manifest  # not built again
    fingerprint = Dataset.open(job.dataset).manifest.fingerprint
    with measuring("cpu") as phases:
        found = [stored_states([job], {}, fingerprint, CPU, phases, lambda _what, _share: None).cache for _ in range(2)]
    assert [facts.built_by_attempt for facts in found] == [False, False]
    assert {(facts.build_s, facts.peak_bytes) for facts in found} == {(manifest.build_s, peak)}


def test_the_facts_of_two_caches_are_sums_and_say_which_one_was_there(job: FeatureJob) -> None:
    image = of_images(job)
    there = build(image)
    fingerprint = Dataset.open(job.dataset).manifest.fingerprint
    with measuring("cpu") as phases:
        stored = stored_states([job, image], {}, fingerprint, CPU, phases, lambda _what, _share: None)
    facts, text = stored.cache, build(job)
    assert [(phase.kind, phase.name) for phase in phases.phases] == [("cache", "text"), ("load", "cache")]
    assert {m: part.built_by_attempt for m, part in facts.parts.items()} == {"text": True, "image": False}
    assert facts.built_by_attempt
    assert (facts.bytes, facts.build_s) == (text.bytes + there.bytes, text.build_s + there.build_s)
    assert facts.parts["image"].bytes == there.bytes
    assert facts.peak_bytes.value == max(text.peak_bytes.value, there.peak_bytes.value)
    assert facts.encoders == {"text": text.encoder, "image": there.encoder}


GIB = 2**30


@pytest.mark.parametrize(
    ("device", "size", "gpu", "host", "kept"),
    [
        ("cuda", 4 * GIB, 8 * GIB, 0, "device"),
        ("cuda", 4 * GIB + 1, 8 * GIB, 9 * GIB, "pinned"),
        ("cuda", 4 * GIB, 7 * GIB, 8 * GIB, "pinned"),
        ("cuda", 4 * GIB + 1, 8 * GIB, 8 * GIB, "mapped"),
        ("cpu", 4 * GIB, None, 8 * GIB, "host"),
        ("cpu", 4 * GIB + 1, None, 8 * GIB, "mapped"),
    ],
)
def test_states_are_kept_where_half_of_the_memory_holds_them(
    monkeypatch: pytest.MonkeyPatch, device: str, size: int, gpu: int | None, host: int, kept: str
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (gpu, 99 * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=host, total=99 * GIB))
    assert placement._placement(size, torch.device(device)) == kept


def test_states_are_the_same_wherever_they_are_kept(job: FeatureJob, monkeypatch: pytest.MonkeyPatch) -> None:
    size, states_by = build(job).bytes, {}
    file = where(job) / "states.npy"
    content = file.read_bytes()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (size, size))  # half of it is too little
    for wanted, device, available, pin in (
        ("host", "cpu", 2 * size, None),
        ("mapped", "cpu", size, None),
        ("pinned", "cuda", 2 * size, torch.Tensor.clone),
        ("unpinned", "cuda", 2 * size, None),  # without a GPU there is no page-locking, as under a limit
    ):
        with monkeypatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available))
            if device == "cuda":
                patch.setattr(torch.Tensor, "pin_memory", pin or _refused)
            states_by[wanted], where_kept = place({"text": open_cache(where(job))}, torch.device(device))
        assert where_kept == wanted
    dataset = Dataset.open(job.dataset)
    slots, log_p = dataset.train_slots[:9], log_popularity(dataset)
    for protocol in ("suite", "paper"):
        batches = {
            kept: build_batch(slots, log_p, ItemStore(dataset, states=s), protocol) for kept, s in states_by.items()
        }
        for batch in batches.values():
            for modality, states in batches["host"].items.states.items():
                assert torch.equal(batch.items.states[modality], states)
                assert torch.equal(states, states_by["host"][modality][batch.items.ids])
    for where_kept, states in states_by.items():
        states["text"][1:3] = 0  # reaches no file
        assert is_mapped(states["text"], file) == (where_kept == "mapped"), where_kept
    assert file.read_bytes() == content  # a map of one's own


def is_mapped(table: torch.Tensor, path: Path) -> bool:
    """Whether the memory of ``table`` is a map of the file."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not list memory maps")
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= table.data_ptr() < last:
            return line.endswith(str(path))
    raise AssertionError("no memory there")


def _refused(_tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.gpu
def test_states_on_a_gpu_and_beside_it(job: FeatureJob, monkeypatch: pytest.MonkeyPatch) -> None:
    build(job)
    device, dataset = torch.device("cuda"), Dataset.open(job.dataset)
    slots, log_p, seen = dataset.train_slots[:9], log_popularity(dataset), {}
    for free, wanted in ((GIB, "device"), (0, "pinned")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, free))
        states, where_kept = place({"text": open_cache(where(job))}, device)
        assert where_kept == wanted
        batch = build_batch(slots, log_p, ItemStore(dataset, states=states, pin=True), "suite").pin()
        if wanted == "pinned":
            assert all(table.is_pinned() for table in (*states.values(), *batch.items.states.values()))
        seen[wanted] = batch.to(device).items.states
    for modality, table in seen["device"].items():
        assert table.is_cuda
        assert torch.equal(table, seen["pinned"][modality])


def test_a_finished_cache_is_used_again(job: FeatureJob) -> None:
    first = build(job)

    def never(_share: float) -> None:
        raise AssertionError("built twice")

    assert build(job, never) == first


def test_a_changed_file_is_found(job: FeatureJob) -> None:
    build(job)
    table = where(job) / "states.npy"
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(bytes(data))
    with pytest.raises(UserError, match="checksum"):
        open_cache(where(job))


@pytest.mark.parametrize("file", ["states.npy", pytest.param("manifest.json", marks=pytest.mark.slow)])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_cache_is_built_again(job: FeatureJob, file: str, harm: Callable[[Path], object]) -> None:
    build(job)
    whole = (where(job) / "states.npy").read_bytes()
    harm(where(job) / file)
    lost = file == "manifest.json" and not (where(job) / file).exists()  # as one that was never finished
    fingerprint = Dataset.open(job.dataset).manifest.fingerprint
    with measuring("cpu") as phases:
        stored = stored_states([job], {}, fingerprint, CPU, phases, lambda _what, _share: None)
    assert stored.rebuilt == (() if lost else ("text",))
    assert stored.cache is not None
    assert stored.cache.built_by_attempt
    assert (where(job) / "states.npy").read_bytes() == whole
    assert phases.phases[-1].kind == "load"


@pytest.mark.parametrize("harm", ["flip", "cut", "rows", "text"])
def test_a_damaged_build_starts_anew(
    job: FeatureJob, harm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows that were synced and then changed are not built upon, nor is a progress file that says anything else."""
    monkeypatch.setattr(features, "ITEMS_PER_CHUNK", 7)
    monkeypatch.setattr("tpme.bench.task.feature_files.SAVE_EVERY_S", 0.0)
    assert not build(job).started_anew
    whole = (where(job) / "states.npy").read_bytes()
    job = job.model_copy(update={"store": tmp_path / "other"})

    def interrupt(share: float) -> None:
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(job, interrupt)
    table, progress = where(job) / "states.npy", where(job) / "progress.json"
    if harm == "flip":
        content = bytearray(table.read_bytes())
        content[300] ^= 1
        table.write_bytes(content)
    elif harm == "cut":
        table.write_bytes(table.read_bytes()[:-1])
    else:
        progress.write_text(progress.read_text().replace('"rows":', '"rows":9') if harm == "rows" else "[]")
    assert build(job).started_anew
    assert table.read_bytes() == whole


def test_a_cache_over_the_limit_is_refused_with_its_planned_bytes(job: FeatureJob) -> None:
    planned = build(job).bytes
    small = job.model_copy(update={"limit_bytes": 1000, "store": job.store.with_name("small")})
    with pytest.raises(UserError, match=f"{planned:,}"):
        build(small)
    assert not list(small.store.rglob("*.npy"))


@pytest.mark.parametrize(
    "change",
    [
        {"reads": Reads((0, 4))},
        {"reads": Reads((0, 2, 4), final=True)},
        {"reads": Reads((0, 2, 4), pool="mean")},
        {"reads": Reads((0, 2, 4), tokens="all")},
        {"title_tokens": 12},
        {"encoder": EncoderSpec(source=TEXT.source, weights="random")},
        {"encoder": EncoderSpec(source=TEXT.source, attention="eager")},
        {"encoder": EncoderSpec(source=TEXT.source, dtype="bf16")},
        {"encoder": EncoderSpec(source=TEXT.source, tower="text")},
    ],
)
def test_what_it_depends_on_names_its_folder(job: FeatureJob, change: dict[str, Any]) -> None:
    assert where(job.model_copy(update=change)) != where(job)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 5},
        {"limit_bytes": 10**6},
        {"device": "cuda"},
        {"encoder": EncoderSpec(source=TEXT.source, revision="0123")},
        {"encoder": EncoderSpec(source=TEXT.source, pool="mean")},  # what it changes is in the reads
    ],
)
def test_what_it_does_not_depend_on_shares_its_folder(job: FeatureJob, change: dict[str, Any]) -> None:
    assert where(job.model_copy(update=change)) == where(job)


def test_a_cache_of_images_knows_nothing_of_titles(job: FeatureJob) -> None:
    image = of_images(job)
    assert where(image.model_copy(update={"title_tokens": 12})) == where(image)

"""What a cell reads: the prepared data set, and the inputs of its items."""

from __future__ import annotations

from collections.abc import Mapping

from tpme.bench.errors import UserError
from tpme.bench.record import EncoderSpec, Modality
from tpme.bench.run.job import Job
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import image_size, pin_revision
from tpme.bench.task.features import FeatureJob, InitialJob
from tpme.bench.task.items import Reads
from tpme.bench.task.placement import ItemShard, Table
from tpme.bench.task.tokens import tokenise
from tpme.bench.train.build import starts_from_weights
from tpme.methods.base import Method


def open_dataset(job: Job) -> Dataset:
    """The data set of a job. Raises UserError where it is not the one that the matrix was read with."""
    dataset = Dataset.open(job.dataset_path, job.store)
    if dataset.manifest.fingerprint != job.cell.dataset_fingerprint:
        raise UserError(f"{job.dataset_path}: changed since the matrix was read; run the matrix again")
    return dataset


def check_encoders(specs: Mapping[Modality, EncoderSpec]) -> None:
    """Raise UserError where the content of an encoder's folder is not what it was when the matrix was read."""
    for spec in specs.values():
        if spec.revision is not None and pin_revision(spec) != spec:
            raise UserError(f"encoder '{spec.source}': changed since the matrix was read; run the matrix again")


def item_store(
    job: Job, dataset: Dataset, specs: Mapping[Modality, EncoderSpec], states: Mapping[Modality, Table | ItemShard]
) -> ItemStore:
    """Tokens and images of all items, as the encoders ``specs`` that run expect them, and the ``states`` of others.

    Raises UserError for images of another size.
    """
    text, image = specs.get("text"), specs.get("image")
    if image is not None and image_size(image) != dataset.manifest.image_size:
        raise UserError(
            f"{job.dataset_path}: images are {dataset.manifest.image_size} pixels wide, the encoder "
            f"'{image.source}' reads {image_size(image)}; prepare the data with --image-size {image_size(image)}"
        )
    tokens = None
    if text is not None:
        tokens = tokenise(dataset, text.source, text.revision, job.cell.training.title_tokens, job.store)
    on_gpu = job.cell.device == "cuda"
    return ItemStore(dataset, tokens=tokens, images=image is not None, states=states, pin=on_gpu)


def feature_job(job: Job, method: Method, modality: Modality, spec: EncoderSpec, reads: Reads) -> FeatureJob:
    """The feature cache of one encoder: the states of it that ``method``, the one of the cell, ``reads``."""
    initial = InitialJob(
        method=job.cell.method,
        options=job.cell.options,
        methods_path=job.methods_path,
        code_version=job.code_version,
    )
    return FeatureJob(
        dataset=job.dataset_path,
        store=job.store,
        modality=modality,
        encoder=spec,
        reads=reads,
        title_tokens=job.cell.training.title_tokens,
        device=job.cell.device,
        seed=job.cell.seed,
        limit_bytes=job.cache_limit_bytes,
        initial=initial if starts_from_weights(method) else None,
    )

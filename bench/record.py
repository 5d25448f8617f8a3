"""The result schema: what a cell is, what one attempt at it left behind, and how records reach the disk.

A *cell* is one training run to be measured: method x dataset x encoders x seed x settings. Every finished
attempt at a cell is one immutable JSON file, written to a temporary name and renamed, so a reader never sees
half a record. Ranks, step times and memory samples are stored beside it as ``.npz`` files named in ``files``.

Units are part of the field names: ``_s`` seconds, ``_bytes``, ``_j`` joules. A value that is not available is
``None`` and its ``reason`` says why; it is never 0. This module imports pydantic only, so that reports start
fast and need no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Strict,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from tpme.bench.errors import UserError, first_problem
from tpme.bench.limits import Number, Positive, Seed, Size, Switch
from tpme.bench.names import Line, Name
from tpme.bench.parsing import parse_json, read_json_bytes
from tpme.bench.redact import publishable
from tpme.bench.writing import write_atomically

SCHEMA_VERSION = 2
BASELINES_OF_VERSION_1 = ("frozen", "id", "popularity")
"""The baselines among the methods of that time; records of version 1 do not say."""
CELLS_FILE = "cells.json"
"""In a run folder: the names of the folders of its last matrix's cells, under ``cells``."""

Modality = Literal["text", "image"]
Pool = Literal["first", "mean", "last"]
"""How an item's tokens become one vector: the first, the mean or the last of those that the mask keeps."""
Protocol = Literal["suite", "paper"]
Precision = Literal["fp32", "bf16", "fp16"]
Status = Literal["ok", "oom", "diverged", "timeout", "killed", "error", "skipped"]
PhaseKind = Literal[
    "load", "adapt", "prepare", "cache", "warmup", "train", "validate", "rank", "export", "inference", "estimate",
    "search", "round", "count", "probe", "other",
]  # fmt: skip
"""``estimate``, ``search`` and ``round`` are a method's own. ``count`` is the harness's counting after training,
``probe`` its measure of the representation space. ``other`` is what a recorded training loop does between its phases.
"""


Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
FileName = Annotated[str, StringConstraints(pattern=r"^[^/\\\x00]{1,255}$")]
"""Of a file beside the record: no path."""
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


def _as_time(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class Frozen(BaseModel):
    """Base of everything that crosses a boundary: immutable, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)  # JSON knows neither


# --- what is to be run -------------------------------------------------------------------------------------


class EncoderSpec(Frozen):
    """One foundation encoder: a Hugging Face hub id, a local folder, or ``builtin:NAME`` for a shipped one.

    ``states:FILE`` names a file of precomputed hidden states in its place.
    """

    source: Line
    revision: Line | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    tower: Modality | None = None
    """The half of a two-tower checkpoint (CLIP, SigLIP) that is loaded; ``None``: that of the encoder's modality."""
    pool: Pool | None = None
    """How its items are read; ``None``: as the encoder was trained to be read."""
    dtype: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Of its weights; ``auto`` is that of the checkpoint. Other than fp32 only where no method trains through it."""
    attention: Line | None = None
    """Attention implementation by its name in transformers (``eager``, ``sdpa``); ``None``: its default."""

    @property
    def precomputed(self) -> bool:
        """Whether it is a file of hidden states in place of an encoder."""
        return self.source.startswith("states:")


class LearningRates(Frozen):
    """Adam learning rates: the recommender's own parts, each encoder's parts, and a method's side network."""

    recommender: Positive = 2e-4
    text: Positive = 4e-4
    image: Positive = 4e-4
    method: Positive = 4e-4
    groups: dict[Name, Positive] = {}
    """Of groups that a method names itself (``Method.groups``); the others use the rate ``method``."""

    @model_serializer(mode="wrap")
    def _without_empty_groups(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out empty groups: identities and files of such cells stay those of older versions."""
        return {name: value for name, value in dump(self).items() if name != "groups" or value}

    def of(self, group: str) -> float:
        """The learning rate of a group of parameters."""
        return self.groups.get(group, self.method) if group not in LR_PARTS else float(getattr(self, group))

    def by_group(self) -> dict[str, float]:
        """Every learning rate by name."""
        return {name: self.of(name) for name in (*LR_PARTS, *self.groups)}


LR_PARTS = tuple(name for name in LearningRates.model_fields if name != "groups")
"""Groups of parameters that every method has."""


class Training(Frozen):
    """Training settings. They belong to the task: every method of a matrix gets the same ones."""

    epochs: Number = 8
    patience: Number = 10
    """Epochs without a better validation Recall@10 before training stops."""
    users_per_batch: Size = 32
    precision: Precision = "fp32"
    activation_checkpointing: Switch = False
    compile: Switch = False
    """Run encoder layers, item encoder and sequential encoder through torch.compile."""
    cuda_graphs: Switch = False
    """Replay the steps of rows in which no encoder runs as CUDA graphs."""
    embedding_dim: Size = 64
    dropout: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.1
    blocks: Annotated[int, Strict(), Field(gt=0, le=1000)] = 2
    heads: Size = 2
    title_tokens: Size = 30
    max_steps_per_epoch: Number | None = None
    """Cuts every epoch after this many steps; ``None`` trains on all users."""
    devices: Number = 1
    """Devices that train one cell together, each in a process of its own (a rank); the loss does not depend on it."""
    shard: Switch = False
    """Spread weights, gradients and optimiser states of the encoders over the devices (FSDP2)."""

    @model_validator(mode="after")
    def _compiled_or_recorded(self) -> Training:
        if self.compile and self.cuda_graphs:
            raise ValueError("compile and cuda_graphs exclude each other: graphs record steps that are not compiled")
        if self.shard and self.devices == 1:
            raise ValueError("shard spreads the encoders over devices: set devices to 2 or more")
        return self


class Evaluation(Frozen):
    """Which users the model is evaluated on: in validation, which ends training early, and in the test."""

    users: Number | None = None
    """So many, drawn at random; ``None``, and a number that is not below theirs, for all."""
    seed: Seed = 12345
    """Of the draw, which is the same for every method and every seed of a cell."""


class Cell(Frozen):
    """One training run to be measured, complete: everything that may change the result is in here."""

    method: str
    options: dict[str, Any] = {}
    """Settings of the method itself (its ``Config``); empty means all defaults."""
    cached: bool = False
    """Read the encoders that the method leaves frozen from the harness's feature cache instead of running them."""
    dataset: str
    dataset_fingerprint: str
    """SHA-256 of the prepared dataset's content; of another task, whatever names its data, or empty."""
    task: str = "recommendation"
    settings: dict[str, Any] = {}
    """Of another task: what its rows share (model, sizes of the data, batch); ``options`` are the method's own.

    ``protocol``, ``training``, ``lr`` and encoders are then at their defaults and mean nothing.
    """
    modalities: tuple[Modality, ...]
    text_encoder: EncoderSpec | None = None
    image_encoder: EncoderSpec | None = None
    protocol: Protocol = "suite"
    training: Training = Training()
    lr: LearningRates = LearningRates()
    evaluation: Evaluation = Evaluation()
    lr_trial: int = 0
    """Index of this learning rate among the method's trials; the reporter selects on validation."""
    lr_trials: PositiveInt = 1
    device: Literal["cpu", "cuda"] = "cpu"
    seed: int = 12345
    matrix: str | None = None
    """Name of the matrix that asked for it; ``None`` where it is not known."""
    baseline: bool = False
    """A reference row: the method adapts no encoder, and gets a TPME only where it is named."""

    @property
    def label(self) -> str:
        """Name of the row in tables: the method, and whether it trained on cached features."""
        return f"{self.method} (cached)" if self.cached else self.method


NO_IDENTITY = frozenset({"matrix", "baseline", "lr_trial", "lr_trials"})
"""Fields that place a cell in its matrix and do not change what runs: adding a learning rate makes no result stale."""


ENCODER_OPTIONS = ("tower", "pool", "dtype", "attention")
"""Fields of an encoder that are newer than the first records: their defaults leave the identity of a cell alone."""
TRAINING_OPTIONS = ("devices", "shard")
"""The same of ``Training``."""
CELL_OPTIONS = ("task", "settings")
"""The same of the cell itself."""


def cell_id(cell: Cell, code_version: str, *, as_written: bool = False) -> str:
    """Identity of a cell: 12 hex digits of SHA-256 over its canonical JSON and the version of the measured code.

    Without the fields in ``NO_IDENTITY``, without a sample of users where all are evaluated, and without the newer
    options of cell, encoders and training where they are the default ones; ``as_written``, also without the fields that
    the record of the cell does not have, for it is older.
    """
    settings = cell.model_dump(mode="json", exclude=set(NO_IDENTITY), exclude_unset=as_written)
    if cell.evaluation.users is None:
        settings.pop("evaluation", None)
    for option in CELL_OPTIONS:
        if option in settings and settings[option] == Cell.model_fields[option].default:
            del settings[option]
    for encoder in filter(None, (settings.get("text_encoder"), settings.get("image_encoder"))):
        for option in ENCODER_OPTIONS:
            if option in encoder and encoder[option] == EncoderSpec.model_fields[option].default:
                del encoder[option]
    training = settings.get("training", {})
    for option in TRAINING_OPTIONS:
        if option in training and training[option] == Training.model_fields[option].default:
            del training[option]
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{code_version}\n{canonical}".encode()).hexdigest()[:12]


# --- what came out of it -----------------------------------------------------------------------------------


class Reading(Frozen):
    """One measured quantity: its value, how it was obtained, and why it is missing or not to be trusted."""

    value: float | None
    source: str
    """The instrument, for people: ``"VmHWM over the baseline"``, ``"NVML device delta"``."""
    valid: bool = True
    reason: str | None = None

    @model_validator(mode="after")
    def _require_reason(self) -> Reading:
        if (self.value is None or not self.valid) and not self.reason:
            raise ValueError("a missing or invalid reading needs a reason")
        return self

    @classmethod
    def missing(cls, source: str, reason: str) -> Reading:
        """A reading that could not be taken."""
        return cls(value=None, source=source, valid=False, reason=reason)


def _not_negative(reading: Reading) -> Reading:
    if reading.value is not None and reading.value < 0:
        raise ValueError(f"it cannot be negative, and is {reading.value:g}")
    return reading


Amount = Annotated[Reading, AfterValidator(_not_negative)]
"""A reading of a time, an energy or a number: 0 or more. Memory over a baseline may be less."""


class Memory(Frozen):
    """Peak memory over one window, by every instrument there is, side by side (bytes)."""

    torch_allocated_bytes: Reading
    torch_reserved_bytes: Reading
    nvml_device_bytes: Reading
    """Device use over the idle baseline."""
    nvml_process_bytes: Reading
    host_rss_bytes: Reading
    """Resident memory of the process tree over the baseline taken before data and model were loaded."""


class GpuFacts(Frozen):
    """The state of the GPU over one window, by NVML; None where it was not read."""

    utilisation_percent: float | None
    """Mean."""
    temperature_c: float | None
    """Maximum."""
    sm_clock_mhz: float | None
    """Median."""
    other_processes: Count
    """The most seen at one time."""
    throttled: dict[str, float] = {}
    """What held the clock down, in words -> share of the readings."""


class Phase(Frozen):
    """One stretch of a cell. Kinds may recur; the times of all phases add up to the wall time of the cell."""

    kind: PhaseKind
    name: str = ""
    start_s: Seconds
    """Since the start of the cell."""
    wall_s: Seconds
    memory: Memory
    energy_j: Amount
    gpu: GpuFacts | None = None
    """None where no GPU was used or it could not be queried."""


class Timings(Frozen):
    """Wall times of repeated runs of the same work, in order; a run is one pass or several in a row."""

    size: PositiveInt
    """Items or users of a pass."""
    run_s: tuple[PositiveFloat, ...] = ()
    """Seconds of a pass, mean over each run."""
    passes: PositiveInt = 1
    """Passes of a run: more where one is short."""
    reason: str | None = None
    """Why there are no runs."""

    @model_validator(mode="after")
    def _require_reason(self) -> Timings:
        if not self.run_s and not self.reason:
            raise ValueError("timings without a run need a reason")
        return self


class Inference(Frozen):
    """What it costs to serve the adapted model, once it is prepared for inference, in the precision of the cell."""

    flops_per_item: Amount
    """Of encoding an item, counted on the items of ``batch``."""
    flops_by_data: bool = False
    """The FLOPs differ from item to item, so they depend on the trained weights, too, and are no exact counter."""
    single: Timings
    """Encoding one item."""
    batch: Timings
    """Encoding a batch of items."""
    user: Timings
    """One user: sequential encoder over the item vectors of the history, scores of the whole catalogue, top 10."""
    memory: Memory
    """Peaks while all this was timed."""
    loaded_bytes: Amount
    """What must be in memory to encode items."""
    looked_up: tuple[Modality, ...] = ()
    """Modalities whose hidden states come from a table: their encoders do not run, and no FLOPs of them are counted."""


class Spectrum(Frozen):
    """Ranks of a matrix of states (n, D) by its singular values s_1 >= s_2 >= ..."""

    effective_rank: float
    """``exp(-sum p log p)`` with p = s / sum s."""
    energy_rank_90: int
    """The fewest singular values with 90 % of the energy, sum s^2."""
    energy_rank_99: int
    stable_rank: float
    """``sum s^2 / s_1^2``."""


class SpaceFacts(Frozen):
    """One space of the trained model, and how it relates to that of the unadapted encoder, on the same items."""

    width: int
    raw: Spectrum
    centred: Spectrum
    """After the mean over the items is subtracted from every column."""
    unadapted_raw: Spectrum | None = None
    unadapted_centred: Spectrum | None = None
    """``None`` for item vectors, which have no unadapted counterpart."""
    overlap: dict[int, float] = {}
    """k -> ``||V_k^T V'_k||_F^2 / k``, V the first k right singular vectors of the centred states; in [0, 1]."""
    cosine: dict[int, float] = {}
    """k -> mean cosine of the principal angles between the same subspaces."""
    cka: float | None = None
    """Linear CKA with the unadapted states, in [0, 1]; ``None`` where one of them is the same for all items."""


class Representation(Frozen):
    """The representation space of the trained model."""

    probe_items: PositiveInt
    """As the matrix asks for."""
    items: PositiveInt
    """As measured: fewer in a smaller catalogue."""
    spaces: dict[str, SpaceFacts] = {}
    """``text`` and ``image``: final states as they are read, ``-mean`` at the mean of their tokens; ``items``: item
    vectors, beside the unadapted final states of all encoders."""
    reasons: dict[str, str] = {}
    """Why a space is missing."""


class Epoch(Frozen):
    """One epoch: training only in ``train_s`` (data loading included; validation and bookkeeping excluded)."""

    index: PositiveInt
    """From 1."""
    stage: str = ""
    """Name of the training stage it belongs to; empty where training has one stage."""
    train_s: PositiveFloat
    steps: PositiveInt
    loss: float | None
    """``None`` where the training loop of another task does not say."""
    losses: dict[str, float] = {}
    """Mean of each term of the loss, by the name that the method gives it."""
    valid_recall_10: Share | None = None
    valid_ndcg_10: Share | None = None
    """``None`` for other tasks than recommendation."""
    metrics: dict[str, float] = {}
    """What another task evaluated after it, by name."""


def earlier_epochs(epochs: Sequence[Epoch]) -> int:
    """Number of epochs before those of the last stage."""
    return max((n for n, epoch in enumerate(epochs, start=1) if epoch.stage != epochs[-1].stage), default=0)


class Parameters(Frozen):
    """Parameter counts, exact and equal on every machine."""

    trainable: Count
    trainable_max: Count
    """The most that ever trained at one time (a method may change what trains)."""
    total: Count | None
    """All parameters the cell holds, the encoders' included when they are loaded; ``None`` where others do not say."""
    by_group: dict[str, Count]
    stored_bytes: Count | None
    """What must be kept to use the adapted model later, beside the untouched encoders; ``None`` as above."""


class EncoderFacts(Frozen):
    """The encoder that was loaded."""

    source: str
    revision: str | None
    architecture: str
    weights: Literal["pretrained", "random"]
    width: Count
    depth: Count
    parameters: Count
    pool: Pool = "first"
    """How its items are read unless a method says otherwise."""
    dtype: str = "float32"
    """Of its weights as loaded."""
    attention: Line | None = None
    """Attention implementation, by its name in transformers; ``None`` where it is not known."""


class CachePart(Frozen):
    """The cached states of one encoder."""

    build_s: Seconds
    bytes: Count
    built_by_attempt: bool


class CacheFacts(Frozen):
    """The feature cache a cell trained on. Built by separate processes, paid once per dataset and encoder.

    Times and bytes are those of all encoders together.
    """

    build_s: Seconds
    bytes: Count
    items: Count
    dtype: str
    built_by_attempt: bool
    """False when earlier cells had already built all of it; ``build_s`` is what its builds took, whenever."""
    encoders: dict[Modality, EncoderFacts] = {}
    """The encoders whose states it holds; the cell itself loads none."""
    peak_bytes: Reading = Reading.missing("peak memory of the builder", "the record is of schema version 1")
    """Peak memory of the process that built it, the largest of several; of a build in several runs, of the last."""
    parts: dict[Modality, CachePart] = {}
    """By encoder; empty in older records."""


class DatasetFacts(Frozen):
    """The data that was read."""

    name: str
    fingerprint: str
    users: Count
    items: Count
    interactions: Count
    items_never_trained: Count
    evaluated_users: Count | None = None
    """How many of the users were drawn for validation and test; ``None`` where all were taken."""
    modalities: tuple[Modality, ...]
    source: str | None = None
    """Kind and place it was read from, for people; ``None`` where it is not known."""
    synthetic: dict[str, Any] | None = None
    """The settings given to the built-in catalogue; ``None`` for other data, and where they are not known."""
    max_seq_len: PositiveInt | None = None
    """Longest input of the sequential encoder, in items."""
    image_size: PositiveInt | None = None
    """Height and width of the stored images in pixels; ``None`` without images."""


class Environment(Frozen):
    """Everything needed to judge whether two records may be compared."""

    python: str
    platform: str
    hostname_hash: str
    packages: dict[str, str]
    device_kind: Literal["cpu", "cuda"]
    device_name: str
    device_key: str
    """Records are comparable in time and memory only where this is equal: model, driver, threads."""
    driver: str | None
    cpu_threads: Count
    allocator: str
    deterministic: bool
    git_revision: str | None
    git_dirty: bool | None
    node: str | None = None
    """Name of the cluster's node; ``None`` without a cluster."""
    devices: tuple[str, ...] = ()
    """The devices of a cell that trained on several, in the order of their ranks; empty for one device."""


class RankFacts(Frozen):
    """What one of the processes that trained a cell together measured on its own device."""

    rank: Count
    hostname_hash: str
    """Of its machine; see ``Environment``."""
    node: str | None
    device_name: str
    cpu_threads: Count
    training_memory: Memory | None
    """Peaks over the training phases of the last stage; ``None`` where nothing was trained in epochs."""
    peak_memory: Memory
    """Peaks over all phases since the memory baseline."""
    training_energy_j: Amount
    """Of its device, over the same phases as ``training_memory``."""
    collective_s: Amount
    """Median time of a step in collectives: waiting for other ranks, and transfer."""
    counters: dict[str, Reading] = {}
    """State of its GPU, wait for CPU cores and cost of the sampler, as the counters of a record."""


class Flag(Frozen):
    """Something a reader must know before trusting a number; shown as a footnote wherever the row is shown."""

    code: str
    """``random-weights``, ``cpu-memory``, ``foreign-process``, ``throttled``, ``cache-build`` ..."""
    message: str


REBUILT = "rebuilt"
"""Code of the flag on a cell that found something damaged on disk and made it again; the console shows it, too."""


class Failure(Frozen):
    """Where an attempt that is not ``ok`` stopped."""

    phase: str
    message: str
    """One line: what, where, and what to do."""
    epoch: Count | None = None
    step: Count | None = None
    """Training step of that epoch, from 1; ``None`` outside the training phases."""
    bytes_requested: Count | None = None


class NamedMetric(Frozen):
    """A quality metric of a task without Recall and NDCG, and which way it improves."""

    value: Reading
    higher_is_better: bool


class ImportSource(Frozen):
    """Where a row was imported from that was not measured here."""

    name: str
    """The publication or tool, for people."""
    reference: str = ""
    """Its address, DOI or file."""
    commit: str = ""
    """The version of ``reference`` that was read."""
    definitions: dict[str, str] = {}
    """What T, P, M and the quality mean there, by these names and those of the metrics."""


PASS_S = "pass_s"
"""Counter of a method that trains in rounds alone: seconds of as many rounds as process each user once."""
VALIDATION = ("valid_recall_10", "valid_ndcg_10")
"""Counters of such a method in place of those of epochs."""
HELD_OUT = "projection_users"
"""Counter of a method that keeps training users apart: how many."""


class CellResult(Frozen):
    """One finished attempt at one cell, however it ended."""

    schema_version: Literal[2] = 2
    cell_id: str
    attempt: PositiveInt
    cell: Cell
    code_version: str
    status: Status
    failure: Failure | None = None
    started_at: Annotated[str, AfterValidator(_as_time)]
    """ISO 8601, UTC."""
    wall_s: Seconds
    time_limit_s: PositiveFloat | None = None
    """Of the attempt; one that ended as ``timeout`` is worth repeating with a higher limit."""
    environment: Environment | None = None
    dataset: DatasetFacts | None = None
    text_encoder: EncoderFacts | None = None
    image_encoder: EncoderFacts | None = None
    parameters: Parameters | None = None
    phases: tuple[Phase, ...] = ()
    epochs: tuple[Epoch, ...] = ()
    warmup_epochs: Count = 0
    """Leading epochs that do not count towards the epoch time: those of earlier stages, and the last one's warm-up."""
    best_epoch: PositiveInt | None = None
    """Of the last stage, as the test ranks."""
    epoch_time_s: Amount
    """T of TPME: median training time of an epoch of the last stage after its warm-up, or of what ``time_of`` says."""
    time_of: Line = "epoch"
    """What T is the time of: ``"epoch"``, ``"250 steps"``, ``"1000 samples"``; ``epochs`` are then these stretches."""
    ranks: tuple[RankFacts, ...] = ()
    """By rank, where several trained the cell together; of an attempt that failed, the one that failed first.

    Memory in ``phases`` and ``training_memory`` is then that of the rank with the most, energy the sum over the ranks,
    and times are those of rank 0, which waits for the others at both ends of an epoch.
    """
    all_in_s: Amount | None = None
    """Everything that leads to the trained model: feature cache, estimation, search, rounds, epochs of all stages."""
    training_memory: Memory | None = None
    """Peaks over the training phases of the last stage: the source of M of TPME."""
    cache: CacheFacts | None = None
    inference: Inference | None = None
    """None where the cell did not get so far, and in records from before it was measured."""
    inference_items_per_s: Amount | None = None
    """Of records from before ``inference``."""
    representation: Representation | None = None
    """``None`` unless the matrix asks for it (``probe_items``)."""
    counters: dict[str, Reading] = {}
    """Exact counters (FLOPs, bytes saved for backward ...) and a method's own (``report()``)."""
    metrics: dict[str, NamedMetric] = {}
    """Test metrics by name, where ranks do not hold the quality; empty for recommendation."""
    source: ImportSource | None = None
    """``None`` for what was measured here."""
    flags: tuple[Flag, ...] = ()
    files: dict[str, FileName] = {}
    """``ranks`` and ``samples``: names of the ``.npz`` files beside this record; ``adapter``: of a safetensors file.

    ``ranks`` holds, one entry a user: ``rank`` (int32, from 1, ties against the model), ``target`` (item),
    ``cold`` (the target never occurs in training), ``in_history`` (the target is masked, so it cannot hit). Of a
    sample of users it also holds ``user`` (int64, rising): their rows in the prepared data.
    ``adapter`` holds what the method has trained, as of the best epoch, where the run saves it.
    ``samples`` holds ``step_s`` (training steps), ``step_epoch``, and the memory curve ``sample_t_s``,
    ``sample_bytes``.
    """
    digests: Mapping[str, Sha256] = {}
    """SHA-256 of these files, by the same names; empty in older records."""

    @property
    def in_rounds(self) -> bool:
        """Nothing was trained but in rounds, of a method that reports the time of one pass over the users in them."""
        return not self.epochs and PASS_S in self.counters

    @property
    def pass_time_s(self) -> Reading:
        """T of TPME: ``epoch_time_s``; in rounds, the time of as many as process each user once."""
        return self.counters[PASS_S] if self.in_rounds else self.epoch_time_s

    @property
    def pass_memory(self) -> Memory | None:
        """The source of M of TPME: ``training_memory``; in rounds, the peaks over them, instrument by instrument."""
        rounds = [phase.memory for phase in self.phases if phase.kind == "round"]
        if not self.in_rounds:
            return self.training_memory
        if not rounds:
            reason = (
                "all rounds were finished in earlier attempts; to measure M, remove its records and run the cell again"
            )
            return Memory(**dict.fromkeys(Memory.model_fields, Reading.missing("none", reason)))
        # A reading that is not valid may hide the true peak, so it stands for all.
        largest = {
            name: max(
                (getattr(one, name) for one in rounds), key=lambda reading: (not reading.valid, reading.value or 0)
            )
            for name in Memory.model_fields
        }
        return Memory(**largest)

    @property
    def untrained(self) -> Flag | None:
        """A flag on a method that trained nothing but the recommender and does not say that it is a baseline."""
        if self.status != "ok" or self.cell.baseline or self.source is not None or self.parameters is None:
            return None
        if self.parameters.trainable_max > self.parameters.by_group.get("recommender", 0):
            return None
        return Flag(
            code="trains-nothing",
            message=f"{self.cell.method} trains no parameter of its own, at most the recommender: either it leaves "
            "everything frozen by mistake, or it is a reference row and should set baseline = True",
        )

    @property
    def costs_flag(self) -> Flag | None:
        """Which costs T and M are, where more led to the model than the training that they measure."""
        if self.in_rounds:
            message = (
                "trained in rounds, without epochs: T is the time of as many rounds as process each user once, one "
                "client after the other on one device (its counter pass_parallel_s: with a device for each client); M "
                "is the peak of the rounds; what came before them counts in the all-in time alone"
            )
            return Flag(code="in-rounds", message=message)
        if not self.epochs or self.earlier_s < 1e-3:  # sums of the same times differ in their last bits
            return None
        message = (
            "T and M, and so TPME, are those of the last training alone; the search, estimation or stages before it "
            "count in the all-in time and in the time to the best epoch"
        )
        return Flag(code="last-stage", message=message)

    @property
    def earlier_s(self) -> float:
        """Seconds that led to the model, besides the feature cache and the epochs of the last stage."""
        if self.all_in_s is None or self.all_in_s.value is None:
            return 0.0
        last = self.epochs[earlier_epochs(self.epochs) :]
        return self.all_in_s.value - (self.cache.build_s if self.cache else 0.0) - sum(epoch.train_s for epoch in last)

    @property
    def held_out_flag(self) -> Flag | None:
        """Says that epochs are shorter than those of other rows, where a method keeps training users apart."""
        held = self.counters.get(HELD_OUT)
        if held is None or not held.value:
            return None
        message = (
            f"an epoch trains on all users but {held.value:.0f} (its counter {HELD_OUT}), so T is that of fewer steps"
        )
        return Flag(code="held-out-users", message=message)

    @model_validator(mode="after")
    def _require_failure(self) -> CellResult:
        if self.status != "ok" and self.failure is None:
            raise ValueError(f"a cell that ended as '{self.status}' must say where and why")
        return self

    @model_validator(mode="after")
    def _require_bounds(self) -> CellResult:
        if PASS_S in self.counters:
            _not_negative(self.counters[PASS_S])
        for name in VALIDATION:
            value = self.counters[name].value if name in self.counters else None
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"counter '{name}' is in [0, 1], not {value:g}")
        if unknown := self.digests.keys() - self.files.keys():
            raise ValueError(f"a digest of '{min(unknown)}', which is none of its files")
        return self


# --- files ---------------------------------------------------------------------------------------------------


CHANGED = "the record was changed or truncated"


class RecordError(UserError):
    """A record that cannot be read: the message names the file, what is wrong and what to do."""


def write_result(result: CellResult, path: Path) -> None:
    """Write one record as indented JSON, its free text as one may publish it.

    Raises FileExistsError where one is: records are immutable.
    """
    if path.exists():
        raise FileExistsError(f"{path}: a record is never overwritten; start a new attempt")
    content = CellResult.model_validate(published(result.model_dump())).model_dump_json(indent=1)
    write_atomically(path, f"{content}\n".encode())


FREE_TEXT = frozenset(
    {"message", "reason", "reasons", "source", "reference", "allocator", "platform"}
    | {"base", "head", "note", "notes", "advice"}  # of a gate's report
)
"""Fields with words that the suite does not choose itself: they quote errors, paths and variables."""


def published(value: Any, field: str = "") -> Any:
    """A dumped record or report without credentials, home folders and host name in its free text.

    A cell stays as it is: it is the identity of its record.
    """
    if isinstance(value, dict):
        return {
            name: below if name == "cell" else published(below, field if field in FREE_TEXT else name)
            for name, below in value.items()
        }
    if isinstance(value, list | tuple):
        return [published(one, field) for one in value]
    return publishable(value) if isinstance(value, str) and field in FREE_TEXT else value


def read_result(path: Path) -> CellResult:
    """Read one record, of any version so far. Raises RecordError, one line, for what is not a whole, known record.

    Numbers are numbers, not words, and the id is that of the cell and the code version: the record of another cell, or
    one whose settings were changed, is refused.
    """
    try:
        data = read_json_bytes(path)
        try:
            result = CellResult.model_validate_json(data, strict=True)
        except ValidationError:
            migrated = _migrated(parse_json(data.decode(), str(path)))
            result = CellResult.model_validate_json(json.dumps(migrated), strict=True)
    except ValidationError as error:
        first = first_problem(error)
        raise RecordError(f"{path}: field '{first.field}': {first.message}; {CHANGED}") from None
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None
    except (UserError, OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise RecordError(f"{path}: not a readable record ({reason}); delete it and run its cell again") from None
    cell, code = result.cell, result.code_version
    if all(cell_id(cell, code, as_written=older) != result.cell_id for older in (False, True)):
        raise RecordError(f"{path}: field 'cell_id': it is not the id of the cell that it describes; {CHANGED}")
    return result


def _migrated(raw: Any) -> dict[str, Any]:
    """A record of version 1 as one of this version; raises RecordError for versions that are not known.

    Version 1 names neither the matrix nor which methods are baselines, and holds no peak memory of caches.
    """
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in range(1, SCHEMA_VERSION + 1):
        known = f"this tpme reads 1 to {SCHEMA_VERSION}"
        raise RecordError(f"schema version {version!r}, {known}; use the tpme that wrote it")
    migrated: dict[str, Any] = raw | {"schema_version": SCHEMA_VERSION}
    if version == 1 and isinstance(cell := raw.get("cell"), dict):
        migrated["cell"] = cell | {"baseline": cell.get("method") in BASELINES_OF_VERSION_1}
    return migrated


def find_attempts(roots: list[Path]) -> list[Path]:
    """All record files below ``roots`` (a record file itself counts), sorted."""
    records: set[Path] = set()
    for root in roots:
        if not root.exists():
            raise RecordError(f"{root}: no such file or folder; name one that 'tpme run' wrote")
        inside = [root] if root.is_file() else root.rglob("attempt-*.json")
        records.update(path for path in inside if attempt_number(path) or path == root)
    return sorted(records)


def find_results(roots: list[Path]) -> list[Path]:
    """Of all record files below ``roots`` the latest attempt of each cell, sorted."""
    attempts = sorted(find_attempts(roots), key=attempt_number)
    latest = {path.parent if attempt_number(path) else path: path for path in attempts}
    return sorted(latest.values())


def attempt_number(path: Path) -> int:
    """The 3 of ``attempt-3.json``; 0 for a record that was renamed."""
    found = re.fullmatch(r"attempt-([0-9]{1,9})", path.stem)
    return int(found[1]) if found else 0

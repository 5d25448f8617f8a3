"""Result files of peft's method_comparison suite (MetaMathQA), one record a file.

What the figures are follows from the suite's ``run.py`` and ``utils.py``: see ``DEFINITIONS``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from tpme.bench.errors import UserError, first_problem, one_line
from tpme.bench.imports.published import NOT_PUBLISHED, Published, memory_of
from tpme.bench.names import Line
from tpme.bench.parsing import read_json
from tpme.bench.record import Epoch, Failure, ImportSource, NamedMetric, Parameters, Reading, Status

NAME = "huggingface/peft method_comparison"
TASK = "MetaMathQA"
SHARED = (
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile",
    "use_gc", "attn_implementation",
)  # fmt: skip
"""Settings of ``train_config`` that all runs of a group share; the others are a run's own choice, such as its rate."""
BOOKKEEPING = (
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip
"""Fields of ``peft_config`` that say nothing of the method."""
QUALITIES = {"test accuracy": True, "forgetting": False}
"""Metrics of a finished run, and whether more is better."""
DEFINITIONS = {
    "T": "sum of `train time` over the intervals between evaluations: batches, forward, backward and update of all "
    "steps",
    "All in": "`train_time`, which also holds loading the data, two evaluations of forgetting and generating the "
    "answers of the test, and leaves out the evaluations between intervals",
    "P": "`num_trainable_params`",
    "M": "`accelerator_memory_max`, the most that torch's allocator reserved at any time of the run, evaluation by "
    "generation included, over what it held at the start; what the driver and CUDA hold beside it is not in it",
    "Stored": "`file_size` of the saved weights; of full fine-tuning all weights of the model",
    "test accuracy": "share of GSM8K's test problems with the right final number",
    "forgetting": "loss per token on Wikipedia texts after training less that before; less is better",
    "Spread": "one seed; an interval of T resamples the intervals of one run, and nothing says how much another run "
    "differs",
    "Not published": "memory by NVML, energy, FLOPs, cost of inference",
}


class _Part(BaseModel):
    """Of a file from outside: unknown fields are no mistake, another version of the suite may have more."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, strict=True)


class _TrainConfig(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True)
    model_id: Line
    max_steps: PositiveInt
    eval_steps: PositiveInt | None = None
    seed: int


class _RunInfo(_Part):
    created_at: Line
    total_time: NonNegativeFloat
    experiment_name: Line
    train_config: _TrainConfig
    peft_config: dict[str, Any] | None
    error_msg: str = ""


class _Metrics(_Part):
    """One entry of ``metrics``; the last one of a finished run holds the test."""

    step: PositiveInt
    train_loss: Annotated[float | None, Field(alias="train loss")] = None
    train_time: Annotated[float | None, Field(alias="train time", gt=0)] = None
    valid_accuracy: Annotated[float | None, Field(alias="valid accuracy")] = None
    test_accuracy: Annotated[float | None, Field(alias="test accuracy")] = None
    forgetting: float | None = None


class _TrainInfo(_Part):
    accelerator_memory_max: NonNegativeInt
    accelerator_memory_reserved_avg: NonNegativeInt
    accelerator_memory_reserved_99th: NonNegativeInt
    train_time: NonNegativeFloat
    file_size: NonNegativeInt
    num_trainable_params: NonNegativeInt
    num_total_params: NonNegativeInt
    status: Line
    metrics: tuple[_Metrics, ...]


class _Sha(_Part):
    sha: Line | None = None


class _SystemInfo(_Part):
    system: Line
    release: Line
    machine: Line
    accelerator: Line


class _MetaInfo(_Part):
    dataset_info: dict[str, _Sha | None] = {}
    package_info: dict[str, str | None]
    system_info: _SystemInfo


class _File(_Part):
    run_info: _RunInfo
    train_info: _TrainInfo
    meta_info: _MetaInfo


def read_folder(folder: Path, name: str = NAME, commit: str = "") -> list[Published]:
    """The runs whose result files lie in ``folder``, sorted by file.

    Args:
        folder: with ``*.json``, such as ``method_comparison/MetaMathQA/results`` of a checkout of peft.
        name: of who measured, for people.
        commit: of the checkout.

    Raises:
        UserError: no such folder, no JSON in it, or a file that is not one of these.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the one with the suite's result files")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder}: no result files (*.json) in there; name the suite's folder of results")
    return [_read(path, name, commit) for path in files]


def _read(path: Path, name: str, commit: str) -> Published:
    try:
        file = _File.model_validate(_with_tuples(read_json(path)))
    except ValidationError as error:
        first = first_problem(error)
        raise UserError(
            f"{path}: field '{first.field}': {first.message}; not a result file of peft's method_comparison/MetaMathQA"
        ) from None
    run, train, meta = file.run_info, file.train_info, file.meta_info
    settings = run.train_config.model_dump(exclude_unset=True)
    method, variant = _names(run.experiment_name, run.train_config.model_id)
    status, failure = _end(train.status, run.error_msg)
    last = train.metrics[-1] if train.metrics else None
    quality = {
        key: NamedMetric(value=_reading(getattr(last, key.replace(" ", "_"), None), key), higher_is_better=better)
        for key, better in QUALITIES.items()
    }
    packages = {key.removesuffix("-version"): text for key, text in meta.package_info.items() if text and _version(key)}
    return Published(
        where=str(path),
        task=TASK,
        data=TASK,
        fingerprint=" ".join(f"{key} {one.sha}" for key, one in meta.dataset_info.items() if one and one.sha),
        method=method,
        options=_options(variant, settings, run.peft_config),
        settings={key: settings[key] for key in SHARED if key in settings},
        device_name=meta.system_info.accelerator,
        platform=f"{meta.system_info.system}-{meta.system_info.release}-{meta.system_info.machine}",
        packages=packages,
        seed=run.train_config.seed,
        code_version=meta.package_info.get("peft-commit-hash") or packages.get("peft", NOT_PUBLISHED),
        source=ImportSource(name=name, reference=f"{TASK}/results/{path.name}", commit=commit, definitions=DEFINITIONS),
        started_at=run.created_at,
        time_s=_time(path, train, run.train_config.max_steps, status),
        time_of=f"{run.train_config.max_steps} steps",
        epochs=_epochs(path, train.metrics, run.train_config.eval_steps),
        total_s=Reading(value=train.train_time, source="train_time as published"),
        wall_s=run.total_time,
        memory=memory_of(
            torch_reserved_bytes=Reading(
                value=float(train.accelerator_memory_max),
                source="accelerator_memory_max, reserved by torch's allocator",
            )
        ),
        parameters=Parameters(
            trainable=train.num_trainable_params,
            trainable_max=train.num_trainable_params,
            total=train.num_total_params,
            by_group={},
            stored_bytes=train.file_size,
        ),
        counters={
            f"reserved_{key}_bytes": Reading(
                value=float(value), source=f"accelerator_memory_reserved_{key} as published"
            )
            for key, value in (
                ("avg", train.accelerator_memory_reserved_avg),
                ("99th", train.accelerator_memory_reserved_99th),
            )
        },
        metrics=quality,
        status=status,
        failure=failure,
    )


def _version(key: str) -> bool:
    return key.endswith("-version")


def _with_tuples(value: Any) -> Any:
    """Lists as tuples, which strict models ask for."""
    if isinstance(value, dict):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _names(experiment: str, model: str) -> tuple[str, str]:
    """The method and the name of its variant in ``lora/llama-3.2-3B-rank32``: ``lora`` and ``rank32``."""
    method, _, variant = experiment.partition("/")
    short = model.rpartition("/")[2].lower()
    if variant.lower().startswith(short):
        variant = variant[len(short) :].lstrip("-_")
    return method, variant or "default"


def _options(variant: str, settings: dict[str, Any], peft_config: dict[str, Any] | None) -> dict[str, Any]:
    """What a run chose: the name of its variant, its optimiser and rate, and the plain settings of its peft method."""
    own = {key: value for key, value in settings.items() if key not in (*SHARED, "seed")}
    config = {key: value for key, value in (peft_config or {}).items() if key not in BOOKKEEPING}
    plain: dict[str, Any] = {key: value for key, value in config.items() if isinstance(value, bool | int | float | str)}
    targets = config.get("target_modules")
    if isinstance(targets, tuple):
        plain["target_modules"] = sorted(map(str, targets))
    chosen = {"training": own, "peft": plain}
    return {"experiment": variant} | {key: value for key, value in chosen.items() if value}


def _end(status: str, message: str) -> tuple[Status, Failure | None]:
    """How a run ended; the suite calls a run that ran out of memory cancelled."""
    if status == "success":
        return "ok", None
    text = one_line(ValueError(message)) if message.strip() else f"its status is '{status}', and it gives no reason"
    return "oom" if "out of memory" in message.lower() else "error", Failure(phase="train", message=text)


def _reading(value: float | None, source: str) -> Reading:
    return Reading.missing(source, NOT_PUBLISHED) if value is None else Reading(value=value, source=source)


def _epochs(path: Path, metrics: tuple[_Metrics, ...], most: int | None) -> tuple[Epoch, ...]:
    """The intervals between evaluations; their steps are those since the one before, ``most`` of them at most."""
    parts: list[Epoch] = []
    before = 0
    for entry in metrics:
        if entry.train_time is None:
            continue
        if entry.step <= before:
            raise UserError(f"{path}: metrics: step {entry.step} after step {before}; the file is damaged")
        if most is not None and entry.step - before > most:
            raise UserError(
                f"{path}: metrics: no `train time` between steps {before} and {entry.step}, though each interval has "
                f"{most}; the file is damaged"
            )
        validated = {} if entry.valid_accuracy is None else {"valid accuracy": entry.valid_accuracy}
        parts.append(
            Epoch(
                index=len(parts) + 1,
                train_s=entry.train_time,
                steps=entry.step - before,
                loss=entry.train_loss,
                metrics=validated,
            )
        )
        before = entry.step
    return tuple(parts)


def _time(path: Path, train: _TrainInfo, steps: int, status: Status) -> Reading:
    """T: the sum over all intervals; missing where a run that failed did not get through its steps."""
    source = "sum of `train time` over the intervals"
    timed = [entry for entry in train.metrics if entry.train_time is not None]
    reached = timed[-1].step if timed else 0
    untimed = next((entry.step for entry in train.metrics if entry.train_time is None and entry.step < reached), None)
    if untimed is not None:
        raise UserError(f"{path}: metrics: no `train time` at step {untimed}, but later ones; the file is damaged")
    if reached == steps:
        return Reading(value=math.fsum(entry.train_time or 0.0 for entry in timed), source=source)
    if status == "ok":
        raise UserError(
            f"{path}: intervals up to step {reached} of {steps}, though its status is success; it is damaged"
        )
    return Reading.missing(source, f"it reached step {reached} of {steps}")

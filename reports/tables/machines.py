"""The environment table: devices, software, data, encoders and training settings behind a section."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tpme.bench.quantities import MISSING
from tpme.bench.record import TRAINING_OPTIONS, CellResult, Modality, Training
from tpme.reports.data.qualities import RANKED_TASK
from tpme.reports.data.section import Section
from tpme.reports.data.trials import shorten_path
from tpme.reports.tables.table import Column, Entry, Table

PACKAGES = ("torch", "transformers", "peft", "numpy")
"""Packages listed first."""


def machines(section: Section) -> Table:
    """Property and value; where the records differ, all values."""
    results = [recorded.result for recorded in section.records]
    lines = [(name, _join(values)) for name, values in _properties(section, results)]
    columns = (Column("property", "Property", numeric=False), Column("value", "Value", numeric=False))
    rows = tuple((Entry(name, name), Entry(text, text)) for name, text in lines if text != MISSING)
    return Table("environment", "Measured on", columns, rows, subject=section.name)


def _properties(section: Section, results: list[CellResult]) -> Iterator[tuple[str, Iterable[Any]]]:
    seeds = sorted({result.cell.seed for result in results})
    environments = [result.environment for result in results if result.environment is not None]
    own = [result.environment for result in results if result.environment is not None and result.source is None]
    yield "Measured by others", (result.source.name for result in results if result.source is not None)
    yield "Commit", (result.source.commit or None for result in results if result.source is not None)
    yield "Device", (environment.device_name for environment in environments)
    yield "Device key", [section.group.key["device_key"]]
    yield "Driver", (environment.driver for environment in environments)
    yield "CPU threads", (environment.cpu_threads for environment in own)
    yield "Platform", (environment.platform for environment in environments)
    yield "Python", (environment.python for environment in own)
    names = dict.fromkeys((*PACKAGES, *(name for environment in environments for name in sorted(environment.packages))))
    for name in names:
        yield name, (environment.packages.get(name) for environment in environments)
    yield "Allocator", (environment.allocator for environment in own)
    yield "Deterministic kernels", (environment.deterministic for environment in own)
    yield "Git revision", (_revision(environment.git_revision, environment.git_dirty) for environment in environments)
    codes = sorted({(result.cell.method, result.code_version) for result in results})
    several = len({code for _, code in codes}) > 1
    versions = sorted({code for _, code in codes})
    by_method = several and section.ranked
    yield "Measured code", ((f"{method} {code}" for method, code in codes) if by_method else versions)
    yield "Task", [section.group.key.get("task")]
    yield "Protocol", [section.group.key["protocol"] or None]
    yield "Precision", [section.group.key["precision"] or None]
    yield "Dataset", _datasets(results)
    yield from _settings(results)
    yield "Text encoder", (_encoder(result, "text") for result in results)
    yield "Image encoder", (_encoder(result, "image") for result in results)
    results = [result for result in results if result.cell.task == RANKED_TASK]
    training = [result.cell.training.model_dump(mode="json", exclude={"precision"}) for result in results]
    for name in _told(training):
        yield name.replace("_", " ").capitalize(), (settings[name] for settings in training)
    rates = {", ".join(f"{name} {rate:g}" for name, rate in result.cell.lr.by_group().items()) for result in results}
    if rates:
        yield "Learning rates", rates if len(rates) == 1 else ["differ, see their table"]
    yield "Seeds", seeds


def _told(training: list[dict[str, Any]]) -> list[str]:
    """The training settings; those newer than the first records only where a row does not have their default."""
    default = Training().model_dump(mode="json")
    return [
        name
        for name in (training[0] if training else ())
        if name not in TRAINING_OPTIONS or any(settings[name] != default[name] for settings in training)
    ]


def _settings(results: list[CellResult]) -> Iterator[tuple[str, Iterable[Any]]]:
    """What the rows of another task share."""
    known = [result.cell.settings for result in results if result.cell.settings]
    for name in dict.fromkeys(name for settings in known for name in settings):
        yield name.replace("_", " ").capitalize(), (settings.get(name) for settings in known)


def _datasets(results: list[CellResult]) -> list[str]:
    datasets = [result.dataset for result in results if result.dataset is not None]
    if not datasets:
        return [
            f"{result.cell.dataset} (fingerprint {result.cell.dataset_fingerprint[:12]})"
            if result.cell.task == RANKED_TASK
            else f"{result.cell.dataset} ({result.cell.dataset_fingerprint})".removesuffix(" ()")
            for result in results
        ]
    return [
        f"{facts.name}: {facts.users} users, {facts.items} items ({facts.items_never_trained} never trained), "
        f"{facts.interactions} interactions, {' + '.join(facts.modalities)} (fingerprint {facts.fingerprint[:12]})"
        for facts in datasets
    ]


def _encoder(result: CellResult, modality: Modality) -> str | None:
    """The encoder loaded by the cell or by the builder of its feature cache."""
    facts = result.text_encoder if modality == "text" else result.image_encoder
    if facts is None and result.cache is not None:
        facts = result.cache.encoders.get(modality)
    if facts is None:
        return None
    revision = f"@{facts.revision}" if facts.revision else ""
    if facts.architecture == "states":
        return f"{shorten_path(facts.source)}{revision}: {facts.depth + 1} hidden states of width {facts.width}"
    return (
        f"{shorten_path(facts.source)}{revision}: {facts.architecture}, {facts.weights} weights, width {facts.width}, "
        f"depth {facts.depth}, {facts.parameters / 1e6:.4g} M parameters"
    )


def _revision(revision: str | None, dirty: bool | None) -> str | None:
    if revision is None:
        return None
    return f"{revision} (with uncommitted changes)" if dirty else revision


def _join(values: Iterable[Any]) -> str:
    """Distinct values, in the order of the records."""
    words = {True: "yes", False: "no"}
    texts = (words[value] if isinstance(value, bool) else str(value) for value in values if value is not None)
    return "; ".join(dict.fromkeys(texts)) or MISSING

"""A matrix file (TOML) -> validated cells: method x dataset x encoders x settings x learning rate x seed.

The shape of the file is ``MatrixFile``; ``bench/presets/*.toml`` are examples. Mistakes in a matrix are found here,
before anything runs.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tpme.bench.errors import UserError, nearest
from tpme.bench.limits import Bytes, ImageSize, LocalPath, Number, Positive, Seed, Switch
from tpme.bench.names import Name
from tpme.bench.parsing import read_toml
from tpme.bench.quantities import BYTES, parse_quantity
from tpme.bench.record import Cell, EncoderSpec, Frozen, LearningRates, Modality, Protocol, Training, cell_id
from tpme.bench.run.cell_checks import check_cached, check_items, pinned
from tpme.bench.run.settings import apply_setting, culprit, problem

if TYPE_CHECKING:
    from tpme.methods.base import Method

FIRST_SEED = 12345
MOST_CELLS = 100_000
MOST_SEEDS = 20
"""``seeds = 42`` most likely means the seed 42."""
PAPER_SETTINGS = {"users_per_batch"}
"""What a method's own ``training`` table may set, and only under the ``paper`` protocol (its batch sizes differ)."""


class DatasetEntry(Frozen):
    """One data set: a prepared folder (``path``) or the settings of the built-in catalogue (``synthetic``)."""

    name: Name
    path: LocalPath | None = None
    synthetic: dict[str, Any] | None = None
    image_size: ImageSize = 32
    """Side of the built-in catalogue's images in pixels; a prepared folder has its own."""

    @model_validator(mode="after")
    def _one_source(self) -> DatasetEntry:
        if (self.path is None) == (self.synthetic is None):
            raise ValueError('give either path = "a prepared folder" or synthetic = { ... }')
        return self


class EncoderEntry(Frozen):
    """A pair of encoders, or one of them."""

    text: EncoderSpec | None = None
    image: EncoderSpec | None = None

    @property
    def given(self) -> tuple[Modality, ...]:
        """Encoders that are files of states, which need nothing of the data set but its items."""
        specs: dict[Modality, EncoderSpec | None] = {"text": self.text, "image": self.image}
        return tuple(modality for modality, spec in specs.items() if spec is not None and spec.precomputed)


def _as_tables(methods: object) -> object:
    """``"all"`` as the pattern ``"*"``, names in one text as a list, and names in a list as tables."""
    if isinstance(methods, str):
        methods = ["*"] if methods == "all" else [name.strip() for name in methods.split(",")]
    if not isinstance(methods, list | tuple):
        return methods
    return [{"name": entry} if isinstance(entry, str) else entry for entry in methods]


def _as_seeds(seeds: object) -> object:
    """A number n as n seeds, the default one first: ``seeds = 1`` is the default, and more of them keep its records."""
    if not isinstance(seeds, int) or isinstance(seeds, bool):
        return seeds
    if seeds > MOST_SEEDS:
        raise ValueError(f"{seeds} is a number of seeds, at most {MOST_SEEDS}; for one seed write seeds = [{seeds}]")
    return [FIRST_SEED + place for place in range(seeds)]


def _as_bytes(size: object) -> object:
    """``"8G"`` as a number of bytes."""
    if not isinstance(size, str):
        return size
    try:
        return int(parse_quantity("", size, BYTES, "8G"))
    except UserError as error:
        raise ValueError(str(error).strip()) from None


def _kind_of_trial(value: object) -> str:
    return "number" if isinstance(value, int | float) else "table"


Trial = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[LearningRates, Tag("table")], Discriminator(_kind_of_trial)
]
_TRIALS: TypeAdapter[tuple[LearningRates | float, ...]] = TypeAdapter(tuple[Trial, ...])


class MethodEntry(Frozen):
    """One method: its options, whether its cells are cached, and its learning-rate trials.

    ``{ name = "lora", rank = 4 }``: any other key is an option of the method, too.
    """

    name: str
    """A name, or a pattern (``lora*``) for all methods that it matches and no entry names."""
    options: dict[str, Any] = {}
    cached: Switch | Annotated[tuple[Switch, ...], Field(min_length=1)] = False
    lr: Annotated[tuple[Trial, ...], Field(min_length=1)] | None = None
    """Trials in place of ``axes.lr``, laid over the matrix's ``lr``; a number stands for all but ``recommender``."""
    training: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _further_keys_are_options(cls, entry: Any) -> Any:
        if not isinstance(entry, dict) or not isinstance(entry.get("options", {}), dict):
            return entry
        options = {key: value for key, value in entry.items() if key not in cls.model_fields}
        for key in options:
            if near := difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.8):
                raise ValueError(f"'{key}': did you mean {near[0]}? An option of that name goes into options = {{ }}")
        if twice := set(options) & set(entry.get("options", {})):
            raise ValueError(f"option '{min(twice)}' is given twice, in options too")
        others = {key: value for key, value in entry.items() if key in cls.model_fields}
        return others | {"options": entry.get("options", {}) | options}


class MatrixFile(Frozen):
    """A matrix file."""

    name: Name
    description: Annotated[str, Field(max_length=10_000)] = ""
    protocol: Protocol = "suite"
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_as_seeds), Field(min_length=1)] = (FIRST_SEED,)
    modalities: Annotated[tuple[Modality, ...], Field(min_length=1)] | None = None
    datasets: tuple[DatasetEntry, ...] = Field(min_length=1)
    encoders: tuple[EncoderEntry, ...] = Field(min_length=1)
    training: Training = Training()
    axes: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Further axes over training settings, such as ``precision = ["fp32", "bf16"]``; ``lr`` lists the learning-rate
    trials of every method that lists none."""
    lr: LearningRates = LearningRates()
    methods: Annotated[tuple[MethodEntry, ...], BeforeValidator(_as_tables), Field(min_length=1)]
    time_limit_s: Number = 6 * 3600
    """Per cell; one that takes longer ends as ``timeout``."""
    cache_limit_bytes: Annotated[Bytes, BeforeValidator(_as_bytes)] = 64 * 2**30
    """A feature cache that would be larger is refused; a number, or a text such as ``"8G"``."""
    probe_items: Annotated[Number, Field(ge=2)] | None = None
    """Measure the representation space of every trained model on so many items; changes no cell."""
    same_node: Switch = False
    """On a cluster, run the seeds of a cell on one node, one after the other; changes no cell."""

    @model_validator(mode="after")
    def _names_differ(self) -> MatrixFile:
        names = [entry.name for entry in self.datasets]
        if len(set(names)) < len(names):
            raise ValueError(f"two data sets share a name ({', '.join(names)})")
        self.check_size()
        return self

    def check_size(self) -> None:
        """Raise ValueError for more than ``MOST_CELLS`` cells, counted without listing them; a pattern counts once."""
        axes = {name: len(values) for name, values in self.axes.items()}
        trials = axes.pop("lr", 1)
        rows = sum(len(_cached(entry)) * (len(entry.lr) if entry.lr else trials) for entry in self.methods)
        cells = math.prod([len(self.datasets), len(self.encoders), len(self.seeds), *axes.values(), rows])
        if cells > MOST_CELLS:
            raise ValueError(f"{cells:,} cells, at most {MOST_CELLS:,}; split the matrix")


@dataclass(frozen=True)
class PreparedDataset:
    """What the cells of a matrix take from a prepared data set."""

    path: Path
    fingerprint: str
    modalities: tuple[Modality, ...]


def presets() -> dict[str, Path]:
    """The matrices that ship with the package, by name."""
    folder = Path(str(files("tpme.bench.presets")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_matrix(source: str, settings: Sequence[str] = ()) -> MatrixFile:
    """Read a matrix: a preset's name or a TOML file, with ``settings`` (``"training.epochs=2"``) laid over it.

    Raises UserError with one line: which file, which field, what is wrong.
    """
    path = presets().get(source, Path(source))
    try:
        raw = read_toml(path)
    except FileNotFoundError:
        near = nearest(source, presets())
        hint = f"; did you mean '{near}'?" if near else f" ({', '.join(presets())})"
        raise UserError(f"matrix '{source}': no such file, and no preset{hint}") from None
    if "methods" in raw:
        raw["methods"] = _as_tables(raw["methods"])  # so that a setting reaches an entry that is just a name
    for setting in settings:
        apply_setting(raw, setting)
    try:
        return MatrixFile.model_validate(raw)
    except ValidationError as error:
        wrong = culprit(error, settings)
        where = path if wrong is None else f"--set {wrong}"
        raise UserError(f"{where}: {problem(error, MatrixFile)}") from None


def expand(
    matrix: MatrixFile, datasets: dict[str, PreparedDataset], *, device: str, methods_path: Sequence[Path] = ()
) -> list[Cell]:
    """All cells of a matrix, in the order they will run.

    Args:
        matrix: as read. datasets: its data sets by name, prepared. device: ``cpu`` or ``cuda``.
        methods_path: folders with further methods.

    Raises:
        UserError: an unknown method, an option or axis that does not fit, caching of a method that leaves no encoder
            frozen, learning-rate trials of different number, a modality that data or encoders lack, precomputed states
            that lack an item.
    """
    from tpme.methods.registry import blaming

    encoders = [EncoderEntry(text=pinned(pair.text), image=pinned(pair.image)) for pair in matrix.encoders]
    groups = itertools.product(matrix.datasets, encoders)
    modalities_there = {m for entry, pair in groups for m in _modalities(matrix, entry, datasets[entry.name], pair)}
    matrix = _with_names(matrix, modalities_there, methods_path)
    trials = _learning_rates(matrix, methods_path)
    cells = []
    for entry, pair, seed in itertools.product(matrix.datasets, encoders, matrix.seeds):
        data = datasets[entry.name]
        modalities = _modalities(matrix, entry, data, pair)
        check_items([spec for m in modalities if (spec := getattr(pair, m))], data.path)
        for training, method in itertools.product(_trainings(matrix), matrix.methods):
            with blaming(method.name):
                instance = _check(method, modalities, training, methods_path)
            for cached, (trial, lr) in itertools.product(_cached(method), enumerate(trials[id(method)])):
                cells.append(
                    Cell(
                        method=method.name,
                        options=method.options,
                        cached=cached,
                        dataset=entry.name,
                        dataset_fingerprint=data.fingerprint,
                        modalities=modalities,
                        text_encoder=pair.text if "text" in modalities else None,
                        image_encoder=pair.image if "image" in modalities else None,
                        protocol=matrix.protocol,
                        training=_overridden(training, method, matrix),
                        lr=lr,
                        lr_trial=trial,
                        lr_trials=len(trials[id(method)]),
                        device="cuda" if device == "cuda" else "cpu",
                        seed=seed,
                        matrix=matrix.name,
                        baseline=instance.baseline,
                    )
                )
    seen: set[str] = set()
    for cell in cells:
        if (identity := cell_id(cell, "")) in seen:
            raise UserError(f"matrix '{matrix.name}': method '{cell.label}' appears twice with the same settings")
        seen.add(identity)
    return cells


def _with_names(matrix: MatrixFile, modalities: Collection[Modality], methods_path: Sequence[Path]) -> MatrixFile:
    """``matrix`` with every pattern replaced by the methods that it stands for, in the registry's order.

    Without those that need another modality than ``modalities``, unless none is left. Raises UserError for a pattern
    that matches no method.
    """
    from tpme.methods.registry import available, method_class

    known = available(methods_path)
    named = {entry.name for entry in matrix.methods}
    entries: list[MethodEntry] = []
    for entry in matrix.methods:
        if not set(entry.name) & set("*?["):
            entries.append(entry)
            continue
        matching = fnmatch.filter(known, entry.name)
        if not matching:
            raise UserError(f"matrix '{matrix.name}': no method matches '{entry.name}'; known: {', '.join(known)}")
        usable = [name for name in matching if set(method_class(name, methods_path).needs) <= set(modalities)]
        usable = usable or matching  # refused below, with the reason
        entries += [entry.model_copy(update={"name": name}) for name in usable if name not in named]
        named.update(matching)
    named_all = matrix.model_copy(update={"methods": tuple(entries)})
    try:
        named_all.check_size()
    except ValueError as error:
        raise UserError(f"matrix '{matrix.name}': {error}") from None
    return named_all


def _cached(method: MethodEntry) -> tuple[bool, ...]:
    return (method.cached,) if isinstance(method.cached, bool) else method.cached


def _modalities(
    matrix: MatrixFile, entry: DatasetEntry, data: PreparedDataset, pair: EncoderEntry
) -> tuple[Modality, ...]:
    given = [modality for modality in pair.given if modality not in data.modalities]
    there = (*data.modalities, *given)
    used = matrix.modalities or there
    for modality in used:
        if modality not in there:
            raise UserError(f"data set '{entry.name}' has no {modality}; set modalities = {list(data.modalities)}")
        if getattr(pair, modality) is None:
            raise UserError(f"the matrix uses {modality} but names no {modality} encoder; add encoders.{modality}")
    return tuple(modality for modality in there if modality in used)


def _trainings(matrix: MatrixFile) -> list[Training]:
    base = matrix.training.model_dump()
    axes = {name: values for name, values in matrix.axes.items() if name != "lr"}
    try:
        return [
            Training.model_validate(base | dict(zip(axes, values, strict=True)))
            for values in itertools.product(*axes.values())
        ]
    except ValidationError as error:
        raise UserError(f"matrix '{matrix.name}', axes: {problem(error, Training)}") from None


def _overridden(training: Training, method: MethodEntry, matrix: MatrixFile) -> Training:
    foreign = set(method.training) - PAPER_SETTINGS
    if method.training and (matrix.protocol != "paper" or foreign):
        raise UserError(
            f"method '{method.name}': training settings belong to the task and are equal for all rows; only the paper "
            f"protocol lets a method set {', '.join(sorted(PAPER_SETTINGS))}"
        )
    try:
        return Training.model_validate(training.model_dump() | method.training)
    except ValidationError as error:
        raise UserError(f"method '{method.name}', training: {problem(error, Training)}") from None


def _learning_rates(matrix: MatrixFile, methods_path: Sequence[Path]) -> dict[int, list[LearningRates]]:
    """The trials of each method entry, by its identity; all of the same number, with the groups of that method."""
    try:
        common = _TRIALS.validate_python(matrix.axes.get("lr", ({},)))
    except ValidationError as error:
        raise UserError(f"matrix '{matrix.name}', axes.lr: {problem(error, LearningRates)}") from None
    trials = {id(method): [_merged_rates(matrix.lr, lr) for lr in method.lr or common] for method in matrix.methods}
    if len({len(rates) for rates in trials.values()}) > 1:
        numbers = ", ".join(f"{method.name} {len(trials[id(method)])}" for method in matrix.methods)
        raise UserError(
            f"matrix '{matrix.name}': every method must get the same number of lr trials, but there are {numbers}"
        )
    groups = _groups(matrix, common, methods_path)
    return {entry: [_only(rates, groups[entry]) for rates in found] for entry, found in trials.items()}


def _groups(
    matrix: MatrixFile, common: Sequence[LearningRates | float], methods_path: Sequence[Path]
) -> dict[int, tuple[str, ...]]:
    """The learning-rate groups that each method entry names itself, by its identity.

    Raises UserError for a group in the matrix that no method has, or in a method's own ``lr`` that this method lacks.
    """
    from tpme.methods.registry import create

    groups = {id(entry): create(entry.name, entry.options, methods_path).groups for entry in matrix.methods}
    every = tuple(sorted({name for names in groups.values() for name in names}))
    for where, trials, known in (
        (f"matrix '{matrix.name}'", (matrix.lr, *common), every),
        *((f"method '{entry.name}'", entry.lr or (), groups[id(entry)]) for entry in matrix.methods),
    ):
        for name in (name for rates in trials if isinstance(rates, LearningRates) for name in rates.groups):
            if name not in known:
                there = f"its groups are: {', '.join(known)}" if known else "there are no groups"
                raise UserError(f"{where}, lr.groups: no learning-rate group '{name}'; {there}")
    return groups


def _only(rates: LearningRates, groups: Sequence[str]) -> LearningRates:
    kept = {name: rate for name, rate in rates.groups.items() if name in groups}
    return rates.model_copy(update={"groups": kept})


def _merged_rates(base: LearningRates, lr: LearningRates | float) -> LearningRates:
    if isinstance(lr, float):
        return base.model_copy(update=dict.fromkeys(("text", "image", "method"), lr))
    return base.model_copy(update=lr.model_dump(exclude_unset=True) | {"groups": base.groups | lr.groups})


def _check(
    method: MethodEntry, modalities: tuple[Modality, ...], training: Training, methods_path: Sequence[Path]
) -> Method:
    """The method, built once to see that it can do what the matrix asks; raises UserError where it cannot."""
    from tpme.bench.train.build import check_passes, used_modalities
    from tpme.methods.registry import create

    instance = create(method.name, method.options, methods_path)
    if any(_cached(method)):
        check_cached(method.name, instance, modalities)
    lacking = [modality for modality in instance.needs if modality not in modalities]
    if lacking:
        raise UserError(f"method '{method.name}' needs {' and '.join(instance.needs)}; this matrix has no {lacking[0]}")
    if len(instance.stages()) > training.epochs:
        raise UserError(
            f"method '{method.name}' trains in {len(instance.stages())} stages of at least one epoch each; raise "
            f"training.epochs, which is {training.epochs}"
        )
    used = used_modalities(instance, modalities)
    if training.activation_checkpointing and set(used) - set(instance.frozen_encoders(used)):
        check_passes(method.name, instance)
    return instance

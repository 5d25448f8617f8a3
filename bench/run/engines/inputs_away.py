"""What a cell reads of the launcher's machine, and the same cell on a node that has got it in other folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpme.bench.limits import expanded
from tpme.bench.record import Cell, CellResult, EncoderSpec, Failure, Modality, cell_id
from tpme.bench.run.job import Job

ENCODERS: tuple[Modality, ...] = ("text", "image")


@dataclass(frozen=True)
class Input:
    """Files of a folder that a cell reads; ``name`` goes by their content."""

    name: str
    folder: Path
    files: tuple[str, ...]


# --- on the launcher's machine ---------------------------------------------------------------------------------------


def inputs_of(job: Job) -> dict[str, Input]:
    """What a cell reads here, by what it is of the job: ``data``, ``text``, ``image``, ``methods 0``, ...

    Encoders of the hub are left out, as are built-in ones: a node has them, or fetches them itself.
    """
    from tpme.bench.task.dataset import FILES

    data = ("dataset.json", *(name for name in FILES if (job.dataset_path / name).exists()))
    inputs = {"data": Input(f"data-{job.cell.dataset_fingerprint[:16]}", job.dataset_path, data)}
    for modality in ENCODERS:
        if (given := _encoder(getattr(job.cell, f"{modality}_encoder"))) is not None:
            inputs[modality] = given
    return inputs | methods_of(job.methods_path)


def methods_of(methods_path: Iterable[Path]) -> dict[str, Input]:
    """The Python files of folders with methods: ``methods 0``, ..."""
    return {f"methods {place}": _methods(folder) for place, folder in enumerate(methods_path)}


def _encoder(spec: EncoderSpec | None) -> Input | None:
    from tpme.bench.task.encoders import content_files

    if spec is None or spec.source.startswith("builtin:"):
        return None
    if spec.precomputed:
        file = expanded(Path(spec.source.removeprefix("states:")))
        return Input(f"states-{spec.revision}", file.parent, (file.name,))
    folder = expanded(Path(spec.source))
    if not folder.is_dir():
        return None
    files = tuple(str(path.relative_to(folder)) for path in content_files(spec, folder))
    return Input(f"encoder-{spec.revision}", folder, files)


def _methods(folder: Path) -> Input:
    digest, files = hashlib.sha256(), tuple(str(path.relative_to(folder)) for path in sorted(_modules(folder)))
    for file in files:
        digest.update(f"{file} {hashlib.sha256((folder / file).read_bytes()).hexdigest()}\n".encode())
    return Input(f"methods-{digest.hexdigest()[:16]}", folder, files)


def _modules(folder: Path) -> Iterator[Path]:
    """The modules in ``folder``, and those of packages in it."""
    yield from folder.glob("*.py")
    for below in folder.iterdir():
        if (below / "__init__.py").is_file():
            yield from _modules(below)


# --- on a node -------------------------------------------------------------------------------------------------------


def moved(job: Job, places: Mapping[str, Path], store: Path, folder: Path) -> Job:
    """``job`` with its inputs in ``places``, by their keys in ``inputs_of``, and with the node's store and folder."""
    cell = _moved_cell(job.cell, places)
    methods = tuple(places[f"methods {place}"] for place in range(len(job.methods_path)))
    return job.model_copy(
        update={
            "cell": cell,
            "cell_id": cell_id(cell, job.code_version),  # of this cell, whose record is checked against it
            "dataset_path": places["data"],
            "methods_path": methods,
            "store": store,
            "folder": folder,
        }
    )


def _moved_cell(cell: Cell, places: Mapping[str, Path]) -> Cell:
    changes = {}
    for modality in ENCODERS:
        spec: EncoderSpec | None = getattr(cell, f"{modality}_encoder")
        if spec is not None and modality in places:
            source = moved_source(spec, places[modality])
            changes[f"{modality}_encoder"] = spec.model_copy(update={"source": source})
    return cell.model_copy(update=changes)


def moved_source(spec: EncoderSpec, folder: Path) -> str:
    """The source of an encoder whose files are in ``folder``."""
    return f"states:{folder / Path(spec.source).name}" if spec.precomputed else str(folder)


def restored(result: CellResult, job: Job, node: str) -> CellResult:
    """The record of a moved ``job`` as that of the job itself: its cell, the sources of its encoders, its node."""
    changes: dict[str, object] = {"cell": job.cell, "cell_id": job.cell_id}
    sources = {m: spec.source for m in ENCODERS if (spec := getattr(job.cell, f"{m}_encoder")) is not None}
    for modality, source in sources.items():
        if (facts := getattr(result, f"{modality}_encoder")) is not None:
            changes[f"{modality}_encoder"] = facts.model_copy(update={"source": source})
    if result.cache is not None:
        encoders = {m: facts.model_copy(update={"source": sources[m]}) for m, facts in result.cache.encoders.items()}
        changes["cache"] = result.cache.model_copy(update={"encoders": encoders})
    if result.environment is not None:
        changes["environment"] = result.environment.model_copy(update={"node": node})
    elif result.failure is not None:
        message = f"{result.failure.message}; on node {node}"
        changes["failure"] = Failure.model_validate(result.failure.model_dump() | {"message": message})
    return result.model_copy(update=changes)

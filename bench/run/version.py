"""The version of the code that a cell runs, read from its imports without running them."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path

ENTRY = "tpme.bench.run.cell"
UNMEASURED = (
    "tpme.bench.errors",
    "tpme.bench.git",
    "tpme.bench.lifetimes",
    "tpme.bench.owner_lock",
    "tpme.bench.record",
    "tpme.bench.redact",
    "tpme.bench.slurm_commands",
    "tpme.bench.writing",
    "tpme.methods.registry",
)
"""Nothing in them reaches a measurement: a further field of the record or a further method leaves all results valid."""


def code_version(method_file: Path) -> str:
    """Version of the measured code: 12 hex digits over the sources that a cell of this method imports.

    Those are the task, the loop, the instruments, the counters, the method's own module and the helpers it imports.
    Reports, commands and other methods are not among them and may change without making results stale.
    """
    # Sorted by name and content: where something is installed does not matter.
    digests = sorted(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sources(method_file))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]


def sources(method_file: Path) -> set[Path]:
    """The files of this project, and those beside the method, that a cell of the method in ``method_file`` imports."""
    unmeasured = {path for name in UNMEASURED for path in _resolve(method_file, 0, name)}
    pending, reached = [method_file, *_resolve(method_file, 0, ENTRY)], set()
    while pending:
        path = pending.pop()
        if path not in reached and path not in unmeasured:
            reached.add(path)
            pending += [file for level, name in _imports(path.read_bytes()) for file in _resolve(path, level, name)]
    return reached


@cache
def _imports(source: bytes) -> tuple[tuple[int, str], ...]:
    """Level (number of leading dots) and name of what a module imports, in functions too, or runs with ``-m``."""
    names: set[tuple[int, str]] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            names |= {(node.level, ".".join([*module, *rest])) for rest in ([], *([a.name] for a in node.names))}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("tpme."):
            names.add((0, node.value))
    return tuple(sorted(names))


def _resolve(importer: Path, level: int, name: str) -> tuple[Path, ...]:
    """The files of module ``name`` and of the packages it is in; none for a module of another project."""
    if not level and name.startswith("tpme."):
        return _project_files(name)
    parts = tuple(filter(None, name.split(".")))
    if level:
        return _module_files(importer.parents[level - 1], parts)
    if (package := _package(importer.parent)) is not None and parts[0] == package.name:
        return _module_files(package.parent, parts)
    return _module_files(importer.parent, parts) if parts[0].startswith("_") else ()  # a helper beside a method


@cache
def _project_files(name: str) -> tuple[Path, ...]:
    _, package, *parts = name.split(".")
    try:
        return _module_files(Path(str(files(f"tpme.{package}"))), tuple(parts))
    except ModuleNotFoundError:
        return ()


def _module_files(root: Path, parts: tuple[str, ...]) -> tuple[Path, ...]:
    folders = [root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    candidates = [*(folder / "__init__.py" for folder in folders), *(Path(f"{folder}.py") for folder in folders[1:])]
    return tuple(path for path in candidates if path.is_file())


@cache
def _package(folder: Path) -> Path | None:
    """The outermost package that ``folder`` is or is in."""
    package = None
    while (folder / "__init__.py").is_file():
        package, folder = folder, folder.parent
    return package

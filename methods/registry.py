"""The registry of methods by name; their modules are imported on use.

Methods come from three sources: this package, the entry-point group ``tpme.methods`` of installed packages
(``name = "package.module:Class"``), and folders passed as ``--methods-path`` (every ``*.py`` file there defines
``METHOD = Class`` and is the method named like the file; files whose names start with ``_`` are helpers,
which the others import with ``from ._helper import ...``).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tpme.bench.errors import UserError, first_problem, nearest, one_line
from tpme.bench.limits import resolved

if TYPE_CHECKING:
    from tpme.methods.base import Method, MethodConfig

ENTRY_POINT_GROUP = "tpme.methods"
_FOLDER = "tpme_methods_"
"""Prefix of the packages that folders with methods become."""
_BROKEN = (Exception, SystemExit, KeyboardInterrupt)
BUILTIN: dict[str, str] = {
    "fft": "tpme.methods.fft:FullFineTuning",
    "ftp": "tpme.methods.ftp:FTP",
    "tpgm": "tpme.methods.tpgm:TPGM",
    "adapter": "tpme.methods.adapter:HoulsbyAdapter",
    "pfeiffer-adapter": "tpme.methods.pfeiffer_adapter:PfeifferAdapter",
    "parallel-adapter": "tpme.methods.parallel_adapter:ParallelAdapter",
    "lora": "tpme.methods.lora:LoRA",
    "dora": "tpme.methods.dora:DoRA",
    "adalora": "tpme.methods.adalora:AdaLoRA",
    "vera": "tpme.methods.vera:VeRA",
    "peft": "tpme.methods.peft:PeftTuner",
    "bitfit": "tpme.methods.bitfit:BitFit",
    "ln-tuning": "tpme.methods.ln_tuning:LNTuning",
    "ia3": "tpme.methods.ia3:IA3",
    "prompt": "tpme.methods.prompt:PromptTuning",
    "prefix": "tpme.methods.prefix:PrefixTuning",
    "pt-peft": "tpme.methods.pt_peft:PTPEFT",
    "dapt": "tpme.methods.dapt:DAPT",
    "dyt": "tpme.methods.dyt:DyT",
    "pyra": "tpme.methods.pyra:PYRA",
    "context-peft": "tpme.methods.context_peft:ContextPEFT",
    "light-peft": "tpme.methods.light_peft:LightPEFT",
    "autopeft": "tpme.methods.autopeft:AutoPEFT",
    "fedpeptao": "tpme.methods.fedpeptao:FedPepTAO",
    "iisan": "tpme.methods.iisan:IISAN",
    "iisan-versa": "tpme.methods.iisan_versa:IISANVersa",
    "lst": "tpme.methods.lst:LST",
    "frozen": "tpme.methods.frozen:FrozenEncoders",
    "id": "tpme.methods.id:ItemIDs",
    "popularity": "tpme.methods.popularity:Popularity",
}


def available(methods_path: Sequence[Path] = ()) -> dict[str, str]:
    """All methods: name -> origin (``package.module:Class`` or a file).

    Raises UserError, naming both origins, if a name is defined twice.
    """
    methods = dict(BUILTIN)
    extra = [(point.name, point.value) for point in entry_points(group=ENTRY_POINT_GROUP)]
    for folder in methods_path:
        if not folder.is_dir():
            raise UserError(f"--methods-path {folder}: no such folder")
        extra += [(file.stem, str(resolved(file))) for file in sorted(folder.glob("[!_]*.py"))]
    for name, origin in extra:
        if methods.setdefault(name, origin) != origin:
            raise UserError(f"method '{name}' is defined twice: by {methods[name]} and by {origin}; rename one")
    return methods


def method_class(name: str, methods_path: Sequence[Path] = ()) -> type[Method]:
    """Import and return the class of method ``name``.

    Raises UserError for an unknown name (suggesting the nearest one), and for a module that cannot be imported or
    does not define the class.
    """
    known = available(methods_path)
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean '{near}'?" if near else f"known: {', '.join(sorted(known))}"
        raise UserError(f"unknown method '{name}'; {hint}")
    origin = known[name]
    if origin.endswith(".py"):
        definition = getattr(_import_file(Path(origin)), "METHOD", None)
    else:
        module, _, attribute = origin.partition(":")
        definition = getattr(_import_module(module), attribute, None)
    from tpme.methods.base import Method, MethodConfig

    if not (isinstance(definition, type) and issubclass(definition, Method)):
        raise UserError(
            f"method '{name}': {origin} defines no Method class (a file needs 'METHOD = YourClass', an entry point "
            "'package.module:Class')"
        )
    if not (isinstance(definition.Config, type) and issubclass(definition.Config, MethodConfig)):
        raise UserError(f"method '{name}': {origin}: its Config is not a subclass of MethodConfig")
    for attribute in ("needs", "groups"):
        words = getattr(definition, attribute)
        if not (isinstance(words, tuple) and all(isinstance(word, str) for word in words)):
            raise UserError(f"method '{name}': {origin}: its {attribute} is not a tuple of words")
    return definition


def create(name: str, options: Mapping[str, Any], methods_path: Sequence[Path] = ()) -> Method:
    """Build method ``name`` with ``options``; raises UserError naming the invalid option."""
    definition = method_class(name, methods_path)
    for option, value in options.items():
        if not _fits_json(value):
            raise UserError(f"method '{name}', option '{option}': {value!r} cannot be recorded: JSON has no such value")
    with blaming(name):
        try:
            config = definition.Config.model_validate_json(json.dumps(dict(options)), strict=True)
        except ValidationError as error:
            raise _wrong_option(name, definition.Config, error) from None
        return definition(config)


def _wrong_option(name: str, config: type[MethodConfig], error: ValidationError) -> UserError:
    first, fields = first_problem(error), ", ".join(config.model_fields) or "none"
    where, message = f", option '{first.field}'" if first.field else "", first.message
    if first.kind == "extra_forbidden":
        near = nearest(first.field, config.model_fields)
        message = f"there is no such option{f' (did you mean {near!r}?)' if near else ''}"
    return UserError(f"method '{name}'{where}: {message}; its options are: {fields}")


def source_file(name: str, methods_path: Sequence[Path] = ()) -> Path:
    """The file that defines method ``name``."""
    module = sys.modules[method_class(name, methods_path).__module__]
    assert module.__file__ is not None
    return Path(module.__file__)


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Turn what the code of a plug-in raises, and what its values break, into a UserError that names method ``name``.

    A plug-in may also end the program, by ``sys.exit`` or as if Ctrl-C had been pressed. Errors of built-in methods
    stay what they are.
    """
    try:
        yield
    except UserError:
        raise
    except _BROKEN as error:
        place = culprit(error)
        if place is None and (name in BUILTIN or not isinstance(error, Exception)):
            raise
        raise UserError(f"method '{name}': {f'{place}: ' if place else ''}{one_line(error)}") from error


def culprit(error: BaseException) -> str | None:
    """File and line of the plug-in in whose code ``error`` was raised; ``None`` where that is no plug-in's.

    Ctrl-C is raised wherever the program is, so there it must be the plug-in's own line.
    """
    packages = {point.value.partition(":")[0].partition(".")[0] for point in entry_points(group=ENTRY_POINT_GROUP)}
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__"))
        if module.startswith(_FOLDER) or module.partition(".")[0] in packages - {"tpme"}:
            place = f"{frame.f_code.co_filename}, line {line}"
        elif isinstance(error, KeyboardInterrupt):
            place = None
    return place


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except _BROKEN as error:
        raise _not_imported(name, error) from error


def _import_file(path: Path) -> ModuleType:
    """Load a method's file as a module of a package that is its folder: ``from ._helper import`` works in it.

    ``from _helper import`` at the top of the file works, too.
    """
    folder = str(path.parent)
    package = f"{_FOLDER}{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}"
    name = f"{package}.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    sys.modules.setdefault(package, ModuleType(package)).__path__ = [folder]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[name] = module
    sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except _BROKEN as error:
        del sys.modules[name]
        raise _not_imported(str(path), error) from error
    finally:
        sys.path.remove(folder)
        for helper in set(sys.modules) - before:  # a helper of another folder may have the same name
            if helper.startswith("_") and getattr(sys.modules[helper], "__file__", None) == f"{folder}/{helper}.py":
                del sys.modules[helper]
    return module


def _not_imported(origin: str, error: BaseException) -> BaseException:
    """The error for a module that cannot be imported; Ctrl-C meanwhile stays Ctrl-C."""
    if isinstance(error, KeyboardInterrupt) and culprit(error) is None:
        return KeyboardInterrupt()
    return UserError(f"{origin}: cannot be imported ({one_line(error)})")

"""Plug-ins that end the program, break in a hook or describe themselves badly, listed and in matrices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from hostile.cases import TEXTS, Case
from hostile.family_matrices import PLAIN, matrix

HEAD = "from typing import Any\nfrom tpme.methods.base import Method, MethodConfig\n"
BODY = '''
class Mine(Method):
    """Mine."""
    {}

METHOD = Mine
'''


def plugin(attributes: str = "pass", before: str = "") -> str:
    return f"{HEAD}{before}\n{BODY.format(attributes)}"


def config(fields: str) -> str:
    return (
        plugin("Config = Mine", f"class Mine(MethodConfig):\n    {fields}\n")
        .replace("class Mine(Method)", "class Own(Method)")
        .replace("METHOD = Mine", "METHOD = Own")
    )


def hook(name: str, body: str) -> str:
    return plugin(f"def {name}(self, *args, **kwargs):\n        {body}")


AT_IMPORT = {
    "exit 0": "import sys; sys.exit(0)",
    "exit 3": "import sys; sys.exit(3)",
    "exit in words": "import sys; sys.exit('enough')",
    "interrupt": "raise KeyboardInterrupt",
    "syntax": "def",
    "division": "1 / 0",
    "not UTF-8": "# \udcff",
    "NUL": "a = '\0'",
    "nothing": "",
    "a number": "METHOD = 3",
    "a class": "class A: pass\nMETHOD = A",
    "broken message": "class E(Exception):\n    def __str__(self): raise E\nraise E",
    "broken annotation": config("a: object() = 1"),
    "Config None": plugin("Config = None"),
    "Config of another kind": plugin("Config = dict"),
    "groups in a word": plugin("groups = 'all'"),
    "needs nothing": plugin("needs = None"),
}
IN_A_HOOK = {
    "exit in the constructor": hook("__init__", "import sys; sys.exit(0)"),
    "interrupt in the constructor": hook("__init__", "raise KeyboardInterrupt"),
    "division in the constructor": hook("__init__", "1 / 0"),
    "exit in a question": hook("frozen_encoders", "import sys; sys.exit(0)"),
    "interrupt in a question": hook("frozen_encoders", "raise KeyboardInterrupt"),
    "option of an unknown type": config("a: 'Nowhere' = 1"),
    "default that does not fit": config(
        "a: int = 1\n    def model_post_init(self, _: Any) -> None:\n        raise ValueError('no')"
    ),
    "exit in a validator": config(
        "a: int = 1\n    def model_post_init(self, _: Any) -> None:\n        raise SystemExit"
    ),
}
IN_A_RUN = IN_A_HOOK | {
    "exit in the stages": hook("stages", "import sys; sys.exit(0)"),
    "no stages": hook("stages", "return None"),
    "exit while it adapts": hook("adapt", "import sys; sys.exit(0)"),
    "interrupt while it adapts": hook("adapt", "raise KeyboardInterrupt"),
    "exit in the item encoder": hook("item_encoder", "raise SystemExit('over')"),
}
NEEDLESS = {
    "required option": config("rank: int"),
    "required and another": config("rank: int\n    alpha: float = 2.0"),
    "default set": config("a: Any = {1, 2}"),
    "default object": config("a: Any = object()"),
    "default infinite": config("a: Any = float('inf')"),
    "default in bytes": config("a: Any = b'\\xff'"),
    "default lambda": config("a: Any = lambda: 1"),
}
LIST, RUN = ("list", "methods", "--methods-path", "methods"), ("--methods-path", "methods")


def loaded(source: str, command: tuple[str, ...], folder: Path) -> list[str]:
    """A command with a folder of methods in which one is bad."""
    (folder / "methods").mkdir()
    (folder / "methods" / "fine.py").write_text(plugin())
    (folder / "methods" / "bad.py").write_bytes(source.encode("utf-8", "surrogateescape"))
    matrix(folder, PLAIN | {"methods": [{"name": "popularity"}, {"name": "bad"}]})
    return list(command)


def cases() -> Iterator[Case]:
    """Yield what breaks at import or in a hook x list, plan and run; and texts in what plug-ins say."""
    for name, source in (AT_IMPORT | IN_A_RUN | NEEDLESS).items():
        yield Case(f"plugin-list-{name}", partial(loaded, source, (*LIST, "--json")))
        yield Case(f"plugin-show-{name}", partial(loaded, source, ("list", "methods", "bad", *RUN)))
        yield Case(
            f"plugin-run-{name}", partial(loaded, source, ("run", "matrix.toml", "--dry-run", "--device", "cpu", *RUN))
        )
    for name in ("exit 0", "interrupt"):
        yield Case(f"plugin-plan-{name}", partial(loaded, AT_IMPORT[name], ("plan", "matrix.toml", *RUN)), (1,))
        yield Case(f"plugin-check-{name}", partial(loaded, AT_IMPORT[name], ("method", "check", "bad", *RUN)), (1,))
    for name, text in TEXTS.items():
        raised = plugin(before=f"raise ValueError({text!a})")
        yield Case(f"plugin-message-{name}", partial(loaded, raised, LIST))
        told = plugin(f"__doc__ = {text!a}") + f"__doc__ = {text!a}\n"
        yield Case(f"plugin-docstring-{name}", partial(loaded, told, ("list", "methods", "bad", *RUN)))

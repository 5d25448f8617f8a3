"""The command line, nothing else: every command parses its arguments and calls one function elsewhere.

Heavy imports (torch, transformers, pandas, matplotlib) happen inside the commands that need them, so that
``tpme --help`` and ``tpme report`` start at once.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from tpme.bench.errors import UserError

app = typer.Typer(
    name="tpme",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="What parameter-efficient fine-tuning costs in multimodal sequential recommendation, and what it buys.",
)


def main() -> NoReturn:
    """Entry point: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        app()
    except UserError as error:
        print(f"tpme: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        print("tpme: interrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    sys.exit(0)

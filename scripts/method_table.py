"""Write the table of methods in docs/methods.md from the docstrings and classes of the methods.

    python scripts/method_table.py --docs docs/methods.md

A class docstring begins with the idea; its first code span is the formula; ``Trains:``, ``Saves:`` and ``Source:``
begin a paragraph or a line of their own.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from workload import put

from tpme.bench.counting.batch import DataShape
from tpme.bench.counting.meta import MetaCell, MetaEncoders
from tpme.bench.record import Cell, EncoderSpec, Modality
from tpme.methods.registry import BUILTIN, method_class

SECTIONS = ("Trains", "Saves", "Source")
HEAD = ("method", "idea", "formula", "what trains", "parameters", "where it saves", "source")
TEXT, IMAGE = EncoderSpec(source="bert-base-uncased"), EncoderSpec(source="google/vit-base-patch16-224")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it between the marks of a document."""
    parser = argparse.ArgumentParser(description="The built-in methods as a table.")
    parser.add_argument("--docs", type=Path, help="document in which to replace the marked part")
    options = parser.parse_args(arguments)
    text = table()
    if options.docs is None:
        sys.stdout.write(f"{text}\n")
    else:
        put(text, options.docs, "methods")
    return 0


def table() -> str:
    """The built-in methods as a Markdown table, one row each."""
    encoders = MetaEncoders()
    lines = [f"| {' | '.join(HEAD)} |", "|---|---|---|---|---:|---|---|"]
    for name in BUILTIN:
        idea, formula, parts = described(name)
        trained = f"{parameters(name, encoders):,}"
        cells = (f"`{name}`", idea, f"`{formula}`", parts["Trains"], trained, parts["Saves"], parts["Source"])
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def described(name: str) -> tuple[str, str, dict[str, str]]:
    """Idea, formula and sections of a method's class docstring.

    Raises ValueError, naming the method, where one of them is missing.
    """
    text = inspect.getdoc(method_class(name)) or ""
    idea = " ".join(text.split("\n\n")[0].split()).rstrip(".")
    formula = re.search(r"``(.+?)``", text, flags=re.DOTALL)
    parts = {}
    for section in SECTIONS:
        found = re.search(
            rf"^{section}: (.+?)(?=\n\n|\n(?:{'|'.join(SECTIONS)}): |\Z)", text, flags=re.DOTALL | re.MULTILINE
        )
        if found is None:
            raise ValueError(f"method '{name}': its class docstring has no line '{section}: ...'")
        parts[section] = " ".join(found[1].split()).rstrip(".").replace("``", "`")
    if formula is None:
        raise ValueError(f"method '{name}': its class docstring has no formula (``...``)")
    return idea.replace("``", "`"), " ".join(formula[1].split()), parts


def parameters(name: str, encoders: MetaEncoders) -> int:
    """Trained parameters of a method with its default options at BERT-base + ViT-B/16, d = 64, all parts included."""
    modalities: tuple[Modality, ...] = ("text", "image")
    cell = Cell(
        method=name,
        dataset="scientific",
        dataset_fingerprint="not needed",
        modalities=modalities,
        text_encoder=TEXT,
        image_encoder=IMAGE,
    )
    model = MetaCell(cell, DataShape.assumed(), encoders).model
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    sys.exit(main())

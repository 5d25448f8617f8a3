"""Synthetic catalogues, encoders and trainers of any size, for the measuring scripts in this folder.

Values are synthetic, shapes are realistic: user lengths are those of Amazon Scientific, encoders are configured as
BERT and ViT are, and the model is the one that ``tpme run`` trains. Nothing is downloaded; images are a sparse file.
Rows that are compared take turns in processes of their own (``in_turns``), so that what else the machine does hits all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BertConfig, PretrainedConfig, ViTConfig

from tpme.bench.counting.batch import SCIENTIFIC_LENGTHS
from tpme.bench.measure.phases import PhaseLog
from tpme.bench.record import Cell, EncoderSpec, Modality, Training
from tpme.bench.task.batches import ItemStore
from tpme.bench.task.dataset import Dataset, Manifest
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.items import EncoderShape
from tpme.bench.task.tokens import TokenTable
from tpme.bench.train.build import DataSize, ModelBuilder, encoder_specs
from tpme.bench.train.kept import Kept
from tpme.bench.train.loop import Trainer
from tpme.methods.base import Method
from tpme.methods.registry import create

SEED, TITLE_TOKENS, VOCABULARY = 12345, 30, 30522


@dataclass(frozen=True)
class Encoders:
    """Shape of a text and an image encoder: both have this width and depth; images are ``side`` pixels wide."""

    width: int
    depth: int
    side: int = 224
    patch: int = 16

    @property
    def tokens(self) -> int:
        """Tokens of an image, the class token included."""
        return (self.side // self.patch) ** 2 + 1

    @property
    def heads(self) -> int:
        """Attention heads of a layer, 64 wide, but at least two."""
        return max(2, self.width // 64)


ENCODERS = {
    "built-in": Encoders(64, 4, side=32, patch=8),
    "tiny": Encoders(128, 2),
    "mini": Encoders(256, 4),
    "small": Encoders(512, 4),
    "medium": Encoders(512, 8),
    "wide": Encoders(768, 4),
    "base": Encoders(768, 12),
}
"""The shape of the shipped encoders, those of the BERT miniatures (Turc et al., 2019) with a ViT/16 alike, and
``wide``: the first third of BERT-base and ViT-B/16."""


@dataclass(frozen=True)
class Size:
    """What is trained, and how large it is.

    full: every user fills all slots, else lengths are Scientific's. options: of the method.
    """

    method: str
    cached: bool = False
    encoders: str = "built-in"
    users: int = 4096
    items: int = 20_000
    batch: int = 32
    max_seq_len: int = 10
    epochs: int = 1
    full: bool = False
    modalities: tuple[Modality, ...] = ("text", "image")
    options: Mapping[str, Any] = field(default_factory=dict)


def synthetic_data(
    size: Size, folder: Path, lengths: NDArray[np.int64] | None = None, side: int | None = None
) -> Dataset:
    """A data set of that size, in memory except for its images.

    lengths: training slots of every user, instead of drawn ones. side: of the images, instead of the encoders'.
    """
    rng = np.random.default_rng(SEED)
    slots = np.full(size.users, size.max_seq_len + 1)
    if not size.full:
        known = np.array(list(SCIENTIFIC_LENGTHS.values()))
        slots = rng.choice(list(SCIENTIFIC_LENGTHS), size.users, p=known / known.sum())
    if lengths is not None:
        slots = lengths
    offsets = np.concatenate(([0], np.cumsum(slots + 2)))
    side = side or ENCODERS[size.encoders].side
    manifest = Manifest(
        name="synthetic",
        source="synthetic",
        modalities=size.modalities,
        users=size.users,
        items=size.items,
        interactions=int(offsets[-1]),
        max_seq_len=size.max_seq_len,
        image_size=side,
        skipped={},
        fingerprint="synthetic",
    )
    images = None
    if not size.cached and size.method != "id" and "image" in size.modalities:
        shape = (size.items + 1, 3, side, side)
        images = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    sequences = rng.integers(1, size.items + 1, manifest.interactions, dtype=np.int32)
    return Dataset(folder, manifest, sequences=sequences, offsets=offsets, titles=None, images=images)


def make_cell(size: Size, folder: Path, device: Literal["cpu", "cuda"]) -> Cell:
    """The cell; configurations of its encoders are written to ``folder``."""
    shape = ENCODERS[size.encoders]
    common = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
    }
    specs: dict[Modality, EncoderSpec] = {}
    configs: dict[Modality, PretrainedConfig] = {
        "text": BertConfig(**common),
        "image": ViTConfig(**common, image_size=shape.side, patch_size=shape.patch),
    }
    for modality in size.modalities:
        configs[modality].save_pretrained(folder / modality)
        specs[modality] = EncoderSpec(source=str(folder / modality), weights="random")
    return Cell(
        method=size.method,
        cached=size.cached,
        dataset="synthetic",
        dataset_fingerprint="synthetic",
        modalities=size.modalities,
        text_encoder=specs.get("text"),
        image_encoder=specs.get("image"),
        training=Training(epochs=size.epochs, users_per_batch=size.batch, title_tokens=TITLE_TOKENS),
        device=device,
        seed=SEED,
    )


def make_trainer(size: Size, folder: Path, phases: PhaseLog, device: Literal["cpu", "cuda"] = "cpu") -> Trainer:
    """The trainer of a cell of that size, on synthetic data and weights; its files go to ``folder``."""
    torch.manual_seed(SEED)
    cell, dataset = make_cell(size, folder, device), synthetic_data(size, folder)
    method = create(size.method, size.options)
    specs = encoder_specs(cell, method)
    shape = EncoderShape(ENCODERS[size.encoders].width, ENCODERS[size.encoders].depth)
    builder = ModelBuilder(method, cell.training, DataSize.of(dataset), dict.fromkeys(specs, shape))
    views = {}
    if size.cached:
        sizes = {m: (size.items + 1, reads.count, shape.width) for m, reads in builder.item_encoder.reads.items()}
        # Filled, because memory that was never touched would not count.
        states = {m: torch.full(table, 0.1, dtype=torch.float16, device=device) for m, table in sizes.items()}
        store = ItemStore(dataset, states=states)
    else:
        views = {m: load_encoder(spec, m, seed=SEED).view for m, spec in specs.items()}
        tokens = _tokens(size.items) if "text" in specs else None
        store = ItemStore(dataset, tokens=tokens, images="image" in specs)
    model = builder.build(views).to(device)
    return Trainer(
        cell,
        model,
        method,
        dataset,
        store,
        phases,
        torch.device(device),
        lambda _what, _share: None,
        kept=Kept(folder / "procedure"),
        build=_no_fork,
    )


def _no_fork(_method: Method, _seed: int) -> NoReturn:
    raise NotImplementedError("none of these methods has a procedure of its own")


def _tokens(items: int) -> TokenTable:
    ids: NDArray[np.int32] = np.random.default_rng(SEED).integers(
        1000, VOCABULARY, (items + 1, TITLE_TOKENS), dtype=np.int32
    )
    return TokenTable(ids, np.full(items + 1, TITLE_TOKENS, np.int32))


def take_turns(ready: Callable[[], object], step: Callable[[], float]) -> None:
    """A row's side of ``in_turns``: ``ready`` once, then two steps for every line on stdin; answers with the seconds of
    the second. The first brings back what the other rows have displaced from caches and memory."""
    say(ready())
    while sys.stdin.readline():
        step()
        say(step())


def say(value: object) -> None:
    """Answer ``in_turns`` with ``value``, as JSON."""
    sys.stdout.write(f"{json.dumps(value)}\n")
    sys.stdout.flush()


def in_turns(commands: Mapping[str, Sequence[str]], turns: int) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Start a process for every row and let them take turns, A B C A B C.

    Args:
        commands: row -> command of a process that calls ``take_turns``, and may ``say`` more when that has ended.

    Returns:
        The seconds of every turn but the first, which allocates, and everything else that a row said.
    """
    with ExitStack() as stack:
        rows = {
            name: stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            )
            for name, command in commands.items()
        }
        said = {name: [_read(process)] for name, process in rows.items()}
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for turn in range(turns + 1):
            for name, process in rows.items():
                assert process.stdin is not None
                process.stdin.write("\n")
                step_s = _read(process)
                if turn:
                    seconds[name].append(step_s)
            sys.stderr.write(f"turn {turn}/{turns}: {', '.join(f'{name} {s[-1:]} s' for name, s in seconds.items())}\n")
        for name, process in rows.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            said[name] += map(json.loads, process.stdout)
            if process.wait():
                raise RuntimeError(f"a row has failed: {' '.join(commands[name])}")
    return seconds, said


def _read(process: Any) -> Any:
    """The next line of a row, as JSON. Raises RuntimeError where it has ended."""
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a row has failed: {' '.join(process.args)}")
    return json.loads(line)


def put(text: str, document: Path, mark: str) -> None:
    """Replace what stands in ``document`` between ``<!-- MARK -->`` and ``<!-- /MARK -->``.

    Raises ValueError where the marks are missing.
    """
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    whole = document.read_text(encoding="utf-8")
    if start not in whole or end not in whole:
        raise ValueError(f"{document}: has no {start} ... {end}")
    before, after = whole.split(start)[0], whole.split(end)[1]
    document.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")

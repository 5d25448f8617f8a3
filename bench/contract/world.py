"""A small world that the contract suite trains methods in: the synthetic catalogue and small encoders, on disk.

On disk, because then the suite takes the path of every cell: encoders are loaded, titles tokenised, hidden states
cached and read back.
"""

from __future__ import annotations

import gc
from functools import cached_property
from pathlib import Path

import numpy as np

from tpme.bench.contract.small_encoders import SIDE, VOCABULARY, modality_of, small_encoder
from tpme.bench.counting.meta import MetaEncoders
from tpme.bench.record import EncoderSpec
from tpme.bench.task.checkpoints import quiet_transformers
from tpme.bench.task.dataset import Dataset
from tpme.bench.task.encoders import load_encoder
from tpme.bench.task.prepare import prepare
from tpme.bench.task.sources.synthetic import Synthetic, generate
from tpme.bench.task.view import EncoderView

USERS, ITEMS, TITLE_TOKENS = 30, 40, 8
DROPOUT = 0.3
"""Of the encoders: high enough to show wherever dropout is active and must not be."""

Pair = tuple[str, str]
"""A family of text encoders and one of image encoders."""
PAIRS: tuple[Pair, ...] = (("bert", "vit"), ("llama", "siglip-image"))
"""The pairs that a method is tried with; the second one with the slow checks."""


class SmallWorld:
    """Prepared data and saved encoders below ``folder``; each is made on first use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta_encoders = MetaEncoders()
        self._views: dict[str, EncoderView] = {}
        self._attempts = 0

    @cached_property
    def data(self) -> Path:
        """The synthetic catalogue, prepared."""
        prepare(generate(Synthetic(users=USERS, items=ITEMS)), self.folder / "data", image_size=SIDE, workers=1)
        gc.freeze()  # every phase collects garbage: let it skip the objects of the libraries
        return self.folder / "data"

    @cached_property
    def dataset(self) -> Dataset:
        """The catalogue, opened."""
        return Dataset.open(self.data)

    @property
    def store(self) -> Path:
        """Where token tables and feature caches go."""
        return self.folder / "store"

    def encoder(self, family: str) -> EncoderSpec:
        """A saved encoder of ``family``, with a tokenizer where it reads text."""
        folder = self.folder / "encoders" / family
        if not folder.is_dir():
            module = small_encoder(family, dropout=DROPOUT)
            with quiet_transformers():
                module.save_pretrained(folder)
            if modality_of(family) == "text":
                self._save_tokenizer(folder, end=int(module.config.eos_token_id or 2))
        return EncoderSpec(source=str(folder))

    def fresh_view(self, family: str) -> EncoderView:
        """The unadapted encoder of ``family``, loaded once; callers must not change it."""
        if family not in self._views:
            self._views[family] = load_encoder(self.encoder(family), modality_of(family)).view
        return self._views[family]

    def attempt_folder(self) -> Path:
        """A new, empty folder for one training."""
        self._attempts += 1
        folder = self.folder / "attempts" / str(self._attempts)
        folder.mkdir(parents=True)
        return folder

    def _save_tokenizer(self, folder: Path, end: int) -> None:
        """A word tokenizer of the commonest words: [PAD] is 0, [CLS] 1, and a title ends with ``end``."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words, counts = np.unique(" ".join(self.dataset.titles or ()).split(), return_counts=True)
        common = words[np.argsort(-counts, kind="stable")].tolist()
        entries = ["[PAD]", "[CLS]", "[UNK]", *common][: VOCABULARY - 1]
        entries.insert(end, "[SEP]")
        tokenizer = Tokenizer(models.WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [("[CLS]", 1), ("[SEP]", end)]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, special)
        names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)

"""Pretrains the two tiny encoders that ship with the package: ``python -m tpme.bench.task.tiny.pretrain --out DIR``.

A BERT and a ViT, 4 layers of width 64, on synthetic items of other worlds than the demo's: other brands, other
combinations of attributes, new titles and images. Users and histories are not used. Each encoder is trained on three
losses at once, like large encoders at a small scale:

- *reconstruction at the last layer*: masked words (BERT), pixels of masked patches (SimMIM, arXiv:2111.09886);
- *a coarse class from the last layer's token 0*, like BERT's sentence-level task and ViT's labels: an item's
  department, or the quarter of the colour wheel. An extra term pulls token 0 towards the mean of its class: long
  supervised pretraining converges there by itself (neural collapse, Papyan et al., PNAS 2020), a short one does not;
- *deep supervision half-way*: token 0 after the second layer predicts the words of the title (a bag of words), or an
  image's shape, colour and texture (tags). Without it, token 0 of so small an encoder carries almost no information.

Tuning: the coarse classes specialise the last token 0 for the pretraining and not for recommendation; half-way it is
richer. This is intended, and known of large encoders: frozen encoders lose something, tuned ones can gain. The weights
of the three losses, the number of steps and the learning rate were set by the resulting order of popularity, frozen
and tuned encoders and side networks on intermediate states, with the same settings for all methods and without any
code specific to a method.

It takes about four minutes on one core. The same command with the same versions writes the same weights on the same
kind of processor. Each folder appears as a whole, with its provenance in ``pretraining.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTModel

from tpme.bench.record import Frozen
from tpme.bench.task.sources.synthetic import Catalogue, make_catalogue, make_world
from tpme.bench.task.sources.synthetic_images import COLOURS, SHAPES, TEXTURES
from tpme.bench.task.sources.synthetic_titles import SYLLABLES, words
from tpme.bench.task.workspace import publish, workspace

WIDTH, LAYERS, HEADS = 64, 4, 2
HALF_WAY = 2
"""Entry of ``hidden_states`` that deep supervision reads: the output of the second layer."""
TOKENS = 16
"""Length of a title in pretraining; the positions reach twice as far, so longer titles are cut there."""
IMAGE, PATCH = 32, 8
FIRST_WORLD = 1000
"""First world used for pretraining; the demo uses world 1."""
DEPARTMENTS, COLOUR_FAMILIES = 4, 4
TAGS = (len(SHAPES), len(COLOURS), len(TEXTURES))


class Pretraining(Frozen):
    """Settings of one pretraining."""

    seed: int = 7
    worlds: PositiveInt = 16
    items_per_world: PositiveInt = 1250
    text_steps: PositiveInt = 1800
    image_steps: PositiveInt = 1800
    batch: PositiveInt = 128
    lr: PositiveFloat = 1.5e-3
    """Of AdamW; linear warm-up over 50 steps, then a cosine to 0."""
    weight_decay: PositiveFloat = 0.05
    masked_words: PositiveFloat = 0.2
    masked_patches: PositiveFloat = 0.3
    """In every second image; the others are not masked."""
    coarse: PositiveFloat = 0.3
    """Weight of the coarse class in the loss."""
    scatter: PositiveFloat = 1.0
    """Weight of token 0's scatter within the coarse classes."""
    pixels: PositiveFloat = 5.0
    """Weight of the reconstruction of pixels."""


def vocabulary() -> list[str]:
    """WordPiece vocabulary: all letters and digits (which cover any Latin text), attribute words, syllables."""
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = [*letters, *SYLLABLES]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys([*special, *string.punctuation, *pieces, *(f"##{piece}" for piece in pieces), *words()]))


def make_catalogues(settings: Pretraining) -> list[Catalogue]:
    """The training items, world by world."""
    return [
        make_catalogue(
            make_world(FIRST_WORLD + world), np.random.default_rng((settings.seed, world)), settings.items_per_world
        )
        for world in range(settings.worlds)
    ]


def pretrain_text(
    settings: Pretraining, catalogues: list[Catalogue]
) -> tuple[BertModel, BertTokenizer, dict[str, float]]:
    """Train a BERT; returns it, its tokenizer, and the mean losses of the last hundred steps."""
    torch.manual_seed(settings.seed)
    pieces = vocabulary()
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(pieces)})
    tokenizer.model_max_length = 2 * TOKENS
    titles = [title for catalogue in catalogues for title in catalogue.titles]
    tokens = tokenizer(titles, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    ids, attended = tokens["input_ids"], tokens["attention_mask"]
    first_word = len(tokenizer.all_special_ids)
    bags = torch.zeros(len(ids), len(pieces)).scatter_(1, ids, 1.0)
    bags[:, :first_word] = 0
    bags /= bags.sum(1, keepdim=True)
    department = _attribute(catalogues, "category") % DEPARTMENTS

    config = BertConfig(
        vocab_size=len(pieces),
        max_position_embeddings=2 * TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_shape(),
    )
    model = BertModel(config, add_pooling_layer=False)
    spell = nn.Linear(WIDTH, len(pieces))
    spell.weight = model.embeddings.word_embeddings.weight  # tied, as in BERT
    heads = nn.ModuleDict(
        {
            "word": nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), spell),
            "coarse": nn.Linear(WIDTH, DEPARTMENTS),
            "bag": nn.Linear(WIDTH, len(pieces)),
        }
    )
    course = _TrainingRun("text", settings, settings.text_steps, model, heads, len(ids))
    for rows in course:
        seen = ids[rows]
        masked = (torch.rand(seen.shape) < settings.masked_words) & (seen >= first_word)
        masked[0, 1] = True  # at least one is masked
        out = model(
            input_ids=seen.masked_fill(masked, tokenizer.mask_token_id),
            attention_mask=attended[rows],
            output_hidden_states=True,
        )
        half_way = F.log_softmax(heads["bag"](out.hidden_states[HALF_WAY][:, 0]), dim=-1)
        course.step(
            masked_words=F.cross_entropy(heads["word"](out.last_hidden_state[masked]), seen[masked]),
            coarse=F.cross_entropy(heads["coarse"](out.last_hidden_state[:, 0]), department[rows]),
            scatter=_scatter(out.last_hidden_state[:, 0], department[rows]),
            half_way=-(bags[rows] * half_way).sum(1).mean(),
        )
    return model, tokenizer, course.losses()


def pretrain_image(settings: Pretraining, catalogues: list[Catalogue]) -> tuple[ViTModel, dict[str, float]]:
    """Train a ViT; returns it and the mean losses of the last hundred steps."""
    torch.manual_seed(settings.seed)
    images = torch.from_numpy(np.stack([picture(IMAGE) for catalogue in catalogues for picture in catalogue.pictures]))
    tags = torch.stack([_attribute(catalogues, name) for name in ("shape", "colour", "texture")])
    family = tags[1] * COLOUR_FAMILIES // len(COLOURS)

    model = ViTModel(ViTConfig(image_size=IMAGE, patch_size=PATCH, **_shape()), add_pooling_layer=False)
    heads = nn.ModuleDict(
        {
            "patch": nn.Linear(WIDTH, 3 * PATCH**2),
            "coarse": nn.Linear(WIDTH, COLOUR_FAMILIES),
            "tags": nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(TAGS))),
        }
    )
    course = _TrainingRun("image", settings, settings.image_steps, model, heads, len(images))
    for rows in course:
        pixels = images[rows].float() / 127.5 - 1  # mean and std 0.5, as the task normalises images for a ViT
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)  # (batch, patches, 3 * PATCH^2)
        masked = torch.rand(patches.shape[:2]) < settings.masked_patches
        masked[::2] = False
        masked[-1, 0] = True  # at least one is masked
        side = IMAGE // PATCH
        hidden = masked.view(-1, 1, side, side).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
        out = model(pixels.masked_fill(hidden, 0.0), output_hidden_states=True)
        tagged = heads["tags"](out.hidden_states[HALF_WAY][:, 0]).split(TAGS, dim=1)
        course.step(
            masked_patches=F.mse_loss(heads["patch"](out.last_hidden_state[:, 1:])[masked], patches[masked]),
            coarse=F.cross_entropy(heads["coarse"](out.last_hidden_state[:, 0]), family[rows]),
            scatter=_scatter(out.last_hidden_state[:, 0], family[rows]),
            half_way=torch.stack([F.cross_entropy(t, tag[rows]) for t, tag in zip(tagged, tags, strict=True)]).sum(),
        )
    return model, course.losses()


class _TrainingRun:
    """One training run: draws batches, weights and records the losses, and prints them to stderr."""

    def __init__(
        self, name: str, settings: Pretraining, steps: int, model: nn.Module, heads: nn.Module, items: int
    ) -> None:
        self._name, self._settings, self._steps, self._items = name, settings, steps, items
        self._weights = {
            "coarse": settings.coarse,
            "scatter": settings.scatter,
            "masked_patches": settings.pixels,
        }
        self._parameters = list(nn.ModuleList([model, heads]).parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (step + 1) / 50) * (0.5 + 0.5 * float(np.cos(np.pi * step / steps)))
        )
        self._history: list[dict[str, float]] = []
        model.train()

    def __iter__(self) -> Iterator[Tensor]:
        """Rows of each batch, drawn with replacement."""
        for _ in range(self._steps):
            yield torch.randint(self._items, (self._settings.batch,))

    def step(self, **losses: Tensor) -> None:
        """Take one step on the weighted sum of the losses."""
        self._optimizer.zero_grad()
        torch.stack([self._weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._history.append({name: float(loss.detach()) for name, loss in losses.items()})
        done = len(self._history)
        if done % 100 == 0 or done == self._steps:
            losses_text = "  ".join(f"{name} {loss:.4f}" for name, loss in self.losses().items())
            print(f"{self._name} {done}/{self._steps}  {losses_text}", file=sys.stderr, flush=True)  # noqa: T201

    def losses(self) -> dict[str, float]:
        """Mean of each loss over the last hundred steps."""
        last = self._history[-100:]
        return {name: round(sum(losses[name] for losses in last) / len(last), 5) for name in last[0]}


def save(
    folder: Path, model: BertModel | ViTModel, tokenizer: BertTokenizer | None, provenance: dict[str, Any]
) -> None:
    """Write an encoder as a checkpoint folder with its ``pretraining.json``, replacing an earlier one as a whole."""
    with workspace(folder) as space:
        building = space / "encoder"
        model.eval().save_pretrained(building)
        if tokenizer is not None:
            tokenizer.save_pretrained(building)
        (building / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
        (building / "pretraining.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        publish(building, folder, replace=True)


def main(arguments: list[str] | None = None) -> None:
    """Pretrain both encoders and write them to ``text/`` and ``image/`` below ``--out``."""
    defaults = Pretraining()
    parser = argparse.ArgumentParser(description="Pretrain the tiny encoders.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for text/ and image/")
    for name in ("seed", "text_steps", "image_steps", "items_per_world", "batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    settings = Pretraining(**options)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # else the order of sums, and so the weights, depends on the number of cores
    changed = [
        f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value != getattr(defaults, name)
    ]
    provenance = {
        "command": " ".join(["python -m tpme.bench.task.tiny.pretrain", *changed]),
        "settings": settings.model_dump(),
        "versions": {
            "python": platform.python_version(),
            "machine": platform.machine(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    catalogues = make_catalogues(settings)
    text, tokenizer, losses = pretrain_text(settings, catalogues)
    save(out / "text", text, tokenizer, {**provenance, "losses": losses})
    image, losses = pretrain_image(settings, catalogues)
    save(out / "image", image, None, {**provenance, "losses": losses})


def _shape() -> dict[str, int]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
    }


def _scatter(vectors: Tensor, classes: Tensor) -> Tensor:
    """Share, 0 to 1, of the scatter of vectors (n, d) within their classes (n,), the rest being between classes."""
    members = F.one_hot(classes).to(vectors.dtype)
    means = members.T @ vectors / members.sum(0).clamp(min=1)[:, None]
    within = (vectors - means[classes]).square().sum()
    return within / (vectors - vectors.mean(0)).square().sum()


def _attribute(catalogues: list[Catalogue], attribute: str) -> Tensor:
    """One attribute of all items: (items,)."""
    parts: list[NDArray[np.int64]] = [getattr(catalogue, attribute) for catalogue in catalogues]
    return torch.from_numpy(np.concatenate(parts))


if __name__ == "__main__":
    main()

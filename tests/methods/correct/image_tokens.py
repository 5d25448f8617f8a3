"""The image as tokens of the text encoder, whose norms train; the image encoder stays frozen, and may be cached."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tpme.bench.errors import UserError
from tpme.bench.task.items import Reads
from tpme.bench.task.recommender import ItemEncoder
from tpme.methods.base import Method


class ImageInText(ItemEncoder):
    """Projects image tokens to the width of the text encoder, and the text's state to the item vector."""

    def __init__(self, task):
        text, image = task.encoders["text"], task.encoders["image"]
        super().__init__({"text": Reads(final=True, pool=text.pool), "image": Reads(final=True, tokens="all")})
        self.project, self.head = nn.Linear(image.width, text.width), nn.Linear(text.width, task.dim)
        self.image = None

    def forward(self, states, ids):
        return self.head(states["text"][:, 0])


class ImageTokens(Method):
    """Image tokens are added behind those of the title."""

    identity_at_start = False
    needs = ("text", "image")

    def item_encoder(self, task):
        return ImageInText(task)

    def frozen_encoders(self, modalities):
        return tuple(modality for modality in modalities if modality == "image")

    def adapt(self, model, schedule):
        view = model.views["text"]
        if view.shape.pool != "first":
            raise UserError("image_tokens: image tokens stand behind the title, so only token 0 can be read")
        view.embeddings.register_forward_hook(partial(_append, model.item_encoder))
        for layer in range(view.shape.depth):
            for norm in view.norms(layer):
                norm.requires_grad_(True)

    def encode(self, model, items):
        image = model.states("image", items)
        mask = torch.cat([items.token_mask, image.mask.to(items.token_mask.dtype)], dim=1)
        model.item_encoder.image = image.states[:, 0]
        try:
            text = model.states("text", replace(items, token_mask=mask))
        finally:
            model.item_encoder.image = None
        return model.item_encoder({"text": text}, items.ids)

    def trainable_parameters(self, task, views):
        text, image = task.encoders["text"], task.encoders["image"]
        norms = sum(p.numel() for i in range(text.depth) for n in views["text"].norms(i) for p in n.parameters())
        return norms + (image.width + 1) * text.width + (text.width + 1) * task.dim


def _append(item_encoder, _module, _args, output):
    return torch.cat([output, item_encoder.project(item_encoder.image)], dim=1)


METHOD = ImageTokens

"""Methods of the library peft: injected into each encoder in place, and merged for inference."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, ClassVar

import torch

from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Method, Schedule

ADAPTER = "default"
"""The name of the one adapter of an encoder, in peft's dictionaries of parameters."""


class PeftMethod(Method):
    """A method that wraps layers of each encoder according to a configuration of peft.

    Class attribute ``name``: the method's name, for messages.
    """

    name: ClassVar[str]

    def settings(self, view: EncoderView) -> Any:
        """The configuration of peft for one encoder. Raises UserError where the method does not suit the encoder."""
        raise NotImplementedError

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Inject the adapter into each encoder; nothing else of it trains."""
        for view in model.views.values():
            inject(view, self.settings(view))

    def prepare_inference(self, model: Recommender) -> None:
        """Merge the adapters into the weights where peft can; an item then costs the same as with frozen encoders."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in model.encoders.modules():
            if isinstance(module, BaseTunerLayer):
                with suppress(NotImplementedError):
                    module.merge()


def inject(view: EncoderView, settings: Any, *, on_host: bool = False) -> None:
    """Adapt an encoder in place.

    The tuner's class is called directly: ``inject_adapter_in_model`` refuses those whose layers share tensors (VeRA),
    although every layer holds a reference to them. Tensors are made where the encoder is, or ``on_host``: peft
    creates those again that it has to move to ``meta``, and all of these would train.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    with torch.device("cpu") if on_host else next(view.module.parameters()).device:
        PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](view.module, settings, ADAPTER)

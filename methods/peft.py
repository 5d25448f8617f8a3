"""Any tuner of the installed peft, by its type and the options of its configuration."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator

from tpme.bench.errors import UserError, one_line
from tpme.bench.record import Modality
from tpme.bench.task.families import Role
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.low_rank import check_rank
from tpme.methods.parts.peft_injection import PeftMethod, inject

_PROMPTS = "adds virtual tokens to the inputs of a language model; use method 'prompt' or 'prefix'"
_SPARSE = "multiplies by sparse matrices, whose operations cannot be counted"
_READS = "reads values of tensors while it runs, so its steps cannot be counted"
_DATA = "is computed from data, which the tuner is not given"
_RANDOM = "changes the pretrained weights at random, so a stored adapter would not fit them again"
UNSUPPORTED: dict[str, str] = {
    "ADALORA": "needs its own loss term and rank allocation in every step; use method 'adalora'",
    "ADAMSS": "clusters the pretrained weights with scikit-learn, so it cannot be planned without the weights",
    "ADAPTION_PROMPT": "adds prompts to the attention of decoders only",
    "CARTRIDGE": "trains the key-value cache of a language model; use method 'prefix'",
    "CPT": _PROMPTS,
    "FROD": _SPARSE,
    "LILY": "averages its routing over a whole batch, so the vector of an item would depend on the others",
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "POLY": "chooses skills by a task id, which items do not have",
    "PREFIX_TUNING": "needs the key-value cache of a language model; use method 'prefix'",
    "PROMPT_TUNING": _PROMPTS,
    "SHADOW": "runs a second decoder beside the blocks of a decoder",
    "SHIRA": _SPARSE,
    "TRAINABLE_TOKENS": "trains rows of a token embedding for new tokens, which titles and images do not have",
    "VBLORA": _READS,
    "WAVEFT": _READS,
    "XLORA": "mixes LoRA adapters that were trained before",
}
"""Types of peft that cannot adapt an encoder here, and why."""
_TARGETS: dict[str, tuple[Role, ...]] = {"IA3": ("key", "value", "ffn_out")}
"""Projections that a type adapts by default, if not queries and values."""
_ON_HOST = {"BOFT", "UNILORA"}
"""Types that read the indices they make, which is impossible on ``meta``; the indices move with the model."""
_REFUSED_OPTIONS = {"modules_to_save", "layer_replication", "trainable_token_indices", "alora_invocation_tokens"}
"""Options of peft's configurations that would change more than the adapter, or that only text generation uses."""
_REFUSED_STARTS = {"eva": _DATA, "corda": _DATA, "lora_ga": _DATA, "pissa_niter": _RANDOM}
"""Values of ``init_lora_weights``, by how they begin, that cannot be used, and why."""
_LOW_RANK = {"DELORA", "GRALORA", "HIRA", "LOHA", "LORA"}
"""Types whose ``r`` is a rank, which peft does not compare with the width."""


class TunerConfig(MethodConfig):
    """Type of the tuner, the projections to adapt, and any option of the type's configuration in peft.

    Default ``targets``: queries and values; keys, values and ``ffn_out`` for IA3; all norms for LN_TUNING.
    ``target_modules``, an option of nearly every type, names modules instead.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    type: str = "OFT"
    targets: Annotated[tuple[Role, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _fits_peft(self) -> TunerConfig:
        known = _options(_configuration(self.type))
        given = self.model_extra or {}
        for option in given:
            if option not in known:
                raise UserError(f"method 'peft': {self.type} has no option '{option}'; {_hint(option, known)}")
        if self.targets and "target_modules" in given:
            raise UserError("method 'peft': targets and target_modules both name what is adapted; give one of them")
        if "layers_to_transform" in given and "target_modules" not in given:
            raise UserError("method 'peft': layers_to_transform chooses among target_modules; give these too")
        start = str(given.get("init_lora_weights"))
        for name, reason in _REFUSED_STARTS.items():
            if start.startswith(name):
                raise UserError(f"method 'peft': init_lora_weights = '{start}' {reason}; choose another")
        return self


class PeftTuner(PeftMethod):
    """Runs any tuner of the installed peft, named by its type, such as LoHa, BOFT or FourierFT.

    ``y = (W + dW) x`` for most types; dW, the options and their defaults are those of the type's configuration in peft.
    The projections with the roles ``targets`` are adapted. A type that cannot adapt an encoder is refused with the
    reason. The trainable parameters are counted on a copy of the encoders on ``meta``, because every type has another
    formula. Whether item vectors start as those of the frozen encoders depends on the type and its options.

    Trains: what the type adds (OFT at queries and values): 285,696 each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size; inference costs the same as frozen encoders if peft can
    merge the type into the weights, else more.
    Source: Mangrulkar et al., PEFT, 2022; OFT: Qiu et al., Orthogonal Finetuning, NeurIPS 2023.
    """

    Config = TunerConfig
    config: TunerConfig
    name: ClassVar[str] = "peft"
    identity_at_start = False

    def settings(self, view: EncoderView) -> Any:
        """The type's configuration for one encoder. Raises UserError where peft does not accept its options."""
        options = dict(self.config.model_extra or {})
        if "target_modules" not in options:
            options["target_modules"] = self._targets(view)
            if self.config.type == "IA3":
                ffn = set(view.projections("ffn_out"))
                options.setdefault("feedforward_modules", [n for n in options["target_modules"] if n in ffn])
        settings = self._built(options)
        if self.config.type in _LOW_RANK:
            check_rank(self.name, settings.r, view, self.config.targets or ("query", "value"))
        return settings

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Inject the tuner into each encoder. Raises UserError where peft cannot."""
        for view in model.views.values():
            self._inject(view)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Counted from what the tuner makes of copies on ``meta``: every type of peft has another formula."""
        total = fusion_parameters(task)
        for view in views.values():
            twin = copy.deepcopy(view)
            twin.module.to("meta").requires_grad_(False)
            self._inject(twin)
            total += sum(p.numel() for p in twin.module.parameters() if p.requires_grad)
        return total

    def _targets(self, view: EncoderView) -> list[str]:
        if self.config.type == "LN_TUNING" and self.config.targets is None:
            return [name for name, part in view.module.named_modules() if type(part).__name__.endswith("Norm")]
        return view.projections(*(self.config.targets or _TARGETS.get(self.config.type, ("query", "value"))))

    def _built(self, options: Mapping[str, Any]) -> Any:
        try:
            return _configuration(self.config.type)(**options)
        except Exception as error:
            raise UserError(f"method 'peft': {self.config.type} refuses its options ({one_line(error)})") from error

    def _inject(self, view: EncoderView) -> None:
        where = f"{type(view.module).__name__} ({view.modality} encoder)"
        try:
            inject(view, self.settings(view), on_host=self.config.type in _ON_HOST)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"method 'peft': {self.config.type} with these options does not fit {where} ({one_line(error)})"
            ) from error
        if not sum(parameter.numel() for parameter in view.module.parameters() if parameter.requires_grad):
            raise UserError(f"method 'peft': {self.config.type} with these options trains nothing of {where}")


def supported_types() -> list[str]:
    """The types of the installed peft that can adapt an encoder."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted({kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - set(UNSUPPORTED))


def _configuration(kind: str) -> Any:
    """The configuration class of a type. Raises UserError for a type that peft does not have or that cannot be used."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = {entry.value: configuration for entry, configuration in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in known:
        raise UserError(f"method 'peft': the installed peft has no type '{kind}'; {_hint(kind, supported_types())}")
    if kind in UNSUPPORTED:
        raise UserError(f"method 'peft': {kind} cannot adapt these encoders: it {UNSUPPORTED[kind]}")
    return known[kind]


def _options(configuration: Any) -> list[str]:
    """The options of a type's configuration, without those that all types have for peft's own purposes."""
    from peft import PeftConfig

    common = {entry.name for entry in dataclasses.fields(PeftConfig)} | _REFUSED_OPTIONS
    return [entry.name for entry in dataclasses.fields(configuration) if entry.name not in common]


def _hint(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1) or [name for name in known if name.lower() == word.lower()]
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"

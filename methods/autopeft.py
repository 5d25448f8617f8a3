"""AutoPEFT (Zhou et al., TACL 2024): searches kinds, sizes and layers of modules, then trains the best."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt

from tpme.bench.errors import UserError, one_line
from tpme.bench.record import Modality
from tpme.bench.task.recommender import Recommender
from tpme.bench.task.view import EncoderView
from tpme.methods.base import Context, Method, MethodConfig, Schedule, TaskShape, fusion_parameters
from tpme.methods.parts.search_engine import Engine, chosen_engine, distinct_draws, propose
from tpme.methods.parts.search_front import Points, non_dominated
from tpme.methods.parts.search_modules import add_modules
from tpme.methods.parts.search_space import KINDS, Configuration, EncoderModules, EncoderSize, Kind, SearchSpace, Vector


class Budget(NamedTuple):
    """Random trials to begin with, all trials, and trials between two fits of the surrogate."""

    random: int
    trials: int
    batch: int = 4


OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
BUDGETS = {"smoke": Budget(4, 8), "small": Budget(16, 32), "paper": Budget(100, 200)}


class AutoPEFTConfig(MethodConfig):
    """How to search and how to choose the winner; or a configuration to train without a search.

    budget: number of trials, 8 (``smoke``), 32 (``small``) or 200 (``paper``), half of them random. engine: proposes
    the other half; ``gp`` needs the extra ``search``, ``saas`` the extra ``saas``, ``auto`` is ``saas`` where that is
    installed, else ``gp``. kinds: the modules to search. shared: one configuration for all encoders. trial_users:
    share of the training users that a trial trains on. trial_epochs: its epochs, at most those of the cell. tolerance:
    the smallest configuration wins whose NDCG@10 is at least (1 - tolerance) of the best. scale: s, of the parallel
    adapters. configuration: modules by encoder, to train without a search.
    """

    budget: Literal["small", "smoke", "paper"] = "small"
    engine: Engine = "auto"
    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = KINDS
    shared: bool = False
    trial_users: Annotated[float, Field(gt=0, le=1)] = 0.1
    trial_epochs: PositiveInt = 2
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scale: PositiveFloat = 4.0
    configuration: dict[Modality, EncoderModules] | None = None


@dataclass(frozen=True)
class Trial:
    """A configuration and its NDCG@10 on validation, or why it failed. seconds: of building, training, validating."""

    vector: Vector
    parameters: int
    seconds: float
    ndcg_10: float | None = None
    failed: str | None = None


class AutoPEFT(Method):
    """Searches sizes and layers of serial adapters, parallel adapters and prefixes, and trains the best it finds.

    ``f <- f + SA(LN(x + f)) + s PA(x); K, V <- [P_K; K], [P_V; V]`` in the layers whose bit is 1: f is the output of
    the feed-forward sub-layer, x what f is added to, LN the norm behind it. Every encoder has one size for each kind
    of module, ``floor(D / 2^k)`` or 0, and one bit for each layer, which all kinds share: 11^3 2^12 = 5,451,776
    configurations of BERT-base, and the square of that for two such encoders. A trial trains one configuration from
    the start on a share of the users, and validates it. Half of the trials are random. Then batches of 4 maximise the
    expected improvement of the hypervolume of two objectives, few parameters and a high NDCG@10, under Gaussian
    processes with a SAAS prior (section 4). Of the configurations that no other one dominates, the best is trained
    anew, as the cell says, on all users.

    The adapters are those of the methods pfeiffer-adapter and parallel-adapter, also in pre-norm encoders, which the
    paper does not define: there x is the residual stream, and SA reads x + f without LN. Reconstructions: keys and
    values train directly, without an MLP; parameters are compared by their exact number, without noise; search and
    choice see the validation targets alone.

    Trains: what was found; before the search, and in a plan, middle sizes in all layers (24, 24 and 24): 1,346,112
    each in BERT-base and ViT-B/16.
    Saves: weight gradients, optimiser state and stored size, and the backward pass below the lowest layer that gets a
    module; the search costs many short trainings, which T leaves out and all-in time does not; inference costs the
    modules.
    Source: Zhou et al., AutoPEFT, TACL 2024.
    """

    Config = AutoPEFTConfig
    config: AutoPEFTConfig
    identity_at_start = False

    def __init__(self, config: AutoPEFTConfig) -> None:
        super().__init__(config)
        self.trials: list[Trial] = []
        self.space: SearchSpace | None = None
        self.winner = 0
        self.proposing_s = 0.0

    # --- the model of one configuration -----------------------------------------------------------------------------

    def check_run(self, users: int) -> None:
        """Raise UserError where the search lacks a package, and for options of a search beside a configuration."""
        if self.config.configuration is None:
            chosen_engine(self.config.engine)
            return
        of_search = sorted(self.config.model_fields_set - {"configuration", "scale"})
        if of_search:
            raise UserError(
                f"method 'autopeft': option '{of_search[0]}' belongs to a search, but a configuration is trained "
                "without one; remove either"
            )

    def frozen_encoders(self, modalities: Sequence[Modality]) -> tuple[Modality, ...]:
        """The encoders that the configuration leaves as they are; none before a search."""
        given = self.config.configuration
        if given is None:
            return ()
        return tuple(m for m in modalities if given.get(m, EncoderModules()).empty)

    def configuration(self, views: Mapping[Modality, EncoderView]) -> Configuration:
        """What ``adapt`` adds: the configuration given, or middle sizes in all layers.

        Raises UserError for a layer that an encoder does not have, and where no encoder gets a module.
        """
        given = self.config.configuration
        if given is None:
            space = self._space(views)
            return space.decode(space.middle())
        for modality, view in views.items():
            layers = given.get(modality, EncoderModules()).layers or ()
            if max(layers, default=0) >= view.shape.depth:
                raise UserError(
                    f"method 'autopeft': configuration.{modality}.layers names layer {max(layers)}, but "
                    f"{type(view.module).__name__} has layers 0 to {view.shape.depth - 1}"
                )
        found = {modality: given.get(modality, EncoderModules()) for modality in views}
        if all(modules.empty for modules in found.values()):
            raise UserError(
                "method 'autopeft': the configuration gives no encoder a module; name layers and a size above 0 for at "
                "least one"
            )
        return found

    def adapt(self, model: Recommender, schedule: Schedule) -> None:
        """Add the modules. Raises UserError also where prefixes are searched and an encoder cannot have one."""
        for modality, modules in self.configuration(model.views).items():
            add_modules(model.views[modality], modules, self.config.scale)

    def trainable_parameters(self, task: TaskShape, views: Mapping[Modality, EncoderView]) -> int:
        """Per active layer: 2 D b + b + D an adapter, P K a prefix with K = 2 H_kv d_h."""
        found = self.configuration(views).items()
        modules = sum(EncoderSize.of(views[modality]).parameters(of) for modality, of in found)
        return modules + fusion_parameters(task)

    def _space(self, views: Mapping[Modality, EncoderView]) -> SearchSpace:
        sizes = {modality: EncoderSize.of(view) for modality, view in views.items()}
        return SearchSpace(sizes, self.config.kinds, shared=self.config.shared)

    # --- the search -------------------------------------------------------------------------------------------------

    def run(self, context: Context) -> None:
        """Search, adopt a fresh model of the winner, and train it; train at once where a configuration is given."""
        if self.config.configuration is None:
            self._search(context)
            self.winner = chosen_trial(self.trials, self.config.tolerance)
            _forget_compiled_code()
            context.adopt(context.fork(self._fixed(self.trials[self.winner].vector), context.seed))
        context.train()

    def _search(self, context: Context) -> None:
        """Do all trials, or read those that an earlier attempt finished."""
        engine, budget = chosen_engine(self.config.engine), BUDGETS[self.config.budget]
        self.space = space = self._space(context.state.model.views)
        vectors = distinct_draws(space, np.random.default_rng(context.seed), budget.random)
        for batch in itertools.count(1):
            for vector in vectors:
                work = partial(self._trial, context, vector)
                found = context.once("search", f"trial {len(self.trials) + 1}", work)
                self.trials.append(Trial(**{**found, "vector": tuple(found["vector"])}))
            left = budget.trials - len(self.trials)
            if left <= 0 or not vectors:
                return
            work = partial(self._proposal, engine, min(left, budget.batch))
            proposal = context.once("search", f"proposal {batch}", work)
            vectors = [tuple(vector) for vector in proposal["vectors"]]
            self.proposing_s += proposal["seconds"]

    def _trial(self, context: Context, vector: Vector) -> dict[str, Any]:
        """Train a configuration for a short time and validate it; it fails if it diverges or runs out of memory."""
        assert self.space is not None
        started, users = time.perf_counter(), np.random.default_rng(context.seed).permutation(context.users)
        trial: dict[str, Any] = {"vector": list(vector), "parameters": self.space.parameters(vector)}
        try:
            _forget_compiled_code()
            fork = context.fork(self._fixed(vector), context.seed)
            epochs = min(self.config.trial_epochs, context.state.schedule.epochs)
            fork.train(epochs, users[: math.ceil(self.config.trial_users * len(users))], kind="search")
            trial["ndcg_10"] = fork.validate().ndcg_10
        except (ArithmeticError, MemoryError, RuntimeError) as error:
            if not diverged_or_out_of_memory(error):
                raise
            trial["failed"] = one_line(error)
        return trial | {"seconds": time.perf_counter() - started}

    def _proposal(self, engine: Engine, count: int) -> dict[str, Any]:
        """The next configurations."""
        assert self.space is not None
        started, done = time.perf_counter(), [trial for trial in self.trials if trial.ndcg_10 is not None]
        tried = [trial.vector for trial in self.trials]
        found = propose(engine, self.space, [trial.vector for trial in done], objectives(done), tried, count)
        return {"vectors": [list(vector) for vector in found], "seconds": time.perf_counter() - started}

    def _fixed(self, vector: Vector) -> AutoPEFT:
        """The method with one configuration."""
        assert self.space is not None
        return type(self)(self.config.model_copy(update={"configuration": self.space.decode(vector)}))

    def report(self, model: Recommender) -> dict[str, float]:
        """Modules of the model, parameters and NDCG@10 of all trials, the modules of the front, and what it cost."""
        found: dict[str, float] = {}
        given = self.config.configuration or {}
        for modality, view in model.views.items() if given else ():
            of = given.get(modality, EncoderModules())
            found |= {f"{modality}_{key}": value for key, value in _numbers(of, view.shape.depth).items()}
        if self.space is None:
            return found
        front = front_of(self.trials)
        for number, trial in enumerate(self.trials):
            name = f"trial_{number + 1:03}"
            found[f"{name}_parameters"] = trial.parameters
            found[f"{name}_ndcg_10"] = math.nan if trial.ndcg_10 is None else trial.ndcg_10
            if number in front:
                for modality, of in self.space.decode(trial.vector).items():
                    numbers = _numbers(of, self.space.encoders[modality].depth)
                    found |= {f"{name}_{modality}_{key}": value for key, value in numbers.items()}
        return found | {
            "procedure_trials": len(self.trials),
            "procedure_trials_failed": sum(trial.ndcg_10 is None for trial in self.trials),
            "procedure_winner": self.winner + 1,
            "procedure_search_s": sum(trial.seconds for trial in self.trials) + self.proposing_s,
            "procedure_proposing_s": self.proposing_s,
        }


def objectives(trials: Sequence[Trial]) -> Points:
    """What is maximised: minus the number of parameters, and NDCG@10, NaN of a trial that failed; (n, 2)."""
    return np.array([(-trial.parameters, trial.ndcg_10) for trial in trials], dtype=np.float64).reshape(-1, 2)


def front_of(trials: Sequence[Trial]) -> list[int]:
    """The Pareto set: places of the trials that no other one dominates."""
    return np.flatnonzero(non_dominated(objectives(trials))).tolist()


def chosen_trial(trials: Sequence[Trial], tolerance: float) -> int:
    """The place of the smallest trial on the front whose NDCG@10 is at least (1 - tolerance) of the best.

    Raises UserError where no trial finished.
    """
    front = front_of(trials)
    if not front:
        raise UserError(
            f"method 'autopeft': none of {len(trials)} trials finished (the last: {trials[-1].failed}); lower the "
            "learning rates, search fewer kinds, or delete the folder 'procedure' of this cell to search anew"
        )
    quality = {place: trials[place].ndcg_10 or 0.0 for place in front}
    least = (1 - tolerance) * max(quality.values())
    return min((place for place in front if quality[place] >= least), key=lambda place: trials[place].parameters)


def diverged_or_out_of_memory(error: Exception) -> bool:
    """Whether a smaller or other configuration may train; the CPU's allocator and cuBLAS raise plain RuntimeErrors."""
    known = isinstance(error, (ArithmeticError, MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in OUT_OF_MEMORY)


def _forget_compiled_code() -> None:
    """Drop the compiled code of earlier trials: torch.compile stops compiling after a number of different models."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _numbers(modules: EncoderModules, depth: int) -> dict[str, float]:
    """Sizes, and the layers as a number: 2^0 for layer 0, 2^1 for layer 1 and so on."""
    layers = sum(1 << layer for layer in modules.active(depth))
    return {"serial": modules.serial, "parallel": modules.parallel, "prefix": modules.prefix, "layers": layers}

"""The contract suite: what every method must keep, whoever wrote it.

A check is a plain function of a ``Subject``. It returns if the method keeps the contract, raises ``ContractError`` with
one line if not, and ``NotApplicable`` if the check does not apply to the method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tpme.bench.contract.checks_of_items import (
    cache_key_names_what_is_read,
    cached_equals_uncached,
    chunks_change_nothing,
    evaluation_repeats,
    padding_changes_nothing,
)
from tpme.bench.contract.checks_of_result import (
    deep_copy_is_independent,
    inference_is_not_dearer,
    merging_changes_no_vector,
    state_of_another_structure_is_refused,
    state_round_trip,
)
from tpme.bench.contract.checks_of_start import (
    identity_at_start,
    nothing_is_uncounted,
    one_learning_rate_each,
    parameter_formula,
    vectors_and_report,
)
from tpme.bench.contract.checks_of_training import (
    checkpointing_changes_nothing,
    compiled_equals_eager,
    encoders_learn_unless_frozen,
    frozen_parameters_stay,
    gradients_reach_what_trains,
    loss_falls,
    resuming_changes_nothing,
    sequential_encoder_is_the_tasks,
    training_is_reproducible,
    trains_in_half_precision,
    trains_through_all_stages,
    trains_under_the_paper_protocol,
)
from tpme.bench.contract.expect import ContractError, NotApplicable
from tpme.bench.contract.subject import Subject, with_options
from tpme.bench.contract.world import PAIRS, Pair, SmallWorld
from tpme.bench.errors import one_line
from tpme.bench.record import Modality
from tpme.methods.registry import create

Check = Callable[[Subject], None]
CHECKS: tuple[Check, ...] = (
    parameter_formula,
    nothing_is_uncounted,
    identity_at_start,
    one_learning_rate_each,
    vectors_and_report,
    trains_through_all_stages,
    loss_falls,
    gradients_reach_what_trains,
    frozen_parameters_stay,
    encoders_learn_unless_frozen,
    sequential_encoder_is_the_tasks,
    training_is_reproducible,
    resuming_changes_nothing,
    trains_under_the_paper_protocol,
    trains_in_half_precision,
    checkpointing_changes_nothing,
    evaluation_repeats,
    chunks_change_nothing,
    padding_changes_nothing,
    cached_equals_uncached,
    cache_key_names_what_is_read,
    state_round_trip,
    state_of_another_structure_is_refused,
    merging_changes_no_vector,
    inference_is_not_dearer,
    deep_copy_is_independent,
)
SLOW_CHECKS: tuple[Check, ...] = (compiled_equals_eager,)


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check of one subject; ``message`` says why it failed or was skipped."""

    subject: str
    check: str
    status: Literal["passed", "failed", "skipped"]
    message: str = ""

    def __str__(self) -> str:
        return f"{self.status:7} {self.subject}: {self.check}{self.message and f': {self.message}'}"


def run_check(check: Check, subject: Subject) -> CheckResult:
    """Run one check. Any error of the method is a failure; a subject that the method refuses is skipped."""
    status: Literal["passed", "failed", "skipped"] = "passed"
    message = ""
    try:
        if (refusal := subject.refusal) is not None:
            raise NotApplicable(f"refused: {refusal}")
        check(subject)
    except NotApplicable as reason:
        status, message = "skipped", str(reason)
    except ContractError as error:
        status, message = "failed", str(error)
    except Exception as error:
        status, message = "failed", one_line(error)
    return CheckResult(str(subject), check.__name__, status, " ".join(message.split()))


def subjects_of(
    world: SmallWorld,
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    pair: Pair = PAIRS[0],
    methods_path: Sequence[Path] = (),
) -> Iterator[Subject]:
    """Yield the subjects of a method: with its options, with all of them changed, and on each modality alone.

    Raises:
        UserError: an unknown method, or an option that does not fit.
    """
    method = create(name, options or {}, methods_path)
    subject = Subject(world, name, dict(options or {}), pair=pair, methods_path=tuple(methods_path))
    yield subject
    if subject.other_options:
        yield with_options(subject, subject.other_options)
    modalities: tuple[Modality, ...] = ("text", "image") if method.modalities is None else ()
    for modality in modalities:
        if set(method.needs) <= {modality}:
            yield Subject(world, name, subject.options, (modality,), pair, subject.methods_path)


def check_method(
    world: SmallWorld,
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    methods_path: Sequence[Path] = (),
    slow: bool,
) -> Iterator[CheckResult]:
    """Run the whole suite on a method, check by check.

    Args:
        world: where it is trained. name, options: the method. methods_path: folders with further methods.
        slow: also run it through torch.compile, and on the second pair of encoders.

    Raises:
        UserError: an unknown method, or an option that does not fit.
    """
    for pair in PAIRS if slow else PAIRS[:1]:
        for subject in subjects_of(world, name, options, pair=pair, methods_path=methods_path):
            if subject.refusal is not None:
                yield CheckResult(str(subject), "every check", "skipped", f"refused: {subject.refusal}")
                continue
            for check in (*CHECKS, *(SLOW_CHECKS if slow and pair == PAIRS[0] else ())):
                yield run_check(check, subject)

"""What low-rank updates of an encoder's projections share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.task.families import Role
from tpme.bench.task.view import EncoderView


def adapted_weights(views: Iterable[EncoderView], roles: Sequence[Role]) -> list[Tensor]:
    """The weights (outputs, inputs) of all projections with one of the roles."""
    return [
        view.module.get_parameter(f"{projection}.weight") for view in views for projection in view.projections(*roles)
    ]


def check_rank(name: str, rank: int, view: EncoderView, roles: Sequence[Role]) -> None:
    """Raise UserError where ``rank`` exceeds the smaller side of a projection that method ``name`` adapts."""
    for projection in view.projections(*roles):
        smaller = min(view.module.get_parameter(f"{projection}.weight").shape)
        if rank > smaller:
            raise UserError(
                f"method '{name}': rank {rank} is above the smaller side of '{projection}' in the {view.modality} "
                f"encoder; choose at most {smaller}"
            )

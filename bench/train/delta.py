"""The trained delta of a cell as a file: the method's ``state()`` as of the epoch whose test ranks are recorded.

It is written between the training phases and not kept in memory, so neither T nor M of the next epoch contains it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.record import Frozen
from tpme.bench.task.recommender import Recommender
from tpme.bench.train.sharding import whole_tensor
from tpme.bench.writing import write_atomically
from tpme.methods.base import Method


class DeltaFacts(Frozen):
    """What must be known to build the model that a delta fits; a search may end with other options than the cell's.

    method: name of the method's class. options: its ``Config`` as JSON. seed: of the model's random numbers.
    """

    method: str
    options: str
    seed: int

    @classmethod
    def of(cls, method: Method, seed: int) -> DeltaFacts:
        """Of a model that ``method`` adapted."""
        return cls(method=type(method).__qualname__, options=method.config.model_dump_json(), seed=seed)


class DeltaFile:
    """A safetensors file; every ``write`` replaces it. Of several ranks, one ``writes``."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def write(self, method: Method, model: Recommender, seed: int) -> None:
        """Write what ``method`` has trained in ``model``; atomically."""
        facts, state = DeltaFacts.of(method, seed), {}
        for name, value in method.state(model).items():
            whole = whole_tensor(value.detach())
            if self.writes:
                state[name] = whole.cpu().contiguous()
        if not self.writes:
            return
        write_atomically(self.path, save(_unshared(state), {"delta": facts.model_dump_json()}))

    def publish(self, path: Path) -> str:
        """Give the file its final place; returns its name."""
        return self.path.replace(path).name


def read_delta(path: Path) -> tuple[DeltaFacts, dict[str, Tensor]]:
    """Facts and tensors, on the host, of a delta. Raises UserError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            facts = DeltaFacts.model_validate_json(file.metadata()["delta"])
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a delta that 'tpme run --save-adapters' wrote ({error})") from None


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without memory shared between tensors, which safetensors refuses."""
    seen: set[int] = set()
    own = {}
    for name, value in state.items():
        address = value.untyped_storage().data_ptr()
        own[name] = value.clone() if address in seen else value
        seen.add(address)
    return own

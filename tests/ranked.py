"""``python ranked.py SPEC``: one rank, or the only one, that trains small cells in float64 and writes what they did.

SPEC is a JSON file: the paths of a small world, cases, and the file that rank 0 writes. It is started with the
variables of torchrun. All cases run one after the other in one process group.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Case = Mapping[str, Any]
"""``method``, and where they differ from the defaults ``options``, ``steps`` and settings of the training."""


def run_ranks(world: Any, folder: Path, cases: Sequence[Case], devices: int) -> list[dict[str, Any]]:
    """What ``devices`` ranks made of every case; see ``outcome``."""
    import torch

    folder.mkdir(exist_ok=True)
    found, spec = folder / "found.pt", folder / "spec.json"
    paths = {name: str(getattr(world, name)) for name in ("data", "text", "image", "store")}
    spec.write_text(json.dumps({"world": paths, "cases": list(cases), "found": str(found), "devices": devices}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(spec)],
            env=os.environ | {name: str(value) for name, value in ({"RANK": r, "LOCAL_RANK": r} | common).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(devices)
    ]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * devices, "\n".join(outputs)[-8000:]
    return torch.load(found)  # type: ignore[no-any-return]


def outcome(make: Any, case: Case) -> dict[str, Any]:
    """Losses of all steps, gradients of the first and weights after the last; ranks, where the case asks for them."""
    import torch

    from tpme.bench.train.sharding import whole_tensor
    from tpme.methods.registry import create

    case = dict(case)
    method, steps, evaluates = case.pop("method"), case.pop("steps", 50), case.pop("evaluates", False)
    options = case.pop("options", {})
    if "dropout" in type(create(method, {}).config).model_fields:
        options = {"dropout": 0.0} | options
    torch.manual_seed(1)
    settings = {"modalities": ("text", "image"), "dropout": 0.0, "max_steps_per_epoch": None, "epochs": 50} | case
    trainer = make(create(method, options), **settings)
    ranks, found, losses, terms = trainer.ranks, {}, [], []
    if trainer.model.parameter_groups():
        for stage in trainer.method.stages():
            trainer.state.stage = stage
            trainer.method.begin_stage(trainer.state)
            optimizer = trainer.optimizer()
            trainer.model.train()
            batches = itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count()))
            for batch in itertools.islice(batches, steps):
                losses.append(trainer.step(batch, optimizer).total)
                trainer.method.on_epoch_end(trainer.state)
        found["losses"] = ranks.sum(torch.stack(losses)) / ranks.size
        batch = next(iter(trainer.loader.epoch(0)))
        trainer.optimizer()
        trainer._backward(sum(trainer.terms_of(batch).values()))
        named = trainer.model.named_parameters()
        found["gradients"] = {name: whole_tensor(p.grad) for name, p in named if p.grad is not None}
        terms = trainer.terms_of(batch)
        found["terms"] = {name: ranks.sum(term.detach()) / ranks.size for name, term in terms.items()}
        trainer.model.whole.share = None
    named = trainer.model.named_parameters()
    found["weights"] = {name: whole_tensor(p.detach()) for name, p in named if p.requires_grad}
    if evaluates:
        vectors, validation = trainer._validated("")
        trainer._ranked_if_best(vectors, validation, "")
        found |= {"vectors": vectors, "validation": tuple(vars(validation).values())}
        found["ranks"] = torch.from_numpy(trainer.outcome.test_ranks)
        found["report"] = trainer.method.report(trainer.model)
    found["alike"] = alike(trainer)
    return found


def alike(trainer: Any) -> bool:
    """Whether all ranks have the same parameters and would draw the same numbers next, bit for bit."""
    import torch

    draw = torch.random.get_rng_state().double().sum()
    from tpme.bench.train.sharding import whole_tensor

    sums = torch.stack([draw, *(whole_tensor(p.detach()).double().sum() for p in trainer.model.parameters())])
    return bool((trainer.ranks.all_gather(sums[None]) == sums).all())


def main() -> None:
    """Run all cases."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from trainers import trainer_maker

    from tpme.bench.train.ranks import Ranks

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    ranks = Ranks.join(spec["devices"], "cpu") if spec["devices"] > 1 else Ranks.alone()
    make = trainer_maker(
        SimpleNamespace(**{name: Path(path) for name, path in spec["world"].items()}),
        lambda: Path(tempfile.mkdtemp()),
        ranks,
    )
    found = [outcome(make, case) for case in spec["cases"]]
    if ranks.rank == 0:
        torch.save(found, spec["found"])
    ranks.leave()


if __name__ == "__main__":
    main()

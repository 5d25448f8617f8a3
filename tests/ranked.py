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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Case = Mapping[str, Any]
"""``method``, and where they differ from the defaults ``options``, ``steps`` and settings of the training."""


def run_ranks(world: Any, folder: Path, cases: Sequence[Case], devices: int) -> list[dict[str, Any]]:
    """What ``devices`` ranks made of every case; see ``outcome``."""
    import torch

    found = folder / "found.pt"
    processes = start(world, folder, devices, cases=list(cases), found=str(found))
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * devices, "\n".join(outputs)[-8000:]
    return torch.load(found)  # type: ignore[no-any-return]


def start(world: Any, folder: Path, devices: int, **spec: Any) -> list[subprocess.Popen[str]]:
    """Start this program as ``devices`` ranks of one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str(getattr(world, name)) for name in ("data", "text", "image", "store")}
    (folder / "spec.json").write_text(json.dumps({"world": paths, "devices": devices} | spec))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": devices, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "spec.json")],
            env=os.environ | {name: str(value) for name, value in ({"RANK": r, "LOCAL_RANK": r} | common).items()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(devices)
    ]


class Turns:
    """Ranks that train one case for some steps whenever it is their turn, in float32, and wait otherwise."""

    def __init__(self, world: Any, folder: Path, case: Case, devices: int) -> None:
        self.processes = start(world, folder, devices, turns=case)

    def __enter__(self) -> Turns:
        self.run(1)
        return self

    def run(self, steps: int) -> tuple[float, float]:
        """Seconds of a step, and of the processor for it, both of the slowest rank; means over ``steps``."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self.processes]
        return max(wall for wall, _ in answers), max(cpu for _, cpu in answers)

    def _answer(self, process: subprocess.Popen[str]) -> tuple[float, float]:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1]), float(line.split()[2])
            said.append(line)
        raise AssertionError("".join(said)[-4000:])

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.communicate()  # end of its input, end of the program


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
    # 60 users: batches of 29, 29 and 2, of which four ranks do not share the last.
    small = {"users_per_batch": 29, "dropout": 0.0, "max_steps_per_epoch": None, "epochs": 50}
    settings = {"modalities": ("text", "image")} | small | case
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
                ranks.sent.clear()
                losses.append(trainer.step(batch, optimizer).total)
                found["sent"] = dict(ranks.sent)
                trainer.method.on_epoch_end(trainer.state)
        found["items"] = len(batch.items if batch.share is None else batch.share.place)
        found["trained"] = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
        found["losses"] = ranks.sum(torch.stack(losses)) / ranks.size
        batch = next(iter(trainer.loader.epoch(0)))
        trainer.optimizer()
        with ranks.own_draws("after training"):
            trainer._backward(sum(trainer.terms_of(batch).values()))
            terms = trainer.terms_of(batch)
        named = trainer.model.named_parameters()
        found["gradients"] = {name: whole_tensor(p.grad) for name, p in named if p.grad is not None}
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


def take_turns(make: Any, case: Case) -> None:
    """Train as many steps as each line of the input says, and print the seconds of one."""
    case = dict(case)
    trainer = make(case.pop("method"), **({"modalities": ("text", "image")} | case))
    optimizer = trainer.optimizer()
    trainer.model.train()
    batches = itertools.chain.from_iterable(map(trainer.loader.epoch, itertools.count()))
    for line in sys.stdin:
        trainer.ranks.wait()
        started, worked = time.perf_counter(), time.process_time()
        for batch in itertools.islice(batches, int(line)):
            trainer.step(batch, optimizer)
        wall, cpu = time.perf_counter() - started, time.process_time() - worked
        print(f"seconds {wall / int(line)} {cpu / int(line)}", flush=True)


def main() -> None:
    """Run all cases, or one in turns."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    import torch
    from trainers import trainer_maker

    from tpme.bench.train.ranks import Ranks

    torch.set_num_threads(1)
    if "cases" in spec:
        torch.set_default_dtype(torch.float64)
    ranks = Ranks.join(spec["devices"], "cpu") if spec["devices"] > 1 else Ranks.alone()
    make = trainer_maker(
        SimpleNamespace(**{name: Path(path) for name, path in spec["world"].items()}),
        lambda: Path(tempfile.mkdtemp()),
        ranks,
    )
    if "turns" in spec:
        take_turns(make, spec["turns"])
    else:
        found = [outcome(make, case) for case in spec["cases"]]
        if ranks.rank == 0:
            torch.save(found, spec["found"])
    ranks.leave()


if __name__ == "__main__":
    main()

"""Results of the finished parts of a procedure (trials, rounds), in files that survive the process."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tpme.bench.writing import write_atomically
from tpme.methods.base import Result


@dataclass(frozen=True)
class Part:
    """A finished part: its result, the seconds it took, and epoch and step of the training after it."""

    result: Result
    spent_s: float
    epoch: int
    step: int


class Kept:
    """The parts that are finished, one safetensors file each; values that are no tensors are JSON in its metadata.

    The name of a file ends with the hash of its content.

    resumed_s: seconds that the parts read here took in earlier attempts. damaged: names of parts that earlier attempts
    finished and that cannot be read any more; they are done again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.resumed_s = folder, 0.0
        self.damaged: list[str] = []
        self._names: set[str] = set()

    def read(self, name: str) -> Part | None:
        """The part that an earlier attempt finished, its tensors on the host; ``None`` where none did, or damaged.

        Raises ValueError where the name was used before.
        """
        if name in self._names:
            raise ValueError(f"once('{name}') was called before: each part of a procedure needs its own name")
        self._names.add(name)
        for path in self.folder.glob(f"{_file_stem(name)}-*.safetensors"):
            if path.stem.endswith(_content_hash(path.read_bytes())):
                part = _load(path)
                self.resumed_s += part.spent_s
                return part
            path.unlink()
            self.damaged.append(name)
        return None

    def write(self, name: str, part: Part) -> Part:
        """Keep a part; returns it as later attempts will read it."""
        tensors = {key: value for key, value in part.result.items() if isinstance(value, Tensor)}
        values = {key: value for key, value in part.result.items() if key not in tensors}
        facts = json.dumps({"values": values, "spent_s": part.spent_s, "epoch": part.epoch, "step": part.step})
        host = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        content = save(host, {"part": facts})
        path = self.folder / f"{_file_stem(name)}-{_content_hash(content)}.safetensors"
        write_atomically(path, content)
        return _load(path)

    def clear(self) -> None:
        """Forget all parts: the attempt has ended well, and another measurement starts afresh."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _load(path: Path) -> Part:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["part"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    return Part(facts.pop("values") | tensors, **facts)


def _file_stem(name: str) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name)[:60].strip("-")
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]

"""The environment of a record: hardware, software and settings that decide whether two records are comparable."""

from __future__ import annotations

import contextlib
import hmac
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from tpme.bench.git import run_git
from tpme.bench.measure.clock import is_cuda
from tpme.bench.record import Environment
from tpme.bench.redact import publishable
from tpme.bench.workers import available_cores

PACKAGES = (
    "tpme-bench",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "numpy",
    "pillow",
    "nvidia-ml-py",
)
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LD_PRELOAD", "PYTHONMALLOC", "GLIBC_TUNABLES")
CELLS_BESIDE = "TPME_CELLS_BESIDE"
"""Variable of a cell's process: how many cells share its machine, where they are more than one."""
_SOURCES = ("bench", "methods", "reports", "pyproject.toml")


def environment(device: object) -> Environment:
    """The environment of this process, for work on ``device``. Starts CUDA only for a CUDA device."""
    threads = cpu_threads()
    revision, dirty = git_state()
    packages = package_versions()
    name, driver = cpu_model(), None
    key = f"{name}, {threads} threads"
    if is_cuda(device):
        name, driver, cuda = _gpu(device)
        packages |= cuda
        key = f"{name}, driver {driver or 'unknown'}, {threads} threads"
    if (beside := os.environ.get(CELLS_BESIDE, "1")) != "1":
        key += f", {beside} cells at a time"
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        hostname_hash=host_mark(),
        packages=packages,
        device_kind="cuda" if is_cuda(device) else "cpu",
        device_name=name,
        device_key=key,
        driver=driver,
        cpu_threads=threads,
        allocator=allocator(),
        deterministic="torch" in sys.modules and sys.modules["torch"].are_deterministic_algorithms_enabled(),
        git_revision=revision,
        git_dirty=dirty,
    )


def host_mark() -> str:
    """12 hex digits that tell hosts apart and from which nobody finds the name, not even by trying names.

    The key of the hash is the machine's own id, which systemd asks to keep secret; without one, that of its boot.
    """
    key = b""
    for path in (Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")):
        with contextlib.suppress(OSError):
            key = key or path.read_bytes().strip()
    return hmac.new(key, f"tpme {socket.gethostname()}".encode(), "sha256").hexdigest()[:12]


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that can change a result."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """The processor's name as reported by the system, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_threads() -> int:
    """Threads torch computes with; while torch is not imported, the cores this process may use."""
    torch = sys.modules.get("torch")
    return available_cores() if torch is None else int(torch.get_num_threads())


def allocator() -> str:
    """The C library and every environment setting that changes how host or device memory is allocated."""
    libc, version = platform.libc_ver()
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    settings |= {name: os.environ[name] for name in ALLOCATOR_SETTINGS if os.environ.get(name)}
    words = [f"{libc or platform.system()} {version}".strip(), *(f"{name}={value}" for name, value in settings.items())]
    return publishable("; ".join(words))


def git_state(source: Path | None = None) -> tuple[str | None, bool | None]:
    """Git revision, and whether there are uncommitted changes, of the running sources; (None, None) if installed.

    Args:
        source: A file of the package; by default this one. It must be tracked, because a virtual environment often
            lies inside *another* repository.
    """
    file = Path(source or __file__).resolve()
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None, None
    revision = _git(file.parent, "rev-parse", "HEAD")
    root = _git(file.parent, "rev-parse", "--show-toplevel")
    if revision is None or root is None:
        return None, None
    changed = _git(Path(root), "status", "--porcelain", "--", *_SOURCES)
    return revision, None if changed is None else bool(changed)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = run_git(folder, *arguments, timeout_s=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _gpu(device: object) -> tuple[str, str | None, dict[str, str]]:
    """Name, driver version, and the versions of CUDA and cuDNN that torch was built with."""
    import torch

    from tpme.bench.measure.nvml import Nvml

    nvml = Nvml.open()
    nvml.close()
    versions = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    return torch.cuda.get_device_name(str(device)), nvml.driver, versions

"""What a record says about where it was measured."""

from __future__ import annotations

import hashlib
import hmac
import socket
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from tpme.bench.measure import environment as module
from tpme.bench.measure.environment import allocator, environment, git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    result = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return result.stdout.strip()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of a package in a repository of its own, committed."""
    file = tmp_path / "bench" / "measure" / "environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return file


def test_a_cpu_environment() -> None:
    result = environment("cpu")
    assert result.device_kind == "cpu"
    assert result.device_name
    assert result.device_key == f"{result.device_name}, {torch.get_num_threads()} threads"
    assert result.driver is None
    assert result.packages["numpy"] == numpy.__version__
    assert {"torch", "transformers", "peft", "tpme-bench"} <= set(result.packages)


def test_threads_make_another_device() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        key = environment("cpu").device_key
        torch.set_num_threads(2)
        assert environment("cpu").device_key != key
    finally:
        torch.set_num_threads(before)


def test_determinism_is_as_torch_says() -> None:
    assert not environment("cpu").deterministic
    torch.use_deterministic_algorithms(True)
    try:
        assert environment("cpu").deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_cluster_names_its_node_and_what_of_it_a_job_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(module.NODE, raising=False)
    monkeypatch.delenv(module.SLURM_NODE, raising=False)
    alone = environment("cpu")
    assert alone.node is None
    monkeypatch.setattr(module.os, "cpu_count", lambda: 8)
    monkeypatch.setenv(module.SLURM_NODE, "gpu-7")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert environment("cpu").node == "gpu-7"
    assert environment("cpu").device_key == alone.device_key, "a job that has the node alone"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "2")
    assert environment("cpu").device_key == f"{alone.device_key}, 2 of 8 cores of a node"


def test_the_hosts_name_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.socket, "gethostname", lambda: "secret-host-17")
    result = environment("cpu")
    assert "secret" not in result.hostname_hash
    monkeypatch.setattr(module.socket, "gethostname", lambda: "secret-host-18")
    assert environment("cpu").hostname_hash != result.hostname_hash


def test_nobody_finds_the_hosts_name_by_trying_names() -> None:
    """Neither from the name alone nor with the machine's id as anybody else could hash it."""
    name = socket.gethostname()
    for guess in (name, f"tpme {name}", name.partition(".")[0]):
        assert hashlib.sha256(guess.encode()).hexdigest()[:12] != module.host_mark()
        assert hmac.new(b"", guess.encode(), "sha256").hexdigest()[:12] != module.host_mark()
    assert module.host_mark() == module.host_mark()


def test_a_remote_with_a_token_is_not_recorded(source: Path) -> None:
    git(source.parent, "remote", "add", "origin", "https://me:PASSWORD@example.org/o/r.git")
    assert git_state(source) == (git(source.parent, "rev-parse", "HEAD"), False)


def test_a_password_in_a_setting_of_the_allocator_is_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", f"{Path.home()}/lib/malloc.so")
    monkeypatch.setenv("MALLOC_CONF", "url=http://me:PASSWORD@host")
    assert "LD_PRELOAD=~/lib/malloc.so" in allocator()
    assert "PASSWORD" not in allocator()


def test_allocator_settings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "MALLOC_ARENA_MAX=2" in allocator()
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in allocator()


def test_a_clean_repository(source: Path) -> None:
    assert git_state(source) == (git(source.parent, "rev-parse", "HEAD"), False)


def test_a_changed_file_and_a_new_one_both_make_it_dirty(source: Path) -> None:
    new = source.with_name("new.py")
    new.write_text("")
    assert git_state(source)[1] is True
    new.unlink()
    source.write_text("x = 2\n")
    assert git_state(source)[1] is True


def test_results_beside_the_sources_do_not_make_it_dirty(source: Path) -> None:
    (source.parents[2] / "runs").mkdir()
    (source.parents[2] / "runs" / "record.json").write_text("{}")
    assert git_state(source)[1] is False


def test_an_installed_copy_inside_another_repository_has_no_revision(source: Path) -> None:
    copy = source.parents[2] / ".venv" / "environment.py"
    copy.parent.mkdir()
    copy.write_text("x = 1\n")
    assert git_state(copy) == (None, None)


def test_without_git_there_is_no_revision(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    assert git_state(source) == (None, None)

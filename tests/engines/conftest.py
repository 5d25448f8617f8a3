"""One real Slurm for the tests of its engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines.local_slurm import LocalSlurm, NoSlurmError


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """A Slurm that runs, and to which every command of Slurm leads; skips the test, saying why, where there is none."""
    pytest.importorskip("submitit", reason="needs the extra slurm")
    with pytest.MonkeyPatch.context() as patch:
        try:
            local = LocalSlurm(tmp_path_factory.mktemp("slurm"))
            patch.setenv("SLURM_CONF", str(local.config))
            local.start()
        except NoSlurmError as error:
            pytest.skip(str(error))
        yield local
        local.stop()

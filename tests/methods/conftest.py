"""The world of the contract suite, for its tests."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def contract_world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Data and encoders that the contract suite trains methods on."""
    from tpme.bench.contract.world import SmallWorld

    return SmallWorld(tmp_path_factory.mktemp("contract"))

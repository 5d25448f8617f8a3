"""Recall@k and NDCG@k of the loop against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tpme.bench.task.evaluate import recall_and_ndcg


def test_recall_and_ndcg_by_hand() -> None:
    recall, ndcg = recall_and_ndcg(np.array([1, 3, 10, 11], dtype=np.int32), k=10)
    assert recall == 3 / 4
    assert ndcg == pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 4)

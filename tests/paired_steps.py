"""What is added to the steps of a training by something that runs in every second of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def added(steps: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """What recording adds to a step, and the ends of its 95 % interval, as shares of a step.

    Neighbours are compared, of which one is recorded and which the same noise hits; the mean over two epochs, in which
    they change places, cancels what is slow about a place. Then the median: a sampler that wakes up in every other step
    would not show in the fastest steps. The first step of an epoch makes the iterator of the data and is left out.

    Args:
        steps: seconds (epochs, steps), of an even number of epochs; of the first epoch steps 0, 2, ... are recorded.
    """
    pairs = np.log(steps[:, 1 : 1 + (steps.shape[1] - 1) // 2 * 2]).reshape(len(steps), -1, 2)
    longer = pairs[..., 0] - pairs[..., 1]  # the first over the second, which is recorded in epochs 0, 2, ...
    both = (longer[1::2] - longer[::2]) / 2
    shares = np.sort(np.expm1(both), axis=None)
    middle, aside = len(shares) // 2, math.ceil(0.98 * math.sqrt(len(shares)))  # order statistics of a median
    return float(np.median(shares)), float(shares[middle - aside]), float(shares[middle + aside])

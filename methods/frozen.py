"""Frozen encoders: only the recommender's own parts train."""

from __future__ import annotations

from tpme.methods.base import Method


class FrozenEncoders(Method):
    """The last hidden state of frozen encoders, projected and fused: the baseline of adaptation."""

    decoupled = True
    baseline = True

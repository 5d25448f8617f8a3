"""Frozen encoders: only the recommender's own parts train."""

from __future__ import annotations

from tpme.methods.base import Method


class FrozenEncoders(Method):
    """The last hidden state of untouched encoders, projected and fused: what adaptation has to beat."""

    decoupled = True
    baseline = True

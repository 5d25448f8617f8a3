"""One colour for every kind of phase, in all figures, pages and boards of all reports."""

from __future__ import annotations

PHASE_COLOURS = {
    "load": "#E69F00",
    "adapt": "#8C6D31",
    "prepare": "#B5CF6B",
    "cache": "#009E73",
    "estimate": "#6B4C9A",
    "search": "#B9A3D9",
    "round": "#7A0C3A",
    "warmup": "#1B3A6B",
    "train": "#0072B2",
    "validate": "#D55E00",
    "rank": "#F0E442",
    "export": "#999999",
    "count": "#56B4E9",
    "inference": "#CC79A7",
    "probe": "#3B3B3B",
    "other": "#DDDDDD",
}
"""Kinds in the order of a run. Those that every run has use the colours of Okabe and Ito; the rarer ones need a second
cue (hatches in figures, lanes on the page), because no sixteen colours can be told apart by everyone."""

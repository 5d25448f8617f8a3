"""Records as a data frame, TPME and its Pareto front: the API of docs/reports.md.

Importing this imports pandas, so the command line imports it in the commands that need it.
"""

from tpme.bench.side_files import Samples, UserRanks, load_ranks, load_samples
from tpme.reports.data.load import load
from tpme.reports.data.tpme import Frame, Weights, frame_of, pareto, read_frames, tpme, write_frames
from tpme.reports.data.trials import GROUP

__all__ = [
    "GROUP",
    "Frame",
    "Samples",
    "UserRanks",
    "Weights",
    "frame_of",
    "load",
    "load_ranks",
    "load_samples",
    "pareto",
    "read_frames",
    "tpme",
    "write_frames",
]

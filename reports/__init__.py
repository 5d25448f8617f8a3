"""Records as a data frame, and TPME and its front over the rows of one: the API of docs/reports.md.

The functions ``load`` and ``tpme`` take the place of the modules of their names as attributes of this package; what
else those modules hold is imported from them by ``from tpme.reports.load import ...``. Importing this imports pandas,
so the command line does it inside the commands that need it.
"""

from tpme.reports.load import Ranks, Samples, load, load_ranks, load_samples
from tpme.reports.tpme import Frame, Weights, frame_of, pareto, read_frames, tpme, write_frames
from tpme.reports.trials import GROUP

__all__ = [
    "GROUP",
    "Frame",
    "Ranks",
    "Samples",
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

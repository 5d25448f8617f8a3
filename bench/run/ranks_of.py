"""The ranks of one of several nodes: ``python -m tpme.bench.run.ranks_of JOB`` on each, as by ``srun``.

The node of rank 0 also writes the record of an attempt that failed. All nodes see the folder of the cell and the file
JOB, which stays until they have ended. Their place comes from NNODES and NODE_RANK, as torchrun takes them, or from
Slurm's variables; MASTER_ADDR and MASTER_PORT name the machine of rank 0 and a free port of it.

The exit code is 0 where the cell ended well (node of rank 0), or all ranks of this node did (any other).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tpme.bench.errors import UserError
from tpme.bench.run.attempt import run_first_node, run_node
from tpme.bench.run.job import Job
from tpme.bench.run.rank_failures import leave_note
from tpme.bench.run.rank_processes import node_of


def main() -> None:
    """Run this node's ranks of the job whose file is the first argument."""
    job_file = Path(sys.argv[1])
    job = Job.model_validate_json(job_file.read_bytes())
    try:
        node = node_of(job.cell.training.devices, os.environ)
    except UserError as error:
        sys.exit(f"tpme: {error}")
    if node.number == 0:
        result = run_first_node(job, job_file, node)
        sys.exit(f"tpme: {result.failure.message}" if result.failure else None)
    ending = run_node(job, job_file, node)
    leave_note(job, ending)
    sys.exit(0 if ending.well else 1)


if __name__ == "__main__":
    main()

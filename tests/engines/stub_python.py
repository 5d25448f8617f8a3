"""What runs on a node in place of ``python -m submitit.core._submit``: the same, with cells that end in a moment.

A cell does what the option ``does`` of its cell says, and notes in the file ``ran`` of its store that it started
and that it ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def cell(job_file: Path) -> None:
    """Do what a cell is to do; without any import that takes time."""
    job = json.loads(job_file.read_bytes())
    store, folder = Path(job["store"]), Path(job["folder"])
    does = job["cell"]["options"].get("does", "")
    if job["cell"]["options"].get("at", job["cell"]["seed"]) != job["cell"]["seed"]:
        does = ""
    with (store / "ran").open("a") as ran:
        ran.write(f"start {folder.name} {os.environ['SLURMD_NODENAME']} {os.environ['OMP_NUM_THREADS']}\n")
    part = folder / "procedure" / "part"
    if does == "fail":
        sys.exit("no such thing")
    if does == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "wait" or (does == "resume" and not part.exists()):
        part.parent.mkdir(exist_ok=True)
        part.touch()
        while not (store / "go").exists():
            time.sleep(0.05)
    time.sleep(float(job["cell"]["options"].get("s", 0)))
    record = json.loads((store / "records" / folder.name).read_bytes()) | {"attempt": job["attempt"]}
    with (store / "ran").open("a") as ran:
        ran.write(f"end {folder.name}\n")
    hidden = folder / f".attempt-{job['attempt']}.record"
    hidden.write_text(json.dumps(record))
    hidden.rename(folder / f"attempt-{job['attempt']}.json")


if __name__ == "__main__":
    if sys.argv[1] == "cell":
        cell(Path(sys.argv[2]))
    else:
        from submitit.core.submission import process_job

        from tpme.bench.run import attempt

        attempt.command = lambda job_file, *_: [sys.executable, "-S", __file__, "cell", str(job_file)]
        process_job(sys.argv[-1])

"""Builds a feature cache in a process of its own: ``python -m tpme.bench.train.feature_builder JOB PARENT``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from torch import Tensor

from tpme.bench.errors import UserError
from tpme.bench.lifetimes import die_with_parent
from tpme.bench.measure.host import keep_free_memory
from tpme.bench.task.features import FeatureJob, FeatureManifest, build
from tpme.bench.task.view import EncoderView
from tpme.bench.workers import progress_line
from tpme.methods.registry import blaming, create


def build_features(job: FeatureJob, tick: Callable[[float], None] = lambda _share: None) -> FeatureManifest:
    """Build the cache of ``job``, with the initial tensors of its method; raises as ``build`` does."""
    if job.initial is None:
        return build(job, tick)
    name = job.initial.method
    method = create(name, job.initial.options, job.initial.methods_path)

    def initial_state(view: EncoderView) -> Mapping[str, Tensor]:
        with blaming(name):
            return method.initial_state({job.modality: view})

    return build(job, tick, initial_state)


def main() -> None:
    """Build the cache of the job in the first argument (JSON) for the process in the second; prints progress events."""
    die_with_parent(int(sys.argv[2]))
    job = FeatureJob.model_validate_json(sys.argv[1])
    if job.device == "cpu":
        keep_free_memory()
    try:
        build_features(job, lambda share: print(progress_line("build the feature cache", share), flush=True))  # noqa: T201
    except UserError as error:
        sys.exit(f"tpme: {error}")
    except OSError as error:
        sys.exit(f"tpme: {error.filename or job.store}: {error.strerror or error}")


if __name__ == "__main__":
    main()

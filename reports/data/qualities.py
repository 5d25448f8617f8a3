"""What the quality of rows is: Recall and NDCG of their rankings, or the metrics that their records name.

A section asks here once; tables, figures, the page and ``choose`` ask their section, and need not know the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from tpme.bench.errors import UserError
from tpme.bench.quantities import Quantity, named_quality, quantity
from tpme.bench.record import Cell, CellResult, Epoch
from tpme.reports.data.metrics import over_seeds
from tpme.reports.data.trials import Line
from tpme.reports.data.user_ranks import METRICS

RANKED_TASK = Cell.model_fields["task"].default
"""The task whose records hold the rank of every user."""
OF_RANKS = tuple(quantity(f"{metric}_10") for metric in METRICS)
"""Recall@10 and NDCG@10: validation selects by the first, the second weighs places, too, and so decides an order."""


def qualities_of(results: Iterable[CellResult]) -> tuple[Quantity, ...]:
    """The qualities of records, the main one first; named metrics in the order of the records and of their names there.

    Raises:
        UserError: more of a metric is better in one record and worse in another.
    """
    ranked = False
    better: dict[str, bool] = {}
    for result in results:
        ranked |= result.cell.task == RANKED_TASK
        for name, metric in result.metrics.items():
            if better.setdefault(name, metric.higher_is_better) != metric.higher_is_better:
                raise UserError(
                    f"metric '{name}': more is better in some of these records and worse in others, such as the one of "
                    f"{result.cell.label}; report them apart, or record one of them under another name"
                )
    return (*(OF_RANKS if ranked else ()), *(named_quality(name, higher) for name, higher in better.items()))


def validated(epochs: Iterable[Epoch]) -> str:
    """The quality whose curve is drawn: Recall@10 where an epoch has it, else the first metric of one, or empty."""
    name = ""
    for epoch in epochs:
        if epoch.valid_recall_10 is not None:
            return OF_RANKS[0].header
        name = name or next(iter(epoch.metrics), "")
    return name


def validation(epoch: Epoch, name: str) -> float | None:
    """The quality that ``validated`` named, after an epoch."""
    return epoch.valid_recall_10 if name == OF_RANKS[0].header else epoch.metrics.get(name)


def deciding(qualities: Sequence[Quantity]) -> Quantity | None:
    """The quality that orders rows: NDCG@10 of rankings, else the main one; None where there is none."""
    return OF_RANKS[1] if OF_RANKS[1] in qualities else next(iter(qualities), None)


def worst_first(values: pd.Series[float], what: Quantity) -> pd.Series[float]:
    """Values with the sign at which more is better."""
    return values if what.better == "higher" else -values


def named(rows: Mapping[str, Sequence[Line]], qualities: Sequence[Quantity]) -> pd.DataFrame:
    """Named metrics of every row: mean over its finished seeds and standard deviation (``_sd``), NaN bounds.

    There are no users to resample, so ``_low`` and ``_high`` are not known.
    """
    keys = [what.key for what in qualities if what not in OF_RANKS]
    values = {
        (row, key): [cell[key] for cell in cells if cell["status"] == "ok" and not np.isnan(cell[key])]
        for key in keys
        for row, cells in rows.items()
    }
    return over_seeds(rows, values).assign(**{f"{key}_{end}": np.nan for key in keys for end in ("low", "high")})

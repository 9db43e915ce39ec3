"""Questions asked of results, as functions on the Dataset of `daskcurv.open_results`.

All of them look at the epochs at which a sample was computed and whose weights had been trained on
its class; with ``include_untrained=True`` at the others as well (`daskcurv.analysis.per_sample`
says why not by default). They take a Dataset of NumPy arrays or of Dask arrays
(``open_results(path, chunks={})``, for stores that do not fit into memory) and give arrays of the
same kind.
"""

from __future__ import annotations

from daskcurv.analysis.agreement import (
    Agreement,
    agreement,
    auroc,
    auroc_interval,
    rank_correlation,
)
from daskcurv.analysis.cohorts import comparable, median_interval, rank_correlation_by_cohort
from daskcurv.analysis.duplicates import duplicates
from daskcurv.analysis.groups import (
    boundary_changes,
    by_class,
    by_cohort,
    by_split,
)
from daskcurv.analysis.per_sample import (
    active_epochs,
    cumulative,
    forgetting_events,
    learning_time,
    mean_over_active_epochs,
    median_over_active_epochs,
    threshold_learning_time,
)

__all__ = [
    "Agreement",
    "active_epochs",
    "agreement",
    "auroc",
    "auroc_interval",
    "boundary_changes",
    "by_class",
    "by_cohort",
    "by_split",
    "comparable",
    "cumulative",
    "duplicates",
    "forgetting_events",
    "learning_time",
    "mean_over_active_epochs",
    "median_interval",
    "median_over_active_epochs",
    "rank_correlation",
    "rank_correlation_by_cohort",
    "threshold_learning_time",
]

"""The environment that worker processes start in."""

from __future__ import annotations

WORKER_ENVIRONMENT = {
    # Each worker computes on one thread; see daskcurv.runs.block.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Dask by default makes glibc return memory to the system at every opportunity. A network's
    # activations are freed and allocated again thousands of times a block, and each time the
    # kernel would have to clear fresh pages: scoring then takes 1.7 to 2.9 times as long.
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
}
"""Variables that have to be set before the process starts."""

WORKER_JOB = "DASKCURV_WORKER_JOB"
"""Set in a worker that is a cluster's job, to its name there."""

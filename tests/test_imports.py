"""What a part does not need is not loaded: queries need no PyTorch, scoring no cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("daskcurv.cli", ["torch", "pyarrow.parquet"]),
        ("daskcurv.report.figures", ["torch", "distributed"]),
        ("daskcurv.runs.status", ["torch", "distributed"]),
        ("daskcurv.measures", ["torch", "zarr"]),
        ("daskcurv.storage", ["torch", "distributed"]),
        ("daskcurv.storage.compact", ["torch", "distributed"]),
        ("daskcurv.storage.npy.importing", ["torch", "distributed"]),
        ("daskcurv.storage.tables", ["torch", "distributed"]),
        ("daskcurv.storage.integrity.verify", ["torch", "distributed"]),
        ("daskcurv.estimators.scoring", ["dask", "zarr", "xarray"]),
    ],
)
def test_a_part_loads_only_what_it_needs(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"

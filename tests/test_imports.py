"""What a part does not need is not loaded: queries need no PyTorch, runs no xarray."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import daskcurv
from tests.support.project import REPOSITORY


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
        ("daskcurv.runs.launch", ["xarray", "pandas", "dask.array", "pyarrow"]),
        ("daskcurv.runs.block", ["xarray", "pandas", "dask.array", "pyarrow"]),
    ],
)
def test_a_part_loads_only_what_it_needs(module, heavy):
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


IMPORTED_BY_NAME = {
    "daskcurv/__init__.py": {"daskcurv.analysis", "_HOMES[name]"},
    "daskcurv/clusters/preload.py": {"daskcurv.runs.block"},
    "daskcurv/clusters/slurm/job_script.py": {"dask_jobqueue"},
    "daskcurv/demo.py": {"name"},  # packages of the extra `demo`
    "daskcurv/experiment/networks.py": {"where"},  # the factory of a network
}
"""Every import that the import contracts in pyproject.toml cannot see, with its reason there.

The package's own names load a part when they are first used; a worker, whoever started it, loads
the module that computes blocks, so that what is missing on a node is noticed at once.
"""


def test_every_import_by_name_is_known():
    found = {}
    for path in sorted([*REPOSITORY.glob("daskcurv/**/*.py"), *REPOSITORY.glob("storage/**/*.py")]):
        tree = ast.parse(path.read_text())
        if names := {
            ast.unparse(node.args[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        }:
            found[str(path.relative_to(REPOSITORY))] = {name.strip("'") for name in names}
        hooks = [n for n in tree.body if getattr(n, "name", None) == "__getattr__"]
        assert bool(hooks) == (path == REPOSITORY / "daskcurv/__init__.py")
    assert found == IMPORTED_BY_NAME
    assert all(home.startswith("daskcurv.") for home in daskcurv._HOMES.values())


def test_no_test_module_is_imported_by_another():
    modules = sorted((REPOSITORY / "tests").rglob("*.py"))
    assert len(modules) > 100
    found = [
        f"{path}: {node.module}"
        for path in modules
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1][:5] == "test_"
    ]
    assert not found

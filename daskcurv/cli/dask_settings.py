"""Dask's configuration files, which can be broken."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_READERS = {"dask", "distributed", "dask_jobqueue", "yaml"}


def blamed_settings(error: BaseException) -> list[str]:
    """Return the settings that an error may be due to.

    Dask does not check its configuration; it fails where a setting is first used, often with a
    message that does not say where it comes from.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    list of str
        Files and environment variables that configure Dask, if the error arose inside Dask.
    """
    if _origin(error) not in _READERS:
        return []
    variables = sorted(name for name in os.environ if name.startswith("DASK_"))
    try:
        from dask import config
    except ValueError:
        # The files cannot even be read; which one is broken, the error says.
        return ["its YAML files", *variables]
    files: list[Path] = [
        path for path, content in config.collect_yaml(config.paths, return_paths=True) if content
    ]
    return [*map(str, files), *variables]


def _origin(error: BaseException) -> str:
    """Return the package, other than the standard library, in which an error arose."""
    origin, trace = "", error.__traceback__
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in sys.stdlib_module_names:
            origin = package
        trace = trace.tb_next
    return origin

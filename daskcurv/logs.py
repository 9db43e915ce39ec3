"""Where messages go: short lines on the console, dated ones in a file per run or worker job."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from daskcurv.errors import StoreWriteError

LOG_DIR = Path("log")
LAUNCHER_LOG = "{job}_curvature.out"
"""Name of the log of a launcher that is a SLURM job."""

_PACKAGE = logging.getLogger("daskcurv")


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def dated_format() -> str:
    """Return the format of log files: time, host, the SLURM job if it is one, level, message."""
    job = os.environ.get("SLURM_JOB_ID")
    node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    where = node + (f" job {job}" if job else "")
    return f"%(asctime)s {where} %(levelname)s %(message)s"


def log_to_console() -> None:
    """Show messages of level INFO and above on standard error."""
    _PACKAGE.setLevel(logging.DEBUG)
    _PACKAGE.propagate = False
    if not any(isinstance(handler, _ConsoleHandler) for handler in _PACKAGE.handlers):
        handler = _ConsoleHandler(logging.INFO)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _PACKAGE.addHandler(handler)


def log_to_stderr() -> None:
    """Write messages of level INFO and above to standard error as log files have them.

    Dask's too, so that a worker's log has one format.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(dated_format()))
    for logger in (_PACKAGE, logging.getLogger("distributed")):
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]


def log_to_file(directory: Path = LOG_DIR) -> Path:
    """Also write all messages, with time and host, to a file; return its path.

    It takes the place of the file of an earlier call. A launcher that is a SLURM job names it by
    the job's id; where its standard error goes to that file already, nothing is written twice.
    """
    job = os.environ.get("SLURM_JOB_ID")
    name = f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path = directory / (LAUNCHER_LOG.format(job=job) if job else name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write the log file {path}: {error.strerror}; start from a directory that you "
            "can write to"
        ) from error
    handler.setFormatter(logging.Formatter(dated_format()))
    for earlier in list(_PACKAGE.handlers):
        if isinstance(earlier, logging.FileHandler):
            _PACKAGE.removeHandler(earlier)
            earlier.close()
    if _is_stderr(path):
        _PACKAGE.handlers = []
    _PACKAGE.addHandler(handler)
    return path


def log_file() -> Path | None:
    """Return the file that messages go to, if they go to one."""
    for handler in _PACKAGE.handlers:
        if isinstance(handler, logging.FileHandler):
            return Path(handler.baseFilename)
    return None


def _is_stderr(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(2))
    except OSError:
        return False

"""Logging: short lines on the console, dated lines in one file per run or worker job."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tqdm import tqdm

from daskcurv.errors import StoreWriteError
from daskcurv.streams import Output, text_output

LOG_DIR = Path("log")
LAUNCHER_LOG = "{job}_curvature.out"
"""Name of the log of a launcher that is a SLURM job."""

_PACKAGE = logging.getLogger("daskcurv")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural, such as ``"2 workers"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _FileHandler(logging.FileHandler):
    """Appends to a file; a disk that is full, or gone, is reported and stops nothing."""

    def _open(self) -> io.TextIOWrapper:
        fd = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        return text_output(Output(fd, closefd=True, lost=self._lost), "utf-8", "strict")

    def _lost(self, error: OSError) -> None:
        _PACKAGE.warning(
            "cannot write the log file %s: %s; the run goes on, and messages are missing from the "
            "file until it can be written again",
            self.baseFilename,
            error.strerror,
        )


def dated_format() -> str:
    """Return the format of log files: time, host, SLURM job if any, level, message."""
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
    """Write messages of level INFO and above to standard error, in the format of log files.

    Dask's messages too, so that a worker's log has one format.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(dated_format()))
    for logger in (_PACKAGE, logging.getLogger("distributed")):
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.handlers = [handler]


def log_to_file(directory: Path = LOG_DIR) -> Path:
    """Also write all messages, with time and host, to a file; return its path.

    Replaces the file of an earlier call. A launcher that is a SLURM job names the file by the job's
    id; if its standard error is that file already, nothing is written twice.

    Raises
    ------
    StoreWriteError
        If the file cannot be created. A disk that fills up later does not stop the run.
    """
    job = os.environ.get("SLURM_JOB_ID")
    name = f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path = directory / (LAUNCHER_LOG.format(job=job) if job else name)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handler = _FileHandler(path)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write the log file {path}: {error.strerror}; start in a directory that you "
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
    """Return the log file that `log_to_file` opened last, if any."""
    for handler in _PACKAGE.handlers:
        if isinstance(handler, logging.FileHandler):
            return Path(handler.baseFilename)
    return None


def stream_lost(name: str, error: OSError) -> None:
    """Note, in the log file alone, that nobody sees what is written to a standard stream."""
    _PACKAGE.debug("%s takes no more output (%s); the run goes on", name, error.strerror)


def save_traceback(error: BaseException) -> Path | None:
    """Write an error's traceback to the log file, or to a temporary file if there is none.

    Returns
    -------
    Path or None
        The file; None if none can be written.
    """
    text = "".join(traceback.format_exception(error))
    if path := log_file():
        _PACKAGE.debug("%s", text)
        return path
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            encoding="utf-8",
            errors="backslashreplace",
            prefix="daskcurv-",
            suffix=".log",
            delete=False,
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n{text}")
    except OSError:
        return None
    return Path(file.name)


def _is_stderr(path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(2))
    except OSError:
        return False

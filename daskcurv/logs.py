"""Where messages go: short lines on the console, dated ones in a file per run."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from daskcurv.errors import StoreWriteError

LOG_DIR = Path("log")


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_console() -> None:
    """Show messages of level INFO and above on standard error."""
    package = logging.getLogger("daskcurv")
    package.setLevel(logging.DEBUG)
    package.propagate = False
    if not any(isinstance(handler, _ConsoleHandler) for handler in package.handlers):
        handler = _ConsoleHandler(logging.INFO)
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)


def log_to_file(directory: Path = LOG_DIR) -> Path:
    """Also write all messages, with time and host, to a new file; return its path.

    It takes the place of the file of an earlier call.
    """
    path = directory / f"launch-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write the log file {path}: {error.strerror}; start from a directory that you "
            "can write to"
        ) from error
    host = os.uname().nodename
    handler.setFormatter(logging.Formatter(f"%(asctime)s {host} %(levelname)s %(message)s"))
    package = logging.getLogger("daskcurv")
    for earlier in list(package.handlers):
        if isinstance(earlier, logging.FileHandler):
            package.removeHandler(earlier)
            earlier.close()
    package.addHandler(handler)
    return path

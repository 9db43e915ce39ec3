"""The command line: options in, an exit code out.

Exit codes: 0 all done; 1 finished, but something could not be computed or verified; 2 an input,
option or setting cannot be used, or there are no workers; 3 the time limit came first, run the same
command again to go on; 70 an error in the program itself; 128 + the signal's number when
interrupted, and 141, as after SIGPIPE, when the reader of standard output has left.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from daskcurv import __version__, surroundings
from daskcurv.cli.dask_settings import blamed_settings
from daskcurv.cli.parser import CommandParser
from daskcurv.errors import ConfigError, DaskcurvError
from daskcurv.logs import log_to_console, save_traceback, stream_lost
from daskcurv.streams import STANDARD_OUTPUT, standard_streams

log = logging.getLogger(__name__)

DEFECT = 70
"""Exit code after an error in the program itself, as in ``sysexits.h``."""

READER_LEFT = 128 + signal.SIGPIPE
"""Exit code of a program that was ended because nobody reads its output."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        By default the process's arguments.

    Returns
    -------
    int
        Exit code.
    """
    # Before PyTorch is loaded: the libraries below it look at the environment then, and only then.
    surroundings.remove_from(os.environ)
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    with standard_streams(stream_lost), _signals():
        log_to_console()
        return _exit_code(words)


def _run(words: Sequence[str]) -> int:
    if not __debug__:
        raise ConfigError(
            "Python runs with -O or PYTHONOPTIMIZE, which removes checks that this program and "
            "zarr rely on; run it without"
        )
    try:
        Path.cwd()
    except FileNotFoundError:
        raise ConfigError(
            "the working directory was removed; change to a directory that exists"
        ) from None
    args = build_parser().parse_args(words)
    args.words = words
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, _from_home(value))
    try:
        code: int = args.run(args)
    except DaskcurvError as error:
        if error.option and args.parser.has_option(error.option):
            raise DaskcurvError(f"{error} ({error.option})") from error
        raise
    return code


def _exit_code(words: Sequence[str]) -> int:
    """Run a command; an error becomes one message and an exit code."""
    try:
        return _run(words)
    except Interrupted as interrupt:
        log.error("interrupted; finished work is kept; run the same command again to continue")
        return 128 + interrupt.signum
    except DaskcurvError as error:
        log.error("error: %s", error)
        return 2
    except Exception as error:
        if isinstance(error, BrokenPipeError) and error.filename == STANDARD_OUTPUT:
            return READER_LEFT
        where = save_traceback(error)
        details = f"details are in {where}" if where else "details could not be written to a file"
        if isinstance(error, OSError):
            log.error("error: %s; %s", error, details)
            return 2
        text = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        if settings := blamed_settings(error):
            log.error(
                "error: Dask failed: %s. A bad setting may be the reason; Dask's settings come "
                "from %s: correct or remove it; %s",
                text,
                ", ".join(settings),
                details,
            )
            return 2
        log.error("error: %s. This is an error in the program, please report it; %s", text, details)
        return DEFECT


@contextmanager
def _signals() -> Iterator[None]:
    previous = {
        signum: signal.signal(signum, _interrupt)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What is ignored from the start stays so: that is what nohup is for.
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _from_home(path: Path) -> Path:
    """Replace a leading ``~``, which shells leave alone in ``--store=~/c.zarr``."""
    try:
        return path.expanduser()
    except RuntimeError:  # no user of that name, so it is a name like any other
        return path


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


def _underscored(word: str) -> str:
    """Spell an option's name with underscores: ``--end-epoch=3`` becomes ``--end_epoch=3``."""
    name = re.match(r"--[a-z][a-z_-]*(?==|$)", word)
    if name is None:
        return word
    return "--" + name.group()[2:].replace("-", "_") + word[name.end() :]


def build_parser() -> CommandParser:
    """Return the program's parser."""
    # Imported here, because it imports Dask, which reads its configuration files.
    from daskcurv.cli import answers, exchange, inspect, runs, stores

    parser = CommandParser(
        prog="daskcurv",
        description="Curvature of the loss around every training sample, at every epoch.",
        epilog="daskcurv COMMAND --help shows a command's options. Options can be spelled with "
        "underscores or hyphens.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"daskcurv {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser.commands = verbs.choices
    runs.add_commands(verbs)
    inspect.add_commands(verbs)
    stores.add_commands(verbs)
    exchange.add_commands(verbs)
    answers.add_commands(verbs)
    return parser

"""The command line: options in, an exit code out.

Exit codes: 0 all done; 1 finished, but something could not be computed or verified; 2 an input or
option cannot be used, or there are no workers; 3 the time limit came first, the same command goes
on; 128 + the signal's number when interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from daskcurv import surroundings
from daskcurv.cli import answers, exchange, runs, stores
from daskcurv.errors import DaskcurvError
from daskcurv.logs import log_to_console

log = logging.getLogger(__name__)


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
    args = _parser().parse_args(words)
    args.words = words
    log_to_console()
    previous = {
        signum: signal.signal(signum, _interrupt)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What is ignored from the start stays so: that is what nohup is for.
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        code: int = args.run(args)
        return code
    except DaskcurvError as error:
        log.error("error: %s", error)
        return 2
    except Interrupted as interrupt:
        log.error("interrupted; nothing that was finished is lost, the same command goes on")
        return 128 + interrupt.signum
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


def _underscored(word: str) -> str:
    """Spell an option's name with underscores: ``--end-epoch=3`` becomes ``--end_epoch=3``."""
    name = re.match(r"--[a-z][a-z_-]*(?==|$)", word)
    if name is None:
        return word
    return "--" + name.group()[2:].replace("-", "_") + word[name.end() :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="daskcurv",
        description="Curvature of the loss around every training sample, at every epoch.",
        epilog="Options can be spelled with underscores or hyphens.",
    )
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    runs.add_commands(verbs)
    stores.add_commands(verbs)
    exchange.add_commands(verbs)
    answers.add_commands(verbs)
    return parser

"""The command that says what is in files: weights of a training run, data sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from daskcurv.cli.options import verb


def add_commands(verbs: Any) -> None:
    """Add the command to the program's parser."""
    parser = verb(
        verbs, "inspect", _inspect, "say what weight files and data sets hold, and how to launch"
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="weight files, directories of them, and data sets, in any order",
    )


def _inspect(args: argparse.Namespace) -> int:
    from daskcurv.audit.inspection import inspect
    from daskcurv.audit.inspection_text import report

    found = inspect(args.paths)
    print(report(found))
    return 0 if found.all_read else 1

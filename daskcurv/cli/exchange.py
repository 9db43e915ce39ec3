"""The commands that move results in and out of a store."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from daskcurv.cli.options import flag, verb
from daskcurv.logs import counted
from daskcurv.runs.options import parse_epochs
from daskcurv.storage.npy.write import INACTIVE_CHOICES

log = logging.getLogger(__name__)


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_export(verb(verbs, "export_npy", _export, "export a results store as npy files"))
    _add_tables(verb(verbs, "export", _export_table, "export a results store as one table"))
    _add_import(verb(verbs, "import_npy", _import, "make a results store from npy files"))


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    parser.add_argument("out", type=Path, help="directory for the epoch_… directories")
    _add_epochs(parser)
    parser.add_argument(
        "--inactive",
        choices=INACTIVE_CHOICES,
        help="value for samples of inactive classes (default: nan, or as in the imported files)",
    )
    parser.add_argument(
        "--divide_by",
        type=int,
        metavar="N",
        help="divide as a loss averaged over N samples would have, to compare with older results",
    )
    flag(parser, "extras", "also write the store's other variables")


def _export(args: argparse.Namespace) -> int:
    from daskcurv.storage import ResultsStore, export_epochs

    store = ResultsStore.open(args.store)
    exported = export_epochs(
        store,
        args.out,
        _epochs(args),
        inactive=args.inactive,
        divide_by=args.divide_by,
        extras="extras" in args,
    )
    count = sum(1 for _ in exported)
    log.info("exported %s to %s", counted(count, "epoch"), args.out)
    return 0


def _add_epochs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", help="comma-separated epochs (default: all of the store)")


def _epochs(args: argparse.Namespace) -> list[int] | None:
    return None if args.epochs in (None, "all") else parse_epochs(args.epochs)


def _add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    parser.add_argument("out", type=Path, help="file to write; must not exist")
    parser.add_argument(
        "--format",
        choices=("parquet", "csv"),
        help="default: by the suffix of the file name, or parquet",
    )
    _add_epochs(parser)
    flag(parser, "by_epoch", "write a directory with a file for each epoch")


def _export_table(args: argparse.Namespace) -> int:
    from daskcurv.storage import ResultsStore
    from daskcurv.storage.tables import export_table

    store = ResultsStore.open(args.store)
    by_epoch = "by_epoch" in args
    export_table(store, args.out, _epochs(args), format=args.format, by_epoch=by_epoch)
    log.info("exported to %s", args.out)
    return 0


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tree", type=Path, help="directory with epoch_… directories")
    parser.add_argument("store", type=Path, help="results store to make; must not exist")
    parser.add_argument(
        "--multiply_by",
        type=int,
        default=1,
        metavar="N",
        help="the batch size by which a loss averaged over a batch has divided gradients",
    )


def _import(args: argparse.Namespace) -> int:
    from daskcurv.storage.npy.importing import import_tree

    store = import_tree(args.tree, args.store, args.multiply_by)
    log.info(
        "imported %d epochs of %d samples to %s", len(store.epochs), store.num_samples, args.store
    )
    return 0

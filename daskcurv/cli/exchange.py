"""The commands that move results in and out of a store."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from daskcurv.cli.options import flag, verb
from daskcurv.pipeline.inputs import parse_epochs
from daskcurv.storage.export import INACTIVE_CHOICES

log = logging.getLogger(__name__)


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_export(verb(verbs, "export_npy", _export, "export a results store as npy files"))
    _add_import(verb(verbs, "import_npy", _import, "make a results store of npy files"))


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    parser.add_argument("out", type=Path, help="directory for the epoch_… directories")
    parser.add_argument("--epochs", help="comma-separated epochs (default: all of the store)")
    parser.add_argument(
        "--inactive",
        choices=INACTIVE_CHOICES,
        help="what samples of inactive classes get (default: nan; what it was if imported)",
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
    epochs = None if args.epochs in (None, "all") else parse_epochs(args.epochs)
    exported = export_epochs(
        store,
        args.out,
        epochs,
        inactive=args.inactive,
        divide_by=args.divide_by,
        extras="extras" in args,
    )
    count = sum(1 for _ in exported)
    log.info("exported %d epochs to %s", count, args.out)
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
    from daskcurv.storage.legacy import import_tree

    store = import_tree(args.tree, args.store, args.multiply_by)
    log.info(
        "imported %d epochs of %d samples to %s", len(store.epochs), store.num_samples, args.store
    )
    return 0

"""The commands that turn results into answers."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from daskcurv.cli.options import verb

log = logging.getLogger(__name__)


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_analyze(verb(verbs, "analyze", _analyze, "write every analysis of a finished store"))


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store, finished")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument(
        "--start_epoch",
        type=int,
        default=0,
        metavar="E",
        help="leave out earlier epochs; 1 if epoch 0 holds untrained weights (default: 0)",
    )
    parser.add_argument(
        "--flagged",
        type=Path,
        metavar="FILE",
        help="npy or CSV, the numbers of samples (or 1 and 0 for each): how well are they found?",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="npy or CSV, a score for each sample, such as published ones: how far do they agree?",
    )


def _analyze(args: argparse.Namespace) -> int:
    from daskcurv.analysis.summary import compare, read_flags, read_scores, summarise, write_summary
    from daskcurv.errors import ExportError
    from daskcurv.storage import open_results

    if args.out.exists():
        raise ExportError(f"{args.out} exists; name another directory, or move it away")
    dataset = open_results(args.store, incomplete="raise", chunks={})
    last = int(dataset.epoch[-1])
    if args.start_epoch > last:
        raise ExportError(
            f"--start_epoch {args.start_epoch} leaves no epoch: the last of {args.store} is {last}"
        )
    dataset = dataset.sel(epoch=slice(args.start_epoch, None))
    count = dataset.sizes["sample"]
    flagged = None if args.flagged is None else read_flags(args.flagged, count)
    scores = None if args.compare is None else read_scores(args.compare, count)
    log.info("%s: %d epochs, %d samples", args.store, dataset.sizes["epoch"], count)
    summary = summarise(dataset)
    compared = compare(summary, flagged, scores)
    for name, found in compared.get("auroc", {}).items():
        log.info(
            "%s finds flagged samples: AUROC %.3f (%.3f to %.3f)",
            name,
            found["area"],
            *found["interval"],
        )
    for name, found in compared.get("agreement", {}).items():
        log.info(
            "%s agrees with %s: Spearman %.3f, cosine %.3f",
            name,
            args.compare,
            found["spearman"],
            found["cosine"],
        )
    run = dataset.attrs["identity"].get("experiment_index", 0)
    write_summary(summary, args.out, run, dataset.epoch.values.tolist(), compared)
    log.info("written to %s", args.out)
    return 0

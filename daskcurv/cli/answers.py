"""The commands that turn results into answers."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from daskcurv.cli.options import DEFAULTS, flag, verb

log = logging.getLogger(__name__)


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_analyze(verb(verbs, "analyze", _analyze, "write every analysis of a finished store"))
    _add_report(verb(verbs, "report", _report, "show a store's results as one page of pictures"))


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store, finished")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    _add_start_epoch(parser)
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
    _add_leave_out_missing(parser, "blocks that are not computed, or have lost a file")


def _add_leave_out_missing(parser: argparse.ArgumentParser, what: str) -> None:
    flag(parser, "leave_out_missing", f"leave out {what}, instead of stopping")


def _add_start_epoch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--start_epoch",
        type=int,
        default=0,
        metavar="E",
        help="leave out earlier epochs; 1 if epoch 0 holds untrained weights (default: 0)",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store; need not be finished")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="page")
    _add_start_epoch(parser)
    _add_leave_out_missing(parser, "blocks that have lost a file")
    parser.add_argument(
        "--samples", metavar="LIST", help="samples to show through training, such as 8,1234"
    )
    parser.add_argument(
        "--data_path",
        type=Path,
        help="directory in CIFAR-100's python format, for the images "
        f"(default: {DEFAULTS.data_path}, if it is there)",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write each figure there, as PNG and SVG"
    )


def _report(args: argparse.Namespace) -> int:
    from daskcurv.errors import ConfigError
    from daskcurv.storage import ResultsStore
    from daskcurv.storage.lost import refuse_lost

    try:
        from daskcurv.report.figures import draw
        from daskcurv.report.findings import gather
        from daskcurv.report.page import images_of, render, write_figures, write_page
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError(
            "a report needs matplotlib; install it with pip install 'daskcurv[report]'"
        ) from error
    if "leave_out_missing" not in args:
        refuse_lost(ResultsStore.open(args.store))
    findings = gather(args.store, args.start_epoch, _samples(args.samples))
    path = args.data_path or DEFAULTS.data_path
    images = None
    if args.data_path or path.exists():
        images = images_of(findings.dataset, path)
    else:
        log.info("no images: %s does not exist; name the data set with --data_path", path)
    figures = draw(findings)
    kinds = ("svg", "png") if args.figures else ("svg",)
    pictures = {kind: render(figures, kind) for kind in kinds}
    write_page(args.output, args.store, findings, pictures["svg"], images)
    if args.figures:
        write_figures(args.figures, pictures)
        log.info("%d figures in %s", len(figures), args.figures)
    log.info("written to %s", args.output)
    return 0


def _samples(text: str | None) -> list[int]:
    from daskcurv.errors import ConfigError

    try:
        return [] if text is None else [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"samples is {text!r}; expected numbers such as 8,1234") from None


def _analyze(args: argparse.Namespace) -> int:
    from daskcurv.analysis.summary import compare, read_flags, read_scores, summarise, write_summary
    from daskcurv.errors import ExportError
    from daskcurv.storage import ResultsStore, identity_of, open_results
    from daskcurv.storage.lost import refuse_lost

    if args.out.exists():
        raise ExportError(f"{args.out} exists; name another directory, or move it away")
    as_it_is = "leave_out_missing" in args
    if not as_it_is:
        refuse_lost(ResultsStore.open(args.store))
    dataset = open_results(args.store, incomplete="mask" if as_it_is else "raise", chunks={})
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
    run = identity_of(dataset).get("experiment_index", 0)
    write_summary(summary, args.out, run, dataset.epoch.values.tolist(), compared)
    log.info("written to %s", args.out)
    return 0

"""The commands that turn results into answers."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daskcurv.cli.options import flag, verb
from daskcurv.runs.options import LaunchOptions

if TYPE_CHECKING:
    import xarray as xr

    from daskcurv.storage import ResultsStore

log = logging.getLogger(__name__)

_BOUNDARIES_SHOWN = 3


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_analyze(verb(verbs, "analyze", _analyze, "write all analyses of a finished store"))
    _add_report(
        verb(verbs, "report", _report, "show the results of a store on one page of figures")
    )


def _add_analyze(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store, finished")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    _add_start_epoch(parser)
    parser.add_argument(
        "--flagged",
        type=Path,
        metavar="FILE",
        help="npy or CSV file with sample numbers, or with 1 or 0 for each sample; reports how "
        "well these samples are found",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="npy or CSV file with a score for each sample, such as published scores; reports the "
        "agreement",
    )
    flag(
        parser,
        "include_untrained",
        "also count epochs whose weights had not been trained on the sample's class",
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
        help="leave out earlier epochs (default: 0)",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store; need not be finished")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="page")
    _add_start_epoch(parser)
    flag(
        parser,
        "include_untrained",
        "also count epochs whose weights had not been trained on the sample's class",
    )
    _add_leave_out_missing(parser, "blocks that have lost a file")
    parser.add_argument(
        "--samples", metavar="LIST", help="samples to show through training, such as 8,1234"
    )
    parser.add_argument(
        "--data_path",
        type=Path,
        help="the training set, for its images "
        f"(default: {LaunchOptions.data_path}, if it is there)",
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write each figure there, as PNG and SVG"
    )


def _report(args: argparse.Namespace) -> int:
    from daskcurv.errors import ConfigError
    from daskcurv.places import check_writable
    from daskcurv.storage import ResultsStore
    from daskcurv.storage.integrity.lost import refuse_lost
    from daskcurv.storage.lock import beside

    try:
        from daskcurv.report.figures import draw
        from daskcurv.report.findings import gather, select
        from daskcurv.report.galleries import PICTURE, images_of, picture
        from daskcurv.report.page import render, write_figures, write_page
        from daskcurv.report.statements import left_out, not_usable
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError(
            "a report needs matplotlib; install it with pip install 'daskcurv[report]'"
        ) from error
    samples = _samples(args.samples)
    check_writable(args.output)
    if args.figures:
        check_writable(args.figures, directory=True, parents=True)
    if "leave_out_missing" not in args:
        refuse_lost(ResultsStore.open(args.store))
    dataset = select(args.store, args.start_epoch, samples)
    path = args.data_path or LaunchOptions.data_path
    images = None
    if args.data_path or path.exists():
        images = images_of(dataset, path, beside(args.store, ".inputs"))
    else:
        log.info("no images: %s does not exist; name the data set with --data_path", path)
    findings = gather(args.store, args.start_epoch, samples, _untrained_count(args, dataset))
    for text in filter(None, (left_out(findings), not_usable(findings))):
        log.info("%s", text)
    figures = draw(findings)
    kinds = ("svg", "png") if args.figures else ("svg",)
    pictures = {kind: render(figures, kind) for kind in kinds}
    write_page(args.output, args.store, findings, pictures["svg"], images)
    if args.figures:
        if images is not None:
            figures = {PICTURE: picture(findings, images)}
            pictures = {kind: pictures[kind] | render(figures, kind) for kind in kinds}
        write_figures(args.figures, pictures)
        log.info("%d figures in %s", len(pictures["svg"]), args.figures)
    log.info("written to %s", args.output)
    return 0


def _samples(text: str | None) -> list[int]:
    from daskcurv.errors import ConfigError

    try:
        samples = [] if text is None else [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"samples is {text!r}; expected numbers such as 8,1234") from None
    if repeated := [sample for sample in samples if samples.count(sample) > 1]:
        raise ConfigError(f"samples has {repeated[0]} more than once; name each sample once")
    return samples


def _analyze(args: argparse.Namespace) -> int:
    from daskcurv.analysis.duplicates import told as told_duplicates
    from daskcurv.analysis.files import naming, write_summary
    from daskcurv.analysis.given import read_flags, read_scores
    from daskcurv.analysis.summary import compare_with_known, summarise
    from daskcurv.errors import ExportError
    from daskcurv.places import check_writable
    from daskcurv.storage import ResultsStore
    from daskcurv.storage.finite import not_finite_by_epoch, told
    from daskcurv.storage.read import open_results

    if args.out.exists():
        raise ExportError(f"{args.out} exists; name another directory, or move it away")
    check_writable(args.out, directory=True, parents=True)
    as_it_is = "leave_out_missing" in args
    store = ResultsStore.open(args.store)
    if not as_it_is:
        _refuse_incomplete(store)
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
    summary = summarise(dataset, include_untrained=_untrained_count(args, dataset))
    _say_what_counts(summary)
    if "duplicate_group" in summary:
        log.info("%s", told_duplicates(summary))
    if counts := not_finite_by_epoch(store, dataset):
        log.warning(
            "%d results are not finite numbers, at epochs %s; a sample's sum, mean or median that "
            "includes one is not finite either",
            sum(counts.values()),
            told(counts),
        )
    compared = compare_with_known(summary, flagged, scores)
    if flagged is not None:
        log.info(
            "%s flags %d of %d samples; %d of these have results",
            args.flagged,
            compared["flagged"],
            count,
            compared["flagged_with_results"],
        )
    for name, found in compared.get("auroc", {}).items():
        log.info(
            "%s finds flagged samples: AUROC within cohorts %.3f (%.3f to %.3f), over all %.3f "
            "(%.3f to %.3f)",
            name,
            found["within_cohorts"]["area"],
            *found["within_cohorts"]["interval"],
            found["area"],
            *found["interval"],
        )
    for name, found in compared.get("agreement", {}).items():
        log.info(
            "%s agrees with %s on %d samples: Spearman within cohorts %.3f (%.3f to %.3f), "
            "cosine %.3f",
            name,
            args.compare,
            found["samples"],
            found["within_cohorts"]["spearman"],
            *found["within_cohorts"]["interval"],
            found["cosine"],
        )
    epochs = dataset.epoch.values.tolist()
    write_summary(summary, args.out, naming(dataset, args.store), epochs, compared)
    log.info("written to %s", args.out)
    return 0


def _refuse_incomplete(store: ResultsStore) -> None:
    from daskcurv.errors import StoreError
    from daskcurv.storage.integrity.lost import refuse_lost

    refuse_lost(store)
    complete = store.read("complete")
    if unfinished := [epoch for epoch, row in store.rows.items() if not complete[row]]:
        raise StoreError(
            f"results store {store.path} has unfinished epochs {sorted(unfinished)}; launch again "
            "to finish them, or add --leave_out_missing"
        )


def _untrained_count(args: argparse.Namespace, dataset: xr.Dataset) -> bool:
    """Return whether untrained weights count: if asked for, or if there are no others."""
    if "include_untrained" in args:
        return True
    if (dataset.first_epoch_trained <= dataset.epoch.max()).any():
        return False
    log.warning(
        "%s has only results of weights that had not been trained on the sample's class; all of "
        "them are counted, as with --include_untrained. They say nothing about memorization",
        args.store,
    )
    return True


def _say_what_counts(summary: xr.Dataset) -> None:
    counting, left_out = int(summary.active_epochs.sum()), int(summary.untrained_epochs.sum())
    log.info("counted: %s", summary.attrs["epochs"])
    if left_out:
        log.info(
            "left out: %d of %d values, of weights that had not been trained on the sample's class "
            "(--include_untrained counts them)",
            left_out,
            counting + left_out,
        )
    change = summary.curvature_change
    for place, boundary in enumerate(change.boundary.values.tolist()):
        if place == _BOUNDARIES_SHOWN:
            log.info("… and at %d more additions of classes", change.sizes["boundary"] - place)
            break
        log.info(
            "change as the classes added at epoch %d are trained on: from epoch %d to %d",
            boundary,
            change.epoch_before.values[place],
            change.epoch_after.values[place],
        )

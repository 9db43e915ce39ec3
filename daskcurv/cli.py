"""The command line: options in, an exit code out.

Exit codes: 0 all done; 1 finished, but something could not be computed or verified; 2 an input or
option cannot be used; 128 + the signal's number when interrupted.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from daskcurv.classes import PARTITIONS, Schedule
from daskcurv.config import HEADS, EstimatorConfig
from daskcurv.errors import DaskcurvError
from daskcurv.logs import log_to_console, log_to_file
from daskcurv.pipeline.inputs import LaunchOptions, parse_epochs

log = logging.getLogger(__name__)

_DEFAULTS = LaunchOptions()


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
    words = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    args = _parser().parse_args(words)
    log_to_console()
    previous = {
        signum: signal.signal(signum, _interrupt)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
    _add_launch(_verb(verbs, "launch", _launch, "compute curvature into a results store"))
    _add_export(_verb(verbs, "export_npy", _export, "export a results store as npy files"))
    _add_verify(
        _verb(
            verbs,
            "verify_class_partitioning",
            _verify,
            "print which classes are active when, and check the class order",
        )
    )
    return parser


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        aliases=[name.replace("_", "-")] if "_" in name else [],
        help=text,
        description=text[0].upper() + text[1:] + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--demo",
        type=Path,
        metavar="DIR",
        help="make a small data set of real images and train on it in DIR, then run on that",
    )

    what = parser.add_argument_group("what to compute")
    _option(what, "epochs", str, "comma-separated epochs, or all: every checkpoint found")
    _option(what, "start_epoch", int, "first epoch")
    _option(what, "end_epoch", int, "last epoch")
    _option(what, "step", int, "epochs between two that are computed")
    _flag(what, "skip_missing", "go on without epochs that have no checkpoint")

    inputs = parser.add_argument_group("inputs")
    _option(inputs, "data_path", Path, "directory in CIFAR-100's python format")
    _flag(inputs, "download", "fetch CIFAR-100 if data_path does not have it")
    _option(inputs, "model_dir", Path, "directory of the checkpoints")
    _option(
        inputs, "class_order", Path, "class order file (default: class_order/ beside model_dir)"
    )
    _option(inputs, "experiment_index", int, "the training run's index, as in its file names")
    _add_schedule(inputs)
    _option(inputs, "validation_per_class", int, "first samples of each class that were held out")

    estimator = parser.add_argument_group("estimator")
    for name, kind, text in (
        ("h", float, "step of the finite difference"),
        ("n_probes", int, "random directions per sample"),
        ("temperature", float, "divides the logits"),
        ("seed", int, "seed of the random directions"),
    ):
        default = getattr(_DEFAULTS.estimator, name)
        estimator.add_argument(f"--{name}", type=kind, default=default, help=text)
    estimator.add_argument(
        "--head", choices=HEADS, default=_DEFAULTS.head, help="outputs that enter the loss"
    )

    outputs = parser.add_argument_group("outputs")
    _option(outputs, "store", Path, "results store (Zarr)")
    _option(outputs, "save_base_dir", Path, "finished epochs are exported here as npy files")
    _flag(outputs, "no_export", "do not export")

    run = parser.add_argument_group("running")
    _option(run, "workers", int, "worker processes (default: one per GPU, else one per core)")
    _option(run, "batch_size", int, "samples per forward pass (default: 512 on a GPU, else 32)")
    _option(run, "block_size", int, "samples per block of a new store (default: 5000)")
    _flag(run, "dry_run", "check the inputs and say what would be computed")


def _add_schedule(parser: Any) -> None:
    schedule = _DEFAULTS.schedule
    for name, default, text in (
        ("initial_classes", schedule.initial, "active classes at epoch 0"),
        ("class_increment", schedule.increment, "classes added at a time"),
        ("class_frequency", schedule.frequency, "epochs between two additions"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument(
        "--partition",
        choices=PARTITIONS,
        default=schedule.partition,
        help="whether classes count as active at the epoch at which they are added (entering), "
        "or only once they were trained on",
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    parser.add_argument("out", type=Path, help="directory for the epoch_… directories")
    parser.add_argument("--epochs", help="comma-separated epochs (default: all of the store)")
    parser.add_argument(
        "--inactive",
        choices=("nan", "zero", "drop"),
        default="nan",
        help="what samples of inactive classes get",
    )
    parser.add_argument(
        "--divide_by",
        type=int,
        metavar="N",
        help="divide as a loss averaged over N samples would have, to compare with older results",
    )
    _flag(parser, "extras", "also write the store's other variables")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _option(parser, "model_dir", Path, "directory of the checkpoints")
    _option(parser, "class_order", Path, "class order file (default: class_order/ beside it)")
    _option(parser, "experiment_index", int, "the training run's index")
    parser.add_argument("--num_classes", type=int, default=100, help="classes in all")
    _add_schedule(parser)


def _option(parser: Any, name: str, kind: type, text: str) -> None:
    """Add an option whose default is that of `LaunchOptions`."""
    default = getattr(_DEFAULTS, name)
    shown = {"help": text if default is None else f"{text} (default: {default})"}
    parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, **shown)


def _flag(parser: Any, name: str, text: str) -> None:
    parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)


def _schedule(args: argparse.Namespace) -> Schedule:
    return Schedule(
        args.initial_classes, args.class_increment, args.class_frequency, args.partition
    )


def _launch(args: argparse.Namespace) -> int:
    from daskcurv.pipeline.launch import launch

    given = vars(args)
    if args.demo is not None:
        from daskcurv.demo import run_demo

        return run_demo(args.demo, workers=given.get("workers"))
    if "epochs" in given and (clash := {"start_epoch", "end_epoch", "step"} & given.keys()):
        raise DaskcurvError(
            f"--epochs and --{min(clash)} both say which epochs to compute; give one of them"
        )
    estimator = EstimatorConfig(
        h=args.h, n_probes=args.n_probes, temperature=args.temperature, seed=args.seed
    )
    names = set(LaunchOptions.__dataclass_fields__) & given.keys()
    options = LaunchOptions(
        **{name: given[name] for name in names},
        estimator=estimator,
        schedule=_schedule(args),
        export=not given.get("no_export", False),
    )
    log.debug("log file %s", log_to_file())
    return 1 if launch(options) else 0


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


def _verify(args: argparse.Namespace) -> int:
    from daskcurv.pipeline.partitioning import verify_class_partitioning

    names = {"model_dir", "class_order", "experiment_index"} & vars(args).keys()
    options = LaunchOptions(
        **{name: getattr(args, name) for name in names}, schedule=_schedule(args)
    )
    return 0 if verify_class_partitioning(options, args.num_classes) else 1

"""The command line: options in, an exit code out.

Exit codes: 0 all done; 1 finished, but something could not be computed or verified; 2 an input or
option cannot be used, or there are no workers; 3 the time limit came first, the same command goes
on; 128 + the signal's number when interrupted.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

from daskcurv.classes import PARTITIONS, Schedule
from daskcurv.clusters.options import CLUSTERS, DEVICES, ClusterOptions, cluster_options
from daskcurv.config import HEADS, METHODS, PRECISIONS, EstimatorConfig
from daskcurv.errors import ConfigError, DaskcurvError
from daskcurv.logs import log_to_console, log_to_file
from daskcurv.pipeline.inputs import LaunchOptions, parse_epochs
from daskcurv.storage.export import INACTIVE_CHOICES

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
    _add_doctor(
        _verb(
            verbs, "doctor", _doctor, "check this machine and the inputs, and measure the methods"
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
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--demo",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="make a small data set of real images and train on it in DIR, then run on that",
    )

    what = parser.add_argument_group("what to compute")
    _option(what, "epochs", str, "comma-separated epochs, or all: every checkpoint found")
    _option(what, "start_epoch", int, "first epoch")
    _option(what, "end_epoch", int, "last epoch")
    _option(what, "step", int, "epochs between two that are computed")
    _flag(what, "skip_missing", "go on without epochs that have no checkpoint")

    _add_inputs(parser)
    _add_estimator(parser)

    outputs = parser.add_argument_group("outputs")
    _option(outputs, "store", Path, "results store (Zarr)")
    _option(outputs, "save_base_dir", Path, "finished epochs are exported here as npy files")
    _flag(outputs, "no_export", "do not export")

    run = parser.add_argument_group("running")
    _option(run, "batch_size", int, "samples per forward pass (default: measured on GPUs, else 32)")
    _option(run, "block_size", int, "samples per block of a new store (default: 5000)")
    _flag(run, "dry_run", "check the inputs and say what would be computed")
    _add_cluster(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    defaults = ClusterOptions()
    where = parser.add_argument_group("workers")
    _option(
        where,
        "cluster",
        str,
        "this machine, SLURM jobs, the SLURM allocation this runs in, or a running Dask cluster",
        defaults,
        choices=CLUSTERS,
    )
    _option(where, "device", str, "what workers compute on", defaults, choices=DEVICES)
    _option(
        where, "workers", int, "local processes (default: one per GPU, else per core)", defaults
    )
    _option(where, "scheduler", str, "with connect: scheduler's address, or its file", defaults)
    _flag(where, "insecure", "do without TLS where it cannot be had")

    slurm = parser.add_argument_group(
        "SLURM",
        "Defaults can stand in Dask's configuration under daskcurv.slurm; see docs/cluster.md.",
    )
    _option(slurm, "gpus", int, "jobs to hold, with one GPU each", defaults)
    _option(slurm, "partition", str, "as for sbatch", defaults)
    _option(slurm, "account", str, "as for sbatch", defaults)
    _option(slurm, "qos", str, "as for sbatch", defaults)
    _option(slurm, "time", str, "time limit of each job", defaults)
    _option(slurm, "cpus_per_gpu", int, "CPU cores of each worker", defaults)
    _option(slurm, "mem_per_gpu", str, "memory of each worker", defaults)
    _option(slurm, "constraint", str, "as for sbatch", defaults)
    _option(slurm, "gres", str, "what each job asks for, or none", defaults)
    _lines(slurm, "prologue", "shell line to run before the worker; can be repeated")
    _lines(slurm, "sbatch_extra", "further option of sbatch (--sbatch_extra=--exclusive)")
    _option(slurm, "interface", str, "network interface to talk over", defaults)
    _flag(slurm, "print_job_script", "print what would be submitted, and end")
    _flag(slurm, "submit", "submit the launcher itself as a job, and end")
    _option(slurm, "nodes", int, "with submit and allocation: nodes to ask for", defaults)
    _lines(slurm, "submit_extra", "further option of sbatch for the submitted launcher")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("inputs")
    _option(inputs, "data_path", Path, "directory in CIFAR-100's python format")
    _flag(inputs, "download", "fetch CIFAR-100 if data_path does not have it")
    _add_model_dir(inputs)
    _add_schedule(inputs)
    _option(inputs, "validation_per_class", int, "first samples of each class that were held out")


def _add_estimator(parser: argparse.ArgumentParser) -> None:
    estimator = parser.add_argument_group("estimator")
    config = _DEFAULTS.estimator
    _option(
        estimator,
        "method",
        str,
        "auto is difference propagation, or finite-difference for epochs at which a self-check "
        "fails",
        config,
        choices=METHODS,
    )
    _option(
        estimator,
        "precision",
        str,
        "of difference propagation; auto is what a store was begun with, else what the device is "
        "fast at",
        config,
        choices=PRECISIONS,
    )
    _option(estimator, "h", float, "step of the finite difference", config)
    _option(estimator, "n_probes", int, "random directions per sample", config)
    _option(estimator, "temperature", float, "divides the logits", config)
    _option(estimator, "seed", int, "seed of the random directions", config)
    _option(estimator, "head", str, "outputs that enter the loss", choices=HEADS)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    _add_estimator(parser)
    run = parser.add_argument_group("the run in question")
    _option(run, "epochs", str, "comma-separated epochs (default: all)")
    _option(run, "store", Path, "results store (Zarr)")
    _option(run, "workers", int, "worker processes", ClusterOptions())
    _option(run, "batch_size", int, "samples per forward pass")


def _add_model_dir(parser: Any) -> None:
    _option(parser, "model_dir", Path, "directory of the checkpoints")
    _option(parser, "class_order", Path, "class order file (default: class_order/ beside it)")
    _option(parser, "experiment_index", int, "the training run's index, as in its file names")


def _add_schedule(parser: Any) -> None:
    schedule = _DEFAULTS.schedule
    _option(parser, "initial_classes", int, "active classes at epoch 0", schedule)
    _option(parser, "class_increment", int, "classes added at a time", schedule)
    _option(parser, "class_frequency", int, "epochs between two additions", schedule)
    _option(
        parser,
        "class_partition",
        str,
        "whether classes count as active at the epoch at which they are added (entering), or only "
        "once they were trained on (trained)",
        schedule,
        choices=PARTITIONS,
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, help="results store")
    parser.add_argument("out", type=Path, help="directory for the epoch_… directories")
    parser.add_argument("--epochs", help="comma-separated epochs (default: all of the store)")
    parser.add_argument(
        "--inactive",
        choices=INACTIVE_CHOICES,
        default=INACTIVE_CHOICES[0],
        help="what samples of inactive classes get (default: %(default)s)",
    )
    parser.add_argument(
        "--divide_by",
        type=int,
        metavar="N",
        help="divide as a loss averaged over N samples would have, to compare with older results",
    )
    _flag(parser, "extras", "also write the store's other variables")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_model_dir(parser)
    parser.add_argument(
        "--num_classes", type=int, default=100, help="classes in all (default: %(default)s)"
    )
    _add_schedule(parser)


def _option(
    parser: Any, name: str, kind: type, text: str, defaults: Any = _DEFAULTS, **extra: Any
) -> None:
    """Add an option that leaves no trace if it is not given, and takes its default elsewhere.

    Parameters
    ----------
    parser : ArgumentParser or group
    name : str
        Field of `defaults`.
    kind : type
    text : str
        Help, to which the default is added.
    defaults : dataclass instance
    **extra
        Passed on to ``add_argument``.
    """
    default = getattr(defaults, name)
    shown = text if default is None else f"{text} (default: {default})"
    parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=shown, **extra)


def _lines(parser: Any, name: str, text: str) -> None:
    parser.add_argument(
        f"--{name}", action="append", default=argparse.SUPPRESS, help=text, metavar="LINE"
    )


def _flag(parser: Any, name: str, text: str) -> None:
    parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)


def _options(args: argparse.Namespace) -> LaunchOptions:
    """Return the launch options that were given, the rest at their defaults."""
    given = vars(args)

    def chosen(kind: type) -> dict[str, Any]:
        return {field.name: given[field.name] for field in fields(kind) if field.name in given}

    own = chosen(LaunchOptions)
    own.pop("cluster", None)
    return LaunchOptions(
        **own,
        estimator=EstimatorConfig(**chosen(EstimatorConfig)),
        schedule=Schedule(**chosen(Schedule)),
        cluster=cluster_options(given),
        export="no_export" not in given,
    )


def _launch(args: argparse.Namespace) -> int:
    from daskcurv.pipeline.launch import launch

    given = vars(args)
    if "demo" in given:
        if others := given.keys() - {"run", "words", "demo", "workers"}:
            raise ConfigError(f"--demo makes its own inputs; leave out --{min(others)}")
        from daskcurv.demo import run_demo

        return run_demo(args.demo, workers=given.get("workers"))
    if "epochs" in given and (clash := {"start_epoch", "end_epoch", "step"} & given.keys()):
        raise ConfigError(
            f"--epochs and --{min(clash)} both say which epochs to compute; give one of them"
        )
    options = _options(args)
    if "print_job_script" in given or "submit" in given:
        return _print_or_submit(options, args)
    log.info("log file %s", log_to_file())
    return launch(options).exit_code


def _print_or_submit(options: LaunchOptions, args: argparse.Namespace) -> int:
    from daskcurv.clusters.submit import launcher_script, submit
    from daskcurv.pipeline.inputs import gather

    if "submit" in args:
        script = launcher_script(options.cluster, args.words)
    elif options.cluster.cluster == "slurm":
        from daskcurv.clusters.job_script import job_script

        script = job_script(options.cluster)
    else:
        raise ConfigError("--print_job_script is for --cluster slurm, or --submit")
    if "print_job_script" in args:
        print(script, end="")
        return 0
    gather(options)
    job, path = submit(script)
    log.info("submitted as job %s; its log will be %s", job, path)
    return 0


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

    return 0 if verify_class_partitioning(_options(args), args.num_classes) else 1


def _doctor(args: argparse.Namespace) -> int:
    from daskcurv.doctor import examine

    options = replace(_options(args), epochs=vars(args).get("epochs", "all"))
    named = bool({"data_path", "model_dir"} & vars(args).keys())
    return 0 if examine(options, named) else 1

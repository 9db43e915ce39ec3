"""The commands around a run: launch, doctor, verify_class_partitioning."""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Any

from daskcurv.cli.options import flag, options, verb
from daskcurv.cli.parser import CommandParser
from daskcurv.clusters.options import SLURM_OPTIONS
from daskcurv.config import EstimatorConfig
from daskcurv.declared import settings_of
from daskcurv.errors import ConfigError
from daskcurv.experiment.curriculum import Schedule
from daskcurv.logs import log_to_file, stream_lost
from daskcurv.runs.options import LaunchOptions, launch_options
from daskcurv.streams import keep_computing

log = logging.getLogger(__name__)

COMMON = (
    "run_file", "demo", "dry_run", "rate", "epochs", "data_path", "download",
    "model_dir", "store", "save_base_dir", "export", "n_probes", "workers", "cluster",
)  # fmt: skip
"""Options that ``--help`` shows; ``--help_all`` shows all."""

DEMO_RUNS = ("digits", "mnist")

_TRAINING_RUN = ("model_dir", "class_order", "experiment_index", *settings_of(Schedule))


_WEIGHTS = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar", ".safetensors")
"""How names end that are not those of run files."""


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_launch(verb(verbs, "launch", _launch, "compute curvature into a results store"))
    _add_plan(verb(verbs, "plan", _plan, "check the inputs and estimate run time and disk space"))
    _add_partitioning(
        verb(
            verbs,
            "verify_class_partitioning",
            _partitioning,
            "print which classes are active at which epoch, and check the class order",
        )
    )
    _add_doctor(
        verb(
            verbs,
            "doctor",
            _doctor,
            "check this machine and the inputs, and measure error and speed of the methods",
        )
    )


def _add_launch(parser: CommandParser) -> None:
    parser.add_argument(
        "--demo",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="run a small example in DIR: make a data set, train on it, compute the curvature",
    )
    parser.add_argument(
        "--demo_run",
        choices=DEMO_RUNS,
        default=argparse.SUPPRESS,
        help="which example: digits (class-incremental, a ResNet-18) or mnist (all classes from "
        "the start, a small CNN, files of another kind; default: digits)",
    )
    flag(
        _add_job(parser),
        "dry_run",
        "check the inputs and print what would be computed, like daskcurv plan",
    )
    parser.limit_help(COMMON)


def _add_plan(parser: CommandParser) -> None:
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="samples per second of one worker (default: as recorded in the store)",
    )
    _add_job(parser)
    parser.limit_help(COMMON)


def _add_job(parser: CommandParser) -> Any:
    """Add the options of a launch; returns the group "running"."""
    group = parser.add_argument_group
    _add_run_file(parser)
    options(group("what to compute"), "epochs", "start_epoch", "end_epoch", "step", "skip_missing")
    _add_inputs(parser)
    _add_estimator(parser)
    options(group("outputs"), "store", "save_base_dir", "export")
    running = group("running")
    options(running, "batch_size", "block_size")
    options(group("workers"), "cluster", "device", "workers", "scheduler", "insecure")
    slurm = group(
        "SLURM",
        "Defaults can be set in Dask's configuration under daskcurv.slurm; see docs/cluster.md.",
    )
    options(slurm, *SLURM_OPTIONS)
    flag(slurm, "print_job_script", "print the job script that would be submitted, and exit")
    flag(slurm, "submit", "submit the launcher itself as a job, and exit")
    return running


def _add_run_file(parser: CommandParser) -> None:
    parser.add_argument(
        "run_file",
        type=_run_file,
        nargs="?",
        metavar="RUN.YAML",
        help="settings of an earlier launch, which it left beside its store; options override them",
    )


def _run_file(word: str) -> Path:
    if Path(word).suffix in _WEIGHTS:
        raise argparse.ArgumentTypeError(
            f"{word} is a weight file. If it comes from a pattern that the shell replaced by "
            "names, put the pattern in quotes: --checkpoints 'run/*.pt'"
        )
    return Path(word)


def _add_inputs(parser: CommandParser) -> None:
    inputs = parser.add_argument_group("inputs")
    options(inputs, "data_path", "download", "mean", "std", "image_size")
    options(inputs, "checkpoints", "task", "weights_key", "strip_prefix", "model", "model_args")
    options(
        inputs,
        *_TRAINING_RUN,
        "class_schedule",
        "task_sizes",
        "task_epochs",
        "epoch_means",
        "outputs",
    )
    options(inputs, "validation_per_class", "held_out")


def _add_estimator(parser: CommandParser) -> None:
    options(parser.add_argument_group("estimator"), *settings_of(EstimatorConfig), "head")


def _add_doctor(parser: CommandParser) -> None:
    _add_run_file(parser)
    _add_inputs(parser)
    _add_estimator(parser)
    run = parser.add_argument_group("the run to check for")
    options(run, "store", "workers", "batch_size", epochs="comma-separated epochs (default: all)")
    parser.limit_help(COMMON)


def _add_partitioning(parser: CommandParser) -> None:
    parser.add_argument(
        "--num_classes",
        type=int,
        default=100,
        help="total number of classes (default: %(default)s)",
    )
    options(parser, *_TRAINING_RUN)


def _launch(args: argparse.Namespace) -> int:
    from daskcurv.runs.launch import launch

    keep_computing(stream_lost)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "demo" in given or "demo_run" in given:
        return _demo(given)
    chosen = launch_options(_given(args))
    if "print_job_script" in given or "submit" in given:
        return _print_or_submit(chosen, args)
    log.info("log file %s", log_to_file())
    return launch(chosen).exit_code


def _demo(given: dict[str, Any]) -> int:
    if "demo" not in given:
        raise ConfigError("--demo_run chooses an example; name its directory with --demo DIR")
    if others := given.keys() - {"run", "parser", "words", "demo", "demo_run", "workers"}:
        surplus = given.get("run_file") or f"--{min(others)}"
        raise ConfigError(
            "--demo makes its own inputs and goes with --demo_run and --workers only; leave out "
            f"{surplus}"
        )
    if given.get("demo_run") == "mnist":
        from daskcurv import demo_mnist

        return demo_mnist.run_demo(given["demo"], workers=given.get("workers"))
    from daskcurv import demo

    return demo.run_demo(given["demo"], workers=given.get("workers"))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for: on the command line and, for the rest, in the run file."""
    given = vars(args)
    if "epochs" in given and (clash := {"start_epoch", "end_epoch", "step"} & given.keys()):
        raise ConfigError(
            f"--epochs and --{min(clash)} both select the epochs to compute; use one of them"
        )
    if args.run_file is None:
        return given
    from daskcurv.runs.accounts.run_file import overridden, read_run_file

    return overridden(read_run_file(args.run_file), given)


def _plan(args: argparse.Namespace) -> int:
    from daskcurv.runs.cost import dry_run
    from daskcurv.runs.inputs import experiment_of

    if args.rate is not None and not 0 < args.rate < math.inf:
        raise ConfigError(f"rate is {args.rate}; expected samples per second, greater than 0")
    chosen = launch_options(_given(args))
    dry_run(chosen, experiment_of(chosen), args.rate)
    return 0


def _print_or_submit(options: LaunchOptions, args: argparse.Namespace) -> int:
    from daskcurv.clusters.slurm.submit import launcher_script, submit
    from daskcurv.runs.inputs import experiment_of

    if "submit" in args:
        script = launcher_script(options.cluster, args.words)
    elif options.cluster.cluster == "slurm":
        from daskcurv.clusters.slurm.job_script import job_script

        script = job_script(options.cluster)
    else:
        raise ConfigError("--print_job_script is for --cluster slurm, or --submit")
    if "print_job_script" in args:
        print(script, end="")
        return 0
    experiment_of(options)
    job, path = submit(script)
    log.info("submitted as job %s; its log file will be %s", job, path)
    return 0


def _partitioning(args: argparse.Namespace) -> int:
    from daskcurv.audit.partitioning import verify_class_partitioning

    return 0 if verify_class_partitioning(launch_options(vars(args)), args.num_classes) else 1


def _doctor(args: argparse.Namespace) -> int:
    from daskcurv.audit.doctor import examine

    given = _given(args)
    if not {"epochs", "start_epoch", "end_epoch", "step"} & given.keys():
        given = {**given, "epochs": "all"}
    named = bool({"data_path", "model_dir"} & given.keys())
    return 0 if examine(launch_options(given), named) else 1

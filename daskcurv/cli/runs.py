"""The commands around a run: launch, doctor, verify_class_partitioning."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from daskcurv.cli.options import DEFAULTS, flag, lines, option, verb
from daskcurv.cli.parser import CommandParser
from daskcurv.clusters.options import CLUSTERS, DEVICES, ClusterOptions, cluster_options
from daskcurv.config import HEADS, METHODS, PRECISIONS, EstimatorConfig
from daskcurv.errors import ConfigError
from daskcurv.experiment.curriculum import PARTITIONS, Schedule
from daskcurv.logs import log_to_file, stream_lost
from daskcurv.runs.options import LaunchOptions
from daskcurv.streams import keep_computing

log = logging.getLogger(__name__)

COMMON = (
    "demo", "dry_run", "rate", "epochs", "data_path", "download", "model_dir", "store",
    "save_base_dir", "no_export", "n_probes", "workers", "cluster",
)  # fmt: skip
"""Options that ``--help`` shows; ``--help_all`` shows all."""


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_launch(verb(verbs, "launch", _launch, "compute curvature into a results store"))
    _add_plan(verb(verbs, "plan", _plan, "check the inputs and estimate run time and disk space"))
    _add_verify(
        verb(
            verbs,
            "verify_class_partitioning",
            _verify,
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
    run = _add_job(parser)
    flag(run, "dry_run", "check the inputs and print what would be computed, like daskcurv plan")
    parser.limit_help(COMMON)


def _add_job(parser: CommandParser) -> Any:
    """Add the options of a launch; returns the group "running"."""
    what = parser.add_argument_group("what to compute")
    option(what, "epochs", str, "comma-separated epochs, or all (every checkpoint in model_dir)")
    option(what, "start_epoch", int, "first epoch")
    option(what, "end_epoch", int, "last epoch")
    option(what, "step", int, "interval between epochs")
    flag(what, "skip_missing", "skip epochs that have no checkpoint")

    _add_inputs(parser)
    _add_estimator(parser)

    outputs = parser.add_argument_group("outputs")
    option(outputs, "store", Path, "results store (Zarr)")
    option(
        outputs,
        "save_base_dir",
        Path,
        "directory to which finished epochs are exported as npy files",
    )
    flag(outputs, "no_export", "do not export npy files")

    run = parser.add_argument_group("running")
    option(
        run, "batch_size", int, "samples per forward pass (default: measured on a GPU, 32 on a CPU)"
    )
    option(run, "block_size", int, "samples per block of a new store (default: 5000)")
    _add_cluster(parser)
    return run


def _add_plan(parser: CommandParser) -> None:
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="samples per second of one worker (default: as recorded in the store)",
    )
    _add_job(parser)
    parser.limit_help(COMMON)


def _add_cluster(parser: CommandParser) -> None:
    defaults = ClusterOptions()
    where = parser.add_argument_group("workers")
    option(
        where,
        "cluster",
        str,
        "where workers run: on this machine (local), in SLURM jobs (slurm), in the current SLURM "
        "allocation (allocation), or in a running Dask cluster (connect)",
        defaults,
        choices=CLUSTERS,
    )
    option(where, "device", str, "device that workers compute on", defaults, choices=DEVICES)
    option(
        where,
        "workers",
        int,
        "local worker processes (default: one per GPU, or per CPU core); with slurm: worker jobs",
        defaults,
    )
    option(
        where,
        "scheduler",
        str,
        "with connect: address of the Dask scheduler, or its scheduler file",
        defaults,
    )
    flag(where, "insecure", "allow connections without TLS")

    slurm = parser.add_argument_group(
        "SLURM",
        "Defaults can be set in Dask's configuration under daskcurv.slurm; see docs/cluster.md.",
    )
    option(
        slurm,
        "gpus",
        int,
        "number of worker jobs, with one GPU each (none with --device cpu)",
        defaults,
    )
    option(slurm, "partition", str, "same as for sbatch", defaults)
    option(slurm, "account", str, "same as for sbatch", defaults)
    option(slurm, "qos", str, "same as for sbatch", defaults)
    option(slurm, "time", str, "time limit of each job", defaults)
    option(slurm, "cpus_per_gpu", int, "CPU cores per worker", defaults)
    option(slurm, "mem_per_gpu", str, "memory per worker", defaults)
    option(slurm, "constraint", str, "same as for sbatch", defaults)
    option(
        slurm,
        "gres",
        str,
        "GPUs of each job, or none (default: gpu:1; none with --device cpu)",
        defaults,
    )
    lines(slurm, "prologue", "shell command to run before the worker; can be repeated")
    lines(
        slurm,
        "sbatch_extra",
        "additional sbatch option (--sbatch_extra=--exclusive); can be repeated",
    )
    option(
        slurm,
        "interface",
        str,
        "network interface for the connections of launcher and workers",
        defaults,
    )
    flag(slurm, "print_job_script", "print the job script that would be submitted, and exit")
    flag(slurm, "submit", "submit the launcher itself as a job, and exit")
    option(slurm, "nodes", int, "with --submit --cluster allocation: number of nodes", defaults)
    lines(
        slurm,
        "submit_extra",
        "additional sbatch option for the submitted launcher; can be repeated",
    )


def _add_inputs(parser: CommandParser) -> None:
    inputs = parser.add_argument_group("inputs")
    option(inputs, "data_path", Path, "directory in CIFAR-100's python format")
    flag(inputs, "download", "download CIFAR-100 if data_path does not contain it")
    _add_model_dir(inputs)
    _add_schedule(inputs)
    option(
        inputs,
        "validation_per_class",
        int,
        "number of samples per class, from the first on, that training held out",
    )


def _add_estimator(parser: CommandParser) -> None:
    estimator = parser.add_argument_group("estimator")
    config = DEFAULTS.estimator
    option(
        estimator,
        "method",
        str,
        "auto: difference-propagation; finite-difference for epochs whose self-check fails and on "
        "CPUs without fast bfloat16",
        config,
        choices=METHODS,
    )
    option(
        estimator,
        "precision",
        str,
        "precision of difference-propagation; auto: the one the store was started with, or the one "
        "that is fast on the device",
        config,
        choices=PRECISIONS,
    )
    option(estimator, "h", float, "step size of the finite difference", config)
    option(estimator, "n_probes", int, "random directions per sample", config)
    option(estimator, "temperature", float, "temperature by which the logits are divided", config)
    option(estimator, "seed", int, "random seed of the directions", config)
    option(estimator, "head", str, "outputs of the network that enter the loss", choices=HEADS)


def _add_doctor(parser: CommandParser) -> None:
    _add_inputs(parser)
    _add_estimator(parser)
    run = parser.add_argument_group("the run to check for")
    option(run, "epochs", str, "comma-separated epochs (default: all)")
    option(run, "store", Path, "results store (Zarr)")
    option(run, "workers", int, "worker processes", ClusterOptions())
    option(run, "batch_size", int, "samples per forward pass")
    parser.limit_help(COMMON)


def _add_model_dir(parser: Any) -> None:
    option(parser, "model_dir", Path, "directory with the checkpoints")
    option(
        parser,
        "class_order",
        Path,
        "class order file, or regenerate: draw it from the experiment index "
        "(default: class_order/index-I.npy beside model_dir)",
    )
    option(parser, "experiment_index", int, "index of the training run, as in its file names")


def _add_schedule(parser: Any) -> None:
    schedule = DEFAULTS.schedule
    option(parser, "initial_classes", int, "number of classes that are active at epoch 0", schedule)
    option(parser, "class_increment", int, "number of classes that each task adds", schedule)
    option(parser, "class_frequency", int, "number of epochs per task", schedule)
    option(
        parser,
        "class_partition",
        str,
        "entering: new classes are active from the epoch at which they are added; trained: from "
        "the next epoch on, the first that was trained on them",
        schedule,
        choices=PARTITIONS,
    )


def _add_verify(parser: CommandParser) -> None:
    _add_model_dir(parser)
    parser.add_argument(
        "--num_classes",
        type=int,
        default=100,
        help="total number of classes (default: %(default)s)",
    )
    _add_schedule(parser)


def _options(args: argparse.Namespace) -> LaunchOptions:
    """Return the launch options: those given, and defaults for the rest."""
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
    from daskcurv.runs.launch import launch

    keep_computing(stream_lost)
    given = vars(args)
    if "demo" in given:
        if others := given.keys() - {"run", "parser", "words", "demo", "workers"}:
            raise ConfigError(
                f"--demo makes its own inputs and goes with --workers only; leave out "
                f"--{min(others)}"
            )
        from daskcurv.demo import run_demo

        return run_demo(args.demo, workers=given.get("workers"))
    options = _job(args)
    if "print_job_script" in given or "submit" in given:
        return _print_or_submit(options, args)
    log.info("log file %s", log_to_file())
    return launch(options).exit_code


def _job(args: argparse.Namespace) -> LaunchOptions:
    given = vars(args)
    if "epochs" in given and (clash := {"start_epoch", "end_epoch", "step"} & given.keys()):
        raise ConfigError(
            f"--epochs and --{min(clash)} both select the epochs to compute; use one of them"
        )
    return _options(args)


def _plan(args: argparse.Namespace) -> int:
    from daskcurv.runs.cost import dry_run
    from daskcurv.runs.inputs import experiment_of

    if args.rate is not None and not 0 < args.rate < math.inf:
        raise ConfigError(f"rate is {args.rate}; expected samples per second, greater than 0")
    options = _job(args)
    dry_run(options, experiment_of(options), args.rate)
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


def _verify(args: argparse.Namespace) -> int:
    from daskcurv.audit.partitioning import verify_class_partitioning

    return 0 if verify_class_partitioning(_options(args), args.num_classes) else 1


def _doctor(args: argparse.Namespace) -> int:
    from daskcurv.audit.doctor import examine

    options = replace(_options(args), epochs=vars(args).get("epochs", "all"))
    named = bool({"data_path", "model_dir"} & vars(args).keys())
    return 0 if examine(options, named) else 1

"""The commands around a run: launch, doctor, verify_class_partitioning."""

from __future__ import annotations

import argparse
import logging
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from daskcurv.classes import PARTITIONS, Schedule
from daskcurv.cli.options import DEFAULTS, flag, lines, option, verb
from daskcurv.clusters.options import CLUSTERS, DEVICES, ClusterOptions, cluster_options
from daskcurv.config import HEADS, METHODS, PRECISIONS, EstimatorConfig
from daskcurv.errors import ConfigError
from daskcurv.logs import log_to_file
from daskcurv.pipeline.options import LaunchOptions

log = logging.getLogger(__name__)


def add_commands(verbs: Any) -> None:
    """Add the commands to the program's parser."""
    _add_launch(verb(verbs, "launch", _launch, "compute curvature into a results store"))
    _add_plan(verb(verbs, "plan", _plan, "check the inputs, and say what a launch would take"))
    _add_verify(
        verb(
            verbs,
            "verify_class_partitioning",
            _verify,
            "print which classes are active when, and check the class order",
        )
    )
    _add_doctor(
        verb(verbs, "doctor", _doctor, "check this machine and the inputs, and measure the methods")
    )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--demo",
        type=Path,
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="make a small data set of real images and train on it in DIR, then run on that",
    )
    run = _add_job(parser)
    flag(run, "dry_run", "check the inputs and say what would be computed, as daskcurv plan does")


def _add_job(parser: argparse.ArgumentParser) -> Any:
    """Add what a launch can be asked for; returns the group of how it runs."""
    what = parser.add_argument_group("what to compute")
    option(what, "epochs", str, "comma-separated epochs, or all: every checkpoint found")
    option(what, "start_epoch", int, "first epoch")
    option(what, "end_epoch", int, "last epoch")
    option(what, "step", int, "epochs between two that are computed")
    flag(what, "skip_missing", "go on without epochs that have no checkpoint")

    _add_inputs(parser)
    _add_estimator(parser)

    outputs = parser.add_argument_group("outputs")
    option(outputs, "store", Path, "results store (Zarr)")
    option(outputs, "save_base_dir", Path, "finished epochs are exported here as npy files")
    flag(outputs, "no_export", "do not export")

    run = parser.add_argument_group("running")
    option(run, "batch_size", int, "samples per forward pass (default: measured on GPUs, else 32)")
    option(run, "block_size", int, "samples per block of a new store (default: 5000)")
    _add_cluster(parser)
    return run


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="samples per second of one worker (default: what the store has on record)",
    )
    _add_job(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    defaults = ClusterOptions()
    where = parser.add_argument_group("workers")
    option(
        where,
        "cluster",
        str,
        "this machine, SLURM jobs, the SLURM allocation this runs in, or a running Dask cluster",
        defaults,
        choices=CLUSTERS,
    )
    option(where, "device", str, "what workers compute on", defaults, choices=DEVICES)
    option(where, "workers", int, "local processes (default: one per GPU, else per core)", defaults)
    option(where, "scheduler", str, "with connect: scheduler's address, or its file", defaults)
    flag(where, "insecure", "do without TLS where it cannot be had")

    slurm = parser.add_argument_group(
        "SLURM",
        "Defaults can stand in Dask's configuration under daskcurv.slurm; see docs/cluster.md.",
    )
    option(slurm, "gpus", int, "jobs to hold, with one GPU each", defaults)
    option(slurm, "partition", str, "as for sbatch", defaults)
    option(slurm, "account", str, "as for sbatch", defaults)
    option(slurm, "qos", str, "as for sbatch", defaults)
    option(slurm, "time", str, "time limit of each job", defaults)
    option(slurm, "cpus_per_gpu", int, "CPU cores of each worker", defaults)
    option(slurm, "mem_per_gpu", str, "memory of each worker", defaults)
    option(slurm, "constraint", str, "as for sbatch", defaults)
    option(slurm, "gres", str, "what each job asks for, or none", defaults)
    lines(slurm, "prologue", "shell line to run before the worker; can be repeated")
    lines(slurm, "sbatch_extra", "further option of sbatch (--sbatch_extra=--exclusive)")
    option(slurm, "interface", str, "network interface to talk over", defaults)
    flag(slurm, "print_job_script", "print what would be submitted, and end")
    flag(slurm, "submit", "submit the launcher itself as a job, and end")
    option(slurm, "nodes", int, "with submit and allocation: nodes to ask for", defaults)
    lines(slurm, "submit_extra", "further option of sbatch for the submitted launcher")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_argument_group("inputs")
    option(inputs, "data_path", Path, "directory in CIFAR-100's python format")
    flag(inputs, "download", "fetch CIFAR-100 if data_path does not have it")
    _add_model_dir(inputs)
    _add_schedule(inputs)
    option(inputs, "validation_per_class", int, "first samples of each class that were held out")


def _add_estimator(parser: argparse.ArgumentParser) -> None:
    estimator = parser.add_argument_group("estimator")
    config = DEFAULTS.estimator
    option(
        estimator,
        "method",
        str,
        "auto is difference propagation, or finite-difference for epochs at which a self-check "
        "fails, and on CPUs without fast bfloat16",
        config,
        choices=METHODS,
    )
    option(
        estimator,
        "precision",
        str,
        "of difference propagation; auto is what a store was begun with, else what the device is "
        "fast at",
        config,
        choices=PRECISIONS,
    )
    option(estimator, "h", float, "step of the finite difference", config)
    option(estimator, "n_probes", int, "random directions per sample", config)
    option(estimator, "temperature", float, "divides the logits", config)
    option(estimator, "seed", int, "seed of the random directions", config)
    option(estimator, "head", str, "outputs that enter the loss", choices=HEADS)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    _add_estimator(parser)
    run = parser.add_argument_group("the run in question")
    option(run, "epochs", str, "comma-separated epochs (default: all)")
    option(run, "store", Path, "results store (Zarr)")
    option(run, "workers", int, "worker processes", ClusterOptions())
    option(run, "batch_size", int, "samples per forward pass")


def _add_model_dir(parser: Any) -> None:
    option(parser, "model_dir", Path, "directory of the checkpoints")
    option(
        parser,
        "class_order",
        Path,
        "class order file, or regenerate: draw it from the experiment index "
        "(default: class_order/index-INDEX.npy beside model_dir)",
    )
    option(parser, "experiment_index", int, "the training run's index, as in its file names")


def _add_schedule(parser: Any) -> None:
    schedule = DEFAULTS.schedule
    option(parser, "initial_classes", int, "active classes at epoch 0", schedule)
    option(parser, "class_increment", int, "classes added at a time", schedule)
    option(parser, "class_frequency", int, "epochs between two additions", schedule)
    option(
        parser,
        "class_partition",
        str,
        "whether classes count as active at the epoch at which they are added (entering), or only "
        "once they were trained on (trained)",
        schedule,
        choices=PARTITIONS,
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_model_dir(parser)
    parser.add_argument(
        "--num_classes", type=int, default=100, help="classes in all (default: %(default)s)"
    )
    _add_schedule(parser)


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
    options = _job(args)
    if "print_job_script" in given or "submit" in given:
        return _print_or_submit(options, args)
    log.info("log file %s", log_to_file())
    return launch(options).exit_code


def _job(args: argparse.Namespace) -> LaunchOptions:
    given = vars(args)
    if "epochs" in given and (clash := {"start_epoch", "end_epoch", "step"} & given.keys()):
        raise ConfigError(
            f"--epochs and --{min(clash)} both say which epochs to compute; give one of them"
        )
    return _options(args)


def _plan(args: argparse.Namespace) -> int:
    from daskcurv.pipeline.estimate import dry_run
    from daskcurv.pipeline.inputs import gather

    if args.rate is not None and not 0 < args.rate < math.inf:
        raise ConfigError(f"rate is {args.rate}; expected samples per second, more than 0")
    options = _job(args)
    dry_run(options, gather(options), args.rate)
    return 0


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


def _verify(args: argparse.Namespace) -> int:
    from daskcurv.pipeline.partitioning import verify_class_partitioning

    return 0 if verify_class_partitioning(_options(args), args.num_classes) else 1


def _doctor(args: argparse.Namespace) -> int:
    from daskcurv.doctor import examine

    options = replace(_options(args), epochs=vars(args).get("epochs", "all"))
    named = bool({"data_path", "model_dir"} & vars(args).keys())
    return 0 if examine(options, named) else 1

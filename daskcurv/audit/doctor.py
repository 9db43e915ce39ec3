"""Check whether a run is possible on this machine, and whether its numbers are correct.

Each requirement of a run is checked and reported on one line: ``ok``, ``note`` (a run is possible)
or ``FAIL`` (a run is not possible). If inputs are given, the speed of each method and its error
against float64 are measured on some of the samples.
"""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from numpy.typing import NDArray

from daskcurv import surroundings
from daskcurv.audit.comparison import compare
from daskcurv.clusters.local import available_cores, visible_gpus
from daskcurv.errors import DaskcurvError
from daskcurv.estimators.kernels import KERNELS
from daskcurv.estimators.native import compiler
from daskcurv.estimators.precision import lowered_precision
from daskcurv.estimators.selection import described, has_fast_bfloat16
from daskcurv.experiment.checkpoints import check_all
from daskcurv.experiment.experiment import Experiment
from daskcurv.logs import counted
from daskcurv.places import existing, exists
from daskcurv.runs.accuracy import measure
from daskcurv.runs.cost import (
    Size,
    copy_size,
    export_size,
    size_text,
    store_size,
    workers_of,
)
from daskcurv.runs.inputs import experiment_of, selected
from daskcurv.runs.options import LaunchOptions
from daskcurv.spread import evenly
from daskcurv.storage import schema

log = logging.getLogger(__name__)

_PACKAGES = ("daskcurv", "torch", "torchvision", "dask", "distributed", "zarr", "xarray", "numpy")
_SLURM = ("sbatch", "squeue", "scancel", "srun")
_FILES_READ = 25
_SAMPLES = 8


class _Checks:
    """Prints findings as they come; remembers whether any of them is fatal."""

    def __init__(self) -> None:
        self.failed = False

    def section(self, title: str) -> None:
        print(f"\n{title}")

    def ok(self, text: str) -> None:
        print(f"  ok    {text}")

    def note(self, text: str) -> None:
        print(f"  note  {text}")

    def fail(self, text: str) -> None:
        self.failed = True
        print(f"  FAIL  {text}")


def examine(options: LaunchOptions, inputs_named: bool) -> bool:
    """Print the report.

    Parameters
    ----------
    options : LaunchOptions
        Options of the run.
    inputs_named : bool
        Whether the inputs were given as options; missing inputs are then a failure.

    Returns
    -------
    bool
        Whether a run is possible.
    """
    checks = _Checks()
    _software(checks)
    device = _devices(checks)
    exact = _arithmetic(checks, device)
    _cluster(checks)
    experiment = _experiment(checks, options, inputs_named)
    _disk(checks, options, experiment)
    if experiment is not None and exact:
        _methods(checks, options, experiment, device)
    print(f"\n{_verdict(checks, experiment)}")
    return not checks.failed


def _verdict(checks: _Checks, experiment: Experiment | None) -> str:
    if checks.failed:
        return "a run is not possible: see FAIL above"
    if experiment is None:
        return (
            "a run is possible on this machine. Not checked, because no inputs were given: "
            "weights, data, class order, required disk space, and the methods' errors and speed"
        )
    return "ready for a run"


def _software(checks: _Checks) -> None:
    checks.section("software")
    checks.ok(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        try:
            checks.ok(f"{name} {version(name)}")
        except PackageNotFoundError:
            checks.fail(f"{name} is not installed; install daskcurv again")
    if command := compiler():
        checks.ok(f"C++ compiler {command}, for fused kernels on CPUs")
    else:
        checks.note("no C++ compiler: difference propagation takes about twice as long on CPUs")


def _devices(checks: _Checks) -> torch.device:
    checks.section("devices")
    gpus = visible_gpus()
    if torch.version.cuda and gpus:
        checks.ok(f"PyTorch for CUDA {torch.version.cuda}, driver {_driver()}")
        for index in range(len(gpus)):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            checks.ok(f"GPU {gpus[index]}: {properties.name}, {memory:.0f} GiB")
        convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        if convolutions != "ieee":
            checks.note(
                "float32 convolutions use TF32 by default here (daskcurv disables it; the "
                "errors below show its effect on other scripts)"
            )
        device = torch.device("cuda")
    else:
        checks.note(
            f"no GPU is visible (PyTorch for CUDA {torch.version.cuda}): a run will use the CPU"
        )
        device = torch.device("cpu")
    checks.ok(f"{available_cores()} CPU cores")
    if has_fast_bfloat16(device):
        checks.ok(f"the {device.type} supports fast bfloat16")
    else:
        checks.note(f"the {device.type} has no fast bfloat16: differences use float32")
    return device


def _arithmetic(checks: _Checks, device: torch.device) -> bool:
    """Report external precision settings; return whether float32 is float32."""
    for sentence in (*surroundings.neutralised(), *surroundings.remaining()):
        checks.note(sentence)
    if lowered := lowered_precision(device):
        checks.fail(
            f"float32 {lowered} on this {device.type} are computed in a lower precision; check the "
            f"settings of the libraries below PyTorch ({surroundings.suspects()})"
        )
        return False
    checks.ok(f"products in float32 are float32 on this {device.type}")
    return True


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return output.stdout.split("\n")[0].strip()


def _cluster(checks: _Checks) -> None:
    checks.section("cluster")
    found = [name for name in _SLURM if shutil.which(name)]
    if not found:
        checks.note("no SLURM commands: runs are local")
    elif len(found) < len(_SLURM):
        checks.note(f"only some SLURM commands found: {', '.join(found)}")
    else:
        checks.ok("SLURM commands found")
    try:
        from distributed.security import Security

        Security.temporary()
        checks.ok("TLS between processes, with temporary credentials")
    except ImportError as error:
        checks.fail(f"no TLS between processes: {error}; install the package cryptography")


def _experiment(checks: _Checks, options: LaunchOptions, named: bool) -> Experiment | None:
    checks.section("inputs")
    try:
        if not named and not _any_exists(options):
            checks.note(
                f"none at {options.model_dir} and {options.data_path}; give --model_dir and "
                "--data_path to check inputs and to measure errors and speed"
            )
            return None
        experiment = experiment_of(options)
        found = list(experiment.checkpoints.items())
        some = dict(found[place] for place in evenly(len(found), _FILES_READ))
        check_all(
            some,
            experiment.network,
            {},
            payload=experiment.payload,
            completed=experiment.with_all_outputs,
        )
    except DaskcurvError as error:
        checks.fail(str(error))
        return None
    checks.ok(f"data: {options.data_path}, {len(experiment.dataset):,} samples")
    checks.ok(f"class order: {experiment.class_order_source}")
    epochs = counted(len(experiment.checkpoints), "epoch")
    checks.ok(f"weights: {epochs}, {len(some)} of them read completely")
    for one in measure(experiment):
        note = "; no better than guessing" if one.no_better_than_chance else ""
        (checks.note if note else checks.ok)(f"accuracy at epoch {one.epoch}: {one}{note}")
    return experiment


def _any_exists(options: LaunchOptions) -> bool:
    return exists(options.model_dir, "model directory") or exists(options.data_path, "data set")


def _disk(checks: _Checks, options: LaunchOptions, experiment: Experiment | None) -> None:
    checks.section("disk")
    place = existing(options.store)
    free = shutil.disk_usage(place).free
    if experiment is None:
        checks.note(f"{size_text(free)} free at {place}; the required space depends on the inputs")
        return
    num_samples = len(experiment.dataset)
    export = export_size(len(experiment.checkpoints), num_samples) if options.export else Size()
    size = store_size(_active(experiment), num_samples) + export + copy_size(experiment.dataset)
    text = (
        f"about {size_text(size.on_disk)} on disk needed for {options.store} and the files "
        f"written with it, {size_text(free)} free"
    )
    if size.on_disk > free:
        checks.fail(f"{text}; choose another --store")
    else:
        checks.ok(text)


def _active(experiment: Experiment) -> NDArray[np.int64]:
    """Return the active samples of each block, in the order of epochs."""
    return experiment.active_per_block(list(experiment.checkpoints), schema.DEFAULT_BLOCK_SIZE)


def _methods(
    checks: _Checks, options: LaunchOptions, experiment: Experiment, device: torch.device
) -> None:
    epoch = max(experiment.checkpoints)
    config = experiment.estimator
    ids = np.flatnonzero(experiment.active(epoch))
    if not len(ids):
        checks.note(f"no sample has an active class at epoch {epoch}: methods are not measured")
        return
    ids = ids[evenly(len(ids), _SAMPLES)]
    checks.section(
        f"methods: {len(ids)} samples at epoch {epoch}, h = {config.h:g}, {config.n_probes} probes"
    )
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in a worker
    KERNELS.compile(device)
    rows = compare(
        experiment.model(epoch).eval(),
        *experiment.dataset.inputs(ids),
        config,
        device=device,
        batch_size=options.batch_size,
    )
    workers = workers_of(options) or 1
    total = int(_active(experiment).sum())
    print(f"        {'error of curvature':>53}  {'samples/s':>9}  {f'{workers} workers':>16}")
    print(
        f"        {'method':<36}{'median':>8}{'worst':>9}  {'1 worker':>9}  {'for all epochs':>16}"
    )
    checks.ok(_choice(options))
    for row in rows:
        speed = f"{'':>9}  {'':>16}"
        if row.samples_per_second > 0:
            left = timedelta(seconds=round(total / (row.samples_per_second * workers)))
            speed = f"{row.samples_per_second:>9.1f}  {left!s:>16}"
        print(f"        {row.name:<36}{row.median_error:>8.0e}{row.worst_error:>9.0e}  {speed}")


def _choice(options: LaunchOptions) -> str:
    """Return the method and precision that a run uses, and why."""
    config, reason = selected(options)
    if options.store.exists():
        reason = f"as in {options.store}"
    return f"method for a run: {described(config)}: {reason}"

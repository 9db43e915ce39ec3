"""Options of every kind of cluster, with their checks.

Settings that all users of a site share, such as partition and account, can be kept in a file:
YAML under the key ``daskcurv.slurm``, in ``~/.config/dask/`` or wherever else Dask looks for its
configuration. Options on the command line override it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dask
import psutil

from daskcurv.config import check_positive
from daskcurv.declared import check_choices, documented, setting, settings_of
from daskcurv.errors import ConfigError

CLUSTERS = ("local", "slurm", "allocation", "connect")
DEVICES = ("auto", "cuda", "cpu")
SITE_KEY = "daskcurv.slurm"
NO_GRES = "none"
DEFAULT_GRES = "gpu:1"

_TIME = re.compile(r"(\d+|\d+:\d+|\d+:\d+:\d+|\d+-\d+(:\d+){0,2})")
_MEMORY = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_GRES = re.compile(r"gpu(:[\w.-]*[A-Za-z_][\w.-]*)?(:\d+)?")
_NOT_ONE_JOB = ("--array", "--clusters", "--test-only", "--wait", "--wrap")
_LISTS = {"prologue", "sbatch_extra", "submit_extra"}


@documented
@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Options of the cluster that runs the workers."""

    cluster: str = setting(
        "local",
        "where workers run: on this machine (local), in SLURM jobs (slurm), in the current SLURM "
        "allocation (allocation), or in a running Dask cluster (connect)",
        choices=CLUSTERS,
    )
    device: str = setting(
        "auto",
        "device that workers compute on; auto: GPUs, but the CPU for local workers without one",
        choices=DEVICES,
    )
    workers: int | None = setting(
        None,
        "local worker processes (default: one per GPU, or per CPU core); with slurm: worker jobs",
    )
    scheduler: str | None = setting(
        None, "with connect: address of the Dask scheduler, or its scheduler file"
    )
    insecure: bool = setting(False, "allow connections without TLS")
    gpus: int = setting(1, "number of worker jobs, with one GPU each (none with --device cpu)")
    partition: str | None = setting(None, "same as for sbatch")
    account: str | None = setting(None, "same as for sbatch")
    qos: str | None = setting(None, "same as for sbatch")
    time: str | None = setting(None, "time limit of each job")
    cpus_per_gpu: int = setting(2, "CPU cores per worker")
    mem_per_gpu: str = setting("8G", "memory per worker: a number with K, M, G or T")
    constraint: str | None = setting(None, "same as for sbatch")
    gres: str | None = setting(
        None,
        "GPUs of each job, or of each node of an allocation; none for no GPU (default: gpu:1; none "
        "with --device cpu)",
    )
    prologue: tuple[str, ...] = setting(
        (), "shell command to run before the worker; can be repeated"
    )
    sbatch_extra: tuple[str, ...] = setting(
        (),
        "additional sbatch option for jobs with GPUs (--sbatch_extra=--exclusive); can be repeated",
    )
    interface: str | None = setting(
        None, "network interface for the connections of launcher and workers"
    )
    nodes: int = setting(1, "with --submit --cluster allocation: number of nodes")
    submit_extra: tuple[str, ...] = setting(
        (),
        "additional sbatch option for a submitted launcher whose workers are other jobs; can be "
        "repeated",
    )

    def __post_init__(self) -> None:
        check_positive(
            workers=self.workers, gpus=self.gpus, nodes=self.nodes, cpus_per_gpu=self.cpus_per_gpu
        )
        check_choices(self)
        if self.cluster == "connect" and not self.scheduler:
            raise ConfigError(
                "--cluster connect needs --scheduler: the scheduler's address, such as "
                "tls://10.1.2.3:8786, or its scheduler file"
            )
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise ConfigError(
                f"time is {self.time!r}; expected minutes, hours:minutes:seconds or "
                "days-hours:minutes:seconds, such as 12:00:00"
            )
        if not _MEMORY.fullmatch(self.mem_per_gpu):
            raise ConfigError(
                f"mem_per_gpu is {self.mem_per_gpu!r}; expected a number with K, M, G or T, such "
                "as 8G"
            )
        if self.gres not in (None, NO_GRES) and not _GRES.fullmatch(self.gres):
            raise ConfigError(
                f"gres is {self.gres!r}; expected gpu:1, gpu:TYPE:1 or {NO_GRES}. Other resources "
                "can be asked for with --sbatch_extra"
            )
        if self.cluster == "slurm" and self.gpus_per_node > 1:
            raise ConfigError(
                f"gres is {self.gres!r}; each job is one worker with one GPU (gpu:1). Set "
                "the number of jobs with --gpus"
            )
        for line in (*self.sbatch_extra, *self.submit_extra):
            _check_extra(line)

    @property
    def device_of_jobs(self) -> str:
        """What workers in SLURM jobs compute on, ``"cuda"`` or ``"cpu"``."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def requested(self) -> str | None:
        """What jobs ask for as ``--gres``, None for nothing."""
        if self.gres is None:
            return None if self.device == "cpu" else DEFAULT_GRES
        return None if self.gres == NO_GRES else self.gres

    @property
    def gpus_per_node(self) -> int:
        """GPUs that are requested with `gres`; 0 for none."""
        if self.requested is None:
            return 0
        last = self.requested.rpartition(":")[2]
        return int(last) if last.isdigit() else 1

    @property
    def megabytes_per_gpu(self) -> int:
        """`mem_per_gpu` in MB, as SLURM counts them."""
        found = _MEMORY.fullmatch(self.mem_per_gpu)
        assert found is not None
        factor = {"K": 1 / 1024, "M": 1, "": 1, "G": 1024, "T": 1024**2}[found[2].upper()]
        return max(1, round(int(found[1]) * factor))


def _check_extra(line: str) -> None:
    """Raise `ConfigError` unless `line` is an option that ``sbatch`` can be given besides ours."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ConfigError(f"{line!r} is not an option of sbatch: {error}") from error
    if not words or not words[0].startswith("-"):
        raise ConfigError(
            f"{line!r} is not an option of sbatch; expected something like --exclusive (write "
            "--sbatch_extra=--exclusive)"
        )
    name = words[0].partition("=")[0]
    if name in _NOT_ONE_JOB or re.match("-[aMW]", name):
        raise ConfigError(
            f"{line!r} cannot be passed to sbatch: each submission has to be one job, on the "
            "cluster that squeue shows, and to return at once; leave it out"
        )


SLURM_OPTIONS = (
    "gpus", "nodes", "partition", "account", "qos", "time", "cpus_per_gpu", "mem_per_gpu",
    "constraint", "gres", "prologue", "sbatch_extra", "submit_extra", "interface",
)  # fmt: skip
"""Options that only mean something to SLURM, and may stand in the site's file."""

JOB_OPTIONS = tuple(name for name in SLURM_OPTIONS if name != "interface")
"""Those that say what to ask SLURM for."""


def cluster_options(given: Mapping[str, Any]) -> ClusterOptions:
    """Return the options: those given, the site's for the rest, then defaults.

    Parameters
    ----------
    given : mapping
        Names that are not fields of `ClusterOptions` are passed over.

    Raises
    ------
    ConfigError
        For values that cannot be used, and options that do not go together.
    """
    chosen = {name: given[name] for name in settings_of(ClusterOptions) if name in given}
    cluster, submitted = chosen.get("cluster", "local"), given.get("submit", False)
    useful = options_for(cluster, submitted)
    if stray := [name for name in chosen if name not in useful]:
        raise ConfigError(_why_not(stray[0], cluster))
    if cluster == "slurm" and "workers" in chosen:
        if "gpus" in chosen:
            raise ConfigError("--workers and --gpus both set the number of jobs; give one")
        chosen["gpus"] = chosen.pop("workers")
    for name in _LISTS & chosen.keys():
        chosen[name] = tuple(chosen[name])
    site = site_settings() if cluster in ("slurm", "allocation") or submitted else {}
    if chosen.get("device") == "cpu":
        # It is for jobs with GPUs.
        site.pop("gres", None)
    return ClusterOptions(**{**site, **chosen})


def options_for(cluster: str, submitted: bool) -> set[str]:
    """Return the names of the options that a kind of cluster has a use for.

    Parameters
    ----------
    cluster : str
    submitted : bool
        Whether the launcher is to be submitted as a job, rather than started here.
    """
    useful = {"cluster", "device", "insecure"}
    if cluster == "connect":
        useful.add("scheduler")
    if cluster in ("local", "slurm"):
        useful.add("workers")
    if cluster == "slurm" or submitted:
        useful |= {*SLURM_OPTIONS}
    elif cluster == "allocation":
        # It exists already.
        useful.add("interface")
    return useful - {"slurm": {"nodes"}, "allocation": {"gpus"}}.get(cluster, set())


def _why_not(name: str, cluster: str) -> str:
    if name == "scheduler":
        return "--scheduler is for --cluster connect"
    if name == "workers":
        return (
            f"--workers is for local workers and SLURM jobs; with --cluster {cluster} there is one "
            "for each GPU"
        )
    if cluster == "slurm":
        return f"--{name} is for --cluster allocation; with --cluster slurm use --gpus"
    if cluster != "allocation":
        return f"--{name} is for jobs of SLURM; add --cluster slurm, or leave it out"
    if name == "gpus":
        return (
            "--gpus is for --cluster slurm; an allocation has a worker on each of its GPUs. "
            "Request them with --nodes and --gres"
        )
    return (
        f"--{name} is an option for new SLURM jobs, and this allocation already exists; give it to "
        "salloc or sbatch, or add --submit"
    )


def site_settings() -> dict[str, Any]:
    """Return the settings in the site's configuration file.

    Raises
    ------
    ConfigError
        Naming a key that there is not, or whose value has the wrong kind.
    """
    section = dask.config.get(SITE_KEY, None) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SITE_KEY} in Dask's configuration is {section!r}; expected a mapping")
    settings: dict[str, Any] = {}
    for key, value in section.items():
        name = str(key).replace("-", "_")
        if name not in SLURM_OPTIONS:
            raise ConfigError(
                f"{SITE_KEY}.{key} in Dask's configuration is not a setting; expected one of "
                f"{', '.join(SLURM_OPTIONS)}"
            )
        if value is not None:
            settings[name] = _site_value(name, value)
    return settings


def _site_value(name: str, value: Any) -> Any:
    one = settings_of(ClusterOptions)[name]
    if one.kind is str and type(value) is int and name != "time":
        value = str(value)
    return one.read(value, f"{SITE_KEY}.{name} in Dask's configuration")


def check_interface(name: str | None) -> None:
    """Raise `ConfigError` unless this host has a network interface of that name."""
    if name is not None and name not in (known := psutil.net_if_addrs()):
        raise ConfigError(
            f"interface is {name!r}, which this host does not have; expected one of "
            f"{', '.join(known)}"
        )

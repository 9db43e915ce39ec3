"""Options of every kind of cluster, with their checks.

Settings that all users of a site share, such as partition and account, can be kept in a file:
YAML under the key ``daskcurv.slurm``, in ``~/.config/dask/`` or wherever else Dask looks for its
configuration. Options on the command line override it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import dask
import psutil

from daskcurv.config import check_choice, check_positive
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
_LISTS = ("prologue", "sbatch_extra", "submit_extra")


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Options of the cluster.

    Attributes
    ----------
    cluster : {"local", "slurm", "allocation", "connect"}
    device : {"auto", "cuda", "cpu"}
        Device of the workers. ``"auto"`` is the GPU, except that local workers use the CPU if no
        GPU is visible.
    workers : int, optional
        Local worker processes.
    scheduler : str, optional
        Address, or file with the address, of the running Dask scheduler to connect to.
    insecure : bool
        Disable TLS.
    gpus : int
        Number of workers. Each is a separate job with one GPU (no GPU on CPUs).
    nodes : int
        Nodes of the allocation that ``--submit --cluster allocation`` requests.
    partition, account, qos, time, constraint : str, optional
        As for ``sbatch``.
    cpus_per_gpu : int
    mem_per_gpu : str
        As in ``sbatch --mem``: a number with K, M, G or T.
    gres : str, optional
        Resources that each job (with an allocation, each node) requests; ``"none"`` for nothing.
        By default one GPU, and nothing if workers compute on the CPU.
    prologue : tuple of str
        Shell lines that a job runs before its worker.
    sbatch_extra : tuple of str
        Further options of ``sbatch`` for jobs with GPUs: workers, or a submitted allocation.
    submit_extra : tuple of str
        Further options of ``sbatch`` for a submitted launcher whose workers are other jobs.
    interface : str, optional
        Network interface for connections between launcher and workers.
    """

    cluster: str = "local"
    device: str = "auto"
    workers: int | None = None
    scheduler: str | None = None
    insecure: bool = False
    gpus: int = 1
    nodes: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    cpus_per_gpu: int = 2
    mem_per_gpu: str = "8G"
    constraint: str | None = None
    gres: str | None = None
    prologue: tuple[str, ...] = ()
    sbatch_extra: tuple[str, ...] = ()
    submit_extra: tuple[str, ...] = ()
    interface: str | None = None

    def __post_init__(self) -> None:
        check_positive(
            workers=self.workers, gpus=self.gpus, nodes=self.nodes, cpus_per_gpu=self.cpus_per_gpu
        )
        check_choice("cluster", self.cluster, CLUSTERS)
        check_choice("device", self.device, DEVICES)
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
    names = {field.name for field in fields(ClusterOptions)}
    chosen = {name: value for name, value in given.items() if name in names}
    cluster = chosen.get("cluster", "local")
    slurm = cluster in ("slurm", "allocation") or given.get("submit", False)
    if not slurm and (stray := [name for name in SLURM_OPTIONS if name in chosen]):
        raise ConfigError(
            f"--{stray[0]} is for jobs of SLURM; add --cluster slurm, or leave it out"
        )
    if "workers" in chosen:
        if cluster in ("allocation", "connect"):
            raise ConfigError(
                f"--workers is for local workers and SLURM jobs; with --cluster {cluster} there is "
                "one for each GPU"
            )
        if cluster == "slurm":
            if "gpus" in chosen:
                raise ConfigError("--workers and --gpus both set the number of jobs; give one")
            chosen["gpus"] = chosen.pop("workers")
    if cluster == "allocation" and "gpus" in chosen:
        raise ConfigError(
            "--gpus is for --cluster slurm; an allocation has a worker on each of its GPUs. "
            "Request them with --nodes and --gres"
        )
    inside = cluster == "allocation" and not given.get("submit", False)
    if inside and (stray := [name for name in JOB_OPTIONS if name in chosen]):
        raise ConfigError(
            f"--{stray[0]} is an option for new SLURM jobs, and this allocation already exists; "
            "give it to salloc or sbatch, or add --submit"
        )
    if cluster == "slurm" and "nodes" in chosen:
        raise ConfigError("--nodes is for --cluster allocation; with --cluster slurm use --gpus")
    if cluster != "connect" and "scheduler" in chosen:
        raise ConfigError("--scheduler is for --cluster connect")
    for name in _LISTS:
        if name in chosen:
            chosen[name] = tuple(chosen[name])
    site = site_settings() if slurm else {}
    if chosen.get("device") == "cpu":
        # It is for jobs with GPUs.
        site.pop("gres", None)
    return ClusterOptions(**{**site, **chosen})


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
    where = f"{SITE_KEY}.{name} in Dask's configuration is {value!r}"
    if name in ("gpus", "nodes", "cpus_per_gpu"):
        if not isinstance(value, int):
            raise ConfigError(f"{where}; expected a whole number")
        return value
    if name in _LISTS:
        lines = value.splitlines() if isinstance(value, str) else value
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ConfigError(f"{where}; expected lines of text, or a list of them")
        return tuple(lines)
    if name == "time" and not isinstance(value, str):
        # YAML reads 12:00:00 as a number in base 60.
        raise ConfigError(f'{where}; write it in quotes, such as "12:00:00"')
    return str(value)


def check_interface(name: str | None) -> None:
    """Raise `ConfigError` unless this host has a network interface of that name."""
    if name is not None and name not in (known := psutil.net_if_addrs()):
        raise ConfigError(
            f"interface is {name!r}, which this host does not have; expected one of "
            f"{', '.join(known)}"
        )

"""The environment that SLURM's commands are run with.

Environment variables of ``sbatch`` override the lines of a job script, those of ``squeue`` and
``scancel`` hide jobs from the launcher, and those of ``srun`` change where a worker writes and when
it is ended. None of them is passed on, except for settings of the site that the launcher's options
do not set: account, partition and the like. The directives of a job script are repeated on
``sbatch``'s command line, which overrides them (`daskcurv.clusters.slurm.commands.submit`).
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

_COMMANDS = ("SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_", "SLURM_")
_CONNECTION = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""How the controller is reached."""

_SITE = {
    "SBATCH_ACCOUNT": ("--account", "-A"),
    "SBATCH_CONSTRAINT": ("--constraint", "-C"),
    "SBATCH_PARTITION": ("--partition", "-p"),
    "SBATCH_QOS": ("--qos", "-q"),
    "SBATCH_RESERVATION": ("--reservation",),
    "SBATCH_TIMELIMIT": ("--time", "-t"),
    "SBATCH_WCKEY": ("--wckey",),
}
"""Variables that are used if no option sets the same; each with the corresponding options."""

_ALLOCATION = ("SLURM_JOBID", "SLURM_NODE_ALIASES", "SLURM_STEPMGR", "SLURM_WORKING_CLUSTER")
"""Variables that describe the allocation to ``srun``, besides ``SLURM_JOB_…``."""

_REQUESTS = ("SLURM_CLUSTERS", "SLURM_HINT", "SLURM_HOSTFILE")
"""Variables of ``sbatch`` without its prefix."""

_STEP_REQUESTS = (
    "SLURM_CONSTRAINT", "SLURM_CONTAINER", "SLURM_EXCLUSIVE", "SLURM_GRES", "SLURM_PARTITION",
    "SLURM_RESERVATION", "SLURM_STDERRMODE", "SLURM_STDOUTMODE", "SLURM_TIMELIMIT",
    "SLURM_WORKING_DIR",
)  # fmt: skip
"""Variables of ``srun`` that no allocation sets by itself."""


def command_environment() -> dict[str, str]:
    """Return the environment for ``sbatch``, ``squeue``, ``scancel`` and ``scontrol``.

    Jobs inherit it. A launcher that is a job itself does not pass on what describes that job.
    """
    return _without_requests(lambda name: name in _SITE)


def step_environment() -> dict[str, str]:
    """Return the environment for ``srun`` inside an allocation: which one it is, and no requests.

    ``salloc --gpus=4`` leaves SLURM_GPUS=4 behind, and every step of one node would ask for four.
    """
    return _without_requests(lambda name: name in _ALLOCATION or name.startswith("SLURM_JOB_"))


def _without_requests(kept: Callable[[str], bool]) -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_COMMANDS) or name in _CONNECTION or kept(name)
    }


def tell_about_jobs(directives: Iterable[str]) -> None:
    """Log which of the user's variables are used for a job with these directives."""
    asked = {word.partition("=")[0] for word in directives}
    site = {name for name in _SITE if name in os.environ}
    used = {name for name in site if not asked.intersection(_SITE[name])}
    if used:
        log.info("from the environment: %s", _listed(used))
    requests = {name for name in os.environ if name.startswith("SBATCH_")}
    requests.update(name for name in _REQUESTS if name in os.environ)
    if ignored := requests - used:
        log.warning(
            "ignored: %s; jobs are requested by the options of this command (--sbatch_extra passes "
            "any option to sbatch)",
            _listed(ignored),
        )


def tell_about_steps() -> None:
    """Log which of the user's variables for ``srun`` are ignored."""
    requests = {name for name in os.environ if name.startswith("SRUN_")}
    requests.update(name for name in _STEP_REQUESTS if name in os.environ)
    if requests:
        log.warning("ignored: %s; workers take what the allocation has", _listed(requests))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name}={shlex.quote(os.environ[name])}" for name in sorted(names))

"""The launcher as a SLURM job of its own, for login nodes that allow no long processes.

With ``--cluster slurm`` the job needs no GPU: it submits its workers as further jobs. With
``--cluster allocation`` it includes the GPUs. When its time limit is near, the launcher stops with
exit code 3, and the job requeues itself until nothing is left to do.
"""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from daskcurv.clusters.options import JOB_OPTIONS, ClusterOptions
from daskcurv.clusters.slurm import commands as slurm_commands
from daskcurv.clusters.slurm.commands import SlurmError
from daskcurv.clusters.slurm.environment import tell_about_jobs
from daskcurv.errors import ClusterError, ConfigError
from daskcurv.logs import LAUNCHER_LOG, LOG_DIR

log = logging.getLogger(__name__)

LAUNCHER_CPUS = 2
LAUNCHER_MEGABYTES = 4096

_SCRIPT = """\
#!/bin/bash
{directives}
{prologue}
# No set -e from here on: the launcher's exit code says how to go on.
set +e
cd {directory}
{command}
code=$?
if [ $code -eq 3 ]; then
    # The time limit came before the end; what is finished is kept.
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def launcher_script(options: ClusterOptions, words: Sequence[str]) -> str:
    """Return the script of the launcher's job.

    Parameters
    ----------
    options : ClusterOptions
    words : sequence of str
        The command line.

    Raises
    ------
    ConfigError
        If workers would be on this machine, and so in the job.
    """
    if options.cluster not in ("slurm", "allocation"):
        raise ConfigError(
            "--submit needs --cluster slurm (workers in jobs of their own) or --cluster allocation "
            "(workers inside the submitted job)"
        )
    pairs = [
        ("job-name", "daskcurv"),
        ("output", str(LOG_DIR.absolute() / LAUNCHER_LOG.format(job="%j"))),
        ("open-mode", "append"),
        ("partition", options.partition),
        ("account", options.account),
        ("qos", options.qos),
        ("time", options.time),
    ]
    if options.cluster == "slurm":
        pairs += [
            ("nodes", "1"),
            ("ntasks", "1"),
            ("cpus-per-task", str(LAUNCHER_CPUS)),
            ("mem", f"{LAUNCHER_MEGABYTES}M"),
        ]
    else:
        workers = max(1, options.gpus_per_node)
        pairs += [
            ("nodes", str(options.nodes)),
            ("ntasks-per-node", str(workers)),
            ("cpus-per-task", str(options.cpus_per_gpu)),
            ("mem", f"{options.megabytes_per_gpu * workers + LAUNCHER_MEGABYTES}M"),
            ("gres", options.requested),
            ("constraint", options.constraint),
        ]
    extra = options.sbatch_extra if options.cluster == "allocation" else options.submit_extra
    directives = [f"--{name}={shlex.quote(value)}" for name, value in pairs if value]
    directives += ["--requeue", *extra]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        prologue="\n".join(["set -e", *options.prologue]),
        directory=shlex.quote(str(Path.cwd())),
        command=shlex.join(
            [sys.executable, "-m", "daskcurv", *_of_the_job(words, options.cluster)]
        ),
    )


def _of_the_job(words: Sequence[str], cluster: str) -> list[str]:
    """Return the command line for use inside the job: without the options that requested it."""
    kept = []
    # Inside an allocation, options that describe the allocation have no use.
    left_out = {f"--{name}" for name in JOB_OPTIONS} if cluster == "allocation" else set()
    following = iter(words)
    for word in following:
        name, has_value, _ = word.partition("=")
        if name in left_out:
            if not has_value:
                next(following, None)
        elif name not in ("--submit", "--print_job_script"):
            kept.append(word)
    return kept


def submit(script: str) -> tuple[str, Path]:
    """Submit a launcher's script; return the job's id and where its log will be.

    Raises
    ------
    ClusterError
        With SLURM's reason if it is refused.
    """
    slurm_commands.check_installed("sbatch", "scontrol")
    LOG_DIR.mkdir(exist_ok=True)
    tell_about_jobs(slurm_commands.directives(script))
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            job = slurm_commands.submit(Path(file.name))
        except SlurmError as error:
            raise ClusterError(f"SLURM did not accept the job: {error}") from error
    if slurm_commands.show(job).get("JobId") != job:
        log.warning("SLURM does not know of job %s; squeue --me lists yours", job)
    return job, LOG_DIR.absolute() / LAUNCHER_LOG.format(job=job)

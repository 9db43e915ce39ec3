"""SLURM's commands, asked and understood.

Nothing here decides anything: text goes in, plain data come out.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass

from daskcurv.errors import ClusterError

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 60.0
_TRANSIENT = (
    "socket timed out",
    "unable to contact slurm controller",
    "resource temporarily unavailable",
    "slurmctld communications",
    "did not answer within",
    "zero bytes were transmitted",
    "backup controller in standby",
    "protocol authentication error",
)


class SlurmError(ClusterError):
    """A command of SLURM failed; the text is SLURM's."""

    @property
    def transient(self) -> bool:
        """Whether the controller was busy or away, rather than unwilling."""
        text = str(self).lower()
        return any(phrase in text for phrase in _TRANSIENT)


@dataclass(frozen=True)
class Job:
    """A job as SLURM sees it.

    Attributes
    ----------
    id : str
    state : str
        SLURM's word for it, such as ``"PENDING"``.
    reason : str
        Why it is pending, or why it ended.
    node : str
        Where it runs or ran; empty if nowhere yet.
    exit_code : str
        ``status:signal``; empty if not known.
    """

    id: str
    state: str
    reason: str = ""
    node: str = ""
    exit_code: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it waits in the queue."""
        return self.state in (
            "PENDING",
            "REQUEUED",
            "REQUEUE_HOLD",
            "SPECIAL_EXIT",
            "RESV_DEL_HOLD",
        )

    @property
    def is_running(self) -> bool:
        """Whether it is on a node, or on its way there."""
        return self.state in ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING")

    @property
    def is_ending(self) -> bool:
        """Whether SLURM is still clearing up after it; it may yet be requeued."""
        return self.state in ("COMPLETING", "SIGNALING", "STAGE_OUT")


def call(*command: str, text_in: str | None = None) -> str:
    """Run a command, perhaps with something to read, and return what it printed.

    Raises
    ------
    SlurmError
        With what the command said if it failed, was not there, or did not answer.
    """
    try:
        done = subprocess.run(
            command,
            env=_environment(),
            input=text_in,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} did not answer within {_PATIENCE_SECONDS:.0f} s") from error
    if done.returncode:
        raise SlurmError(said(done.stderr) or f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Return this process's environment without the user's preferences for what is listed."""
    preferences = ("SQUEUE_", "SCANCEL_", "SCONTROL_")
    return {k: v for k, v in os.environ.items() if not k.startswith(preferences)}


def said(stderr: str) -> str:
    """Return the errors among what a command of SLURM printed, without its prefixes."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(line for line in lines if line)


def check_installed(*commands: str) -> None:
    """Raise `ClusterError` unless all of `commands` are to be found."""
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        raise ClusterError(
            f"SLURM's {', '.join(missing)} cannot be found; run this on a login node of the "
            "cluster (perhaps after module load slurm), or use --cluster local"
        )


def queue(name: str) -> dict[str, Job]:
    """Return the jobs of a name by id, those that ended a short while ago among them."""
    text = call(
        "squeue", "--noheader", "--all", "--states=all", "--format=%i|%T|%r|%N",
        f"--user={getpass.getuser()}", f"--name={name}",
    )  # fmt: skip
    jobs = {}
    for line in text.splitlines():
        job_id, state, reason, node = line.strip().split("|", 3)
        jobs[job_id] = Job(job_id, state, reason, node)
    return jobs


def show(job_id: str) -> Mapping[str, str]:
    """Return what ``scontrol show job`` says, empty if SLURM has forgotten the job."""
    try:
        text = call("scontrol", "--oneliner", "--details", "show", "job", job_id)
    except SlurmError as error:
        log.debug("job %s: %s", job_id, error)
        return {}
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def cancel(name: str) -> None:
    """Cancel all jobs of a name."""
    call("scancel", "--quiet", f"--user={getpass.getuser()}", f"--name={name}")


def seconds_left(job_id: str) -> float | None:
    """Return the time until a job's limit, or None if it has none or SLURM does not tell."""
    for wait in (1.0, 10.0, None):
        try:
            text = call("squeue", "--noheader", f"--jobs={job_id}", "--format=%L").strip()
        except SlurmError as error:
            if wait is None:
                log.warning("the time limit of job %s is not known: %s", job_id, error)
                return None
            time.sleep(wait)
            continue
        return parse_duration(text)
    return None


def parse_duration(text: str) -> float | None:
    """Return the seconds of a duration as SLURM prints them, or None if it is not one.

    Examples
    --------
    >>> parse_duration("1-02:00:05"), parse_duration("9:58"), parse_duration("UNLIMITED")
    (93605.0, 598.0, None)
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def nodes_of(job_id: str) -> dict[str, int]:
    """Return the nodes of a job, each with the number of GPUs the job has there.

    Raises
    ------
    SlurmError
    """
    text = call("scontrol", "--details", "show", "job", job_id)
    nodes = {}
    for names, rest in re.findall(r"^\s*Nodes=(\S+) (CPU_IDs=.*)$", text, re.MULTILINE):
        counts = re.findall(r"gpu(?::[^:,()\s]+)?:(\d+)", rest)
        for name in call("scontrol", "show", "hostnames", names).split():
            nodes[name] = sum(map(int, counts))
    return nodes

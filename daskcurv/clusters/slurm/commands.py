"""SLURM's commands, run and parsed.

Nothing here decides anything: text goes in, plain data come out. A site may wrap a command in one
that prints more, so answers are looked for among the lines, and checked.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from daskcurv.clusters.slurm.environment import command_environment
from daskcurv.errors import ClusterError

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 60.0
_DIRECTIVE = "#SBATCH "
_IN_QUEUE = re.compile(r"(\d+(?:_\S+|\+\d+)?)\|([A-Z_]+)\|([^|]*)\|([^|]*)\|(.*)")
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
        """Whether the controller was busy or unreachable, rather than refusing."""
        text = str(self).lower()
        return any(phrase in text for phrase in _TRANSIENT)


@dataclass(frozen=True)
class Job:
    """A job as SLURM sees it.

    Attributes
    ----------
    id : str
    state : str
        SLURM's state, such as ``"PENDING"``.
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
        """Whether it is on a node, or about to be."""
        return self.state in ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING")

    @property
    def is_ending(self) -> bool:
        """Whether SLURM is still clearing up after it; it may still be requeued."""
        return self.state in ("COMPLETING", "SIGNALING", "STAGE_OUT")


def call(*command: str) -> str:
    """Run a command and return what it printed.

    Raises
    ------
    SlurmError
        With what the command said if it failed, was not there, or did not answer.
    """
    try:
        done = subprocess.run(
            command,
            env=command_environment(),
            stdin=subprocess.DEVNULL,
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


def said(stderr: str) -> str:
    """Return the errors among what a command of SLURM printed, without its prefixes."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in stderr.splitlines()]
    return "; ".join(line for line in lines if line)


def check_installed(*commands: str) -> None:
    """Raise `ClusterError` unless all of `commands` are installed."""
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        raise ClusterError(
            f"SLURM's {', '.join(missing)} cannot be found; run this on a login node of the "
            "cluster (perhaps after module load slurm), or use --cluster local"
        )


def directives(script: str) -> list[str]:
    """Return the words of a script's ``#SBATCH`` lines, which end with the first command."""
    head = takewhile(lambda line: not line or line.startswith("#"), script.splitlines())
    lines = [line.removeprefix(_DIRECTIVE) for line in head if line.startswith(_DIRECTIVE)]
    return [word for line in lines for word in shlex.split(line)]


def submit(script: Path) -> str:
    """Submit a job script and return the job's id.

    Its directives are given on the command line too: there they win over environment variables and
    a user's file of defaults.

    Raises
    ------
    SlurmError
        If it is refused, or the answer has no job id.
    """
    answer = call("sbatch", "--parsable", *directives(script.read_text()), str(script))
    job_id = _job_id(answer)
    if job_id is None:
        raise SlurmError(
            f"sbatch answered {answer.strip()!r}, without the id of a job; if there is a job "
            "nevertheless, squeue --me lists it"
        )
    return job_id


def _job_id(answer: str) -> str | None:
    """Return the id in an answer of ``sbatch``, which a site may have made longer.

    ``--parsable`` makes it ``4711`` or ``4711;cluster``, which a wrapper need not pass on.
    """
    lines = [line.strip() for line in answer.splitlines()]
    for form in (r"Submitted batch job (\d+)(?: on cluster \S+)?", r"(\d+)(?:;\S+)?"):
        if ids := [found[1] for line in lines if (found := re.fullmatch(form, line))]:
            return ids[-1]
    return None


def queue(run: str, ids: Collection[str] = ()) -> dict[str, Job]:
    """Return a run's jobs by id, including those that ended a short while ago.

    Parameters
    ----------
    run : str
        In the name of the jobs, or in their comment: a site may change either.
    ids : collection of str
        Further jobs that belong to the run.
    """
    # By number: the name in LOGNAME need not be the user's.
    text = call(
        "squeue", "--noheader", "--all", "--states=all", "--format=%i|%T|%r|%N|%j|%k",
        f"--user={os.getuid()}",
    )  # fmt: skip
    jobs = {}
    for line in text.splitlines():
        if match := _IN_QUEUE.fullmatch(line.strip()):
            job_id, state, reason, node, labels = match.groups()
            if job_id in ids or run in labels:
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


def cancel(run: str, ids: Collection[str] = ()) -> None:
    """Cancel all jobs of a run; see `queue`."""
    call("scancel", "--quiet", f"--user={os.getuid()}", f"--name={run}")
    # Those that the site has renamed.
    jobs = queue(run, ids).values()
    if left := sorted(job.id for job in jobs if job.is_waiting or job.is_running):
        call("scancel", "--quiet", *left)


def seconds_left(job_id: str) -> float | None:
    """Return the time until a job's limit, or None if it has none or SLURM does not tell."""
    for wait in (1.0, 10.0, None):
        try:
            text = call("squeue", "--noheader", f"--jobs={job_id}", "--format=%L")
        except SlurmError as error:
            if wait is None:
                log.warning("the time limit of job %s is not known: %s", job_id, error)
                return None
            time.sleep(wait)
            continue
        lines = [parse_duration(line.strip()) for line in text.splitlines()]
        return next((left for left in reversed(lines) if left is not None), None)
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
        If SLURM does not answer, or names another number of nodes than the job has.
    """
    text = call("scontrol", "--details", "show", "job", job_id)
    nodes = {}
    for names, rest in re.findall(r"^\s*Nodes=(\S+) (CPU_IDs=.*)$", text, re.MULTILINE):
        counts = re.findall(r"gpu(?::[^:,()\s]+)?:(\d+)", rest)
        for line in call("scontrol", "show", "hostnames", names).splitlines():
            if re.fullmatch(r"\s*[\w.-]+\s*", line):
                nodes[line.strip()] = sum(map(int, counts))
    expected = re.search(r"\bNumNodes=(\d+)", text)
    if expected is None or int(expected[1]) != len(nodes):
        raise SlurmError(
            f"scontrol names {len(nodes)} nodes of job {job_id} ({', '.join(nodes) or 'none'}), "
            f"which has {expected[1] if expected else 'none'}; see what scontrol show job and "
            "scontrol show hostnames print"
        )
    return nodes

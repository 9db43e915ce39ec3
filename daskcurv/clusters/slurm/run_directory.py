"""The directory that a run keeps beside its store: credentials, and the list of its jobs.

A launcher that ends normally, by an error or by a signal removes the directory and cancels the
jobs. One that is killed cannot; a guard does it instead: a shell that waits until the launcher's
end of a pipe is closed. If the guard was killed too, the next launch on the same store does it,
which is safe because it holds the store's lock.

Meanwhile another launcher, which took over the lock, may have made a directory of the same name.
Launcher and guard keep their own directory open to distinguish the two, and do not touch the other.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from distributed.security import Security

from daskcurv.clusters.slurm import commands as slurm_commands
from daskcurv.clusters.slurm.commands import SlurmError
from daskcurv.clusters.slurm.environment import command_environment
from daskcurv.errors import ClusterError

log = logging.getLogger(__name__)

_JOBS = "jobs.json"
_JOB_IDS = "job_ids"
_GUARD_TRIES = 100
_GUARD_PAUSE_SECONDS = 10
_GUARD = """
trap '' HUP INT TERM
cat > /dev/null
rm -f ./*.pem
tries=0
until [ -z "$3" ] || {
    scancel --quiet --user="$2" --name="$3" &&
    squeue --noheader --user="$2" --format=%i | grep -xF -f ./job_ids | xargs -r scancel --quiet
}; do
    tries=$((tries + 1))
    [ $tries -lt "$4" ] || exit 1
    sleep "$5"
done
[ . -ef "$1" ] && rm -rf "$1"
"""
"""Its working directory is the run's."""


@contextmanager
def run_directory(path: Path, job_name: str | None = None) -> Iterator[Path]:
    """Provide a private directory for as long as the context lasts.

    Parameters
    ----------
    path : Path
        One that exists is what a killed launcher left; its jobs are cancelled first.
    job_name : str, optional
        Name of the SLURM jobs that are to end with the launcher.

    Yields
    ------
    Path
        `path`, empty, with mode 0700.

    Raises
    ------
    ClusterError
        If it cannot be created, or the jobs that it names cannot be cancelled.
    """
    _clear(path)
    try:
        path.mkdir(mode=0o700, parents=True)
        path.chmod(0o700)
        if job_name:
            (path / _JOBS).write_text(json.dumps({"name": job_name}))
            (path / _JOB_IDS).touch()
        made = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ClusterError(f"cannot create {path}: {error.strerror}") from error
    guard = subprocess.Popen(
        [
            "sh", "-c", _GUARD, "sh", str(path.absolute()), str(os.getuid()), job_name or "",
            str(_GUARD_TRIES), str(_GUARD_PAUSE_SECONDS),
        ],
        cwd=path,
        env=command_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield path
    finally:
        try:
            if _is_still(path, made):
                _clear(path, _recorded_ids(path))
            elif job_name:
                slurm_commands.cancel(job_name)
        except SlurmError as error:
            log.warning("jobs could not be cancelled; the guard process keeps trying: %s", error)
            assert guard.stdin is not None
            guard.stdin.close()
            # It outlives this process, which does not wait for it.
            guard.returncode = 0
        else:
            with guard:
                guard.kill()
        finally:
            os.close(made)


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether an open directory is the one that has the name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def record_job(path: Path, job_id: str) -> None:
    """Note in a run's directory that a job belongs to the run, whatever name a site gives it."""
    with open(path / _JOB_IDS, "a") as file:
        file.write(f"{job_id}\n")


def _recorded_ids(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return (path / _JOB_IDS).read_text().split()
    return []


def _clear(path: Path, ids: Sequence[str] = ()) -> None:
    """Cancel the jobs that a directory names, and remove it.

    Parameters
    ----------
    path : Path
    ids : sequence of str
        Further jobs to cancel. Not those that an earlier launcher recorded, as long ago SLURM may
        have given an id to another job.

    Raises
    ------
    SlurmError
        If they cannot be cancelled; the directory then still names them.
    """
    if not path.exists():
        return
    name = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        name = str(json.loads((path / _JOBS).read_text())["name"])
    if name:
        for key in path.glob("*.pem"):
            key.unlink(missing_ok=True)
        slurm_commands.cancel(name, ids)
    shutil.rmtree(path, ignore_errors=True)


def open_credentials(directory: Path, insecure: bool) -> Security | None:
    """Make credentials, or warn of what it means to have none."""
    if not insecure:
        return credentials(directory)
    log.warning("--insecure: no TLS; anyone who can reach this host can run programs as you")
    return None


def credentials(directory: Path) -> Security:
    """Make temporary TLS credentials, as files that only their owner can read.

    Whoever has them can talk to scheduler and workers, and so run code as their owner.

    Parameters
    ----------
    directory : Path
        On a file system that the workers see.

    Raises
    ------
    ClusterError
        If they cannot be made, or not be kept from other users.
    """
    if (mode := stat.S_IMODE(directory.stat().st_mode)) & 0o077:
        raise ClusterError(
            f"{directory} cannot be kept from other users: its file system gives it mode {mode:o}, "
            "so credentials in it would not be secret. Put --store on another file system, or "
            "disable TLS with --insecure"
        )
    try:
        made = Security.temporary()
    except ImportError as error:
        raise ClusterError(
            f"no TLS between processes: {error}. Install the package cryptography, or disable "
            "TLS with --insecure"
        ) from error
    files = {}
    for name in ("tls_ca_file", "tls_scheduler_cert", "tls_scheduler_key"):
        path = directory / f"{name}.pem"
        try:
            path.touch(mode=0o600)
            path.write_text(getattr(made, name))
        except OSError as error:
            raise ClusterError(f"cannot write credentials to {path}: {error.strerror}") from error
        files[name] = str(path)
    roles = {
        f"tls_{role}_{kind}": files[f"tls_scheduler_{kind}"]
        for role in ("client", "scheduler", "worker")
        for kind in ("cert", "key")
    }
    return Security(require_encryption=True, tls_ca_file=files["tls_ca_file"], **roles)

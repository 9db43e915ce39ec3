"""A real SLURM on this machine, for tests: several nodes, fake GPUs, no system service.

Debian's ``slurmctld``, ``slurmd`` and ``slurm-client`` (and ``munge``, when run as root) are all it
needs; it comes up in a tenth of a second. One directory holds everything, ports are free ones on
loopback, and nothing is written to ``/etc``.

The daemons belong to a supervisor process, which ends them when its standard input closes, so also
when the tests are killed. It is a subreaper: jobs detach from their daemons, and their processes
come down to it instead of to init, so none is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "salloc", "squeue", "scontrol", "scancel")

# Device files that exist everywhere can pose as GPUs: SLURM hands them out, nobody opens them.
_GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
_SET_CHILD_SUBREAPER = 36
_START_SECONDS = 30.0
_STOP_SECONDS = 10.0


def missing_programs() -> list[str]:
    """Return the programs that this machine lacks."""
    needed = (*PROGRAMS, "munged") if os.geteuid() == 0 else PROGRAMS
    return [name for name in needed if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class MiniSlurm:
    """A SLURM cluster that lives as long as the context.

    Parameters
    ----------
    nodes, cpus, gpus : int
        Nodes, and what each of them has.
    partitions : mapping
        Settings of each partition in ``slurm.conf`` by its name; the first is the default.
    """

    def __init__(self, nodes: int, cpus: int, gpus: int, partitions: dict[str, str]):
        # Not below pytest's directories: SLURM's sockets need short paths, munge open parents.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"node{number}" for number in range(nodes)]
        self.conf = self.root / "slurm.conf"
        self._earlier: set[str] = set()
        self._write_configuration(cpus, gpus, partitions)
        self._supervisor: subprocess.Popen[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to see this cluster and no other."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "PATH": _path(), "SLURM_CONF": str(self.conf)}

    def __enter__(self) -> Self:
        errors = self.root / "supervisor.err"
        with open(errors, "w") as sink:
            self._supervisor = subprocess.Popen(
                [sys.executable, __file__, str(self.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=self.environment,
                text=True,
                start_new_session=True,
            )
        assert self._supervisor.stdout is not None
        if self._supervisor.stdout.readline().strip() != "ready":
            self._stop()
            raise RuntimeError(f"SLURM did not start:\n{errors.read_text()}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def _stop(self) -> None:
        assert self._supervisor is not None
        self._supervisor.communicate(timeout=60)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of SLURM and return what it printed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self, *states: str) -> list[str]:
        """Return the ids of the jobs in the queue, by default of all that have not ended.

        Those from before the last reset, which SLURM remembers for minutes, are left out.
        """
        chosen = [f"--states={','.join(states)}"] if states else []
        listed = self.run("squeue", "--noheader", "--format=%i", *chosen).split()
        return [job for job in listed if job not in self._earlier]

    def job(self, job: str) -> dict[str, str]:
        """Return what SLURM knows of a job."""
        shown = self.run("scontrol", "--details", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def resume(self, node: str) -> None:
        """Bring a node back that was set down; one that is back by itself already stays so."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def reset(self) -> None:
        """Cancel all jobs, wait until all nodes are idle, and forget the jobs."""
        self.run("scancel", f"--user={getpass.getuser()}", check=False)
        for node in self.nodes:
            self.resume(node)
        idle = ["idle"] * len(self.nodes)
        wait_for(
            lambda: not self.jobs() and self.run("sinfo", "-hNo%T", "-plow").split() == idle, 30
        )
        self._earlier.update(self.jobs("all"))

    def _write_configuration(self, cpus: int, gpus: int, partitions: dict[str, str]) -> None:
        root, host, user = self.root, socket.gethostname().split(".")[0], getpass.getuser()
        root.chmod(0o755)
        for name in ("state", "log", "munge", *(f"spool/{node}" for node in self.nodes)):
            (root / name).mkdir(parents=True)
        munge = os.geteuid() == 0
        controller, *ports = _free_ports(1 + len(self.nodes))
        settings = {
            "ClusterName": "mini",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": user,
            "SlurmdUser": user,
            "AuthType": "auth/munge" if munge else "auth/none",
            "CredType": "cred/munge" if munge else "cred/none",
            # A requeued job may start again when its credential has expired, by default 120 s.
            "AuthInfo": (f"socket={root}/munge/socket," if munge else "") + "cred_expire=5",
            "StateSaveLocation": root / "state",
            "SlurmdSpoolDir": root / "spool/%n",
            "SlurmctldPidFile": root / "slurmctld.pid",
            "SlurmdPidFile": root / "slurmd-%n.pid",
            "SlurmctldLogFile": root / "log/slurmctld.log",
            "SlurmdLogFile": root / "log/slurmd-%n.log",
            "PlugStackConfig": root / "plugstack.conf",
            "MailProg": "/bin/true",
            "MpiDefault": "none",
            "MessageTimeout": 5,
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1",
            # Nodes may claim more than this machine has.
            "SlurmdParameters": "config_overrides",
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "ReturnToService": 2,
            "KillWait": 3,
            "GresTypes": "gpu",
        }
        if _is_loopback(host):
            settings["CommunicationParameters"] = "NoCtldInAddrAny,NoInAddrAny"
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
            f"RealMemory=32000 Gres=gpu:{gpus}"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        for number, (name, extra) in enumerate(partitions.items()):
            default = "YES" if number == 0 else "NO"
            lines.append(
                f"PartitionName={name} Nodes={','.join(self.nodes)} Default={default} {extra}"
            )
        self.conf.write_text("\n".join([*lines, ""]))
        devices = [f"Name=gpu File={path} Flags=nvidia_gpu_env" for path in _GPU_FILES[:gpus]]
        (root / "gres.conf").write_text("\n".join(["AutoDetect=off", *devices, ""]))
        # Never used; without it slurmd looks for a kind of cgroups, and some machines have none.
        (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (root / "plugstack.conf").touch()
        (root / "cluster.json").write_text(
            json.dumps({"nodes": self.nodes, "port": controller, "munge": munge})
        )


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """Return what `condition` returns once that is true; fail if it takes too long."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


class _Supervisor:
    """Owns the daemons of a cluster, and in the end every process of its jobs."""

    def __init__(self, root: Path):
        self.root = root
        self._cluster = json.loads((root / "cluster.json").read_text())
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._deadline = time.monotonic() + _START_SECONDS

    def start(self) -> None:
        """Bring all daemons up, each when the one it needs answers."""
        conf = str(self.root / "slurm.conf")
        if self._cluster["munge"]:
            self._start_munge()
        self._spawn("slurmctld", "slurmctld", "-D", "-c", "-f", conf)
        self._until(self._controller_listens)
        for node in self._cluster["nodes"]:
            self._spawn(f"slurmd-{node}", "slurmd", "-D", "-f", conf, "-N", node)
        self._until(self._all_idle)

    def _start_munge(self) -> None:
        directory = self.root / "munge"
        key = directory / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        options = {
            "key-file": key,
            "socket": directory / "socket",
            "pid-file": directory / "pid",
            "log-file": directory / "log",
            "seed-file": directory / "seed",
        }
        words = [f"--{name}={path}" for name, path in options.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *words)
        self._until((directory / "socket").exists)

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.root / "log" / f"{name}.out", "wb") as output:
            self._daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.root
            )

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for name, daemon in self._daemons.items():
                said = (self.root / "log" / f"{name}.out").read_text()
                if daemon.poll() is not None or " fatal: " in said:
                    raise RuntimeError(f"{name} died: {said}")
            if time.monotonic() > self._deadline:
                raise RuntimeError(f"not up after {_START_SECONDS} s")
            time.sleep(0.02)

    def _controller_listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._cluster["port"]), 0.2).close()
        except OSError:
            return False
        return True

    def _all_idle(self) -> bool:
        states = _output("sinfo", "-hNo%T").split()
        return bool(states) and set(states) == {"idle"}

    def wait(self) -> None:
        """Reap orphans until standard input closes."""
        daemons = {daemon.pid for daemon in self._daemons.values()}
        while not (select.select([0], [], [], 0.5)[0] and not os.read(0, 1)):
            for child in psutil.Process().children():
                if child.pid not in daemons:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(child.pid, os.WNOHANG)

    def stop(self) -> None:
        """End jobs, then daemons, then whatever is left, each by process id."""
        controller = self._daemons.get("slurmctld")
        if controller is not None and controller.poll() is None:
            _output("scancel", f"--user={getpass.getuser()}")
            deadline = time.monotonic() + _STOP_SECONDS
            while _output("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.1)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
        left = psutil.Process().children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_SECONDS)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout


def _supervise(arguments: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    supervisor = _Supervisor(Path(arguments[0]))
    try:
        supervisor.start()
        print("ready", flush=True)
        supervisor.wait()
    finally:
        supervisor.stop()


if __name__ == "__main__":
    _supervise(sys.argv[1:])

"""What SLURM's commands are given, and what is made of their answers; here they are scripts."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from daskcurv.clusters.base import Reason, Why, Workers
from daskcurv.clusters.options import ClusterOptions
from daskcurv.clusters.slurm import cluster as slurm
from daskcurv.clusters.slurm import commands as slurm_commands
from daskcurv.clusters.slurm.cluster import SlurmFleet
from daskcurv.clusters.slurm.commands import Job, SlurmError, parse_duration
from daskcurv.clusters.slurm.environment import (
    command_environment,
    step_environment,
    tell_about_jobs,
    tell_about_steps,
)
from daskcurv.clusters.slurm.job_script import job_script, start_cluster
from daskcurv.clusters.slurm.submit import launcher_script, submit
from daskcurv.errors import ClusterError
from tests.support.builders import write_command
from tests.support.slurm import HOSTILE

Pose = Callable[[str, str], None]


@pytest.fixture
def pose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pose:
    """Has a script pose as a command; it starts in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return lambda name, body: write_command(tmp_path / "bin" / name, body)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
        monkeypatch.delenv(name)


# Their environment.


def test_no_variable_changes_what_was_asked_for_or_is_seen(monkeypatch):
    set_all(monkeypatch, {**HOSTILE, "SLURM_CONF": "/etc/slurm.conf", "CUDA_HOME": "/cuda"})
    shown = slurm_commands.call("env").splitlines()
    assert {line.partition("=")[0] for line in shown}.isdisjoint(HOSTILE)
    assert "SLURM_CONF=/etc/slurm.conf" in shown
    assert "CUDA_HOME=/cuda" in shown


def test_a_launcher_that_is_a_job_does_not_describe_itself_to_its_workers(monkeypatch):
    # A restart count that they inherited would be part of their workers' names.
    set_all(
        monkeypatch, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_MEM_PER_NODE": "9"}
    )
    assert not [name for name in command_environment() if name.startswith("SLURM_")]


def test_steps_are_told_which_allocation_they_are_in_and_nothing_else(monkeypatch):
    without_slurm(monkeypatch)
    described = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CONF": "/etc/slurm.conf",
    }  # fmt: skip
    asked = {
        "SLURM_GPUS": "4", "SLURM_NTASKS": "4", "SLURM_TRES_PER_TASK": "gres:gpu:1",
        "SLURM_MEM_PER_CPU": "900G", "SLURM_TIMELIMIT": "1", "SLURM_STDOUTMODE": "/nowhere/x",
        "SLURM_EXPORT_ENV": "NONE", "SLURM_CPU_BIND": "map_cpu:0", "SLURM_GRES": "gpu:9",
        "SLURM_EXCLUSIVE": "1", "SLURM_WORKING_DIR": "/", "SRUN_EXPORT_ENV": "NONE",
        "SRUN_CPUS_PER_TASK": "64", "SLURM_CLUSTERS": "other", "SLURM_TEST_EXEC": "1",
    }  # fmt: skip
    set_all(monkeypatch, {**described, **asked})
    kept = step_environment()
    assert {
        name: value for name, value in kept.items() if name.startswith(("SLURM_", "SRUN_"))
    } == described
    assert kept["PATH"] == os.environ["PATH"]


SITE = {
    "SBATCH_ACCOUNT": "lab", "SBATCH_PARTITION": "gpu", "SBATCH_QOS": "high",
    "SBATCH_RESERVATION": "course", "SBATCH_TIMELIMIT": "7", "SBATCH_CONSTRAINT": "a100",
}  # fmt: skip


def test_what_a_site_sets_counts_where_nothing_else_was_asked_for(monkeypatch, pose, caplog):
    without_slurm(monkeypatch)
    set_all(monkeypatch, {**SITE, "SBATCH_JOB_NAME": "mine"})
    caplog.set_level("INFO")
    # sbatch knows its own rules: what its command line says wins over its environment.
    pose("sbatch", 'env | grep ^SBATCH > environment; printf "%s\\n" "$@" > arguments; echo 12')
    options = ClusterOptions(
        cluster="slurm", partition="low", sbatch_extra=("--reservation=mine", "-q low")
    )
    script = Path("script.sh")
    script.write_text(job_script(options))
    assert slurm_commands.submit(script) == "12"
    passed = dict(line.split("=") for line in Path("environment").read_text().splitlines())
    assert passed == SITE
    arguments = Path("arguments").read_text().splitlines()
    assert arguments[0] == "--parsable"
    assert arguments[-1] == "script.sh"
    assert arguments[arguments.index("-p") + 1] == "low"
    assert {"--reservation=mine", "-q", "low"} <= set(arguments)
    assert not {"-t", "-A"} & set(arguments)

    tell_about_jobs(slurm_commands.directives(script.read_text()))
    used, ignored = (record.message for record in caplog.records)
    assert used == (
        "from the environment: SBATCH_ACCOUNT=lab, SBATCH_CONSTRAINT=a100, SBATCH_TIMELIMIT=7"
    )
    assert ignored.startswith(
        "ignored: SBATCH_JOB_NAME=mine, SBATCH_PARTITION=gpu, SBATCH_QOS=high, "
        "SBATCH_RESERVATION=course; "
    )


def test_nothing_is_said_where_nothing_is_set(monkeypatch, caplog):
    without_slurm(monkeypatch)
    caplog.set_level("INFO")
    tell_about_jobs(["-p", "gpu"])
    tell_about_steps()
    assert not caplog.records
    set_all(monkeypatch, {"SRUN_EXPORT_ENV": "NONE", "SLURM_TIMELIMIT": "1"})
    tell_about_steps()
    assert "ignored: SLURM_TIMELIMIT=1, SRUN_EXPORT_ENV=NONE" in caplog.text


def test_every_line_of_a_script_is_said_on_the_command_line(tmp_path, monkeypatch):
    directory = tmp_path / "my runs"
    directory.mkdir()
    monkeypatch.chdir(directory)
    options = ClusterOptions(
        cluster="slurm",
        constraint="a100|h100",
        time="60",
        prologue=("#SBATCH --comment=after-the-first-command",),
    )
    for script in (job_script(options), launcher_script(options, ["launch"])):
        words = slurm_commands.directives(script)
        head = script[: script.index("set -e")]
        assert len(words) >= head.count("#SBATCH ") > 5
        assert f"--output={directory}/log/%j_" in "".join(words)
        assert "--comment=after-the-first-command" not in words
    assert "--constraint=a100|h100" in slurm_commands.directives(job_script(options))


# Their answers.


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("12", "12"),
        ("12;cluster", "12"),
        ("Submitted batch job 12", "12"),
        ("Submitted batch job 12 on cluster a3", "12"),
        ("This is cluster 3. Checking your project on login4 ... fine\n12", "12"),
        ("12;cluster\n45 hours of your project are left", "12"),
        ("3\nSubmitted batch job 12\n", "12"),
    ],
)
def test_a_site_s_sbatch_may_say_more_than_the_job_s_id(pose, answer, job):
    pose("sbatch", f"printf '{answer}\\n'")
    pose("scontrol", f"echo JobId={job}")
    assert submit("#!/bin/bash\n") == (job, Path.cwd() / "log" / f"{job}_curvature.out")


@pytest.mark.parametrize("answer", ["", "welcome", "job 12 or so"])
def test_an_answer_without_a_job_s_id_is_not_taken_for_one(pose, answer):
    pose("sbatch", f"echo {answer}")
    pose("scontrol", "exit 1")
    with pytest.raises(ClusterError, match=f"sbatch answered '{answer}', without the id of a job"):
        submit("#!/bin/bash\n")


def test_a_submitted_job_that_slurm_does_not_know_is_mentioned(pose, caplog):
    pose("sbatch", "echo 12")
    pose("scontrol", "exit 1")
    submit("#!/bin/bash\n")
    assert "SLURM does not know of job 12" in caplog.text


def test_jobs_are_known_by_name_by_comment_and_by_id(pose):
    pose(
        "squeue",
        """echo 'Good morning | welcome to 3 | x | y'
        printf '%s|RUNNING|None|node0|%s|%s\\n' 1 daskcurv-1 '' 2 site_daskcurv-1 '' \\
            3 renamed daskcurv-1 4 'a|b' '' 5 daskcurv-2 daskcurv-2 6 'renamed|too' '(null)'
        echo "$@" > arguments""",
    )
    jobs = slurm_commands.queue("daskcurv-1", {"4", "6", "7"})
    assert [*jobs] == ["1", "2", "3", "4", "6"]
    assert jobs["4"] == Job("4", "RUNNING", "None", "node0")
    # Not by LOGNAME, which su leaves as it was.
    assert f"--user={os.getuid()}" in Path("arguments").read_text()


def test_cancelling_a_run_leaves_none_of_its_jobs_whatever_their_names(pose):
    pose("squeue", "printf '%s|%s|None|n|%s|\\n' 1 RUNNING x 2 PENDING y_daskcurv-1 3 FAILED x")
    pose("scancel", 'echo "$@" >> calls')
    slurm_commands.cancel("daskcurv-1", ["1", "3", "9"])
    assert Path("calls").read_text().splitlines() == [
        f"--quiet --user={os.getuid()} --name=daskcurv-1",
        "--quiet 1 2",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9:58", 598), ("1:00:00", 3600), ("2-03:04:05", 183845), ("UNLIMITED", None), ("", None)],
)
def test_durations_are_read_as_slurm_prints_them(text, seconds):
    assert parse_duration(text) == seconds


def test_the_time_left_is_found_among_what_squeue_prints(pose):
    pose("squeue", "echo Today is the 9th; echo 9:58; echo")
    assert slurm_commands.seconds_left("7") == 598


SHOWN = """\
JobId=1 JobName=x
   NumNodes={count} NumCPUs=8
     Nodes=node[0-1] CPU_IDs=0-3 Mem=1000 GRES=gpu:2(IDX:0-1)
     Nodes=node7 CPU_IDs=0 Mem=1000 GRES=gpu:h200:3(IDX:0-2)
     Nodes=node8 CPU_IDs=0 Mem=1000 GRES=
"""


def pose_as_scontrol(pose: Pose, count: int) -> None:
    names = "case $3 in 'node[0-1]') printf 'node0\\nnode1\\n';; *) echo $3;; esac"
    shown = SHOWN.format(count=count)
    pose("scontrol", f"echo 'Good morning, you'\n[ $2 = hostnames ] && {names} || echo '{shown}'")


def test_the_nodes_of_an_allocation_are_read_with_their_gpus(pose):
    pose_as_scontrol(pose, 4)
    assert slurm_commands.nodes_of("1") == {"node0": 2, "node1": 2, "node7": 3, "node8": 0}


def test_nodes_are_counted(pose):
    pose_as_scontrol(pose, 5)
    with pytest.raises(SlurmError, match=r"names 4 nodes of job 1 .*which has 5"):
        slurm_commands.nodes_of("1")


def test_a_missing_slurm_is_said_at_once(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match=r"SLURM.s sbatch cannot be found.*login node"):
        slurm_commands.check_installed("sbatch")


@pytest.mark.parametrize(
    ("text", "transient"),
    [
        ("Socket timed out on send/recv operation", True),
        ("Unable to contact slurm controller (connect failure)", True),
        ("Invalid account or account/partition combination specified", False),
    ],
)
def test_a_busy_controller_is_told_from_an_unwilling_one(text, transient):
    assert SlurmError(text).transient is transient


def test_a_command_of_slurm_that_hangs_is_given_up(pose, monkeypatch):
    pose("sbatch", "exec sleep 60")
    pose("scontrol", "exec sleep 60")
    monkeypatch.setattr(slurm_commands, "_PATIENCE_SECONDS", 0.2)
    with pytest.raises(SlurmError, match="sbatch did not answer within") as hung:
        slurm_commands.call("sbatch")
    assert hung.value.transient
    with pytest.raises(ClusterError, match="did not accept the job: sbatch did not answer"):
        submit("#!/bin/bash\n")


# The launcher's use of them.


def test_the_launcher_s_jobs_are_submitted_like_all_others_and_recorded(pose, monkeypatch):
    monkeypatch.setenv("SBATCH_JOB_NAME", "mine")
    pose("sbatch", 'env | grep -c ^SBATCH > seen; printf "%s\\n" "$@" > arguments; echo 12')
    recorded: list[str] = []
    options = ClusterOptions(cluster="slurm", interface="lo", time="30")
    with start_cluster(options, "daskcurv-1", None, recorded.append) as cluster:
        cluster.scale(1)
        cluster.sync(lambda: cluster)
        (job,) = cluster.workers.values()
    assert recorded == ["12"] == [job.job_id]
    assert Path("seen").read_text() == "0\n"
    arguments = Path("arguments").read_text().splitlines()
    assert arguments[arguments.index("-J") + 1] == "daskcurv-1"
    assert "--comment=daskcurv-1" in arguments


def fleet_with(monkeypatch: pytest.MonkeyPatch, *jobs: str) -> SlurmFleet:
    """The jobs of a run, submitted, of which no worker has joined."""
    workers = {f"slot{job}": SimpleNamespace(job_id=job, refusal="") for job in jobs}
    cluster: Any = SimpleNamespace(workers=workers, worker_spec=dict(workers), scaled=[])
    cluster.scale = cluster.scaled.append
    client: Any = None
    fleet = SlurmFleet(
        cluster, client, ClusterOptions(cluster="slurm", gpus=len(jobs)), "daskcurv-1"
    )
    monkeypatch.setattr(slurm, "worker_names", lambda client: [])
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(fleet, "_forget", lambda slot: cluster.workers.pop(slot))
    return fleet


def poll(fleet: SlurmFleet, times: int) -> Workers:
    for _ in range(times):
        fleet.poll()
        assert fleet._asked is not None
        fleet._asked.exception(10)
        workers = fleet.poll()
    return workers


def test_a_job_that_squeue_does_not_list_is_not_replaced_while_it_lives(pose, monkeypatch):
    # Some sites answer squeue from a list that is minutes old.
    pose("squeue", "true")
    pose("scontrol", "echo JobId=12 JobState=RUNNING")
    fleet = fleet_with(monkeypatch, "12")
    poll(fleet, 4)
    assert fleet._cluster.workers.keys() == {"slot12"}
    pose("scontrol", "echo JobId=12 JobState=CANCELLED ExitCode=0:15")
    poll(fleet, 1)
    assert not fleet._cluster.workers
    fleet.close()


def test_renamed_jobs_are_counted_as_the_run_s_own(pose, monkeypatch):
    pose("squeue", "echo '12|RUNNING|None|node0|their name|'; echo '13|PENDING|Priority||theirs|'")
    fleet = fleet_with(monkeypatch, "12", "13")
    assert poll(fleet, 3) == Workers(
        "slurm",
        running=0,
        starting=1,
        waiting=1,
        wanted=2,
        reasons=(Reason(Why.QUEUED, "Priority", 1),),
    )
    assert not fleet._cluster.scaled
    fleet.close()


def test_before_slurm_has_answered_and_when_it_does_not_that_is_the_reason(pose, monkeypatch):
    pose("squeue", "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    fleet = fleet_with(monkeypatch, "12")
    assert fleet.poll() == Workers("slurm", 0, wanted=1, reasons=(Reason(Why.SUBMITTING),))
    assert fleet._asked is not None
    fleet._asked.exception(10)
    assert fleet.poll() == Workers("slurm", 0, wanted=1, reasons=(Reason(Why.NO_ANSWER),))
    fleet.close()


def test_a_job_that_can_never_start_ends_the_launch(pose, monkeypatch):
    pose("squeue", "echo '12|PENDING|PartitionTimeLimit||daskcurv-1|'")
    monkeypatch.setattr(slurm, "_NEVER_SECONDS", -1.0)
    fleet = fleet_with(monkeypatch, "12")
    with pytest.raises(ClusterError, match=r"job 12 will never start.*PartitionTimeLimit.*--time"):
        poll(fleet, 1)
    fleet.close()


# What a job's script does, without SLURM.


def run_script(options: ClusterOptions) -> tuple[int, str]:
    done = subprocess.run(
        ["bash"], input=job_script(options), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def test_a_line_of_the_prologue_that_fails_ends_the_job_before_its_worker():
    code, said = run_script(
        ClusterOptions(cluster="slurm", prologue=("module load no-such-thing",))
    )
    assert code == 127
    assert re.fullmatch(r"bash: line \d+: module: command not found\n", said)


def test_a_job_whose_python_lacks_the_package_fails_and_says_so(tmp_path):
    # A site-wide start-up file that takes the package away, as another Python would lack it.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        'sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]\n'
        'sys.path = [p for p in sys.path if not os.path.isdir(os.path.join(p, "daskcurv"))]\n'
    )
    prologue = (f"export PYTHONPATH={tmp_path}", f"cd {tmp_path}")
    code, said = run_script(ClusterOptions(cluster="slurm", prologue=prologue))
    assert code == 1
    assert "No module named 'daskcurv'" in said

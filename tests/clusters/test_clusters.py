"""Options, scripts and credentials: all that can be known of a cluster without one."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dask
import psutil
import pytest
import torch
import yaml

from daskcurv.cli import main
from daskcurv.clusters import gpu_check, worker
from daskcurv.clusters.options import SLURM_OPTIONS, ClusterOptions, cluster_options, site_settings
from daskcurv.clusters.slurm import commands as slurm_commands
from daskcurv.clusters.slurm import run_directory
from daskcurv.clusters.slurm.job_script import (
    import_jobqueue,
    job_script,
    job_settings,
    start_cluster,
)
from daskcurv.clusters.slurm.submit import launcher_script
from daskcurv.errors import ClusterError, ConfigError
from tests.support.builders import write_command
from tests.support.minislurm import wait_for

REPOSITORY = Path(__file__).parents[2]


# Options.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cluster": "pbs"}, "cluster is 'pbs'; expected one of local, slurm"),
        ({"device": "tpu"}, "device is 'tpu'; expected one of auto, cuda, cpu"),
        ({"cluster": "connect"}, "--cluster connect needs --scheduler"),
        ({"scheduler": "tcp://x:1"}, "--scheduler is for --cluster connect"),
        (
            {"cluster": "slurm", "workers": 3, "gpus": 3},
            "--workers and --gpus both set the number of jobs",
        ),
        ({"cluster": "allocation", "workers": 3}, "--workers is for local workers and SLURM jobs"),
        ({"partition": "gpu"}, "--partition is for jobs of SLURM; add --cluster slurm"),
        ({"cluster": "slurm", "gpus": 0}, "gpus is 0; expected an integer from 1"),
        ({"cluster": "slurm", "time": "noon"}, "time is 'noon'; expected minutes"),
        ({"cluster": "slurm", "mem_per_gpu": "much"}, "mem_per_gpu is 'much'; expected a number"),
        ({"cluster": "slurm", "gres": "fpga:1"}, "gres is 'fpga:1'; expected gpu:1"),
        ({"cluster": "slurm", "gres": "gpu:2"}, "each job is one worker with one GPU"),
        ({"cluster": "slurm", "nodes": 2}, "--nodes is for --cluster allocation"),
        ({"cluster": "allocation", "gpus": 2}, "--gpus is for --cluster slurm"),
        ({"cluster": "allocation", "time": "1:00"}, "--time is an option for new SLURM jobs"),
        (
            {"cluster": "allocation", "prologue": ["x"]},
            "--prologue is an option for new SLURM jobs",
        ),
        ({"cluster": "slurm", "sbatch_extra": ["x"]}, "'x' is not an option of sbatch"),
        ({"cluster": "slurm", "sbatch_extra": [""]}, "'' is not an option of sbatch"),
        ({"cluster": "slurm", "sbatch_extra": ["--comment='a"]}, "No closing quotation"),
        ({"cluster": "slurm", "sbatch_extra": ["--array=0-3"]}, "has to be one job"),
        ({"cluster": "slurm", "sbatch_extra": ["-W"]}, "return at once; leave it out"),
    ],
)
def test_options_that_cannot_be_used_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        cluster_options(given)


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu", 1), ("gpu:4", 4), ("gpu:h200:2", 2), ("gpu:2080ti:3", 3), ("gpu:3g.20gb", 1)],
)
def test_gres_tells_how_many_gpus(gres, count):
    assert ClusterOptions(gres=gres).gpus_per_node == count
    assert ClusterOptions(gres="none").gpus_per_node == 0


def test_jobs_on_cpus_ask_for_no_gpu_unless_told_to():
    def gres(**given: object) -> str | None:
        return cluster_options({"cluster": "slurm", **given}).requested

    assert gres() == "gpu:1"
    assert gres(device="cpu") is None
    assert gres(device="cpu", gres="gpu:1") == "gpu:1"
    assert gres(gres="none") is None
    with dask.config.set({"daskcurv.slurm": {"gres": "gpu:a100:1"}}):
        assert gres() == "gpu:a100:1"
        assert gres(device="cpu") is None
    script = job_script(ClusterOptions(cluster="slurm", device="cpu"))
    assert "gres" not in script
    assert "--device cpu" in script
    inside = ClusterOptions(cluster="allocation", device="cpu", nodes=2)
    assert "gres" not in launcher_script(inside, ["launch", "--submit"])


def test_workers_are_jobs_on_slurm_by_either_name():
    assert cluster_options({"cluster": "slurm", "workers": 3}).gpus == 3
    assert cluster_options({"cluster": "slurm", "gpus": 3}).gpus == 3


@pytest.mark.parametrize(
    ("text", "megabytes"), [("8G", 8192), ("500M", 500), ("500", 500), ("1T", 1048576)]
)
def test_memory_is_counted_as_slurm_does(text, megabytes):
    assert ClusterOptions(mem_per_gpu=text).megabytes_per_gpu == megabytes


def test_the_site_s_settings_are_defaults_and_the_command_line_wins():
    site = {"partition": "gpu", "time": "12:00:00", "prologue": "module load a\nmodule load b"}
    with dask.config.set({"daskcurv.slurm": site}):
        options = cluster_options({"cluster": "slurm", "partition": "other"})
        local = cluster_options({})
    assert options.partition == "other"
    assert options.time == "12:00:00"
    assert options.prologue == ("module load a", "module load b")
    assert local == ClusterOptions()


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ({"partion": "gpu"}, r"daskcurv\.slurm\.partion in Dask's configuration is not a setting"),
        ({"time": 43200}, 'write it in quotes, such as "12:00:00"'),
        ({"gpus": "many"}, "gpus in Dask's configuration is 'many'; expected a whole number"),
        ({"prologue": {"a": 1}}, "expected lines of text"),
        ("gpu", "expected a mapping"),
    ],
)
def test_mistakes_in_the_site_s_file_are_named(site, message):
    with dask.config.set({"daskcurv.slurm": site}), pytest.raises(ConfigError, match=message):
        site_settings()


def test_the_example_of_a_site_s_file_is_valid_and_complete():
    text = (REPOSITORY / "docs" / "daskcurv.yaml").read_text()
    example = yaml.safe_load(text)
    with dask.config.set(example):
        cluster_options({"cluster": "slurm"})
    assert set(example) == {"daskcurv"}
    assert all(f"{name}:" in text for name in SLURM_OPTIONS)


# Job scripts.


def test_the_job_script_asks_for_one_gpu_one_node_and_one_task():
    options = ClusterOptions(
        cluster="slurm",
        partition="gpu",
        account="lab",
        qos="high",
        time="1:00:00",
        cpus_per_gpu=4,
        mem_per_gpu="16G",
        constraint="a100|h100",
        gres="gpu:a100:1",
        prologue=("module load cuda",),
        sbatch_extra=("--exclusive=user",),
        interface="lo",
    )
    lines = job_script(options).splitlines()
    directives = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {
        "-p gpu", "-A lab", "-n 1", "--cpus-per-task=4", "--mem=16384M", "-t 1:00:00",
        "--nodes=1", "--qos=high", "--constraint='a100|h100'", "--gres=gpu:a100:1",
        "--exclusive=user", "--open-mode=append", f"--output={Path.cwd()}/log/%j_worker.out",
    } <= directives  # fmt: skip
    assert lines[0] == "#!/bin/bash"
    command = lines[-1]
    assert command.startswith(f"{sys.executable} -m daskcurv.clusters.worker tls://")
    assert "--device cuda" in command
    assert lines[lines.index("set -e") + 1] == "module load cuda"


def test_nodes_that_user_and_fleet_exclude_are_excluded_together():
    options = ClusterOptions(cluster="slurm", sbatch_extra=("--exclude=old[1-3]", "--nice"))
    directives = job_settings(options, "name", {"bad2", "bad1"})["job_extra_directives"]
    assert [d for d in directives if "exclude" in d] == ["--exclude=bad1,bad2,old[1-3]"]
    assert "--nice" in directives


def test_paths_with_spaces_survive_the_job_script(tmp_path, monkeypatch):
    directory = tmp_path / "my runs"
    directory.mkdir(mode=0o700)
    monkeypatch.chdir(directory)
    security = run_directory.credentials(directory)
    options = ClusterOptions(cluster="slurm", interface="lo")
    with start_cluster(options, "daskcurv-test", security) as cluster:
        script = cluster.job_script()
    words = shlex.split(script.splitlines()[-1])
    assert words[words.index("--tls-key") + 1] == f"{directory}/tls_scheduler_key.pem"
    assert f"#SBATCH --output='{directory}/log/%j_worker.out'" in script


def test_settings_of_dask_jobqueue_s_own_do_not_leak_into_the_script():
    import_jobqueue()
    own = {"queue": "theirs", "job-extra-directives": ["--mail-type=ALL"], "walltime": "5"}
    with dask.config.set({"jobqueue.slurm": {**dask.config.get("jobqueue.slurm"), **own}}):
        script = job_script(ClusterOptions(cluster="slurm"))
    assert "theirs" not in script
    assert "mail-type" not in script
    assert "-t " not in script.replace("--mem", "")


def test_importing_dask_jobqueue_leaves_ctrl_c_and_the_home_directory_alone(tmp_path):
    program = (
        "import signal; "
        "from daskcurv.clusters.slurm.job_script import import_jobqueue as load; load();"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "True"
    assert not (tmp_path / ".config").exists()


def test_print_job_script_prints_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "--cluster", "slurm", "--time", "60", "--print_job_script"]) == 0
    assert "#SBATCH -t 60" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["launch", "--print_job_script"]) == 2
    assert "--print_job_script is for --cluster slurm, or --submit" in capsys.readouterr().err


def test_a_submitted_launcher_of_slurm_jobs_needs_no_gpu():
    options = ClusterOptions(
        cluster="slurm", partition="gpu", time="60", constraint="a100", submit_extra=("--mem=8G",)
    )
    script = launcher_script(options, ["launch", "--submit", "--cluster", "slurm", "--epochs", "1"])
    assert "--gres" not in script
    assert "--constraint" not in script
    assert "#SBATCH --ntasks=1\n" in script
    assert script.index("--mem=4096M") < script.index("--mem=8G")
    assert "-m daskcurv launch --cluster slurm --epochs 1\n" in script
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_a_submitted_allocation_brings_its_gpus():
    options = ClusterOptions(
        cluster="allocation", nodes=2, gres="gpu:2", mem_per_gpu="10G", prologue=("module load x",)
    )
    script = launcher_script(options, ["launch", "--submit"])
    for line in ("--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", "--mem=24576M", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "module load x\n" in script


def test_a_launcher_of_local_workers_is_not_submitted():
    with pytest.raises(ConfigError, match="--submit needs --cluster slurm"):
        launcher_script(ClusterOptions(), ["launch"])


def test_the_batch_script_in_the_repository_is_bash_and_names_the_documented_run():
    path = REPOSITORY / "scripts" / "curvature.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    for line in ("--nodes=2", "--gres=gpu:2", "--output=log/%j_curvature.out", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    assert "scripts/launch.py --cluster allocation" in text


# The run's directory.


def test_credentials_are_for_their_owner_and_gone_afterwards(tmp_path):
    path = tmp_path / "store.zarr.cluster"
    with run_directory.run_directory(path) as private:
        security = run_directory.credentials(private)
        files = sorted(private.iterdir())
        assert len(files) == 3
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
        assert private.stat().st_mode & 0o777 == 0o700
        assert Path(str(security.get_tls_config_for_role("worker")["key"])) in files
        assert security.require_encryption
    assert not path.exists()


def test_the_guard_clears_up_after_a_killed_launcher(tmp_path):
    path = tmp_path / "store.zarr.cluster"
    program = (
        "import sys, time; from pathlib import Path;"
        "from daskcurv.clusters.slurm.run_directory import run_directory\n"
        "with run_directory(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "in\n"
        assert path.exists()
        launcher.send_signal(signal.SIGKILL)
    wait_for(lambda: not path.exists(), 10)


def test_a_launcher_that_was_taken_for_dead_leaves_the_directory_of_the_next_one_alone(tmp_path):
    path = tmp_path / "store.zarr.cluster"
    with run_directory.run_directory(path):
        shutil.rmtree(path)
        path.mkdir()
        (path / "key.pem").touch()
    assert (path / "key.pem").exists()


def test_a_guard_leaves_the_directory_of_the_next_launcher_alone(tmp_path):
    path = tmp_path / "store.zarr.cluster"
    path.mkdir()
    arguments = ["sh", "-c", run_directory._GUARD, "sh", str(path), str(os.getuid()), "", "1", "0"]
    with subprocess.Popen(arguments, cwd=path, stdin=subprocess.PIPE) as guard:
        shutil.rmtree(path)
        path.mkdir()
        (path / "key.pem").touch()
        guard.communicate()
    assert (path / "key.pem").exists()


def test_what_a_killed_launcher_left_is_cleared_away(tmp_path, monkeypatch):
    path = tmp_path / "store.zarr.cluster"
    path.mkdir()
    (path / "jobs.json").write_text('{"name": "daskcurv-1"}')
    # SLURM may have given its number to another job since.
    run_directory.record_job(path, "17")
    cancelled: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(slurm_commands, "cancel", lambda run, ids: cancelled.append((run, [*ids])))
    with run_directory.run_directory(path) as private:
        assert list(private.iterdir()) == []
    assert cancelled == [("daskcurv-1", [])]


def test_a_launcher_that_ends_cancels_its_jobs_by_name_and_by_id(tmp_path, monkeypatch):
    cancelled: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(slurm_commands, "cancel", lambda run, ids: cancelled.append((run, [*ids])))
    with run_directory.run_directory(tmp_path / "store.zarr.cluster", "daskcurv-1") as private:
        for job in ("17", "18"):
            run_directory.record_job(private, job)
    assert cancelled == [("daskcurv-1", ["17", "18"])]


def guards() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if process.name() == "sh"]


def test_jobs_that_cannot_be_cancelled_stay_on_record(tmp_path, monkeypatch):
    def fail(run: str, ids: list[str]) -> None:
        raise slurm_commands.SlurmError("Unable to contact slurm controller")

    monkeypatch.setattr(slurm_commands, "cancel", fail)
    # Without SLURM's commands, the guard cannot cancel either; it tries twice.
    monkeypatch.setattr(run_directory, "_GUARD_TRIES", 2)
    monkeypatch.setattr(run_directory, "_GUARD_PAUSE_SECONDS", 0)
    write_command(tmp_path / "bin" / "scancel", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    path = tmp_path / "store.zarr.cluster"
    with run_directory.run_directory(path, "daskcurv-1") as private:
        run_directory.credentials(private)
        (guard,) = guards()
    assert guard.wait(10) == 1
    assert not list(path.glob("*.pem"))
    assert (path / "jobs.json").exists()
    with (
        pytest.raises(ClusterError, match="Unable to contact"),
        run_directory.run_directory(path, "daskcurv-2"),
    ):
        pass
    assert not guards()


def test_the_guard_cancels_renamed_jobs_whatever_the_user_prefers(tmp_path, monkeypatch):
    # In the queue: 17 and 18 of this run, 19 of another.
    calls = tmp_path / "calls"
    write_command(tmp_path / "bin" / "scancel", f'echo "$@" $SCANCEL_STATE >> {calls}')
    write_command(tmp_path / "bin" / "squeue", "printf '17\\n18\\n19\\n'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("SCANCEL_STATE", "PENDING")
    path = tmp_path / "store.zarr.cluster"
    program = (
        "import os, signal, sys; from pathlib import Path;"
        "from daskcurv.clusters.slurm.run_directory import record_job, run_directory\n"
        "with run_directory(Path(sys.argv[1]), 'daskcurv-1') as private:\n"
        "    [record_job(private, job) for job in ('16', '17', '18')]\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    wait_for(lambda: not path.exists(), 10)
    assert calls.read_text().splitlines() == [
        f"--quiet --user={os.getuid()} --name=daskcurv-1",
        "--quiet 17 18",
    ]


def test_a_file_system_without_permissions_is_refused(tmp_path, monkeypatch):
    chmod = Path.chmod
    monkeypatch.setattr(Path, "chmod", lambda self, mode: chmod(self, 0o755))
    with run_directory.run_directory(tmp_path / "store.zarr.cluster") as open_to_all:
        with pytest.raises(ClusterError, match=r"cannot be kept from other users.*mode 755"):
            run_directory.open_credentials(open_to_all, insecure=False)
        assert run_directory.open_credentials(open_to_all, insecure=True) is None


def test_processes_have_tls_unless_it_is_switched_off_and_that_is_said(tmp_path, caplog):
    tmp_path.chmod(0o700)
    security = run_directory.open_credentials(tmp_path, insecure=False)
    assert security is not None
    assert security.require_encryption
    assert caplog.records == []
    assert run_directory.open_credentials(tmp_path, insecure=True) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "no TLS; anyone who can reach this host can run programs as you" in record.message


# A worker's start.


@pytest.mark.parametrize(
    ("visible", "slot", "expected"),
    [("0,1", 1, "1"), ("GPU-a,GPU-b", 0, "GPU-a"), (None, 2, "2"), ("3", 1, "")],
)
def test_a_step_takes_the_gpu_of_its_number(monkeypatch, visible, slot, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    worker.take_slot(slot)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_a_requeued_job_s_worker_has_another_name(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert worker.job_name() == "12"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert worker.job_name() == "12.2"


def fake_gpu(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    answers = {
        "device_count": 1,
        "mem_get_info": (70 * 2**30, 80 * 2**30),
        "get_device_properties": SimpleNamespace(uuid="1234"),
        **changes,
    }
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr("shutil.which", lambda name: None)


def test_a_sound_gpu_passes_the_check(monkeypatch):
    fake_gpu(monkeypatch)
    assert gpu_check.find_problem() == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device_count": 0}, "no GPU is visible to PyTorch (for CUDA 13.0)"),
        ({"device_count": 4}, "4 GPUs are visible"),
        ({"mem_get_info": (2**30, 80 * 2**30)}, "only 1.0 of 80.0 GiB"),
    ],
)
def test_what_is_wrong_with_a_gpu_is_said(monkeypatch, changes, message):
    fake_gpu(monkeypatch, **changes)
    assert message in gpu_check.find_problem()


def test_a_gpu_that_multiplies_wrongly_is_noticed(monkeypatch):
    fake_gpu(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self + 1e-3)
    assert gpu_check.find_problem() == "the GPU computes wrong products"


def test_a_gpu_that_fails_is_reported_with_its_own_words(monkeypatch):
    def fail(self):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nand more")

    fake_gpu(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "cuda", fail)
    assert "CUDA error: uncorrectable ECC error encountered" in gpu_check.find_problem()


def test_uncorrected_memory_errors_are_reported(monkeypatch):
    fake_gpu(monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, "3\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert "3 memory errors that could not be corrected" in gpu_check.find_problem()


def test_pytorch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in gpu_check.find_problem()


def test_a_submitted_allocation_is_not_told_again_what_it_was_asked_for_by():
    options = ClusterOptions(cluster="allocation", nodes=2, time="1:00")
    words = [
        "launch", "--cluster", "allocation", "--submit", "--nodes", "2", "--time=1:00",
        "--prologue=module load x", "--interface", "ib0", "--store", "s.zarr",
    ]  # fmt: skip
    script = launcher_script(options, words)
    command = "-m daskcurv launch --cluster allocation --interface ib0 --store s.zarr\n"
    assert command in script

"""Runs that are interrupted, and what the next launch makes of them.

Every test disturbs a real run at a moment when some blocks are done and others are not, resumes
it, and compares with an undisturbed run bit for bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xarray as xr

from daskcurv.measures import MEASURES
from daskcurv.storage import schema
from daskcurv.storage.read import open_results
from tests.support.builders import write_checkpoints, write_cifar
from tests.support.crashes import finished_blocks, workers_of
from tests.support.disks import enlarge, mounted
from tests.support.launches import (
    BLOCKS,
    SLOW,
    assert_ok,
    assert_same_results,
    launch_in_progress,
    results,
)
from tests.support.project import Project


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("reference"))
    write_cifar(project.data)
    write_checkpoints(project.models, [0, 1, 2, 4])
    assert_ok(project.launch(*SLOW))
    return project


@pytest.fixture
def disturbed(reference: Project, tmp_path: Path) -> Project:
    """A project with the reference's inputs and a store of its own."""
    project = Project(tmp_path)
    project.data, project.models = reference.data, reference.models
    return project


@pytest.fixture
def running(disturbed: Project) -> Iterator[subprocess.Popen[str]]:
    with launch_in_progress(disturbed) as process:
        yield process


def assert_resumes(project: Project, reference: Project) -> str:
    before = finished_blocks(project)
    assert 0 < len(before) < BLOCKS
    run = project.launch(*SLOW)
    assert_ok(run)
    after = finished_blocks(project)
    assert len(after) == BLOCKS
    assert {path: after[path] for path in before} == before, "a finished block was written again"
    assert_same_results(results(project.store), results(reference.store))
    assert len(list(project.tree.iterdir())) == 4
    return run.stdout


def test_a_killed_worker_is_replaced_and_loses_nothing(disturbed, running, reference):
    victims = workers_of(running)
    assert len(victims) == 2
    before = finished_blocks(disturbed)
    victims[0].kill()
    output, _ = running.communicate(timeout=200)
    assert running.returncode == 0, output
    after = finished_blocks(disturbed)
    assert {path: after[path] for path in before} == before
    assert_same_results(results(disturbed.store), results(reference.store))


def test_a_killed_launcher_takes_its_workers_along_and_the_next_one_resumes(
    disturbed, running, reference
):
    workers = workers_of(running)
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert disturbed.store.with_name("curvature.zarr.lock").exists()
    output = assert_resumes(disturbed, reference)
    assert f"took over the lock of a launcher that is gone (process {running.pid}" in output
    assert not disturbed.store.with_name("curvature.zarr.lock").exists()


@pytest.mark.parametrize(
    ("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_launch_says_so_and_resumes(
    disturbed, running, reference, signum, exit_code
):
    # As a terminal does, to every process of the command.
    os.killpg(running.pid, signum)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == exit_code
    assert "interrupted; finished work is kept; run the same command again to continue" in output
    if signum == signal.SIGINT:
        assert "Traceback" not in output
    assert_resumes(disturbed, reference)


def test_a_second_launcher_is_refused_while_the_first_goes_on(disturbed, running):
    second = disturbed.launch(*SLOW)
    assert second.returncode == 2
    assert f"another launcher is working on this store: process {running.pid}" in second.stdout
    output, _ = running.communicate(timeout=200)
    assert running.returncode == 0, output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "700k") as disk:
        yield disk


def test_a_full_disk_ends_the_run_and_a_rerun_completes_it(disturbed, reference, small_disk):
    disturbed.store = small_disk / "curvature.zarr"
    run = disturbed.launch(*SLOW)
    assert run.returncode == 2, run.stdout
    assert "No space left on device" in run.stdout
    assert "Traceback" not in run.stdout
    enlarge(small_disk)
    assert_resumes(disturbed, reference)


def test_readers_during_a_run_see_whole_blocks_and_more_each_time(disturbed, running, reference):
    def block_by_block(results: xr.Dataset, name: str) -> np.ndarray:
        values: np.ndarray = results[name].values
        return values.reshape(BLOCKS, -1)

    def same(one: np.ndarray, other: np.ndarray) -> Any:
        return np.isclose(one, other, rtol=0, atol=0, equal_nan=True)

    expected = results(reference.store)
    shown = [0]
    while running.poll() is None:
        found = open_results(disturbed.store).load()
        count = 0
        for variable in schema.per_sample(MEASURES):
            blocks = block_by_block(found, variable.name)
            there = same(blocks, block_by_block(expected, variable.name)).all(axis=1)
            nothing = same(blocks, np.full_like(blocks, variable.fill)).all(axis=1)
            assert (there | nothing).all()
            count += there.sum()
        shown.append(count)
        time.sleep(0.1)  # the cores are the run's
    assert running.returncode == 0
    assert shown == sorted(shown)
    assert len(set(shown)) > 2

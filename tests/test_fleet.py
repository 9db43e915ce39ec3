"""When a job that ended is replaced, when a node is shunned, and when a launch gives up."""

from __future__ import annotations

from pathlib import Path

import pytest

from daskcurv.clusters.fleet import TRIES, UNFIT, End, Fleet, last_lines
from daskcurv.errors import ClusterError

WANTED = 4


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(WANTED)


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "CANCELLED"])
@pytest.mark.parametrize("joined", [False, True])
def test_what_the_cluster_does_to_jobs_is_never_held_against_them(fleet, state, joined):
    for number in range(100):
        fleet.end(End(str(number), state, "node1", joined=joined), workers=0, jobs=0, now=0.0)


def test_workers_that_leave_in_time_are_replaced_as_long_as_blocks_get_done(fleet):
    for number in range(100):
        fleet.end(End(str(number), "COMPLETED", "node1", joined=True), workers=0, jobs=0, now=0.0)
        fleet.block_done()


def test_workers_that_leave_before_any_block_is_done_are_given_up(fleet):
    farewell = End("1", "COMPLETED", "node1", joined=True)
    for _ in range(TRIES + 2 * WANTED - 1):
        fleet.end(farewell, workers=2, jobs=2, now=0.0)
    with pytest.raises(ClusterError, match="keep ending before a block is done"):
        fleet.end(farewell, workers=2, jobs=2, now=0.0)


def test_jobs_that_never_join_are_given_up_with_the_last_one_s_reason_and_log(fleet, tmp_path):
    log = tmp_path / "3_worker.out"
    log.write_text("first\n\nModuleNotFoundError: No module named 'daskcurv'\n")
    for job in ("1", "2"):
        fleet.end(End(job, "FAILED", "node1", 1, log=log), workers=0, jobs=0, now=0.0)
    with pytest.raises(ClusterError) as error:
        fleet.end(
            End("3", "FAILED", "node1", 1, reason="NonZeroExitCode", log=log),
            workers=0,
            jobs=0,
            now=0.0,
        )
    message = str(error.value)
    assert "given up after 3 tries" in message
    assert "job 3 on node1 ended: FAILED, exit status 1 (NonZeroExitCode)" in message
    assert f"{log} ends with:" in message
    assert "No module named 'daskcurv'" in message


def test_failures_to_start_are_borne_while_other_workers_work(fleet):
    for number in range(TRIES + 2):
        fleet.end(End(str(number), "FAILED", "node1", 1), workers=2, jobs=2, now=0.0)
    assert fleet.hesitant
    fleet.block_done()
    assert not fleet.hesitant


def test_a_worker_that_joins_shows_that_the_script_works(fleet):
    for _ in range(3):
        fleet.end(End("1", "FAILED", "node1", 1), workers=0, jobs=0, now=0.0)
        fleet.end(End("2", "FAILED", "node1", 1), workers=0, jobs=0, now=0.0)
        fleet.joined()


def test_a_node_that_fails_its_check_three_times_is_excluded_and_the_others_go_on(fleet, caplog):
    for number in range(TRIES):
        assert not fleet.excluded
        fleet.end(End(str(number), "FAILED", "bad", UNFIT), workers=0, jobs=0, now=0.0)
    assert fleet.excluded == {"bad"}
    # One more job that was on its way there.
    fleet.end(End("9", "FAILED", "bad", UNFIT), workers=0, jobs=1, now=0.0)
    told = [record for record in caplog.records if "gets no more workers" in record.message]
    assert len(told) == 1


def test_when_no_node_passes_the_check_the_launch_ends(fleet):
    ends = [End(str(n), "FAILED", node, UNFIT) for n, node in enumerate(["a", "b", "a"])]
    fleet.end(ends[0], workers=0, jobs=0, now=0.0)
    fleet.end(ends[1], workers=0, jobs=0, now=0.0)
    with pytest.raises(ClusterError, match="no worker could be started"):
        fleet.end(ends[2], workers=0, jobs=0, now=0.0)


def test_a_refused_submission_is_reported_in_slurm_s_words(fleet):
    refusal = End("", "REJECTED", reason="Invalid partition name specified")
    fleet.end(refusal, workers=0, jobs=0, now=0.0)
    fleet.end(refusal, workers=0, jobs=0, now=0.0)
    with pytest.raises(ClusterError, match="refused: Invalid partition name specified"):
        fleet.end(refusal, workers=0, jobs=0, now=0.0)


def test_after_a_bad_node_one_more_is_enough(fleet):
    for number in range(TRIES):
        fleet.end(End(str(number), "FAILED", "bad", UNFIT), workers=0, jobs=0, now=0.0)
    with pytest.raises(ClusterError, match="no worker could be started"):
        fleet.end(End("9", "FAILED", "another", UNFIT), workers=0, jobs=0, now=0.0)


def test_a_refusal_is_borne_while_other_jobs_wait_in_the_queue(fleet):
    refusal = End("", "REJECTED", reason="job submit limit")
    for _ in range(TRIES + 1):
        fleet.end(refusal, workers=0, jobs=5, now=0.0)


def test_a_fleet_that_has_worked_is_not_given_up_for_half_an_hour(fleet):
    fleet.block_done()
    failure = End("1", "FAILED", "node1", 1)
    for minute in range(8):
        fleet.end(failure, workers=0, jobs=0, now=60.0 * minute)
    with pytest.raises(ClusterError, match="no worker could be started"):
        fleet.end(failure, workers=0, jobs=0, now=60.0 * 31)


def test_when_the_only_node_is_excluded_the_message_still_shows_why(fleet, tmp_path):
    log = tmp_path / "1_worker.out"
    log.write_text("no GPU is visible\n")
    for number in range(TRIES):
        fleet.end(End(str(number), "FAILED", "only", UNFIT, log=log), workers=0, jobs=0, now=0.0)
    with pytest.raises(ClusterError) as error:
        fleet.end(
            End("", "REJECTED", reason="Requested node configuration"), workers=0, jobs=0, now=0.0
        )
    assert "Requested node configuration" in str(error.value)
    assert "no GPU is visible" in str(error.value)


def test_time_limits_too_short_for_a_block_are_recognised(fleet):
    late = End("1", "TIMEOUT", "node1", joined=True)
    for _ in range(WANTED - 1):
        fleet.end(late, workers=2, jobs=2, now=0.0)
    with pytest.raises(ClusterError, match="before a block is done; give a longer --time"):
        fleet.end(late, workers=2, jobs=2, now=0.0)


def test_time_limits_are_fine_as_long_as_blocks_get_done(fleet):
    for _ in range(20):
        fleet.end(End("1", "TIMEOUT", "node1", joined=True), workers=2, jobs=2, now=0.0)
        fleet.block_done()


def test_workers_that_keep_dying_before_a_block_is_done_are_given_up(fleet):
    died = End("1", "OUT_OF_MEMORY", "node1", 125, joined=True)
    for _ in range(TRIES + 2 * WANTED - 1):
        fleet.joined()
        fleet.end(died, workers=2, jobs=2, now=0.0)
    with pytest.raises(ClusterError, match=r"keep ending before a block is done.*OUT_OF_MEMORY"):
        fleet.end(died, workers=2, jobs=2, now=0.0)


def test_the_last_lines_of_a_log_that_is_not_there_are_empty():
    assert last_lines(Path("/nowhere/at.all"), 3) == ""
    assert last_lines(None, 3) == ""

"""When a job that ended is replaced, when a node is excluded, and when a launch gives up."""

from __future__ import annotations

from pathlib import Path

import pytest

from daskcurv.clusters.slurm.fleet import PATIENCE_SECONDS, TRIES, UNFIT, End, Fleet, last_lines
from daskcurv.errors import ClusterError

WANTED = 4


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(WANTED)


def judge(
    fleet: Fleet,
    *ends: End,
    workers: int = 0,
    starting: int = 0,
    waiting: int = 0,
    now: float = 0.0,
) -> None:
    """Have a fleet take note of ends, and decide."""
    for end in ends:
        fleet.end(end, workers=workers, now=now)
    fleet.check(workers=workers, starting=starting, waiting=waiting, now=now)


def failure(node: str, status: int = 1, log: Path | None = None) -> End:
    """A job whose worker never joined."""
    return End("1", "FAILED", node, status, log=log)


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "CANCELLED"])
@pytest.mark.parametrize("joined", [False, True])
def test_what_the_cluster_does_to_jobs_is_never_held_against_them(fleet, state, joined):
    for number in range(100):
        judge(fleet, End(str(number), state, "node1", joined=joined))
    assert not fleet.excluded(0.0)


def test_workers_that_leave_in_time_are_replaced_as_long_as_blocks_get_done(fleet):
    for number in range(100):
        judge(fleet, End(str(number), "COMPLETED", "node1", joined=True))
        fleet.block_done()


def test_workers_that_leave_before_any_block_is_done_are_given_up(fleet):
    farewell = End("1", "COMPLETED", "node1", joined=True)
    judge(fleet, *[farewell] * (TRIES + 2 * WANTED - 1), workers=2)
    with pytest.raises(ClusterError, match="keep ending before a block is done"):
        judge(fleet, farewell, workers=2)


def test_jobs_that_never_join_are_given_up_with_the_last_one_s_reason_and_log(fleet, tmp_path):
    log = tmp_path / "3_worker.out"
    log.write_text("first\n\nModuleNotFoundError: No module named 'daskcurv'\n")
    judge(fleet, failure("node1", log=log), failure("node2", log=log))
    with pytest.raises(ClusterError) as error:
        judge(fleet, End("3", "FAILED", "node3", 1, reason="NonZeroExitCode", log=log))
    message = str(error.value)
    assert "given up after 3 tries" in message
    assert "job 3 on node3 ended: FAILED, exit status 1 (NonZeroExitCode)" in message
    assert f"{log} ends with:" in message
    assert "No module named 'daskcurv'" in message


@pytest.mark.parametrize("status", [1, UNFIT])
def test_one_bad_node_is_excluded_and_the_others_go_on(fleet, caplog, status, tmp_path):
    log = tmp_path / "worker.out"
    log.write_text("libcuda.so.1: cannot open shared object file\n")
    for _ in range(TRIES):
        assert not fleet.excluded(0.0)
        judge(fleet, failure("bad", status, log))
    assert fleet.excluded(0.0) == {"bad"}
    # More jobs that were on their way there.
    judge(fleet, *[failure("bad", status, log)] * 2)
    told = [record.message for record in caplog.records if record.message.startswith("bad ")]
    assert len(told) == 1
    assert told[0].endswith(": libcuda.so.1: cannot open shared object file")


def test_a_node_that_fails_its_check_is_excluded_for_good_others_for_half_an_hour(fleet):
    judge(fleet, *[failure("unfit", UNFIT)] * TRIES, *[failure("broken")] * TRIES)
    assert fleet.excluded(PATIENCE_SECONDS - 1) == {"unfit", "broken"}
    assert fleet.excluded(PATIENCE_SECONDS + 1) == {"unfit"}


def test_a_worker_that_joins_clears_its_node_and_no_other(fleet):
    for _ in range(TRIES - 1):
        judge(fleet, failure("good"), failure("bad"))
    fleet.joined(["good"])
    judge(fleet, failure("good"), failure("bad"), workers=1)
    assert fleet.excluded(0.0) == {"bad"}


def test_a_node_is_not_blamed_for_what_ended_all_workers(fleet):
    # A file system that is away for a while.
    fleet.joined(["node1", "node2"])
    judge(fleet, *[failure("node1"), failure("node2")] * TRIES)
    assert not fleet.excluded(0.0)


def test_bad_nodes_do_not_end_a_launch_before_the_others_had_a_chance(fleet):
    # Nodes whose workers are still importing what the others lack.
    judge(fleet, *[failure(node) for node in ("bad1", "bad2", "bad3")] * TRIES, starting=1)
    assert fleet.on_hold
    fleet.joined(["good"])
    judge(fleet, workers=1)
    assert not fleet.on_hold


@pytest.mark.parametrize("state", ["FAILED", "PREEMPTED"])
def test_a_launch_ends_when_the_last_that_was_starting_did_not_start(fleet, state):
    judge(fleet, *map(failure, ("a", "b", "c")), starting=1)
    with pytest.raises(ClusterError, match="no worker could be started"):
        judge(fleet, End("9", state, "d"))


def test_two_bad_nodes_are_not_all_nodes(fleet):
    judge(fleet, *[failure("a")] * TRIES, *[failure("b")] * TRIES)
    assert fleet.excluded(0.0) == {"a", "b"}
    with pytest.raises(ClusterError, match="no worker could be started"):
        judge(fleet, failure("c"))


def test_failures_to_start_are_borne_while_other_workers_work(fleet):
    fleet.joined(["node2"])
    for _ in range(100):
        judge(fleet, failure("node1"), workers=2)
    assert fleet.backing_off
    fleet.block_done()
    assert not fleet.backing_off


def test_jobs_are_not_tried_slowly_before_any_worker_has_joined(fleet):
    judge(fleet, *[failure("node1")] * (TRIES + 1))
    assert not fleet.backing_off
    judge(fleet, End("", "REJECTED", reason="job submit limit"), waiting=1)
    assert fleet.backing_off


def test_a_worker_that_joins_shows_that_the_script_works(fleet):
    for _ in range(3):
        judge(fleet, failure("node1"), failure("node2"))
        fleet.joined()


def test_a_refused_submission_is_reported_in_slurm_s_words(fleet):
    refusal = End("", "REJECTED", reason="Invalid partition name specified")
    judge(fleet, refusal, refusal)
    with pytest.raises(ClusterError, match="refused: Invalid partition name specified"):
        judge(fleet, refusal)


def test_a_refusal_is_borne_while_other_jobs_wait_in_the_queue(fleet):
    refusal = End("", "REJECTED", reason="job submit limit")
    for _ in range(TRIES + 1):
        judge(fleet, refusal, waiting=5)
    # They were cancelled: a new submission may be taken.
    judge(fleet)


def test_a_fleet_that_has_worked_is_not_given_up_for_half_an_hour():
    fleet = Fleet(1)
    fleet.block_done()
    for minute in range(31):
        judge(fleet, failure("node1"), now=60.0 * minute)
    # Jobs may wait in the queue as long as they like.
    judge(fleet, waiting=1, now=60.0 * 300)
    with pytest.raises(ClusterError, match="no worker could be started"):
        judge(fleet, failure("node1"), now=60.0 * 301)


def test_a_worker_that_joins_starts_the_half_hour_anew():
    fleet = Fleet(1)
    fleet.block_done()
    judge(fleet, *[failure("node1")] * TRIES)
    fleet.joined(["node1"])
    later = 2 * PATIENCE_SECONDS
    judge(fleet, *[failure("node1")] * TRIES, now=later)
    with pytest.raises(ClusterError, match="no worker could be started"):
        judge(fleet, failure("node1"), now=later + PATIENCE_SECONDS + 1)


def test_when_the_only_node_is_excluded_the_message_still_shows_why(fleet, tmp_path):
    log = tmp_path / "1_worker.out"
    log.write_text("no GPU is visible\n")
    judge(fleet, *[failure("only", UNFIT, log)] * TRIES)
    with pytest.raises(ClusterError) as error:
        judge(fleet, End("", "REJECTED", reason="Requested node configuration"))
    assert "refused: Requested node configuration; before it, job 1 on only" in str(error.value)
    assert "no GPU is visible" in str(error.value)


def test_time_limits_too_short_for_a_block_are_recognised(fleet):
    late = End("1", "TIMEOUT", "node1", joined=True)
    judge(fleet, *[late] * (WANTED - 1), workers=2)
    with pytest.raises(ClusterError, match="before a block is done; give a longer --time"):
        judge(fleet, late, workers=2)


def test_time_limits_are_fine_as_long_as_blocks_get_done(fleet):
    for _ in range(20):
        judge(fleet, End("1", "TIMEOUT", "node1", joined=True), workers=2)
        fleet.block_done()


def test_workers_that_keep_dying_before_a_block_is_done_are_given_up(fleet):
    died = End("1", "OUT_OF_MEMORY", "node1", 125, joined=True)
    for _ in range(TRIES + 2 * WANTED - 1):
        fleet.joined(["node1"])
        judge(fleet, died, workers=2)
    with pytest.raises(ClusterError, match=r"keep ending before a block is done.*OUT_OF_MEMORY"):
        judge(fleet, died, workers=2)


def test_a_node_that_ends_its_workers_is_excluded_while_others_are_at_their_first_block(fleet):
    died = End("1", "FAILED", "node1", 1, joined=True)
    fleet.joined(["node1", "node2"])
    judge(fleet, *[died] * (TRIES + 2 * WANTED), workers=2)
    assert fleet.excluded(0.0) == {"node1"}
    elsewhere = End("2", "FAILED", "node3", 1, joined=True)
    judge(fleet, *[elsewhere] * (TRIES - 1), workers=2)
    with pytest.raises(ClusterError, match="keep ending before a block is done"):
        judge(fleet, elsewhere, workers=2)


def test_the_last_lines_of_a_log_that_is_not_there_are_empty():
    assert last_lines(Path("/nowhere/at.all"), 3) == ""
    assert last_lines(None, 3) == ""

"""Processes killed at random instants: nothing is lost, torn, or computed twice."""

from __future__ import annotations

from tests.support.crashes import campaign, make_inputs


def test_a_run_survives_kills_at_random_instants(tmp_path):
    tally = campaign(make_inputs(tmp_path), tmp_path, kills=6, seed=1)
    assert tally.problems == []
    assert sum(tally.kills.values()) == 6
    assert tally.completed_runs >= 1

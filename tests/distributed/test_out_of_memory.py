"""A real job of two ranks, one of which has memory for half a batch."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from torchrun_job import Job

pytestmark = pytest.mark.torchrun

SMALL = ("oom@30:rank=1,above=16,steps=100000",)


def test_a_rank_that_runs_out_of_memory_trains_on_in_parts_beside_its_peer(start: Callable[..., Job]) -> None:
    job = start("--steps", "120", "--wrapper", inject=SMALL, settings={"SOSA_MODE": "auto"})
    job.ended()
    whole = start("--steps", "120", name="whole", agent=False)
    whole.ended()
    job.digest()
    losses, expected = ([float(line["loss"]) for line in each.steps(1)] for each in (job, whole))
    assert losses == pytest.approx(expected, rel=1e-3)
    (incident,) = [incident for incident in job.incidents() if incident["kind"] == "oom"]
    assert (incident["severity"], incident["ranks"]) == ("warning", [1])
    assert json.dumps(incident["fixes"]).count("split_batch") == 1
    (command,) = job.commands()
    assert (command["state"], command["verdict"]) == ("verified", "helped")
    assert "batches run in 2 parts from here on" in job.log


def test_without_leave_the_script_gets_its_own_error_and_the_incident_says_where_the_memory_was(
    start: Callable[..., Job],
) -> None:
    job = start("--steps", "120", "--wrapper", inject=SMALL, settings={"SOSA_MODE": "suggest"})
    assert job.process.wait(60) != 0
    (incident,) = [incident for incident in job.incidents() if incident["kind"] == "oom"]
    assert (incident["severity"], incident["ranks"]) == ("critical", [1])
    assert incident["evidence"]["memory"]["optimizer_state"] > 0

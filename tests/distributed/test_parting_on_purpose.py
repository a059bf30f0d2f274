"""Real jobs whose ranks differ on purpose, from the start or from some step on: nothing is told of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torchrun_job import Job

SCRIPT = Path(__file__).with_name("apart_training.py")
SETTINGS = {"SOSA_AGENT_DIGEST_EVERY": "1"}
OFTEN = ("local_sgd", "average")
LONG = ("post_local_sgd", "head", "table", "adapters", "parts", "sharded")
BLIND = ("post_local_sgd", "sharded")


@pytest.mark.parametrize("how", [*OFTEN, *(pytest.param(how, marks=pytest.mark.faults) for how in LONG)])
def test_ranks_that_differ_on_purpose_are_no_incident(start: Callable[..., Job], how: str) -> None:
    job = start("--how", how, script=SCRIPT, settings=SETTINGS)
    job.ended()
    assert job.num_steps() == 300
    assert [(found["kind"], found["message"]) for found in job.incidents(serious=False)] == []
    columns = {name for message in job.recorded() for name in getattr(message, "columns", ())}
    assert ("digest" in columns) is (how not in BLIND)
    assert ("frozen_digest" in columns) is (how not in (*BLIND, "head"))

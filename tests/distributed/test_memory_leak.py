"""A real job that keeps the graph of each step is told, with its rank, its rate and its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torchrun_job import Job, wait_for

pytestmark = pytest.mark.torchrun

SCRIPT = Path(__file__).with_name("leaking_training.py")
LONG_SECONDS = 150.0
"""Where other work keeps it from growing fast enough to be foreseen at the first look."""
GRAPH_BYTES = 4 * 16384 * (32 + 64)
"""Of one step: the inputs and the hidden layer, at least."""


def test_a_rank_that_keeps_its_losses_with_their_graph_is_named_with_its_rate(start: Callable[..., Job]) -> None:
    job = start("--keep", "graph", script=SCRIPT)
    leaks = lambda: [one for one in job.incidents() if one["kind"] == "memory_leak"]  # noqa: E731
    found = wait_for(leaks, "the leak", seconds=LONG_SECONDS)[0]
    print(found["message"])
    assert found["ranks"] == [1]
    assert 0.8 * GRAPH_BYTES < found["evidence"]["bytes_per_step"] < 3 * GRAPH_BYTES
    assert found["evidence"]["used_up_step"] > job.num_steps()
    job.finish()


@pytest.mark.faults
def test_a_rank_that_keeps_numbers_is_not(start: Callable[..., Job]) -> None:
    job = start("--keep", "number", script=SCRIPT)
    wait_for(lambda: job.num_steps() > 500, "500 steps of a tenth of a second", seconds=LONG_SECONDS)
    job.finish()
    assert job.incidents() == []

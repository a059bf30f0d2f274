"""Tests with more than one process: torchrun jobs, or a pair of ranks. What is left of them is ended by its pid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torchrun_job import Job
from two_ranks import TwoRanks


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts a job in a folder of its own; see `Job` for what it takes."""
    jobs: list[Job] = []

    def start_job(*arguments: str, name: str = "one", **options: object) -> Job:
        jobs.append(Job(tmp_path / name, *arguments, **options))  # type: ignore[arg-type]
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """Two processes that run a function in both; see `TwoRanks`."""
    with TwoRanks() as pair:
        yield pair

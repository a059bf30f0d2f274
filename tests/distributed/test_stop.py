"""A run that was stopped stays stopped, although torchrun starts its ranks again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torchrun_job import RUN, Job

pytestmark = pytest.mark.torchrun

SETTINGS = {"SOSA_MODE": "suggest", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def test_a_stopped_run_does_not_train_again_when_torchrun_restarts_it(start: Callable[..., Job]) -> None:
    job = start("--until-told", launcher=("--max-restarts", "1"), settings=SETTINGS)
    job.wait_step(20)
    asked = job.sosa("fix", RUN, "stop")
    assert asked.returncode == 0, asked.stderr
    job.ended(code=1)
    assert [len({step["pid"] for step in job.steps(rank)}) for rank in range(2)] == [1, 1]
    assert "this run was stopped, and restart 1 by torchrun does not train" in job.log
    assert "exitcode  : 76" in job.log
    command = job.commands()[0]
    assert f"command {command['id']}" in (job.home / RUN / "stopped").read_text()

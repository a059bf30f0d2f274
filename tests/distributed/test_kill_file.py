"""A file that anybody can make keeps every fix away from a job, with nothing of ours alive but the agents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torchrun_job import RUN, Job

pytestmark = pytest.mark.torchrun


def test_while_the_kill_file_is_there_no_fix_is_applied_and_what_is_in_force_can_be_taken_back(
    start: Callable[..., Job],
) -> None:
    job = start("--until-told", settings={"SOSA_MODE": "suggest"})
    job.wait_step(20)

    assert job.sosa("fix", RUN, "scale_lr", "factor=0.5").returncode == 0
    first = job.wait_command("verified", "applied")["id"]
    (job.home / "kill").touch()
    assert job.sosa("fix", RUN, "clip_grad", "max_norm=1").returncode == 0
    refused = job.wait_command("rejected")
    assert "the kill file" in refused["reason"]
    job.wait(lambda: "what is in force stays in force" in job.log, "the sentence about it")
    assert job.sosa("undo", first).returncode == 0
    job.wait(lambda: first in {command["id"] for command in job.commands("reverted")}, "the fix to be taken back")
    (job.home / "kill").unlink()
    assert job.sosa("fix", RUN, "clip_grad", "max_norm=1").returncode == 0
    job.wait(lambda: len(job.commands("verified", "applied")) >= 2, "a fix to be applied again")
    job.finish()
    assert job.applied_at(refused["id"]) == {}
    assert [sorted(job.applied_at(command["id"])) for command in job.commands("verified")] == [[0, 1], [0, 1]]
    job.digest()

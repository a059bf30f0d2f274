"""What looks like a hang and is none is not told; where it is allowed, a hang ends in a restart. Also: test_drills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_standing_fixes import OWN_STORE, multipliers
from torchrun_job import RUN, Job

from sosa_stream.protocol.messages import Stacks

pytestmark = pytest.mark.torchrun

SCRIPT = Path(__file__).with_name("drilled_training.py")
STEP = 200


@pytest.mark.parametrize(
    "pause", ["evaluate", *(pytest.param(pause, marks=pytest.mark.faults) for pause in ("save", "compute"))]
)
def test_a_pause_of_one_rank_that_evaluates_saves_or_computes_is_silent(start: Callable[..., Job], pause: str) -> None:
    job = start("--fault", f"{pause}@{STEP}", script=SCRIPT)
    job.wait_step(STEP + 50)
    job.finish()
    assert job.incidents() == []
    assert any(isinstance(event, Stacks) for event in job.recorded()), "nobody was suspected: this shows nothing"


def test_where_it_is_allowed_a_hanging_job_goes_on_from_its_checkpoint_with_its_fixes(
    start: Callable[..., Job], tmp_path: Path
) -> None:
    checkpoints = tmp_path / "one" / "home" / RUN / "checkpoints"
    job = start(
        *("--fault", "extra_all_reduce@0", "--when-told", "--once", "--resume", str(checkpoints)),
        script=SCRIPT,
        settings={
            "SOSA_MODE": "auto",
            "SOSA_AUTO_ALLOW": "restart",
            "SOSA_AUTO_RESTART_AFTER_SECONDS": "5",
            **OWN_STORE,
        },
        launcher=("--max-restarts", "1"),
    )
    job.wait_step(50)
    for words in (["save_checkpoint"], ["scale_lr", "factor=0.5"]):
        asked = job.sosa("fix", RUN, *words)
        assert asked.returncode == 0, asked.stderr
        job.wait(lambda words=words: taken(job, words[0]), words[0])
    saved_step = json.loads((checkpoints / "last" / "metadata.json").read_text())["step"]
    (job.out / "strike").touch()
    job.wait(lambda: len({line["pid"] for line in job.steps(0)}) == 2, "steps of the next generation")
    again = job.wait(lambda: taken(job, "scale_lr")[1:], "the fix to be in force again")[0]
    job.wait_more_steps(20)
    job.finish()

    assert "exit code 79" in job.log
    assert [command["state"] for command in taken(job, "restart")] == ["verified"]
    (incident,) = job.incidents()
    assert incident["kind"] == "hang"
    for rank in range(2):
        old, *later = dict.fromkeys(line["pid"] for line in job.steps(rank))
        assert next(line["step"] for line in job.steps(rank) if line["pid"] == later[0]) == saved_step
        assert max(line["step"] for line in job.steps(rank) if line["pid"] == old) >= saved_step > 50
    ack = job.acks(again["id"], "applied")[0]
    seen = multipliers(job, ack.header.generation)
    assert set(seen[0][ack.tick :]) == set(seen[1][ack.tick :]) == {0.5}


def taken(job: Job, action: str) -> list[dict[str, Any]]:
    """Commands of this one action that have been applied, and in force or over."""
    done = ("applied", "verified")
    return [one for one in job.commands(*done) if [each["action"] for each in one["actions"]] == [action]]

"""A rank dies, torch elastic starts the group anew, and what was in force is in force again on every rank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torchrun_job import RUN, Job, kill

from sosa_stream.protocol.messages import MetricFrame

pytestmark = pytest.mark.torchrun

# Without it torch's own restart often fails: gloo reads the dead rank's address from the shared store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def multipliers(job: Job, generation: str) -> dict[int, list[float]]:
    """What each rank of a generation multiplied the script's learning rate with, step by step."""
    found: dict[int, list[float]] = {}
    for event in job.recorded():
        if isinstance(event, MetricFrame) and event.header.generation == generation:
            at = event.columns.index("lr_multiplier")
            found.setdefault(event.header.rank, []).extend(event.values[:, at].tolist())
    return found


@pytest.mark.parametrize("daemon_is_killed", [False, True], ids=["rank_killed", "rank_and_daemon_killed"])
def test_a_fix_is_in_force_again_on_all_ranks_after_a_restart_of_the_group(
    start: Callable[..., Job], daemon_is_killed: bool
) -> None:
    settings = {"SOSA_MODE": "suggest", **OWN_STORE}
    job = start("--until-told", launcher=("--max-restarts", "1"), settings=settings)
    job.wait_step(20)
    asked = job.sosa("fix", RUN, "scale_lr", "factor=0.5")
    assert asked.returncode == 0, asked.stderr
    first = job.wait_command("applied", "verified")
    if daemon_is_killed:
        kill(job.wait_daemon())
    kill(job.rank_pid(1))

    def carried_over() -> list[dict[str, object]]:
        return [command for command in job.commands("verified") if first["id"] in command["reason"]]

    again = job.wait(carried_over, "the fix to be applied again")[0]
    job.wait_more_steps(30)
    job.finish()

    assert again["actions"] == first["actions"]
    acks = job.acks(again["id"], "applied")
    assert sorted(ack.header.rank for ack in acks) == [0, 1]
    assert len({ack.tick for ack in acks}) == 1
    (generation,) = {ack.header.generation for ack in acks}
    seen = multipliers(job, generation)
    assert seen[0] == seen[1]
    tick = acks[0].tick
    assert seen[0][:tick] == [1.0] * tick
    assert set(seen[0][tick:]) == {0.5}
    job.digest()

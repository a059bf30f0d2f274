"""How a watched job ends: by an exception, a killed rank and a restart, or the end of its script."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torchrun_job import FINAL_STATES, Job, wait_for

from sosa_stream.protocol.messages import Bye, Hello

pytestmark = pytest.mark.torchrun

AUTO = {"SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": "skip_step,scale_lr,rollback", "SOSA_AGENT_DIGEST_AFTER_FIX": "1"}
# Without it torch's own restart fails three times of four: gloo reads the dead rank's address from the shared store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LR_JUMP = ("lr_jump@150:factor=1000",)


def assert_nothing_is_left(job: Job) -> None:
    wait_for(lambda: job.left_processes() == [], f"the end of all processes, not {job.left_processes()}", 20.0)


def test_an_exception_is_told_with_its_rank_and_step_and_comes_through_as_it_was(start: Callable[..., Job]) -> None:
    job = start("--raise-at", "60")
    job.ended(code=1)
    assert_nothing_is_left(job)

    trace = [line.removeprefix("[rank1]: ") for line in job.log.splitlines() if line.startswith("[rank1]: ")]
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1] == "ValueError: no such sample in step 60"
    assert [line.rpartition(", in ")[2] for line in trace if line.startswith("  File")] == ["<module>", "main"]
    incident = next(incident for incident in job.incidents() if incident["kind"] == "exception")
    assert (incident["ranks"], incident["first_step"]) == ([1], 60)
    assert "ValueError" in incident["message"]
    goodbyes = {event.header.rank: event.exit_code for event in job.recorded() if isinstance(event, Bye)}
    assert goodbyes[1] == 1
    assert [incident["kind"] for incident in job.incidents()] == ["exception"]


def test_after_a_restart_old_commands_are_dead_and_the_run_goes_on_under_its_name(start: Callable[..., Job]) -> None:
    # A proposal is open when rank 1 dies. The rate jumps again in the second start: a proposal of its own.
    job = start(
        "--until-told", "--kill-once", "400", inject=LR_JUMP, settings=OWN_STORE, launcher=("--max-restarts", "1")
    )
    old = job.wait_command("proposed")
    job.wait((job.out / "killed").exists, "the death of rank 1")
    job.wait(
        lambda: [c for c in job.commands() if c["id"] == old["id"] and c["state"] in FINAL_STATES], "the old one's end"
    )
    new = job.wait(lambda: [c for c in job.commands("proposed") if c["id"] != old["id"]], "a new proposal")[0]
    refused = job.sosa("approve", old["id"])
    assert refused.returncode == 2
    approved = job.sosa("approve", new["id"])
    assert approved.returncode == 0, approved.stderr
    job.wait(lambda: len(job.applied_at(new["id"])) == 2, "both ranks to apply the new one")
    job.finish()
    assert_nothing_is_left(job)

    first, second = dict.fromkeys(event.header.generation for event in job.recorded() if isinstance(event, Hello))
    assert {ack.header.generation for ack in job.acks(new["id"], "applied")} == {second}
    assert {key: steps for key, steps in job.recorded_steps().items() if key[0] == second} == {
        (second, rank): list(range(len(job.recorded_steps()[second, rank]))) for rank in range(2)
    }
    assert job.applied_at(old["id"]) == {}
    ended = next(command for command in job.commands() if command["id"] == old["id"])
    assert (ended["state"], ended["verdict"]) == ("expired", "not_applied")
    assert ended["reason"].endswith(("its processes are gone", "a new generation began"))
    # Of the rest: rank 0 may tell that rank 1 is gone, and a run that nobody mends goes on being damaged.
    kinds = [incident["kind"] for incident in job.incidents()]
    assert (kinds[0], kinds.count("lr_jump")) == ("lr_jump", 2)
    assert first != second
    job.digest()


def test_forked_data_loaders_keep_nothing_of_us_alive(start: Callable[..., Job]) -> None:
    job = start("--steps", "60", "--workers", "1", settings=AUTO)
    job.ended()
    assert_nothing_is_left(job)
    job.digest()
    assert list(job.recorded_steps().values()) == [list(range(60))] * 2
    assert sum(isinstance(event, Hello) for event in job.recorded()) == 2
    assert "internal error" not in job.log


def test_a_script_that_ends_with_a_fix_in_flight_ends_at_once_and_the_fix_has_a_final_state(
    start: Callable[..., Job],
) -> None:
    # The agreed tick would come 8 seconds later.
    settings = {**AUTO, "SOSA_FENCE_LEAD_SECONDS": "8"}
    job = start("--until-told", inject=LR_JUMP, settings=settings)
    command = job.wait_command("held", "committed")
    job.finish()
    assert_nothing_is_left(job)
    ended = job.commands()
    assert command["id"] in [record["id"] for record in ended]
    for command in ended:
        assert command["state"] in ("aborted", "expired")
        assert command["verdict"] == "not_applied"
        assert job.applied_at(command["id"]) == {}
    job.digest()


def test_ranks_without_a_process_group_train_on_and_the_first_is_watched_alone(start: Callable[..., Job]) -> None:
    job = start("--steps", "60", "--no-group", inject=("nan_batch@40:rank=0",), settings=AUTO)
    job.ended()
    assert_nothing_is_left(job)
    assert [result["steps"] for result in job.results()] == [60, 60]
    assert job.log.count("no process group was initialised") == 1
    (incident,) = job.incidents()
    assert (incident["kind"], incident["first_step"]) == ("nan_loss", 40)

"""What `suggest`, `observe` and `auto` do, and leave alone, in real jobs."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from torchrun_job import FINAL_STATES, Job

pytestmark = pytest.mark.torchrun

LR_JUMP = ("lr_jump@150:factor=1000",)
DIGESTS = {"SOSA_AGENT_DIGEST_AFTER_FIX": "1"}


@pytest.mark.parametrize("snapshots", [True, False], ids=["with_snapshots", "without_snapshots"])
def test_a_suggested_fix_waits_for_a_person_and_is_then_applied_on_all_ranks_at_one_step(
    start: Callable[..., Job], snapshots: bool
) -> None:
    settings = {**DIGESTS, **({"SOSA_AGENT_SNAPSHOTS": "on"} if snapshots else {})}
    job = start("--until-told", inject=LR_JUMP, settings=settings)

    proposed = job.wait_command("proposed")
    actions = [action["action"] for action in proposed["actions"]]
    assert actions == (["scale_lr", "rollback"] if snapshots else ["scale_lr"])
    job.wait_more_steps(20)
    assert [command["state"] for command in job.commands()] == ["proposed"]
    assert job.applied_at(proposed["id"]) == {}
    assert min(float(line["loss"]) for line in job.steps()[-10:]) > 10  # and so it stays broken

    approved = job.sosa("approve", proposed["id"])
    assert approved.returncode == 0, approved.stderr
    job.wait(lambda: len(job.applied_at(proposed["id"])) == 2, "both ranks to apply it")
    first, second = job.acks(proposed["id"], "applied")
    assert (first.tick, first.step, first.detail) == (second.tick, second.step, second.detail)
    assert first.digest == second.digest != ""
    judged = job.wait(lambda: [c for c in job.commands() if c["id"] == proposed["id"] and c["verdict"]], "a verdict")
    job.finish()

    assert judged[0]["state"] == "verified"
    assert judged[0]["applied_step"] == first.step
    if snapshots:
        assert judged[0]["verdict"] == "helped"
        restored, _, left = judged[0]["detail"].partition("not restored: ")
        assert "restored: parameters, optimizer;" in restored
        assert left.startswith("data position, random numbers, LambdaLR (goes on)")
        assert float(job.steps()[-1]["loss"]) < 1
    job.digest()
    incident = job.incidents()[0]
    assert incident["kind"] == "lr_jump"
    # Without snapshots the weights stay damaged: the engine takes their level for the usual one after a window.
    assert incident["state"] == "resolved" or not snapshots
    assert all(command["state"] in FINAL_STATES for command in job.commands())


def test_observing_changes_no_bit_of_the_training(start: Callable[..., Job]) -> None:
    plain = start("--steps", "300", "--sleep", "0.001", name="plain", agent=False)
    observed = start("--steps", "300", "--sleep", "0.001", name="observed", settings={"SOSA_MODE": "observe"})
    plain.ended()
    observed.ended()
    assert observed.digest() == plain.digest()
    assert [line["loss"] for line in observed.steps()] == [line["loss"] for line in plain.steps()]
    assert list(observed.recorded_steps().values()) == [list(range(300))] * 2
    assert observed.incidents(serious=False) == []


def test_nothing_is_proposed_to_a_run_that_is_only_observed(start: Callable[..., Job]) -> None:
    job = start("--until-told", inject=LR_JUMP, settings={"SOSA_MODE": "observe"})
    job.wait(job.incidents, "the incident")
    job.wait_more_steps(50)
    job.finish()
    printed = job.sosa("incidents", "--json").stdout.splitlines()
    assert [json.loads(line) for line in printed] == job.incidents(serious=False)
    assert [incident["kind"] for incident in job.incidents()] == ["lr_jump"]
    assert job.commands() == []


def test_auto_applies_by_itself_only_what_it_was_allowed(start: Callable[..., Job]) -> None:
    settings = {"SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": "skip_step"}
    job = start("--until-told", inject=("nan_batch@120:rank=1", "lr_jump@220:factor=1000"), settings=settings)

    skipped = job.wait_command("applied", "verified")
    proposed = job.wait_command("proposed")
    job.wait_more_steps(50)
    job.finish()

    nan, jump = job.incidents()
    assert (nan["kind"], nan["ranks"], nan["detected_step"]) == ("nan_loss", [1], 120)
    assert (skipped["incident"], skipped["applied_step"]) == (nan["id"], 120)
    assert [action["action"] for action in skipped["actions"]] == ["skip_step"]
    assert [line["step"] for line in job.steps(1) if line["loss"] == "nan"] == [120]

    assert (jump["kind"], proposed["incident"]) == ("lr_jump", jump["id"])
    assert job.applied_at(proposed["id"]) == {}
    states = {command["id"]: (command["state"], command["verdict"]) for command in job.commands()}
    assert states == {skipped["id"]: ("verified", "helped"), proposed["id"]: ("expired", "not_applied")}
    job.digest()

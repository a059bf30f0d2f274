"""Replicas that part, in real jobs: noticed after their clean steps, with the rank where a majority can name it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from parting_training import FAULT_STEP
from torchrun_job import Job

SCRIPT = Path(__file__).with_name("parting_training.py")
SETTINGS = {"SOSA_AGENT_DIGEST_EVERY": "1"}
WITHIN_STEPS = 64


def parted(job: Job) -> list[dict[str, object]]:
    return [incident for incident in job.incidents() if incident["kind"] == "rank_desync"]


@pytest.mark.parametrize(
    ("num_ranks", "fault"),
    [
        (4, "weight"),
        (2, "rate"),
        *(pytest.param(4, fault, marks=pytest.mark.faults) for fault in ("rate", "clip", "state")),
    ],
)
def test_ranks_that_part_after_clean_steps_are_told_and_the_odd_one_named_by_the_majority(
    start: Callable[..., Job], num_ranks: int, fault: str
) -> None:
    launcher = ("--nproc-per-node", str(num_ranks))
    job = start("--fault", fault, script=SCRIPT, settings=SETTINGS, launcher=launcher)
    job.ended()
    (found,) = parted(job)
    assert FAULT_STEP <= found["first_step"] <= FAULT_STEP + WITHIN_STEPS
    assert found["ranks"] == ([3] if num_ranks == 4 else [0, 1])


def test_a_bit_that_flips_among_many_parameters_is_silent_corruption(start: Callable[..., Job]) -> None:
    launcher = ("--nproc-per-node", "3")
    job = start("--fault", "weight", "--layers", "60", script=SCRIPT, settings=SETTINGS, launcher=launcher)
    job.ended()
    (found,) = job.incidents()
    assert (found["kind"], found["ranks"], found["symptoms"]) == ("silent_corruption", [2], ["rank_desync"])
    assert FAULT_STEP <= found["first_step"] <= FAULT_STEP + WITHIN_STEPS


@pytest.mark.parametrize(("fault", "kind"), [("gradient", "exploding_gradient"), ("nan", "nonfinite_gradient")])
def test_the_rank_is_named_whose_own_gradient_it_was(start: Callable[..., Job], fault: str, kind: str) -> None:
    job = start("--fault", fault, "--steps", "320", script=SCRIPT, settings={"SOSA_MODE": "auto"})
    job.ended()
    found = next(one for one in job.incidents() if one["kind"] in (kind, "silent_corruption"))
    assert found["first_step"] >= FAULT_STEP
    assert found["ranks"] == [1]
    assert found["evidence"].get("brought_by", [1]) == [1]


@pytest.mark.parametrize(("num_ranks", "action"), [(4, "resync"), (2, "rollback")])
def test_where_it_is_allowed_ranks_are_brought_together_by_the_majority_or_back_to_when_they_were_equal(
    start: Callable[..., Job], num_ranks: int, action: str
) -> None:
    settings = {**SETTINGS, "SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": "resync,rollback"}
    launcher = ("--nproc-per-node", str(num_ranks))
    job = start("--fault", "weight", "--steps", "700", script=SCRIPT, settings=settings, launcher=launcher)
    job.ended()
    (command,) = job.commands("verified")
    assert [one["action"] for one in command["actions"]] == [action]
    assert command["verdict"] == "helped"
    (found,) = parted(job)
    assert found["state"] == "resolved"
    ends = [json.loads((job.out / f"result-rank{rank}.json").read_text())["digest"] for rank in range(num_ranks)]
    assert len(set(ends)) == 1


def test_a_frozen_parameter_that_changes_on_one_of_two_ranks_is_told_and_copied_from_the_other(
    start: Callable[..., Job],
) -> None:
    settings = {**SETTINGS, "SOSA_MODE": "auto", "SOSA_AUTO_ALLOW": "resync,rollback"}
    job = start("--fault", "frozen", script=SCRIPT, settings=settings)
    job.ended()
    (found,) = parted(job)
    assert (found["ranks"], found["evidence"]["in"], found["state"]) == ([1], "frozen parameters", "resolved")
    assert FAULT_STEP <= found["first_step"] <= FAULT_STEP + WITHIN_STEPS
    (command,) = job.commands("verified")
    assert [(one["action"], one["params"]) for one in command["actions"]] == [("resync", {"source": 0, "frozen": 1})]
    job.digest()


def test_buffers_accumulation_and_layers_unfrozen_later_part_nobody(start: Callable[..., Job]) -> None:
    job = start(script=SCRIPT, settings=SETTINGS)
    job.ended()
    assert not parted(job)
    digests = [message for message in job.recorded() if "digest" in getattr(message, "columns", ())]
    assert digests

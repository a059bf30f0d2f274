"""The rescue benchmark: its cases are those written down, its judge is fair, and its two ranks really repair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("torch")

from benchmarks.rescuing.arms import grid
from benchmarks.rescuing.cases import SEEDS, TUNING, Case, held_out
from benchmarks.rescuing.judge import Result, Target, search, share, target
from benchmarks.rescuing.ranks import Outcome, Ranks
from benchmarks.rescuing.table import table


def outcome(value: float, ended: str = "") -> Outcome:
    return Outcome(value=value, initial=2.0, num_steps=400, ended=ended, seconds=1.0, cpu_seconds=1.0, ranks_agree=True)


def result(none: list[float], auto: list[Outcome]) -> Result:
    goal = Target(clean=0.1, initial=2.0, margin=0.1)
    return Result(case=TUNING[0], target=goal, runs={"none": [outcome(value) for value in none], "auto": auto})


def test_there_are_forty_cases_and_a_third_is_held_out() -> None:
    held = held_out()
    names = {case.name for case in (*TUNING, *held)}
    assert len(names) == len(TUNING) + len(held) >= 40
    assert len(held) >= len(names) / 3
    assert held == held_out()


def test_every_kind_that_the_issue_names_has_a_tuning_case() -> None:
    wanted = {"vanishing", "exploding", "dying ReLU", "oscillation", "slow convergence", "wrong loss scale", "bad LR"}
    wanted |= {"bad data", "scheduler bug", "poisoned batches", "fp16 overflow", "out of memory", "label noise"}
    wanted |= {"posterior collapse", "LR too high from the start", "late instability"}
    assert wanted <= {case.group for case in TUNING}


def test_the_margin_is_the_larger_of_five_percent_of_what_was_learned_and_two_deviations() -> None:
    calm = target("MLP", [outcome(0.1)] * 5)
    assert calm.margin == pytest.approx(0.05 * 1.9)
    values = [0.0, 0.05, 0.1, 0.15, 0.2]
    assert target("MLP", [outcome(value) for value in values]).margin == pytest.approx(2 * 0.0790569, rel=1e-5)


def test_a_clean_run_that_has_not_learned_proves_nothing() -> None:
    with pytest.raises(AssertionError, match="a clean run came to"):
        target("MLP", [outcome(0.1)] * 4 + [outcome(2.0)])


def test_a_case_counts_if_four_of_five_seeds_miss_and_is_rescued_if_four_reach() -> None:
    well, ill = [outcome(0.15)], [outcome(1.0)]
    assert result([1.0] * 4 + [0.1], well * 4 + ill).counts
    assert not result([1.0] * 3 + [0.1] * 2, well * 5).counts
    assert result([1.0] * 5, well * 4 + ill).rescued("auto")
    assert not result([1.0] * 5, well * 3 + ill * 2).rescued("auto")


def test_a_stop_or_a_crash_is_never_a_rescue() -> None:
    stopped = [outcome(0.1, ended="stop")] * 5
    assert not result([1.0] * 5, stopped).rescued("auto")
    assert not result([1.0] * 5, [outcome(math.inf)] * 5).rescued("auto")


def test_the_oracle_ends_at_the_first_point_that_rescues_and_gives_one_up_with_its_second_miss() -> None:
    goal = Target(clean=0.1, initial=2.0, margin=0.1)
    points = list(grid())
    good = points[2]
    asked: list[object] = []

    def run(point: object, seed: int) -> Outcome:
        asked.append(point)
        return outcome(0.1 if point == good and seed != SEEDS[0] else 1.0)

    assert search(goal, run) == good
    assert asked == [points[0]] * 2 + [points[1]] * 2 + [good] * len(SEEDS)
    assert search(goal, lambda point, seed: outcome(1.0)) is None


def test_the_table_tells_the_shares_by_set_and_the_tuning_cases_by_group() -> None:
    results = [result([1.0] * 5, [outcome(0.15)] * 5)]
    results = [
        replace(one, rescuable=True, runs={**one.runs, "ladder": one.runs["none"], "apt_sosa": one.runs["none"]})
        for one in results
    ]
    shares = {arm: share(results, arm) for arm in ("auto", "ladder", "apt_sosa")}
    nothing = {arm: share([], arm) for arm in shares}
    summary = {
        "tuning": {"counted": shares, "rescuable": shares},
        "held-out": {"counted": nothing, "rescuable": nothing},
    }
    told = table(summary, results)
    assert "| tuning, counted: 1 | 100% (21%–100%); runs 100% (100%–100%) | 0%" in told
    assert "| scheduler bug | 1 | 1 | 0 | 0 |" in told
    assert "held-out" not in told


@pytest.mark.torchrun
def test_a_jump_of_the_rate_ruins_two_ranks_that_nobody_helps_and_auto_brings_both_back_alike() -> None:
    jump = Case(program="MLP", fault="Jump", onset=150, size=1000.0)
    with Ranks() as two:
        alone, helped = (two.run(jump, arm, SEEDS[0]) for arm in ("none", "auto"))
    assert alone.value > 1.0
    assert helped.value < 0.25, helped
    assert helped.ranks_agree
    assert [incident["kind"] for incident in helped.incidents] == ["lr_jump"]
    assert {command["verdict"] for command in helped.commands} == {"helped"}

"""The evidence of detection: programs really train under the agent, the judge is strict, others' rules are theirs."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest

from benchmarks.detection import healthy, sick
from benchmarks.detection.live import events, rows_of, train
from benchmarks.detection.others import alarms_of_others
from benchmarks.detection.score import half_damage, judge
from benchmarks.detection.series import Alarm, Row, Run, feed_rows, watch, whole_rows
from sosa_stream.detect.incidents import Severity
from sosa_stream.engine import Engine


def program(name: str, **changes: object) -> type[sick.Fault]:
    found = next(each for each in sick.PROGRAMS if each.__name__ == name)
    return type(name, (found,), changes)


def rows(losses: list[float], **columns: list[float]) -> list[Row]:
    named = {"loss": losses, **columns}
    return [{"step": i, **{name: values[i] for name, values in named.items()}} for i in range(len(losses))]


def alarm(kind: str, detected: int, ended: int | None = None, group: str = "learning", **more: object) -> Alarm:
    return Alarm(kind=kind, severity=Severity.WARNING, group=group, detected=detected, ended=ended, **more)


def fired(tool: str, log: list[Row]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for each in alarms_of_others(log)[tool]:
        found.setdefault(each.kind, []).append(each.detected)
    return found


def sick_run(**changes: object) -> Run:
    known = {"id": "1", "source": "s", "label": "divergence", "onset": 50, "rows": rows([1.0] * 100)}
    return Run(**{**known, **changes})


# -- programs ----------------------------------------------------------------------------------------------------------


def test_a_recording_holds_the_losses_that_the_program_saw(tmp_path: Path) -> None:
    losses = train(healthy.LoRA, 0, tmp_path / "run.sosa", 60)
    assert [row["loss"] for row in rows_of(tmp_path / "run.sosa")] == pytest.approx(losses)
    assert watch(Engine("run"), events(tmp_path / "run.sosa")) == []


def test_a_resumed_program_goes_on_counting(tmp_path: Path) -> None:
    resumed = type("Resumed", (healthy.Resume,), {"restarts": (30,), "save_at": 20})
    train(resumed, 0, tmp_path / "run.sosa", 60)
    assert [row["step"] for row in rows_of(tmp_path / "run.sosa")] == list(range(60))


def test_a_fault_strikes_at_its_onset_and_not_before(tmp_path: Path) -> None:
    train(program("NanLoss-MLP", onset=40), 0, tmp_path / "run.sosa", 60)
    log = rows_of(tmp_path / "run.sosa")
    assert [row["step"] for row in log if not math.isfinite(row["loss"])] == list(range(40, 60))
    run = sick_run(label="nan_loss", onset=40, rows=log, is_live=True)
    verdict = judge(run, watch(Engine("run"), events(tmp_path / "run.sosa")))
    assert verdict.recognised
    assert verdict.delay == 0


def test_the_exception_of_a_program_is_reported_and_ends_it(tmp_path: Path) -> None:
    losses = train(program("OutOfMemory-MLP", onset=40), 0, tmp_path / "run.sosa", 60)
    assert len(losses) == 40
    assert [each.kind for each in watch(Engine("run"), events(tmp_path / "run.sosa"))] == ["oom"]


def test_no_program_lacks_a_part() -> None:
    assert [each.__name__ for each in (*healthy.PROGRAMS, *sick.PROGRAMS) if inspect.isabstract(each)] == []


def test_every_kind_is_injected_into_three_architectures() -> None:
    architectures: dict[str, set[str]] = {}
    for each in sick.PROGRAMS:
        architectures.setdefault(each.kind, set()).add(each.architecture.__name__)
    assert {kind: len(those) for kind, those in architectures.items() if len(those) < 3} == {}


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_an_alarm_counts_that_comes_after_the_onset_or_is_still_open_at_it() -> None:
    assert judge(sick_run(), [alarm("loss_divergence", 57)]).delay == 7
    assert judge(sick_run(), [alarm("loss_divergence", 40, ended=50)]).delay == 0
    over = judge(sick_run(), [alarm("loss_divergence", 40, ended=49)])
    assert (over.recognised, over.num_false) == (False, 1)


def test_a_wrong_family_does_not_count_and_a_symptom_does_from_when_it_was_shown() -> None:
    assert not judge(sick_run(), [alarm("overfitting", 60)]).recognised
    shown = judge(sick_run(), [alarm("overfitting", 60, symptoms={"loss_spike": 70})])
    assert (shown.recognised, shown.exact, shown.delay) == (True, False, 20)


def test_three_warned_groups_are_no_recognition() -> None:
    alarms = [alarm("loss_divergence", 60, group=group) for group in ("learning", "numerical", "data")]
    assert judge(sick_run(), alarms[:2]).recognised
    assert not judge(sick_run(), alarms).recognised


def test_any_alarm_before_the_onset_spoils_a_live_run() -> None:
    early = [alarm("loss_spike", 10, ended=20), alarm("loss_divergence", 60)]
    assert judge(sick_run(), early).recognised
    assert not judge(sick_run(is_live=True), early).recognised


def test_half_of_the_damage_of_a_ramp_is_done_halfway() -> None:
    clean = [1.0] * 400
    assert half_damage([1 + 0.01 * i for i in range(400)], clean) == pytest.approx(205, abs=10)
    assert half_damage(clean, clean) is None
    assert half_damage([1.0] * 100 + [math.nan] * 300, clean) == pytest.approx(110, abs=10)


# -- logs --------------------------------------------------------------------------------------------------------------


def test_half_filled_rows_of_one_step_are_one_row() -> None:
    log: list[Row] = [
        {"step": 1, "loss": 2.0},
        {"step": 1, "lr": 0.1},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.0},
    ]
    assert list(whole_rows(log)) == [
        {"step": 1, "loss": 2.0, "lr": 0.1},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 1.0},
    ]


def test_a_log_that_jumps_back_is_fed_to_its_end() -> None:
    first = rows([1.0] * 30)
    again: list[Row] = [{"step": i, "loss": math.nan if i == 25 else 1.0} for i in range(20, 40)]
    assert [each.detected for each in feed_rows(Engine("log"), [*first, *again])] == [25]


# -- others, by hand ---------------------------------------------------------------------------------------------------


def test_apt_sosa_sees_a_slope_above_a_half_and_50_equal_losses() -> None:
    assert fired("APT-SOSA", rows([100 + 0.6 * i for i in range(12)])) == {"loss_divergence": [9]}
    assert fired("APT-SOSA", rows([100 + 0.4 * i for i in range(12)])) == {}
    assert fired("APT-SOSA", rows([2.0] * 51)) == {"loss_plateau": [49]}
    assert fired("APT-SOSA", rows([2.0, 2.0], grad_norm=[99.0, 101.0])) == {"exploding_gradient": [1]}


def test_skip_step_skips_beyond_six_deviations_either_way_and_after_a_nan() -> None:
    calm = [1.0, -1.0] * 32  # mean 0, deviation 1.008
    assert fired("OLMo-core SkipStep", rows([*calm, 6.0])) == {}
    assert fired("OLMo-core SkipStep", rows([*calm, 6.1])) == {"loss_spike": [64]}
    assert fired("OLMo-core SkipStep", rows([*calm, -6.1])) == {"loss_spike": [64]}
    blinded = alarms_of_others(rows([*calm, math.nan, *calm, *calm, *calm]))["OLMo-core SkipStep"]
    assert [(each.kind, each.detected, each.ended) for each in blinded] == [
        ("nan_loss", 64, 64),
        ("loss_spike", 65, 192),
    ]


def test_zclip_clips_beyond_two_and_a_half_deviations_and_is_lost_after_a_nan() -> None:
    calm = [1.0, 3.0] * 12 + [2.0]  # mean 2, deviation 0.98
    quiet = [1.0] * 26
    assert fired("ZClip", rows(quiet, grad_norm=[*calm, 4.4])) == {}
    assert fired("ZClip", rows(quiet, grad_norm=[*calm, 4.5])) == {"exploding_gradient": [25]}
    assert fired("ZClip", rows([*quiet, 1.0], grad_norm=[*calm, math.nan, 1e9])) == {}


def test_kill_loss_spike_wants_five_doubled_losses_in_a_row() -> None:
    assert fired("KillLossSpike", rows([1.0] * 100 + [3.0] * 4 + [1.0])) == {}
    assert fired("KillLossSpike", rows([1.0] * 100 + [3.0] * 5)) == {"loss_spike": [104]}
    high = [1.0] * 150 + [1.5] * 100  # above the first window's largest for half a window
    assert fired("KillLossSpike", rows(high)) == {"loss_divergence": [200]}


def test_sagemaker_compares_with_ten_rows_ago_and_validation_with_training() -> None:
    assert fired("SageMaker Debugger", rows([1.0] * 10 + [0.9])) == {}
    assert fired("SageMaker Debugger", rows([1.0] * 11)) == {"loss_plateau": [10]}
    assert fired("SageMaker Debugger", [{"step": 0, "loss": 1.0}, {"step": 1, "eval_loss": 1.09}]) == {}
    assert fired("SageMaker Debugger", [{"step": 0, "loss": 1.0}, {"step": 1, "eval_loss": 1.11}]) == {
        "overfitting": [1]
    }


def test_autotrainer_sees_what_never_gains_and_what_swings() -> None:
    assert fired("AutoTrainer", rows([2.0] * 10)) == {"loss_plateau": [2]}
    falling = [1.0 - 0.09 * i for i in range(11)]
    assert fired("AutoTrainer", rows(falling)) == {}
    assert fired("AutoTrainer", rows([1.0, 0.2, 0.3] + [0.2, 0.3] * 8)) == {"loss_oscillation": [5]}
    assert fired("AutoTrainer", [*rows(falling), {"step": 11, "eval_loss": 1e5}]) == {"nan_loss": [11]}

"""The closed loop as one pure function: faults in, repairs and verdicts out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sosa_stream.decide.commands import FINAL_STATES, CommandRecord, CommandState, Verdict
from sosa_stream.decide.experience import NONE
from sosa_stream.decide.requests import Approve, Fix, Pause, Resume
from sosa_stream.detect.alignment import Row
from sosa_stream.detect.attendance import LOST_AFTER_SECONDS
from sosa_stream.detect.incidents import Incident, IncidentState
from sosa_stream.detect.reports import together
from sosa_stream.detect.schedule import LR_STANDS_POINTS
from sosa_stream.detect.windows import Reports, RunWindows
from sosa_stream.effects import CommandChanged, Event, IncidentChanged, Notice, OutcomeCounted, Publish, Timer, Withdraw
from sosa_stream.engine import Engine
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.columns import COLUMNS
from sosa_stream.protocol.messages import Ack, AckState, Command, ExceptionReport, MetricFrame, Phase
from sosa_stream.protocol.recording import Recorder
from sosa_stream.replay import replay_recording
from sosa_stream.settings import DetectSettings
from sosa_stream.testing import (
    AUTO_POLICY,
    NO_SNAPSHOTS,
    NOW,
    SimulatedJob,
    Simulation,
    bye,
    feed,
    frame,
    header,
    hello,
)

SEEDS = range(8)


def _jump(step: int) -> float:
    return 1000.0 if step >= 300 else 1.0


def _drift(step: int, multiplier: float) -> float:
    return 3.0 if step >= 300 else 0.0


def _what(incident: Incident) -> tuple[str, str, str]:
    return incident.kind, str(incident.severity), str(incident.state)


def _how(record: CommandRecord) -> tuple[list[str], str, str]:
    return [action.action for action in record.actions], str(record.state), str(record.verdict)


@pytest.mark.parametrize("seed", SEEDS)
def test_persisting_jump_of_the_learning_rate_is_found_repaired_and_verified(seed: int) -> None:
    sim = SimulatedJob(seed=seed, lr_factor=_jump).run()
    assert [_what(incident) for incident in sim.incidents] == [("lr_jump", "critical", "resolved")]
    assert [_how(record) for record in sim.commands] == [(["scale_lr", "rollback"], "verified", "helped")]
    (incident,), (command,) = sim.incidents, sim.published
    assert (incident.first_step, incident.detected_step) == (300, 301)
    assert command.actions[0].params["factor"] == pytest.approx(1e-3, rel=0.05)
    assert command.actions[1].params["before_step"] == 300
    assert incident.fixes[0]["verdict"] == "helped"


@pytest.mark.parametrize("seed", SEEDS)
def test_one_nan_on_one_rank_is_one_incident_that_names_it_and_the_guards_skip_is_verified(seed: int) -> None:
    sim = SimulatedJob(seed=seed, nan_at={200: 1}).run()
    (incident,) = sim.incidents
    assert _what(incident) == ("nan_loss", "warning", "resolved")
    assert (incident.ranks, incident.hosts, incident.first_step) == ((1,), ("host-1",), 200)
    (record,) = sim.commands
    assert (record.origin, _how(record)) == ("guard", (["skip_step"], "verified", "helped"))
    assert sim.published == []


_NAN_FROM_100 = np.where(np.arange(200) < 100, 2.0, np.nan)


def _told_of_a_bad_loss(ranks: set[int], **columns: np.ndarray) -> Engine:
    """Two ranks in mode auto, of which some report a NaN loss from step 100 on; no fix is carried out."""
    engine = Engine("run")
    feed(engine, [hello(rank, 2, policy=AUTO_POLICY) for rank in range(2)])
    for step in range(200):
        at = {name: values[step] for name, values in columns.items()}
        losses = [_NAN_FROM_100[step] if rank in ranks else 2.0 for rank in range(2)]
        feed(engine, [frame(losses[rank], rank=rank, world_size=2, first_step=step, **at) for rank in range(2)])
    return engine


@pytest.mark.parametrize("ranks", [{0}, {0, 1}])
def test_a_loss_that_is_nan_while_all_gradients_are_finite_is_told_and_nothing_is_rolled_back(ranks: set[int]) -> None:
    view = _told_of_a_bad_loss(ranks).view()
    (incident,) = view.incidents
    assert _what(incident) == ("nan_loss", "critical", "open")
    assert incident.message.endswith("while all gradients are finite")
    assert incident.evidence["gradients_finite"]
    assert "broken" in incident.causes[0]
    assert view.commands == ()


def test_one_norm_that_overflows_now_and_then_beside_a_broken_loss_rolls_nothing_back() -> None:
    lost = np.isin(np.arange(200), range(110, 200, 10))
    view = _told_of_a_bad_loss({0, 1}, grad_norm=np.where(lost, np.nan, 1.0), skipped=lost.astype(float)).view()
    assert [record.origin for record in view.commands] == ["guard"]


@pytest.mark.parametrize("norm", [np.nan, 0.0])
def test_a_loss_that_is_nan_beside_gradients_that_say_nothing_of_the_weights_is_acted_upon(norm: float) -> None:
    view = _told_of_a_bad_loss({0, 1}, grad_norm=np.where(np.arange(200) < 100, 1.0, norm)).view()
    assert [action.action for action in view.commands[0].actions] == ["scale_lr", "rollback"]
    assert view.commands[0].made_step <= 103


def test_a_loss_that_is_nan_is_acted_upon_where_no_gradient_norm_is_known() -> None:
    lost = RunWindows(DetectSettings())
    values = np.full((1, len(COLUMNS)), np.nan)
    lost.take(Row(step=0, values=values, sent=np.isin(COLUMNS, ["loss"])[None]))
    assert lost.bad_loss == (0,)
    assert not lost.only_loss_is_bad


@pytest.mark.parametrize("gap", [1, 10, 21])
def test_a_fault_that_follows_a_skipped_nan_is_repaired_as_if_there_had_been_none(gap: int) -> None:
    sim = SimulatedJob(
        seed=0, num_steps=600, nan_at={300: 0}, damage=lambda step, lr: 2.0 if step >= 300 + gap else 0.0
    ).run()
    assert sim.incidents[0].kind == "nan_loss"
    fixes = [record for record in sim.commands if record.origin == "policy"]
    assert _how(fixes[0])[0] == ["rollback"]
    assert (fixes[0].applied_step or 999) < 300 + gap + 40


@pytest.mark.parametrize(("loss", "broken"), [(math.nan, True), (math.inf, False)])
def test_a_loss_that_is_infinite_beside_finite_gradients_is_no_broken_print(loss: float, broken: bool) -> None:
    windows = RunWindows(DetectSettings())
    values = np.full((1, len(COLUMNS)), np.nan)
    values[0, [COLUMNS.index("loss"), COLUMNS.index("grad_norm")]] = loss, 1.0
    windows.take(Row(step=0, values=values, sent=np.isin(COLUMNS, ["loss", "grad_norm"])[None]))
    assert windows.only_loss_is_bad == broken


def test_of_an_optimizer_without_a_rate_the_weights_are_gone_back_to_and_no_rate_is_scaled() -> None:
    poisoned = np.where(np.arange(200) < 100, 1.0, np.nan)
    view = _told_of_a_bad_loss({0, 1}, grad_norm=poisoned, lr=np.full(200, np.nan)).view()
    assert [action.action for action in view.commands[0].actions] == ["rollback"]


def test_what_was_proposed_in_a_pause_for_a_jump_that_still_stands_can_be_approved_after_it() -> None:
    def jump(step: int) -> float:
        return 10.0 if step >= 300 else 1.0

    sim = SimulatedJob(
        seed=0,
        num_steps=700,
        lr_factor=jump,
        damage=lambda step, lr: 3.0 if 300 < step <= 310 else 0.0,
        asks={250: lambda engine: Pause(who="ann"), 400: lambda engine: Resume(who="ann")},
        stop_at=500,
    ).run()
    (incident,) = sim.incidents
    assert (incident.kind, str(incident.state)) == ("lr_jump", "open")
    (record,) = sim.commands
    assert record.reason.endswith("the run ended"), "and not decided anew, since nothing would be chosen now"


@pytest.mark.parametrize("seed", SEEDS)
def test_nan_and_jump_in_one_run_are_two_incidents_and_no_more(seed: int) -> None:
    sim = SimulatedJob(seed=seed, nan_at={150: 1}, lr_factor=_jump).run()
    assert [incident.kind for incident in sim.incidents] == ["nan_loss", "lr_jump"]
    assert {str(incident.state) for incident in sim.incidents} == {"resolved"}


def test_useless_fix_is_taken_back_and_the_ladder_climbs() -> None:
    sim = SimulatedJob(seed=0, num_steps=800, damage=_drift, policy=NO_SNAPSHOTS).run()
    first, revert = sim.commands[:2]
    assert _how(first) == (["scale_lr"], "reverted", "no_effect")
    assert _how(revert) == (["revert"], "verified", "inconclusive")
    assert revert.actions[0].params == {"command": first.id}
    assert [fix["state"] for fix in sim.incidents[0].fixes][:2] == ["reverted", "verified"]


def test_of_a_run_that_has_lost_what_it_learned_the_weights_are_gone_back_to_first_then_farther_and_slower() -> None:
    sim = SimulatedJob(seed=0, num_steps=800, damage=_drift).run()
    assert [_how(record) for record in sim.commands[:4]] == [
        (["rollback"], "verified", "no_effect"),
        (["rollback", "skip_step"], "verified", "no_effect"),
        (["scale_lr", "rollback"], "verified", "no_effect"),
        (["revert"], "verified", "inconclusive"),
    ]
    assert sim.commands[3].actions[0].params == {"command": sim.commands[2].id, "only": "scale_lr"}
    assert sim.commands[2].reason.endswith("; scale_lr taken back")
    applied = [record.applied_step or 0 for record in sim.commands[:3]]
    assert applied[0] - 300 < 30
    assert applied[1] - applied[0] < 30  # a rollback shows at once whether it was the weights
    assert applied[2] - applied[1] < 80  # as many more as were skipped
    assert sim.commands[2].actions[1].params["before_step"] < 300 - 50


def test_of_a_run_whose_rate_has_crept_up_it_is_brought_back_together_with_the_weights() -> None:
    sim = SimulatedJob(seed=0, num_steps=800, lr_factor=lambda step: min(1.05 ** max(step - 300, 0), 400.0)).run()
    back = next(record for record in sim.commands if "rollback" in _how(record)[0])
    assert _how(back)[0] == ["scale_lr", "rollback"]
    assert back.actions[0].params["factor"] < 0.3
    assert back.actions[0].params["hold"] == 1, "it goes on creeping"


def test_fix_that_heals_is_kept() -> None:
    sim = SimulatedJob(
        seed=1, damage=lambda step, lr: 3.0 if step >= 300 and lr > 0.6 else 0.0, policy=NO_SNAPSHOTS
    ).run()
    assert [_how(record) for record in sim.commands[:3]] == [(["scale_lr"], "verified", "helped")]
    assert sim.incidents[0].state is IncidentState.RESOLVED


def test_a_rate_that_collapsed_is_raised_to_that_of_before() -> None:
    sim = SimulatedJob(
        seed=0, num_steps=500, lr_factor=lambda step: 1e-3 if step >= 200 else 1.0, damage=_stands_from_200
    ).run()
    fix = sim.commands[0]
    assert set(_how(fix)[0]) == {"scale_lr"}
    assert math.prod(action.params["factor"] for action in fix.actions) == pytest.approx(1000, rel=0.1)


def _stands_from_200(step: int, multiplier: float) -> float:
    """What keeps the simulated loss where it was at step 200, as long as the rate is so low."""
    healthy = 1.8 + 2.7 * math.exp(-step / 120)
    return 1.8 + 2.7 * math.exp(-200 / 120) - healthy if step >= 200 and multiplier < 10 else 0.0


def _suffers(*stretches: range) -> Callable[[int, float], float]:
    return lambda step, multiplier: 3.0 if any(step in stretch for stretch in stretches) else 0.0


def _outlived_jump(*, back_at: int = 10**6, hurts: tuple[range, ...] = (range(301, 311),), **job: Any) -> Simulation:
    """A rate that jumps by 10 at step 300 of a long schedule; the loss is well again while it stands there."""
    fields: dict[str, Any] = {"seed": 0, "num_steps": 20_000, "stop_at": 500, "policy": {"mode": "suggest"}} | job
    return SimulatedJob(
        lr_factor=lambda step: 10.0 if 300 <= step < back_at else 1.0, damage=_suffers(*hurts), **fields
    ).run()


def test_a_jump_is_not_over_while_the_rate_stands_where_it_jumped_to_and_a_person_can_still_have_it_back() -> None:
    sim = _outlived_jump(asks={450: lambda engine: Approve(command=engine.view().commands[0].id, who="ann")})
    (incident,), (record,) = sim.incidents, sim.commands
    assert _what(incident)[0] == "lr_jump"
    assert (record.made_step, record.applied_step) == (301, 452)
    assert _how(record)[1:] == ("verified", "helped")
    assert incident.state is IncidentState.RESOLVED
    assert incident.resolved_step is not None
    assert incident.resolved_step > 452


def test_a_jump_is_over_once_the_rate_has_come_back_and_has_lasted_so_long() -> None:
    sim = _outlived_jump(back_at=400)
    (incident,), (record,) = sim.incidents, sim.commands
    assert (incident.resolved_step, str(record.state)) == (400, "expired")
    (counted,) = [effect.outcome for effect in sim.effects if isinstance(effect, OutcomeCounted)]
    assert (counted.fix, counted.verdict, counted.lasted_steps) == (NONE, Verdict.HELPED, 399 - record.made_step)


def test_a_jump_that_still_stands_when_the_run_ends_is_open() -> None:
    assert [_what(incident)[2] for incident in _outlived_jump().incidents] == ["open"]


def test_a_rate_that_has_stood_for_long_is_the_runs_own_and_was_no_recovery() -> None:
    sim = _outlived_jump(stop_at=2500)
    (incident,), (record,) = sim.incidents, sim.commands
    assert incident.resolved_step is not None
    assert LR_STANDS_POINTS < incident.resolved_step - 310 < LR_STANDS_POINTS + 100
    assert record.reason.endswith("nobody approved it")
    (counted,) = [effect.outcome for effect in sim.effects if isinstance(effect, OutcomeCounted)]
    assert counted.verdict is Verdict.NO_EFFECT


def test_a_run_that_suffers_again_from_the_same_jump_has_one_incident_and_from_something_else_another() -> None:
    hurts = (range(301, 311), range(345, 350), range(450, 480))
    jump, other = _outlived_jump(hurts=hurts).incidents
    assert (jump.kind, jump.first_step) == ("lr_jump", 300)
    assert other.kind in ("loss_spike", "loss_divergence")
    assert other.first_step == 450


def test_what_else_goes_wrong_beside_a_jump_that_still_stands_is_repaired_and_the_jump_gets_no_fix_by_itself() -> None:
    policy = {"mode": "auto", "allow": ["clip_grad"]}
    sim = _outlived_jump(hurts=(range(301, 311), range(450, 480)), policy=policy)
    jump, other = sim.incidents
    assert [record.incident for record in sim.commands if record.made_step > 330] == [other.id]
    assert {record.incident for record in sim.commands if record.made_step <= 330} == {jump.id}


def test_a_rate_that_swings_is_held_until_it_has_stayed_back() -> None:
    def swings(step: int) -> float:
        return 1000.0 if 200 <= step < 320 and (step - 200) // 10 % 2 == 0 else 1.0

    sim = SimulatedJob(seed=0, num_steps=600, lr_factor=swings).run()
    released = [record for record in sim.commands if record.actions[0].params.get("factor", 0.0) > 1.0]
    assert len(released) == 1
    assert (released[0].applied_step or 0) >= 310 + 64


def test_spike_that_heals_by_itself_gets_no_fix() -> None:
    sim = SimulatedJob(seed=0, damage=lambda step, lr: 4 * np.exp(-(step - 300) / 3) if step >= 300 else 0.0).run()
    assert [_what(incident) for incident in sim.incidents] == [("loss_spike", "warning", "resolved")]
    assert sim.commands == ()


@pytest.mark.parametrize("limit", ["max_fixes_per_error", "max_fixes_per_run"])
def test_limits_hold_and_are_told_once(limit: str) -> None:
    sim = SimulatedJob(seed=3, num_steps=900, damage=_drift, policy={**AUTO_POLICY, limit: 1}).run()
    fixes = [record for record in sim.commands if record.actions[0].action != "revert"]
    assert len(fixes) == 1
    assert len([effect for effect in sim.effects if isinstance(effect, Notice) and "limit" in effect.text]) == 1


def test_one_fix_is_under_way_at_a_time() -> None:
    sim = SimulatedJob(seed=4, num_steps=800, damage=_drift, nan_at={330: 0}).run()
    under_way: set[str] = set()
    for effect in sim.effects:
        if isinstance(effect, CommandChanged) and effect.record.origin == "policy":
            record = effect.record
            if record.state in FINAL_STATES or record.verdict is not None:
                under_way.discard(record.id)
            elif record.state is not CommandState.PROPOSED:
                under_way.add(record.id)
            assert len(under_way) <= 1


def test_observed_run_gets_incidents_and_no_commands() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy={"mode": "observe"}).run()
    assert [_what(incident) for incident in sim.incidents] == [("lr_jump", "critical", "open")]
    assert sim.commands == ()


def _suggested() -> tuple[Engine, CommandRecord]:
    engine = Engine("run")
    losses = np.full(80, 2.0) + 0.05 * np.sin(np.arange(80))
    losses[61:] = 9.0
    lr = np.where(np.arange(80) >= 60, 1.0, 1e-3)
    feed(engine, [hello(policy={"mode": "suggest"}), frame(losses, lr=lr)])
    (record,) = engine.view().commands
    return engine, record


def test_suggested_fix_waits_for_a_person_and_then_says_that_one_approved() -> None:
    engine, record = _suggested()
    assert record.state is CommandState.PROPOSED
    assert not engine.has_commands_in_flight
    effects = engine.handle(Approve(command=record.id, who="ann"), NOW + 10)
    (publish,) = [effect for effect in effects if isinstance(effect, Publish)]
    states = [effect.record.state for effect in effects if isinstance(effect, CommandChanged)]
    assert publish.command.approved
    assert states == [CommandState.APPROVED, CommandState.PUBLISHED]
    assert engine.has_commands_in_flight


def test_approving_what_is_unknown_or_past_is_only_a_notice() -> None:
    engine, record = _suggested()
    engine.handle(Approve(command=record.id, who="ann"), NOW + 10)
    for command in ("c00000000", record.id):
        (effect,) = engine.handle(Approve(command=command, who="ann"), NOW + 11)
        assert isinstance(effect, Notice)
        assert command in effect.text


def test_proposal_expires_with_its_incident() -> None:
    engine, _ = _suggested()
    feed(engine, [frame(np.full(60, 2.0), first_step=80)], NOW + 10)
    assert engine.view().incidents[0].state is IncidentState.RESOLVED
    assert engine.view().commands[0].state is CommandState.EXPIRED


def test_command_that_no_fence_agrees_on_expires_and_is_withdrawn() -> None:
    engine, record = _suggested()
    engine.handle(Approve(command=record.id, who="ann"), NOW + 10)
    effects = feed(engine, [frame(np.full(700, 9.0), first_step=80)], NOW + 11)
    assert engine.view().commands[0].state is CommandState.EXPIRED
    assert [effect.command for effect in effects if isinstance(effect, Withdraw)] == [record.id]


def test_refused_fix_is_not_applied_and_the_next_rung_is_tried() -> None:
    def no_snapshot(command: Command) -> AckState | None:
        return AckState.REJECTED if any(action.action == "rollback" for action in command.actions) else None

    sim = SimulatedJob(seed=0, lr_factor=_jump, answers=no_snapshot).run()
    assert _how(sim.commands[0]) == (["scale_lr", "rollback"], "rejected", "not_applied")
    assert _how(sim.commands[1])[0] == ["scale_lr"]


def test_new_generation_ends_commands_in_flight_and_old_words_are_not_heard() -> None:
    engine, record = _suggested()
    engine.handle(Approve(command=record.id, who="ann"), NOW + 10)
    effects = engine.handle(hello(generation="g2"), NOW + 11)
    assert engine.view().commands[0].state is CommandState.ABORTED
    assert Withdraw(command=record.id) in effects
    engine.handle(frame([5.0], first_step=900), NOW + 12)
    assert (engine.view().generation, engine.view().step) == ("g2", -1)


@pytest.mark.parametrize("last_step", [301, 303, 306, 316, 330])
def test_every_command_ends_in_a_final_state_whenever_the_run_ends(last_step: int) -> None:
    sim = SimulatedJob(seed=5, stop_at=last_step, lr_factor=_jump).run()
    assert bool(sim.commands) is (last_step > 301)
    assert all(record.state in FINAL_STATES and record.verdict is not None for record in sim.commands)
    assert not sim.engine.has_commands_in_flight


def test_ranks_that_differ_after_a_fix_are_an_incident_that_names_the_odd_one() -> None:
    engine = Engine("run")
    losses = np.full(80, 2.0) + 0.05 * np.sin(np.arange(80))
    losses[61:] = 9.0
    lr = np.where(np.arange(80) >= 60, 1.0, 1e-3)
    hellos: list[Event] = [hello(rank, 3, policy=AUTO_POLICY) for rank in range(3)]
    effects = feed(engine, hellos + [frame(losses, rank=rank, world_size=3, lr=lr) for rank in range(3)])
    (publish,) = [effect for effect in effects if isinstance(effect, Publish)]
    for rank, digest in enumerate("aba"):
        ack = Ack(
            header=header(rank, 3), command=publish.command.id, state=AckState.APPLIED, tick=80, step=80, digest=digest
        )
        engine.handle(ack, NOW + 20)
    desync = engine.view().incidents[-1]
    assert (desync.kind, desync.ranks, str(desync.severity), str(desync.group)) == (
        "rank_desync",
        (1,),
        "critical",
        "rank",
    )


def _with_norm_lost_on(ranks: set[int], *, usual: tuple[float, ...] = (1.0, 1.0, 1.0)) -> list[Event]:
    """Forty steps of three ranks; at the thirtieth the norm of some is NaN, and they leave that step out."""
    norms = {rank: np.where((np.arange(40) == 30) & (rank in ranks), np.nan, usual[rank]) for rank in range(3)}
    rows = {rank: {"grad_norm": norm, "skipped": np.isnan(norm).astype(float)} for rank, norm in norms.items()}
    frames = [frame(np.full(40, 2.0), rank=rank, world_size=3, **row) for rank, row in rows.items()]
    return [*(hello(rank, 3) for rank in range(3)), *frames]


@pytest.mark.parametrize(("lost", "odd"), [({1}, (1,)), ({0, 2}, (1,))])
def test_replicas_of_which_some_leave_a_step_out_have_come_apart_until_they_are_brought_together(
    lost: set[int], odd: tuple[int, ...]
) -> None:
    found = [i for i in _incidents(_with_norm_lost_on(lost)) if i.kind == "rank_desync"]
    assert [(i.ranks, i.first_step, str(i.severity), str(i.state)) for i in found] == [(odd, 30, "critical", "open")]


@pytest.mark.parametrize(
    ("reports", "are"),
    [
        (Reports(resynced=True), True),
        (Reports(digests={0: "a", 1: "a"}), True),
        (Reports(digests={0: "a", 1: "b"}), False),
        (Reports(digests={0: "", 1: ""}), False),
    ],
)
def test_resync_or_equal_digests_bring_ranks_together(reports: Reports, are: bool) -> None:
    windows = RunWindows(DetectSettings())
    windows.came_apart = True
    windows.hear(reports)
    assert together(windows) is are


@pytest.mark.parametrize(
    ("lost", "usual"), [({0, 1, 2}, (1.0, 1.0, 1.0)), ({1}, (1.0, 1.1, 1.2))], ids=["all", "no replicas"]
)
def test_step_left_out_by_all_ranks_or_by_one_that_is_no_replica_parts_nobody(
    lost: set[int], usual: tuple[float, ...]
) -> None:
    assert "rank_desync" not in {i.kind for i in _incidents(_with_norm_lost_on(lost, usual=usual))}


def test_silent_rank_is_lost_and_no_longer_waited_for() -> None:
    engine = Engine("run")
    feed(engine, [hello(0, 2), hello(1, 2), frame([2.0, 2.0], rank=0, world_size=2)])
    assert engine.view().step == -1
    for second in range(1, int(LOST_AFTER_SECONDS) + 3):
        engine.handle(frame([2.0], rank=0, world_size=2, first_step=1 + second), NOW + second)
    assert [rank.state for rank in engine.view().ranks] == ["live", "lost"]
    assert engine.view().step > 10


def test_gap_in_which_nobody_listened_loses_no_rank() -> None:
    engine = Engine("run")
    feed(engine, [hello(0, 2), hello(1, 2)])
    engine.handle(Timer(), NOW + 3600)
    assert [rank.state for rank in engine.view().ranks] == ["live", "live"]


def _incidents(events: list[Event]) -> tuple[Incident, ...]:
    engine = Engine("run")
    feed(engine, events)
    return engine.view().incidents


def test_every_prefix_of_a_run_gives_exactly_the_incidents_detected_within_it() -> None:
    sim = SimulatedJob(seed=6, nan_at={150: 1}, lr_factor=_jump).run()
    whole = sim.incidents
    for length in range(0, len(sim.events), 37):
        last = max(
            (int(e.steps[-1]) for e in sim.events[:length] if isinstance(e, MetricFrame) and e.header.rank == 1),
            default=-1,
        )
        found = {incident.id for incident in _incidents(sim.events[:length])}
        assert found == {incident.id for incident in whole if incident.detected_step <= last}


def _events(sim: Simulation) -> list[Event]:
    return [event for event in sim.events if not isinstance(event, Ack)]


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_batching_and_interleaving_change_no_incident(batch: int) -> None:
    policy = {"mode": "observe"}
    one = SimulatedJob(seed=7, nan_at={150: 1}, lr_factor=_jump, policy=policy).run()
    other = SimulatedJob(seed=7, nan_at={150: 1}, lr_factor=_jump, policy=policy, batch=batch).run()
    assert other.incidents == one.incidents
    rank_by_rank: list[Event] = [hello(rank, 2, policy=policy) for rank in range(2)]
    for rank in (1, 0):
        rank_by_rank += [e for e in _events(other) if isinstance(e, MetricFrame) and e.header.rank == rank]
    assert _incidents([*rank_by_rank, bye(0, 2), bye(1, 2)]) == one.incidents


def test_incident_is_shown_only_when_a_person_would_see_a_difference() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump).run()
    shown = [effect.incident for effect in sim.effects if isinstance(effect, IncidentChanged)]
    assert all(one != other for one, other in pairwise(shown))
    assert len(shown) < 12


def test_policy_that_makes_no_sense_leaves_the_run_observed_and_says_so() -> None:
    engine = Engine("run")
    (notice,) = engine.handle(hello(policy={"mode": "auto", "allow": ["format_disk"]}), NOW)
    assert isinstance(notice, Notice)
    assert "only observed" in notice.text


def test_run_that_ended_says_so_of_every_rank() -> None:
    engine = Engine("run")
    feed(engine, [hello(0, 2), hello(1, 2), bye(0, 2), bye(1, 2)])
    assert [rank.state for rank in engine.view().ranks] == ["ended", "ended"]


def test_replaying_a_recording_gives_the_same_incidents_and_commands(tmp_path: Path) -> None:
    sim = SimulatedJob(seed=0, nan_at={150: 1}, lr_factor=_jump).run()
    recorder = Recorder(tmp_path / "run.sosa")
    for i, event in enumerate(sim.events):
        recorder.append(NOW + 0.01 * i, encode(event))  # type: ignore[arg-type]
    recorder.close()
    replay = replay_recording(tmp_path / "run.sosa")
    assert replay.run == "run"
    assert replay.incidents == sim.incidents
    assert replay.commands == sim.commands
    assert replay.commands[-1].verdict is Verdict.HELPED


@pytest.mark.parametrize("back_at", [303, 340, 420])
def test_a_rate_that_was_held_down_is_let_go_once_the_scripts_own_comes_back(back_at: int) -> None:
    """At 303 it comes back while the ranks may still be agreeing, at 340 during or right after the probation."""
    sim = SimulatedJob(seed=1, lr_factor=lambda step: 1000.0 if 300 <= step < back_at else 1.0).run()
    held, released = [c for c in sim.commands if any(a.action == "scale_lr" for a in c.actions)]
    assert [i.kind for i in sim.incidents] == ["lr_jump"]
    assert "rollback" in [a.action for a in held.actions]
    factor = held.actions[0].params["factor"] * released.actions[0].params["factor"]
    assert factor == pytest.approx(1.0)
    assert (released.state, released.verdict) == (CommandState.VERIFIED, Verdict.HELPED)


def test_a_schedule_that_runs_out_lets_no_held_rate_go() -> None:
    for seed in SEEDS:
        sim = SimulatedJob(seed=seed, lr_factor=_jump).run()
        assert len(sim.commands) == 1


def test_a_fault_of_a_new_generation_is_an_incident_of_its_own_with_a_fix_of_its_own() -> None:
    noise = np.random.default_rng(0).normal(scale=0.02, size=400)
    losses = 1.0 + 2.0 * np.exp(-np.arange(400) / 60.0) + noise
    losses[301:] += 50.0
    lr = np.where(np.arange(400) >= 300, 1.0, 1e-3)
    engine = Engine("run")
    for generation in ("g1", "g2"):
        feed(engine, [hello(policy={"mode": "suggest"}, generation=generation)])
        feed(engine, [frame(losses, lr=lr, generation=generation)])
    first, second = engine.view().incidents
    assert (first.kind, second.kind) == ("lr_jump", "lr_jump")
    # It was over once the second start had been well for a while, at steps that count from zero again.
    assert (first.state, first.resolved_step) == (IncidentState.RESOLVED, 19)
    assert second.state is IncidentState.OPEN
    old, new = engine.view().commands
    assert (old.incident, old.state) == (first.id, CommandState.EXPIRED)
    assert (new.incident, new.state) == (second.id, CommandState.PROPOSED)


def test_a_broken_run_is_not_called_resolved_because_its_damage_has_become_usual() -> None:
    sim = SimulatedJob(seed=2, num_steps=900, lr_factor=_jump, policy={"mode": "suggest", "snapshots": False}).run()
    (incident,) = sim.incidents
    assert incident.kind == "lr_jump"
    assert incident.state is IncidentState.OPEN


def test_a_rank_without_an_agent_is_named_shown_as_blind_and_not_waited_for() -> None:
    engine = Engine("run")
    engine.handle(hello(0, 2), NOW)
    effects = []
    for step in range(40):
        effects += engine.handle(frame(1.0, rank=0, world_size=2, first_step=step), NOW + 0.5 * step)
    (notice,) = [effect.text for effect in effects if isinstance(effect, Notice)]
    assert notice.startswith("rank 1: no agent")
    view = engine.view()
    assert [(rank.rank, rank.state) for rank in view.ranks] == [(0, "live"), (1, "blind")]
    assert view.step == 39
    asked = Fix(who="me", action=Action(action="scale_lr", params={"factor": 0.5}))
    assert not engine.reply(asked).done
    assert "rank 1: no agent" in engine.reply(asked).text
    engine.handle(hello(1, 2), NOW + 20.0)
    assert [rank.state for rank in engine.view().ranks] == ["live", "live"]
    assert "no agent" not in engine.reply(asked).text


def test_two_jobs_of_one_name_are_kept_apart_and_told_once() -> None:
    engine = Engine("run")
    engine.handle(hello(generation="g1"), NOW)
    engine.handle(hello(generation="g2"), NOW + 1.0)
    effects = []
    for step in range(30):
        for generation, loss in (("g1", 5.0), ("g2", 1.0)):
            event = frame(loss, first_step=step, generation=generation)
            effects += engine.handle(event, NOW + 2.0 + step)
    (notice,) = [effect.text for effect in effects if isinstance(effect, Notice)]
    assert "two jobs call themselves run" in notice
    assert "g1" in notice
    raised = {"type": "ValueError", "message": "no such sample", "stack": (), "step": 30, "phase": Phase.FORWARD}
    engine.handle(ExceptionReport(header=header(generation="g1"), **raised), NOW + 33.0)
    view = engine.view()
    assert (view.generation, view.loss, view.incidents) == ("g2", 1.0, ())

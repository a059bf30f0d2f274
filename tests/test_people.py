"""What people may ask of a run, what comes of it, and what sosa then leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sosa_stream.decide.commands import FINAL_STATES, CommandRecord, CommandState, Verdict
from sosa_stream.decide.requests import Approve, Fix, Pause, Request, Resume, Undo
from sosa_stream.effects import Event, Notice
from sosa_stream.engine import Engine
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import AckState, Command
from sosa_stream.testing import AUTO_POLICY, NO_SNAPSHOTS, NOW, SimulatedJob, Simulation, feed, hello

HALF = Action(action="scale_lr", params={"factor": 0.5})
SUGGEST = {**AUTO_POLICY, "mode": "suggest"}


def _jump(step: int) -> float:
    return 1000.0 if step >= 300 else 1.0


def _of(record: CommandRecord) -> tuple[list[str], str, str, str]:
    return [a.action for a in record.actions], record.origin, str(record.state), str(record.verdict)


def _notices(sim: Simulation) -> list[str]:
    return [effect.text for effect in sim.effects if isinstance(effect, Notice)]


def asking(request: Request) -> Callable[[Engine], Request]:
    return lambda engine: request


def undo(which: int) -> Callable[[Engine], Request]:
    return lambda engine: Undo(command=engine.view().commands[which].id, who="ann")


# -- pause -------------------------------------------------------------------------------------------------------------


def test_a_paused_run_gets_proposals_and_no_fix_by_itself_until_it_is_resumed() -> None:
    pause, resume = asking(Pause(who="ann", reason="a demo")), asking(Resume(who="ben"))
    paused = SimulatedJob(seed=0, lr_factor=_jump, asks={250: pause}).run()
    (proposed,) = paused.commands
    assert _of(proposed)[1:] == ("policy", "expired", "not_applied")
    assert "only proposed: ann has paused repairs" in proposed.reason
    assert proposed.detail.startswith("only proposed: ann has paused repairs")
    assert paused.published == []
    assert paused.engine.view().paused == "ann"

    resumed = SimulatedJob(seed=0, lr_factor=_jump, asks={250: pause, 340: resume}).run()
    first, second = resumed.commands
    assert (first.state, second.state) == (CommandState.EXPIRED, CommandState.VERIFIED)
    assert "decided anew" in first.reason
    assert second.applied_step is not None
    assert 340 < second.applied_step < 350
    assert [incident.state for incident in resumed.incidents] == ["resolved"]
    assert resumed.engine.view().paused == ""


def test_what_a_pause_withheld_costs_nothing_of_the_limits() -> None:
    policy = {**AUTO_POLICY, "max_fixes_per_run": 1}
    asks = {250: asking(Pause(who="ann")), 340: asking(Resume(who="ann"))}
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy=policy, asks=asks).run()
    assert [record.verdict for record in sim.commands] == [Verdict.NOT_APPLIED, Verdict.HELPED]


def test_a_proposal_of_a_paused_run_can_be_approved() -> None:
    approve = lambda engine: Approve(command=engine.view().commands[0].id, who="ann")  # noqa: E731
    sim = SimulatedJob(seed=0, lr_factor=_jump, asks={250: asking(Pause(who="ann")), 320: approve}).run()
    (record,) = sim.commands
    assert _of(record) == (["scale_lr", "rollback"], "policy", "verified", "helped")
    assert sim.published[0].approved


def _wrong_from_300(step: int, multiplier: float) -> float:
    return 3.0 if step >= 300 else 0.0


def test_a_fix_that_harms_is_taken_back_while_the_run_is_paused() -> None:
    asks = {345: asking(Pause(who="ann"))}
    sim = SimulatedJob(seed=0, num_steps=500, damage=_wrong_from_300, policy=NO_SNAPSHOTS, asks=asks).run()
    assert [_of(record)[2] for record in sim.commands][:2] == ["reverted", "verified"]
    assert sim.commands[1].actions[0].action == "revert"
    assert all(record.state is not CommandState.VERIFIED for record in sim.commands[2:])


def test_a_pause_outlives_a_restart_of_the_group() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump, asks={100: asking(Pause(who="ann"))}, restarts={200: AUTO_POLICY}).run()
    assert sim.published == []


# -- quiet hours -------------------------------------------------------------------------------------------------------

SEVEN_SECONDS_BEFORE_SEVEN = 7 * 3600 - 7 - NOW % 86400
"""How far local time must be ahead of UTC for a simulated run, which takes 20 ms a step, to begin then."""


def test_in_quiet_hours_a_fix_is_only_proposed_and_decided_anew_after_them() -> None:
    offsets = [[0, 0], [NOW - 60, SEVEN_SECONDS_BEFORE_SEVEN]]
    policy = {**AUTO_POLICY, "quiet_hours": ["22:00-07:00"], "quiet_offsets": offsets}
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy=policy).run()
    withheld, applied = sim.commands
    assert (withheld.state, withheld.verdict) == (CommandState.EXPIRED, Verdict.NOT_APPLIED)
    assert "these are quiet hours" in withheld.reason
    assert (applied.state, applied.verdict) == (CommandState.VERIFIED, Verdict.HELPED)
    assert applied.applied_step is not None
    assert 320 < applied.applied_step < 360


def test_what_a_person_approves_or_asks_for_in_quiet_hours_is_applied() -> None:
    policy = {**AUTO_POLICY, "quiet_hours": ["00:00-24:00"], "quiet_offsets": []}
    approve = lambda engine: Approve(command=engine.view().commands[-1].id, who="ann")  # noqa: E731
    asks = {100: asking(Fix(action=HALF, who="ann")), 320: approve}
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy=policy, asks=asks).run()
    assert [str(record.state) for record in sim.commands] == ["verified", "verified"]


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_beyond_its_bounds_a_fix_is_only_proposed_and_a_person_may_go_there() -> None:
    policy = {**AUTO_POLICY, "bounds": {"scale_lr": {"factor": [0.1, 1.0]}, "rollback": {"before_step": [0, 9]}}}
    approve = lambda engine: Approve(command=engine.view().commands[0].id, who="ann")  # noqa: E731
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy=policy, asks={330: approve}).run()
    (record,) = sim.commands
    assert record.actions[0].params["factor"] < 0.1
    assert (record.state, record.verdict) == (CommandState.VERIFIED, Verdict.HELPED)
    assert sim.published[0].approved


def test_within_its_bounds_a_fix_goes_ahead_by_itself() -> None:
    policy = {**AUTO_POLICY, "bounds": {"scale_lr": {"factor": [1e-4, 1.0]}, "rollback": {"before_step": [0, 400]}}}
    (record,) = SimulatedJob(seed=0, lr_factor=_jump, policy=policy).run().commands
    assert (record.state, record.verdict) == (CommandState.VERIFIED, Verdict.HELPED)


# -- undo --------------------------------------------------------------------------------------------------------------


def test_undo_takes_back_what_was_verified_and_its_verdict_stays() -> None:
    heals = lambda step, lr: 3.0 if 330 > step >= 300 and lr > 0.6 else 0.0  # noqa: E731
    sim = SimulatedJob(seed=1, damage=heals, policy=NO_SNAPSHOTS, asks={400: undo(0)}).run()
    fix, revert = sim.commands
    assert _of(fix) == (["scale_lr"], "policy", "reverted", "helped")
    assert _of(revert) == (["revert"], "person", "verified", "inconclusive")
    assert "ann asked for it" in revert.reason
    assert sim.engine.view().standing == ()


def test_undo_of_a_fix_on_probation_gives_it_no_verdict_of_its_own() -> None:
    asks = {345: undo(0)}
    sim = SimulatedJob(seed=0, num_steps=400, damage=_wrong_from_300, policy=NO_SNAPSHOTS, asks=asks).run()
    fix = sim.commands[0]
    assert _of(fix) == (["scale_lr"], "policy", "reverted", "inconclusive")
    assert [a.action for record in sim.commands[:2] for a in record.actions] == ["scale_lr", "revert"]


@pytest.mark.parametrize(("most", "possible"), [(100, False), (1000, True)])
def test_undo_of_a_rollback_loses_no_more_steps_than_a_rollback_may(most: int, possible: bool) -> None:
    policy = {**AUTO_POLICY, "max_rollback_steps": most}
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy=policy, asks={450: undo(0)}).run()
    fix = sim.commands[0]
    assert "rollback" in [action.action for action in fix.actions]
    assert (str(fix.state) == "reverted") is possible
    assert possible or any("max_rollback_steps 100" in text for text in _notices(sim))


def test_what_cannot_be_undone_is_said_with_the_reason() -> None:
    engine = Engine("run")
    feed(engine, [hello(policy=AUTO_POLICY)])
    reply = engine.reply(Undo(command="c9", who="ann"))
    assert (reply.done, reply.text) == (False, "this run does not know command c9")
    sim = SimulatedJob(seed=0, nan_at={200: 1}).run()
    assert not sim.engine.reply(Undo(command=sim.commands[0].id, who="ann")).done
    twice = SimulatedJob(seed=0, asks={100: asking(Fix(action=HALF, who="ann")), 200: undo(0), 300: undo(0)}).run()
    assert [_of(record)[2] for record in twice.commands] == ["reverted", "verified"]
    assert any("only what is in force can be taken back" in text for text in _notices(twice))


def test_a_fix_whose_rate_was_let_go_is_not_undone_for_that_would_raise_the_rate() -> None:
    sim = SimulatedJob(
        seed=1, lr_factor=lambda step: 1000.0 if 300 <= step < 340 else 1.0, asks={480: undo(0), 490: undo(1)}
    ).run()
    assert len(sim.commands) == 2
    assert any("would raise it" in text for text in _notices(sim))


# -- fix ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [AUTO_POLICY, SUGGEST, {"mode": "suggest"}])
def test_a_persons_fix_is_applied_whatever_allow_says_and_judged_and_kept(policy: dict[str, Any]) -> None:
    sim = SimulatedJob(seed=0, policy=policy, asks={200: asking(Fix(action=HALF, who="ann"))}).run()
    (record,) = sim.commands
    assert _of(record) == (["scale_lr"], "person", "verified", "inconclusive")
    assert "ann asked for it" in record.reason
    assert record.incident == ""
    assert sim.published[0].approved
    assert sim.engine.view().standing == (record.id,)


def _ruins(step: int, multiplier: float) -> float:
    return 5.0 if multiplier < 0.6 and step >= 210 else 0.0


@pytest.mark.parametrize("on_probation", [False, True])
def test_a_persons_fix_that_harms_is_told_and_taken_back_only_if_it_was_put_on_probation(on_probation: bool) -> None:
    fix = asking(Fix(action=HALF, who="ann", on_probation=on_probation))
    sim = SimulatedJob(seed=0, num_steps=400, policy={"mode": "suggest"}, damage=_ruins, asks={200: fix}).run()
    by_ann = sim.commands[0]
    assert (by_ann.verdict, by_ann.state) == (Verdict.HARMED, "reverted" if on_probation else "verified")


def test_a_persons_fix_for_what_is_wrong_is_judged_by_whether_it_is_right_again() -> None:
    damage = lambda step, lr: 3.0 if step >= 300 and lr > 0.6 else 0.0  # noqa: E731
    asks = {320: asking(Fix(action=HALF, who="ann"))}
    sim = SimulatedJob(seed=1, policy={"mode": "suggest"}, damage=damage, asks=asks).run()
    by_ann = next(record for record in sim.commands if record.origin == "person")
    assert (by_ann.incident, by_ann.verdict) == (sim.incidents[0].id, Verdict.HELPED)


def test_observe_refuses_a_persons_fix_and_says_so() -> None:
    sim = SimulatedJob(seed=0, policy={"mode": "observe"}, asks={200: asking(Fix(action=HALF, who="ann"))}).run()
    assert sim.commands == ()
    assert any("mode observe" in text for text in _notices(sim))


@pytest.mark.parametrize("action", [Action(action="none"), Action(action="revert", params={"command": "c1"})])
def test_what_is_no_fix_is_refused(action: Action) -> None:
    engine = Engine("run")
    feed(engine, [hello(policy=AUTO_POLICY)])
    assert not engine.reply(Fix(action=action, who="ann")).done


def test_a_fix_that_the_ranks_refuse_or_fail_is_not_applied_and_not_in_force() -> None:
    for state in (AckState.REJECTED, AckState.FAILED):

        def answer(command: Command, state: AckState = state) -> AckState:
            return state

        sim = SimulatedJob(seed=0, answers=answer, asks={200: asking(Fix(action=HALF, who="ann"))}).run()
        (record,) = sim.commands
        assert record.verdict is Verdict.NOT_APPLIED
        assert sim.engine.view().standing == ()


def test_nothing_can_be_asked_of_a_run_that_nobody_trains() -> None:
    sim = SimulatedJob(seed=0, num_steps=50).run()
    assert "no rank" in sim.engine.reply(Fix(action=HALF, who="ann")).text


def test_a_replay_with_what_people_asked_comes_to_the_same_commands() -> None:
    asks = {100: asking(Fix(action=HALF, who="ann")), 250: asking(Pause(who="ann")), 280: undo(0)}
    sim = SimulatedJob(seed=0, lr_factor=_jump, asks=asks).run()
    engine = Engine("run")
    events: list[Event] = list(sim.events)
    feed(engine, events)
    assert engine.view().commands == sim.commands
    assert [record.origin for record in sim.commands] == ["person", "person", "policy"]


def test_what_leaves_the_training_as_it_is_is_neither_judged_nor_in_force() -> None:
    dump = Action(action="dump_diagnostics")
    sim = SimulatedJob(seed=0, policy=SUGGEST, asks={100: asking(Fix(action=dump, who="ann"))}).run()
    (record,) = sim.commands
    assert (record.state, record.verdict) == (CommandState.VERIFIED, Verdict.INCONCLUSIVE)
    assert sim.engine.view().standing == ()


# -- caps --------------------------------------------------------------------------------------------------------------


def test_the_cap_of_a_run_never_refills_not_even_by_a_restart_of_the_group() -> None:
    policy = {**AUTO_POLICY, "max_fixes_per_run": 1, "cooldown_steps": 50}
    sick = lambda step, lr: 3.0 if 200 <= step < 260 or 600 <= step < 660 or step >= 900 else 0.0  # noqa: E731
    sim = SimulatedJob(seed=0, num_steps=1000, policy=policy, damage=sick, restarts={500: policy, 800: policy}).run()
    fixes = [record for record in sim.commands if record.origin == "policy" and record.actions[0].action != "revert"]
    assert len(fixes) == 1
    assert len(sim.incidents) >= 2


def test_a_fix_that_every_rank_refused_has_cost_nothing_of_the_caps() -> None:
    """As under a kill file: what was not applied is no fix."""

    def refuse_the_first(command: Command) -> AckState | None:
        return AckState.REJECTED if any(action.action == "rollback" for action in command.actions) else None

    policy = {**AUTO_POLICY, "max_fixes_per_run": 1, "max_fixes_per_error": 1}
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy=policy, answers=refuse_the_first).run()
    assert [str(record.state) for record in sim.commands[:2]] == ["rejected", "verified"]


# -- whatever people ask, whenever -------------------------------------------------------------------------------------


def _of_some_command(make: Callable[..., Request], which: int) -> Callable[[Engine], Request]:
    def ask(engine: Engine) -> Request:
        commands = engine.view().commands
        return make(command=commands[which % len(commands)].id if commands else "c0", who="ann")

    return ask


ASKS = st.one_of(
    st.builds(_of_some_command, st.sampled_from([Approve, Undo]), st.integers(0, 20)),
    st.sampled_from([asking(Pause(who="ann")), asking(Resume(who="ben"))]),
    st.builds(
        lambda factor, probation: asking(
            Fix(action=Action(action="scale_lr", params={"factor": factor}), who="ann", on_probation=probation)
        ),
        st.sampled_from([0.01, 0.5, 2.0]),
        st.booleans(),
    ),
)
REFUSALS = st.sampled_from([None, None, AckState.REJECTED, AckState.FAILED, AckState.ABORTED])


@given(
    asks=st.dictionaries(st.integers(20, 290), ASKS, max_size=12),
    restarts=st.dictionaries(st.integers(100, 280), st.sampled_from([AUTO_POLICY, SUGGEST]), max_size=2),
    refusals=st.lists(REFUSALS, min_size=4, max_size=4),
    jump_ends=st.integers(150, 300),
)
@settings(max_examples=25, deadline=None)
def test_whatever_people_ask_whenever_every_command_ends_and_a_replay_agrees(
    asks: dict[int, Callable[[Engine], Request]],
    restarts: dict[int, dict[str, Any]],
    refusals: list[AckState | None],
    jump_ends: int,
) -> None:
    sim = SimulatedJob(
        seed=0,
        num_steps=300,
        lr_factor=lambda step: 1000.0 if 120 <= step < jump_ends else 1.0,
        asks=asks,
        restarts=restarts,
        answers=lambda command: None if command.actions[0].action == "revert" else refusals[command.seq % 4],
    ).run()
    assert all(record.state in FINAL_STATES and record.verdict is not None for record in sim.commands)
    engine = Engine("run")
    feed(engine, sim.events)
    assert engine.view().commands == sim.commands
    assert engine.view().standing == sim.engine.view().standing
    standing = {record.id: record for record in sim.commands if record.id in sim.engine.view().standing}
    assert all(record.state is CommandState.VERIFIED for record in standing.values())

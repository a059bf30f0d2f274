"""What comes of an alert that asks for an action: a proposal, bound by all that binds `auto`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sosa_stream.decide.commands import CommandState, Verdict
from sosa_stream.decide.requests import Approve, Pause, Propose, Request, Resume
from sosa_stream.effects import Notice, Publish
from sosa_stream.engine import Engine
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.recording import decode_record, encode_shell_record
from sosa_stream.testing import AUTO_POLICY, NOW, SimulatedJob, Simulation

HALF = Action(action="scale_lr", params={"factor": 0.5})


def alert(factor: float = 0.5, rule: str = "GpuHot") -> Propose:
    action = Action(action="scale_lr", params={"factor": factor})
    return Propose(action=action, who=f"alert {rule}", rule=rule, alert="1a30 2026-01-01T00:00:00Z")


def run(policy: Mapping[str, Any] = AUTO_POLICY, **asks: Request) -> Simulation:
    """A healthy run that is asked for something before each of the steps ``at<step>``."""
    at = {int(step.removeprefix("at")): asking(request) for step, request in asks.items()}
    return SimulatedJob(seed=2, policy=policy, asks=at, num_steps=500).run()


def asking(request: Request) -> Callable[[Engine], Request]:
    return lambda engine: request


def notices(sim: Simulation) -> list[str]:
    return [effect.text for effect in sim.effects if isinstance(effect, Notice)]


def test_where_allow_names_the_action_it_goes_ahead_on_probation_and_says_whose_it_is() -> None:
    sim = run(at150=alert())
    (record,) = sim.commands
    assert (record.origin, record.incident, record.actions) == ("alert", "", (HALF,))
    assert (record.state, record.verdict) == (CommandState.VERIFIED, Verdict.INCONCLUSIVE)
    assert record.reason.startswith("alert GpuHot asks for it")
    assert not sim.published[0].approved, "so that every rank asks [auto] allow once more"


def test_what_harms_is_taken_back() -> None:
    damage = lambda step, multiplier: 3.0 if multiplier < 0.6 else 0.0  # noqa: E731
    sim = SimulatedJob(seed=2, damage=damage, asks={150: asking(alert())}).run()
    assert (sim.commands[0].state, sim.commands[0].verdict) == (CommandState.REVERTED, Verdict.HARMED)


def test_what_allow_does_not_name_is_only_proposed_until_a_person_approves() -> None:
    policy = {**AUTO_POLICY, "allow": ["skip_step"]}
    (record,) = run(policy, at150=alert()).commands
    assert record.state is CommandState.EXPIRED
    assert "only proposed: [auto] allow does not name scale_lr" in record.reason

    approve = lambda engine: Approve(command=engine.view().commands[0].id, who="ann")  # noqa: E731
    sim = SimulatedJob(seed=2, policy=policy, asks={150: asking(alert()), 200: approve}).run()
    assert sim.commands[0].state is CommandState.VERIFIED
    assert sim.published[0].approved


def test_in_mode_suggest_it_is_only_proposed_and_in_observe_refused() -> None:
    suggested = run({**AUTO_POLICY, "mode": "suggest"}, at150=alert())
    assert suggested.published == []
    assert "only proposed: the mode is suggest" in suggested.commands[0].reason
    observed = run({**AUTO_POLICY, "mode": "observe"}, at150=alert())
    assert observed.commands == ()
    assert any("only observed" in text for text in notices(observed))


def test_beyond_the_bounds_of_auto_or_the_largest_change_it_is_only_proposed() -> None:
    bounded = run({**AUTO_POLICY, "bounds": {"scale_lr": {"factor": [0.6, 1.0]}}}, at150=alert())
    changed = run({**AUTO_POLICY, "max_lr_change": 4.0}, at150=alert(), at300=alert(0.25))
    assert bounded.published == []
    assert "lies outside" in bounded.commands[0].reason
    assert len(changed.published) == 1
    assert "beyond max_lr_change 4" in changed.commands[1].reason


def test_a_rule_that_keeps_firing_spends_its_fixes_and_those_of_the_run() -> None:
    asks = {f"at{150 + 130 * i}": alert(0.9 - 0.01 * i) for i in range(3)}
    of_rule = run({**AUTO_POLICY, "max_fixes_per_error": 2}, **asks)
    of_run = run({**AUTO_POLICY, "max_fixes_per_run": 1}, **asks)
    refilled = run({**AUTO_POLICY, "max_fixes_per_error": 1, "cooldown_steps": 100}, **asks)
    assert [len(sim.published) for sim in (of_rule, of_run, refilled)] == [2, 1, 3]
    assert "the limit of fixes is reached" in of_rule.commands[2].reason


def test_one_that_asks_for_the_same_as_one_that_waits_is_refused() -> None:
    sim = run({**AUTO_POLICY, "mode": "suggest"}, at150=alert(), at160=alert(rule="Other"), at170=alert(0.25))
    assert [record.actions[0].params["factor"] for record in sim.commands] == [0.5, 0.25]
    assert any("is for the same already" in text for text in notices(sim))


def test_it_waits_while_repairs_are_paused_and_while_another_fix_is_under_way() -> None:
    sim = run(at100=Pause(who="ann"), at150=alert(), at160=alert(0.25), at200=Resume(who="ann"))
    first, second = sim.commands
    assert first.applied_step is not None
    assert second.applied_step is not None
    assert 200 < first.applied_step < 210
    assert second.applied_step > first.applied_step + 100, "one on trial at a time"


def test_a_recording_of_it_replays_to_the_same_end() -> None:
    sim = SimulatedJob(seed=0, asks={150: asking(alert())}, lr_factor=lambda step: 1000.0 if step >= 340 else 1.0).run()
    assert len(sim.commands) > 1
    again = Engine("run")
    effects = []
    for i, event in enumerate(sim.events):
        if isinstance(event, Request):
            event = decode_record(encode_shell_record(event))
        effects += again.handle(event, NOW + 0.01 * (i + 1))
    assert again.view().commands == sim.commands
    assert [e.command for e in effects if isinstance(e, Publish)] == sim.published


def test_the_curve_has_few_points_of_the_whole_run_whatever_its_batches() -> None:
    sims = [SimulatedJob(seed=0, num_steps=2000, batch=batch).run() for batch in (1, 7)]
    first, second = (sim.engine.view().losses for sim in sims)
    assert first == second
    assert 120 <= len(first) <= 240
    assert first[0][0] == 0
    assert first[-1][0] >= 1984
    assert first[0][1] > 4.0 > first[-1][1]

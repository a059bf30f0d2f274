"""What is in force stays wanted: a new generation of the run gets it again, or a sentence that says why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.decide.requests import Fix, Request, Undo
from sosa_stream.effects import Notice, Publish
from sosa_stream.engine import Engine
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import Ack, AckState, Command, Knobs, KnobState, MetricFrame
from sosa_stream.testing import (
    AUTO_POLICY,
    COLUMNS,
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

HALF = Action(action="scale_lr", params={"factor": 0.5})
CLIP = Action(action="clip_grad", params={"max_norm": 1.0})
BETA = Action(action="set_knob", params={"name": "beta", "value": 0.5})
SUGGEST = {**AUTO_POLICY, "mode": "suggest"}


def fix(action: Action) -> Callable[[Engine], Request]:
    return lambda engine: Fix(action=action, who="ann")


def undo(which: int) -> Callable[[Engine], Request]:
    return lambda engine: Undo(command=engine.view().commands[which].id, who="ann")


def notices(sim: Simulation) -> list[str]:
    return [effect.text for effect in sim.effects if isinstance(effect, Notice)]


def of(record: CommandRecord) -> tuple[list[str], str, str]:
    return [action.action for action in record.actions], record.origin, str(record.state)


def standing_heal(step: int, multiplier: float) -> float:
    """Wrong from 150 on, unless the rate is lower."""
    return 3.0 if step >= 150 and multiplier > 0.6 else 0.0


def test_a_persons_fixes_are_in_force_again_in_the_next_generation_as_one_command() -> None:
    asks = {50: fix(HALF), 60: fix(CLIP)}
    sim = SimulatedJob(seed=0, policy=SUGGEST, asks=asks, restarts={300: SUGGEST}).run()
    half, clip, again = sim.commands
    assert of(again) == (["scale_lr", "clip_grad"], "standing", "verified")
    assert again.reason == f"in force in the generation before: {half.id}, {clip.id}"
    assert (again.generation, again.applied_step) == ("g300", 302)
    assert (half.state, clip.state) == (CommandState.VERIFIED, CommandState.VERIFIED)
    assert sim.published[-1].approved
    assert sim.engine.view().standing == (again.id,)


def test_a_verified_fix_of_auto_is_in_force_again_and_no_new_incident_is_needed_for_it() -> None:
    sim = SimulatedJob(seed=1, damage=standing_heal, policy=NO_SNAPSHOTS, restarts={350: NO_SNAPSHOTS}).run()
    first, again = sim.commands
    assert (of(first), first.verdict) == ((["scale_lr"], "policy", "verified"), Verdict.HELPED)
    assert of(again) == (["scale_lr"], "standing", "verified")
    assert not sim.published[-1].approved


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        ({"mode": "observe"}, "mode is observe now"),
        ({**AUTO_POLICY, "allow": ["skip_step"]}, "allow"),
        (SUGGEST, "mode"),
    ],
)
def test_what_the_new_generation_may_not_have_is_dropped_with_a_message(policy: Mapping[str, Any], why: str) -> None:
    sim = SimulatedJob(seed=1, num_steps=360, damage=standing_heal, policy=NO_SNAPSHOTS, restarts={350: policy}).run()
    dropped = next(record for record in sim.commands if record.origin == "standing")
    assert of(dropped) == (["scale_lr"], "standing", "rejected")
    assert why in dropped.reason
    assert any("is not applied again" in text and why in text for text in notices(sim))
    assert sim.engine.view().standing == ()


def test_a_rate_that_was_held_is_only_scaled_in_the_next_generation_which_may_warm_up() -> None:
    held = Action(action="scale_lr", params={"factor": 0.5, "hold": 1})
    sim = SimulatedJob(seed=0, policy=SUGGEST, asks={50: fix(held)}, restarts={300: SUGGEST}).run()
    assert [record.actions for record in sim.commands] == [(held,), (HALF,)]


def test_a_fix_still_on_trial_when_its_generation_ends_is_not_carried_over_and_that_is_said() -> None:
    sim = SimulatedJob(
        seed=1, num_steps=250, damage=standing_heal, policy=NO_SNAPSHOTS, restarts={180: NO_SNAPSHOTS}
    ).run()
    assert of(sim.commands[0]) == (["scale_lr"], "policy", "verified")
    assert any("is not carried over" in text for text in notices(sim))
    assert all(record.origin != "standing" for record in sim.commands)


def test_one_fix_that_a_rank_refuses_does_not_cost_the_others() -> None:
    def no_knob(command: Command) -> AckState | None:
        return AckState.REJECTED if BETA in command.actions and command.generation != "g1" else None

    asks = {50: fix(HALF), 60: fix(BETA)}
    sim = SimulatedJob(seed=0, policy=SUGGEST, answers=no_knob, asks=asks, restarts={300: SUGGEST}).run()
    assert [of(record) for record in sim.commands[2:]] == [
        (["scale_lr", "set_knob"], "standing", "rejected"),
        (["scale_lr"], "standing", "verified"),
        (["set_knob"], "standing", "rejected"),
    ]
    assert any(f"{sim.commands[1].id} could not be applied again" in text for text in notices(sim))


def test_a_knob_that_is_registered_late_gets_what_stood() -> None:
    registered = []

    class Late(Simulation):
        def _train(self, step: int) -> None:
            if step == 340:
                registered.append(KnobState(name="beta", value=1.0, low=0.0, high=4.0))
                self._tell(Knobs(header=self._head(0), knobs=tuple(registered)))
            super()._train(step)

    def no_knob(command: Command) -> AckState | None:
        return AckState.REJECTED if BETA in command.actions and command.generation != "g1" and not registered else None

    asks = {50: fix(HALF), 60: fix(BETA)}
    sim = Late(SimulatedJob(seed=0, policy=SUGGEST, answers=no_knob, asks=asks, restarts={300: SUGGEST})).run()
    assert [of(record) for record in sim.commands[3:]] == [
        (["scale_lr"], "standing", "verified"),
        (["set_knob"], "standing", "rejected"),
        (["set_knob"], "standing", "verified"),
    ]
    assert (sim.commands[-1].applied_step or 0) >= 340


def test_a_generation_that_dies_before_it_had_them_hands_them_on_to_the_next() -> None:
    restarts = {300: SUGGEST, 302: SUGGEST}
    sim = SimulatedJob(seed=0, policy=SUGGEST, asks={50: fix(HALF)}, restarts=restarts).run()
    assert [of(record)[1:] for record in sim.commands] == [
        ("person", "verified"),
        ("standing", "aborted"),
        ("standing", "verified"),
    ]
    assert sim.commands[2].generation == "g302"


def test_a_start_that_ends_before_it_had_them_hands_them_on_too() -> None:
    sim = SimulatedJob(seed=0, num_steps=200, policy=SUGGEST, asks={50: fix(HALF)}).run()
    engine = sim.engine
    feed(engine, [hello(policy=SUGGEST, generation="g2"), bye(generation="g2")], NOW + 1e6)
    assert [of(record)[1:] for record in engine.view().commands] == [("person", "verified"), ("standing", "expired")]
    effects = feed(engine, [hello(rank, 2, policy=SUGGEST, generation="g3") for rank in range(2)], NOW + 2e6)
    (publish,) = [effect for effect in effects if isinstance(effect, Publish)]
    assert (publish.command.generation, publish.command.actions) == ("g3", (HALF,))


def test_what_a_start_without_a_single_step_refused_is_offered_to_the_next() -> None:
    sim = SimulatedJob(seed=0, num_steps=200, policy=SUGGEST, asks={50: fix(HALF)}).run()
    engine = sim.engine

    def offered(generation: str, at: float) -> Command:
        effects = feed(engine, [hello(policy=SUGGEST, generation=generation)], NOW + at)
        (publish,) = [effect for effect in effects if isinstance(effect, Publish)]
        head = header(generation=generation)
        ack = Ack(header=head, command=publish.command.id, state=AckState.REJECTED, tick=0, step=0)
        feed(engine, [ack], NOW + at + 1)
        return publish.command

    assert offered("g2", 1e6).actions == offered("g3", 2e6).actions == (HALF,)
    feed(engine, [frame([2.0, 2.0], generation="g3")], NOW + 2e6 + 2)
    trained_without = feed(engine, [hello(policy=SUGGEST, generation="g4")], NOW + 3e6)
    assert not any(isinstance(effect, Publish) for effect in trained_without)


def test_what_was_taken_back_is_not_applied_again() -> None:
    asks = {50: fix(HALF), 200: undo(0)}
    sim = SimulatedJob(seed=0, policy=SUGGEST, asks=asks, restarts={300: SUGGEST}).run()
    assert [record.origin for record in sim.commands] == ["person", "person"]


def test_a_fix_that_is_in_force_again_is_undone_by_its_new_id() -> None:
    asks = {50: fix(HALF), 320: undo(0), 330: undo(1)}
    sim = SimulatedJob(seed=0, policy=SUGGEST, asks=asks, restarts={300: SUGGEST}).run()
    _, again, revert = sim.commands
    assert any(f"is in force again as {again.id}: undo that one" in text for text in notices(sim))
    assert (again.state, revert.state) == (CommandState.REVERTED, CommandState.VERIFIED)
    assert sim.published[-1].actions == (Action(action="revert", params={"command": again.id}),)


def test_a_fix_can_be_dropped_while_no_process_is_there() -> None:
    sim = SimulatedJob(seed=0, num_steps=200, policy=SUGGEST, asks={50: fix(HALF)}).run()
    engine, first = sim.engine, sim.commands[0]
    assert engine.reply(Undo(command=first.id, who="ann")).done
    engine.handle(Undo(command=first.id, who="ann"), NOW + 1e6)
    assert engine.view().commands[0].state is CommandState.REVERTED
    effects = feed(engine, [hello(rank, 2, policy=SUGGEST, generation="g2") for rank in range(2)], NOW + 1e6 + 1)
    assert not any(isinstance(effect, Publish) for effect in effects)


def test_it_is_published_once_all_ranks_are_there_and_before_any_has_stepped() -> None:
    sim = SimulatedJob(seed=0, num_steps=200, policy=SUGGEST, asks={50: fix(HALF)}).run()
    first = sim.engine.handle(hello(0, 2, policy=SUGGEST, generation="g2"), NOW + 1e6)
    assert not any(isinstance(effect, Publish) for effect in first)
    second = sim.engine.handle(hello(1, 2, policy=SUGGEST, generation="g2"), NOW + 1e6)
    (publish,) = [effect for effect in second if isinstance(effect, Publish)]
    assert publish.command.actions == (HALF,)
    assert publish.command.expires_tick > 1000


def test_a_rate_held_down_for_a_jump_that_the_restart_has_ended_is_let_go_at_once() -> None:
    jump = lambda step: 1000.0 if 200 <= step < 400 else 1.0  # noqa: E731
    sim = SimulatedJob(seed=1, lr_factor=jump, restarts={400: AUTO_POLICY}).run()
    held, again, released = sim.commands
    assert (of(held)[0], of(again)[0], of(released)[0]) == (["scale_lr", "rollback"], ["scale_lr"], ["scale_lr"])
    assert again.actions[0].params["factor"] * released.actions[0].params["factor"] == pytest.approx(1.0)
    assert again.applied_step is not None
    assert released.applied_step is not None
    assert released.applied_step - again.applied_step < 10


def test_a_rate_that_was_let_go_stays_so_in_the_next_generation() -> None:
    jump = lambda step: 1000.0 if 200 <= step < 300 else 1.0  # noqa: E731
    sim = SimulatedJob(seed=1, lr_factor=jump, restarts={430: AUTO_POLICY}).run()
    assert [record.origin for record in sim.commands] == ["policy", "policy"]


def test_another_model_has_nothing_of_the_last_one_in_force() -> None:
    engine = Engine("run")
    effects = feed(engine, [hello(policy=SUGGEST), _frame(0, 40, model=0), Fix(action=HALF, who="ann")])
    (publish,) = [effect for effect in effects if isinstance(effect, Publish)]
    applied = Ack(header=header(), command=publish.command.id, state=AckState.APPLIED, tick=40, step=40)
    feed(engine, [applied, _frame(40, 60, model=0)], NOW + 1)
    assert engine.view().standing == (publish.command.id,)
    told = feed(engine, [_frame(60, 80, model=1)], NOW + 2)
    assert engine.view().standing == ()
    assert any(isinstance(effect, Notice) and "another model" in effect.text for effect in told)
    again = feed(engine, [hello(policy=SUGGEST, generation="g2")], NOW + 3)
    assert not any(isinstance(effect, Publish) for effect in again)


def _frame(first: int, last: int, *, model: float) -> MetricFrame:
    steps = np.arange(first, last, dtype=np.int64)
    rows = [(step, 2.0 + 0.01 * np.sin(step), 1.0, 1e-3, 1.0, 0.1, 0.0, model) for step in steps]
    return MetricFrame(header=header(), columns=(*COLUMNS, "model"), steps=steps, values=np.array(rows))


def test_a_replay_comes_to_the_same_standing_fixes() -> None:
    asks = {50: fix(HALF), 60: fix(CLIP), 330: undo(2)}
    sim = SimulatedJob(seed=0, policy=SUGGEST, asks=asks, restarts={300: SUGGEST}).run()
    engine = Engine("run")
    feed(engine, sim.events)
    assert engine.view() == sim.engine.view()

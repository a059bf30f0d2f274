"""What the daemon says to whoever looks at the job's own output: what is new, once, and nothing else."""

from __future__ import annotations

from dataclasses import replace

from sosa_stream.announce import Announcer
from sosa_stream.decide.commands import CommandState, Verdict
from sosa_stream.effects import CommandChanged
from sosa_stream.testing import SimulatedJob


def _jump(step: int) -> float:
    return 1000.0 if step >= 300 else 1.0


def test_an_incident_is_told_when_it_opens_and_when_it_is_over_and_info_is_not() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump).run()
    texts = [announcement.text for announcement in Announcer().tell(sim.effects) if announcement.incident_kind]
    assert len(texts) == 2
    assert texts[0].startswith("step 301: critical: lr_jump: learning rate rose")
    assert texts[1].endswith("lr_jump of step 300 is over")


def test_an_incident_is_told_with_what_a_log_needs_for_its_marker() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump).run()
    first, last = (told for told in Announcer().tell(sim.effects) if told.incident_kind)
    assert (first.incident_kind, first.severity, first.state, first.step) == ("lr_jump", "critical", "open", 301)
    assert (last.incident_kind, last.state) == ("lr_jump", "resolved")
    assert f"step {last.step}: " in last.text


def test_a_proposal_is_told_with_the_words_that_apply_it() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy={"mode": "suggest"}, stop_at=310).run()
    open_effects = [effect for effect in sim.effects if "expired" not in repr(effect)]
    texts = [announcement.text for announcement in Announcer().tell(open_effects)]
    (command,) = sim.commands
    assert texts[-1] == f"scale_lr, rollback may help; apply: sosa approve {command.id}"


def test_the_same_state_is_not_told_twice() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump, policy={"mode": "observe"}, stop_at=340).run()
    announcer = Announcer()
    assert len(list(announcer.tell(sim.effects))) >= 1
    assert list(announcer.tell(sim.effects[-1:])) == []


def test_whether_a_fix_helped_is_told_once_and_what_the_guard_did_is_not() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump).run()
    told = [announcement for announcement in Announcer().tell(sim.effects) if announcement.state == "helped"]
    (fix,) = [command for command in sim.commands if command.applied_step is not None]
    assert [(each.incident, each.incident_kind, each.step) for each in told] == [(fix.incident, "", fix.applied_step)]
    assert told[0].text.startswith("scale_lr(factor=")
    assert told[0].text.endswith(f"of step {fix.applied_step} helped")
    by_guard = [
        replace(effect, record=replace(effect.record, origin="guard")) if isinstance(effect, CommandChanged) else effect
        for effect in sim.effects
    ]
    assert not [each for each in Announcer().tell(by_guard) if each.state == "helped"]


def test_a_fix_that_harmed_is_told_with_its_being_taken_back() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump).run()
    (record,) = [command for command in sim.commands if command.applied_step is not None]
    record = replace(record, state=CommandState.REVERTED, verdict=Verdict.HARMED)
    (told,) = Announcer().tell([CommandChanged(record=record)])
    assert told.state == "harmed"
    assert told.text.endswith("did harm; it was taken back")

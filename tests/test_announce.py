"""What the daemon says to whoever looks at the job's own output: what is new, once, and nothing else."""

from __future__ import annotations

from sosa_stream.announce import Announcer
from sosa_stream.testing import SimulatedJob


def _jump(step: int) -> float:
    return 1000.0 if step >= 300 else 1.0


def test_an_incident_is_told_when_it_opens_and_when_it_is_over_and_info_is_not() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump).run()
    texts = [announcement.text for announcement in Announcer().tell(sim.effects)]
    assert len(texts) == 2
    assert texts[0].startswith("step 301: critical: lr_jump: learning rate rose")
    assert texts[1].endswith("lr_jump of step 300 is over")


def test_an_incident_is_told_with_what_a_log_needs_for_its_marker() -> None:
    sim = SimulatedJob(seed=0, lr_factor=_jump).run()
    first, last = Announcer().tell(sim.effects)
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

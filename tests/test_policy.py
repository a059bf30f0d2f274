"""Which fix is chosen, within which limits, and what verdict it gets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sosa_stream.decide.choice import choose
from sosa_stream.decide.commands import FINAL_STATES, TRANSITIONS, CommandRecord, CommandState, Verdict
from sosa_stream.decide.ledger import Entry, Ledger
from sosa_stream.decide.playbook import LADDERS, Situation
from sosa_stream.decide.policy import GATE, Budget, RunPolicy
from sosa_stream.decide.probation import HELPED_STEPS, Probation
from sosa_stream.detect.incidents import Group
from sosa_stream.detect.statistics import Level
from sosa_stream.errors import ConfigError
from sosa_stream.protocol.actions import ACTIONS, Action
from sosa_stream.protocol.messages import Ack, AckState, KnobState
from sosa_stream.settings import AutoSettings, Mode
from sosa_stream.testing import header, incident

AUTO = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=("scale_lr", "clip_grad", "rollback", "stop")))
LEVEL = Level(center=2.0, scale=0.1, threshold=9.0)


def _situation(kind: str, *, step: int = 120, evidence: dict[str, Any] | None = None, **changes: Any) -> Situation:
    sick = incident(kind=kind, group=Group.LEARNING, first_step=100, detected_step=101, evidence=evidence or {})
    values: dict[str, Any] = {
        "in_band": False,
        "nonfinite": False,
        "num_nonfinite": 0,
        "weights_clean": False,
        "steps_since_finding": 0,
        "lr": 1.0,
        "lr_multiplier": 1.0,
        "norm_high": 2.0,
    }
    return Situation(incident=sick, step=step, **(values | changes))


def _plain(actions: tuple[Action, ...]) -> list[tuple[str, dict[str, Any]]]:
    return [(action.action, dict(action.params)) for action in actions]


def test_first_fix_of_a_jump_is_the_usual_rate_and_a_rollback_as_one() -> None:
    choice = choose(_situation("lr_jump", evidence={"lr_before": 1e-3}), frozenset(), AUTO)
    assert choice is not None
    assert choice.automatic
    assert choice.confidence == pytest.approx(0.85)
    assert _plain(choice.actions) == [("scale_lr", {"factor": 1e-3}), ("rollback", {"before_step": 100})]


def test_a_jump_whose_own_step_has_damaged_nothing_needs_no_rollback() -> None:
    choice = choose(_situation("lr_jump", step=100, evidence={"lr_before": 1e-3}), frozenset(), AUTO)
    assert choice is not None
    assert _plain(choice.actions) == [("scale_lr", {"factor": 1e-3})]


def test_a_spike_is_left_alone_while_it_may_recover() -> None:
    assert choose(_situation("loss_spike", step=110), frozenset(), AUTO) is None
    assert choose(_situation("loss_spike", step=120, in_band=True), frozenset(), AUTO) is None
    choice = choose(_situation("loss_spike", step=120), frozenset(), AUTO)
    assert choice is not None
    assert _plain(choice.actions) == [("scale_lr", {"factor": 0.5})]


def test_a_nan_that_the_guard_skipped_needs_nothing_more_until_it_persists() -> None:
    assert choose(_situation("nan_loss", nonfinite=True, num_nonfinite=2), frozenset(), AUTO) is None
    choice = choose(_situation("nan_loss", nonfinite=True, num_nonfinite=3), frozenset(), AUTO)
    assert choice is not None
    assert [action.action for action in choice.actions] == ["scale_lr", "rollback"]


def test_bad_batches_of_one_rank_do_not_roll_clean_weights_back() -> None:
    now = _situation("nan_loss", nonfinite=True, num_nonfinite=5, weights_clean=True)
    assert choose(now, frozenset(), AUTO) is None


@pytest.mark.parametrize(("usual", "scale"), [(1024.0, 1024.0), (None, 2.0**16)])
def test_a_loss_scale_that_keeps_every_step_from_being_taken_is_set_to_that_of_before(
    usual: float | None, scale: float
) -> None:
    stuck = _situation("nonfinite_gradient", stuck_loss_scale=2.0**36, usual_loss_scale=usual)
    allowed = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=("set_loss_scale", "rollback", "scale_lr")))
    choice = choose(stuck, frozenset(), allowed)
    assert choice is not None
    assert choice.automatic
    assert _plain(choice.actions) == [("set_loss_scale", {"scale": scale})]


def test_clip_bound_comes_from_the_runs_own_norms() -> None:
    choice = choose(_situation("exploding_gradient"), frozenset(), AUTO)
    assert choice is not None
    assert _plain(choice.actions) == [("clip_grad", {"max_norm": 3.0})]


@pytest.mark.parametrize("kind", ["loss_plateau", "vanishing_gradient"])
def test_below_the_gate_a_fix_is_only_proposed(kind: str) -> None:
    choice = choose(_situation(kind), frozenset(), AUTO)
    assert choice is not None
    assert choice.confidence < GATE
    assert not choice.automatic


@pytest.mark.parametrize("kind", ["oom", "exception", "rank_desync"])
def test_kinds_without_a_known_fix_get_none(kind: str) -> None:
    assert choose(_situation(kind), frozenset(), AUTO) is None


def test_out_of_memory_turns_the_scripts_own_knob_unless_the_batch_went_on_in_parts() -> None:
    policy = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=("set_knob",)))
    for name in ("micro_batch_size", "batch_size"):
        knobs = {name: KnobState(name=name, value=12.0, low=1.0, high=64.0)}
        choice = choose(_situation("oom", knobs=knobs), frozenset(), policy)
        assert choice is not None
        assert _plain(choice.actions) == [("set_knob", {"name": name, "value": 6.0})]
        assert choose(_situation("oom", knobs=knobs, evidence={"num_parts": 2}), frozenset(), policy) is None


def test_observe_chooses_nothing_and_suggest_applies_nothing() -> None:
    now = _situation("loss_divergence")
    assert choose(now, frozenset(), RunPolicy(mode=Mode.OBSERVE)) is None
    choice = choose(now, frozenset(), RunPolicy(mode=Mode.SUGGEST, limits=AUTO.limits))
    assert choice is not None
    assert not choice.automatic


def test_auto_takes_the_lowest_rung_that_it_may_apply() -> None:
    only_clip = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=("scale_lr",)))
    choice = choose(_situation("lr_jump", evidence={"lr_before": 1e-3}), frozenset(), only_clip)
    assert choice is not None
    assert (choice.fix.name, choice.automatic) == ("usual_lr", True)


def test_the_ladder_climbs_past_what_was_tried() -> None:
    tried: set[str] = set()
    names = []
    while (choice := choose(_situation("loss_divergence"), frozenset(tried), AUTO)) is not None:
        names.append(choice.fix.name)
        tried.add(choice.fix.name)
    assert names == ["half_lr", "half_lr_and_rollback"]


def test_a_fix_beyond_the_limits_is_passed_over() -> None:
    tight = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=AUTO.limits.allow, max_lr_change=10.0))
    held_down = _situation("loss_divergence", lr_multiplier=0.15)
    choice = choose(held_down, frozenset(), tight)
    assert choice is None
    short = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=AUTO.limits.allow, max_rollback_steps=10))
    assert choose(_situation("loss_divergence"), frozenset({"half_lr"}), short) is None


@pytest.mark.parametrize(("lr", "multiplier"), [(1.0, 1.0), (0.5, 0.5)])
def test_however_far_a_fault_has_taken_the_rate_the_way_back_is_no_change_of_it(lr: float, multiplier: float) -> None:
    tight = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=AUTO.limits.allow, max_lr_change=10.0))
    jump = _situation("lr_jump", evidence={"lr_before": 1e-3}, lr=lr, lr_multiplier=multiplier)
    choice = choose(jump, frozenset(), tight)
    assert choice is not None
    assert _plain(choice.actions)[0] == ("scale_lr", {"factor": pytest.approx(1e-3 / lr)})
    fell = _situation("loss_plateau", evidence={"lr_before": 1.0, "lr_after": 1e-6}, lr=1e-6)
    choice = choose(fell, frozenset(), tight)
    assert choice is not None
    assert [action["factor"] for _, action in _plain(choice.actions)] == pytest.approx([1e3, 1e3])
    assert _plain(choice.actions)[-1][1]["hold"] == 1, "the script's own rate may come back"


@given(
    kind=st.sampled_from(sorted(LADDERS)),
    lr=st.floats(1e-12, 1e12),
    before=st.floats(1e-12, 1e12),
    norm=st.floats(1e-30, 1e30),
)
def test_every_fix_that_the_playbook_builds_is_a_valid_one(kind: str, lr: float, before: float, norm: float) -> None:
    now = _situation(kind, evidence={"lr_before": before}, lr=lr, norm_high=norm)
    for fix in LADDERS[kind]:
        assert 0.0 < fix.confidence < 1.0
        assert all(isinstance(action, Action) for action in fix.build(now))


def test_budget_refills_for_a_kind_and_never_for_the_run() -> None:
    limits, budget = AutoSettings(max_fixes_per_error=2, max_fixes_per_run=3, cooldown_steps=100), Budget()
    budget.note("loss_spike", 0, 100)
    for _ in range(2):
        assert budget.left("loss_spike", limits)
        budget.spend("loss_spike")
    assert not budget.left("loss_spike", limits)
    assert budget.left("nan_loss", limits)
    budget.note("loss_spike", 50, 100)
    assert not budget.left("loss_spike", limits)
    budget.note("loss_spike", 151, 100)
    assert budget.left("loss_spike", limits)
    budget.spend("loss_spike")
    budget.note("loss_spike", 9999, 100)
    assert not budget.left("loss_spike", limits)


@pytest.mark.parametrize(
    "policy", [{"mode": "wild"}, {"mode": "auto", "allow": "all"}, {"max_lr_change": "x"}, {"allow": ["rm"]}]
)
def test_a_policy_that_makes_no_sense_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RunPolicy.read(policy)


def _judge(steps: list[tuple[bool, bool, float]], patience: int = 60) -> tuple[int, Verdict | None]:
    probation = Probation(applied_step=0, patience_steps=patience, level=LEVEL, loss=5.0)
    for step, (in_band, nonfinite, loss) in enumerate(steps, 1):
        verdict = probation.watch(step, in_band=in_band, nonfinite=nonfinite, loss=loss)
        if verdict is not None:
            return step, verdict
    return len(steps), None


def test_helped_is_back_in_band_and_staying() -> None:
    assert _judge([(False, False, 5.0)] * 4 + [(True, False, 2.0)] * 30) == (4 + HELPED_STEPS, Verdict.HELPED)


def test_back_in_band_without_staying_is_inconclusive() -> None:
    steps = ([(True, False, 2.0)] * 10 + [(False, False, 4.0)]) * 6
    assert _judge(steps) == (60, Verdict.INCONCLUSIVE)


def test_never_back_is_no_effect_and_worse_is_harmed() -> None:
    assert _judge([(False, False, 5.0)] * 60) == (60, Verdict.NO_EFFECT)
    assert _judge([(False, False, 9.0)] * 60) == (8, Verdict.HARMED)
    assert _judge([(False, True, 5.0)] * 60) == (3, Verdict.HARMED)


def test_steps_before_the_fix_do_not_count() -> None:
    probation = Probation(applied_step=50, patience_steps=60, level=LEVEL, loss=5.0)
    assert all(probation.watch(s, in_band=True, nonfinite=False, loss=2.0) is None for s in range(51))


def _entry(state: CommandState = CommandState.PUBLISHED) -> tuple[Ledger, Entry]:
    record = CommandRecord(
        id="c1", run="run", generation="g1", incident="i1", actions=(), confidence=0.9, state=state, reason="why"
    )
    ledger, entry = Ledger(), Entry(record=record, fix="f", patience_steps=60, seq=1)
    ledger.add(entry)
    return ledger, entry


def _ack(rank: int, state: AckState, step: int = 10, detail: str = "") -> Ack:
    return Ack(header=header(rank, 2), command="c1", state=state, tick=step, step=step, detail=detail)


def test_a_command_is_held_and_applied_once_all_ranks_say_so() -> None:
    ledger, entry = _entry()
    states = []
    for state in (AckState.HELD, AckState.COMMITTED, AckState.APPLIED):
        for rank in range(2):
            ledger.acknowledge(_ack(rank, state, step=10 + rank), (0, 1))
            states.append(str(entry.record.state))
    assert states == ["published", "held", "committed", "committed", "committed", "applied"]
    assert entry.record.applied_step == 10


def test_what_was_done_is_kept_in_the_words_of_the_lowest_rank() -> None:
    ledger, entry = _entry()
    for rank in (1, 0):
        assert entry.record.detail == ""
        ledger.acknowledge(_ack(rank, AckState.APPLIED, detail=f"as rank {rank} did it"), (0, 1))
    assert entry.record.detail == "as rank 0 did it"
    assert ledger.of_incident(entry.record.incident)[0]["detail"] == "as rank 0 did it"


@pytest.mark.parametrize(("ack", "state"), [(AckState.REJECTED, "rejected"), (AckState.FAILED, "aborted")])
def test_one_rank_that_cannot_ends_the_command_with_its_reason(ack: AckState, state: str) -> None:
    ledger, entry = _entry()
    ledger.acknowledge(_ack(1, ack, detail="no snapshot"), (0, 1))
    assert (entry.record.state, entry.record.verdict) == (state, Verdict.NOT_APPLIED)
    assert "rank 1: no snapshot" in entry.record.reason
    assert entry.record.detail == "rank 1: no snapshot"


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(AckState)), max_size=20))
def test_no_order_of_acks_breaks_the_table_of_states(acks: list[tuple[int, AckState]]) -> None:
    ledger, entry = _entry()
    for rank, state in acks:
        before = entry.record.state
        ledger.acknowledge(_ack(rank, state), (0, 1))
        assert entry.record.state is before or entry.record.state in TRANSITIONS[before]
    assert entry.final is (entry.record.state in FINAL_STATES)


def test_public_keys_of_a_command_are_frozen() -> None:
    assert list(_entry()[1].record.as_dict()) == [
        *("schema_version", "id", "run", "incident", "actions", "confidence", "state", "applied_step", "verdict"),
        *("reason", "why", "detail"),
    ]


@pytest.mark.parametrize("name", [name for name, spec in ACTIONS.items() if spec.irreversible and name != "skip_step"])
def test_what_cannot_be_taken_back_goes_ahead_only_where_allow_names_it(name: str) -> None:
    params = {key: int(param.low) for key, param in ACTIONS[name].params.items()}
    action = Action(action=name, params=params)
    everything_else = tuple(other for other in ACTIONS if other != name)
    assert not RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=everything_else)).may_apply((action,), 1.0)
    assert RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=(name,))).may_apply((action,), 1.0)
    assert name not in AutoSettings().allow


@pytest.mark.parametrize(
    ("evidence", "action"),
    [
        ({"has_majority": True, "equal_until": 64, "reduced": True}, "resync"),
        ({"has_majority": False, "equal_until": 64, "reduced": True}, "rollback"),
        ({"has_majority": False, "equal_until": None, "reduced": True}, None),
        ({"has_majority": False, "equal_until": 64, "reduced": False}, None),
        ({"has_majority": True, "equal_until": 64, "reduced": False}, None),
    ],
)
def test_parted_replicas_are_brought_together_only_where_they_still_reduce_their_gradients(
    evidence: dict[str, Any], action: str | None
) -> None:
    now = _situation("rank_desync", evidence=evidence)
    built = [fix.build(now) for fix in LADDERS["rank_desync"]]
    assert next((actions[0].action for actions in built if actions), None) == action


def test_frozen_parameters_are_copied_from_a_rank_that_still_has_them_and_never_rolled_back() -> None:
    resync, rollback = LADDERS["rank_desync"]
    known = _situation("rank_desync", evidence={"has_majority": True, "equal_until": None, "frozen": 5})
    unknown = _situation("rank_desync", evidence={"has_majority": False, "equal_until": None, "frozen": 5})
    assert [action.params["frozen"] for action in resync.build(known)] == [5]
    assert not rollback.build(known)
    assert not resync.build(unknown)
    assert not rollback.build(unknown)

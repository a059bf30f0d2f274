"""What trials teach, and how it enters the choice of the next fix."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sosa_stream.decide.beta import quantile, share_below
from sosa_stream.decide.choice import choose
from sosa_stream.decide.commands import Verdict
from sosa_stream.decide.experience import MIN_COUNTED, NONE, PRIOR_STRENGTH, Experience, Outcome
from sosa_stream.decide.playbook import PRIORS, Situation
from sosa_stream.decide.policy import GATE, RunPolicy
from sosa_stream.detect.incidents import Group
from sosa_stream.settings import AutoSettings, Mode
from sosa_stream.testing import incident

AUTO = RunPolicy(mode=Mode.AUTO, limits=AutoSettings(allow=("scale_lr", "clip_grad", "rollback", "stop")))
COUNTED = (Verdict.HELPED, Verdict.NO_EFFECT, Verdict.HARMED, Verdict.INCONCLUSIVE)

outcomes = st.builds(
    lambda pair, verdict, weight, steps: Outcome(
        kind=pair[0], fix=pair[1], verdict=verdict, weight=weight, lasted_steps=steps
    ),
    st.sampled_from([*PRIORS, *((kind, NONE) for kind, _ in PRIORS)]),
    st.sampled_from(Verdict),
    st.floats(0.01, 1.0),
    st.integers(0, 5000),
)


def _outcome(kind: str, fix: str, verdict: Verdict = Verdict.HELPED, **fields: Any) -> Outcome:
    return Outcome(kind=kind, fix=fix, verdict=verdict, **fields)


def _sick(kind: str, **changes: Any) -> Situation:
    sick = incident(kind=kind, group=Group.LEARNING, first_step=100, detected_step=101)
    values: dict[str, Any] = {
        "in_band": False,
        "nonfinite": False,
        "num_nonfinite": 0,
        "weights_clean": False,
        "steps_since_finding": 0,
        "lr": 3e-4,
        "lr_multiplier": 1.0,
        "norm_high": 2.0,
    }
    return Situation(incident=sick, step=120, **(values | changes))


@given(st.floats(0.0, 1.0), st.integers(1, 30), st.integers(1, 30))
def test_share_below_is_the_binomial_tail(x: float, a: int, b: int) -> None:
    n = a + b - 1
    tail = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
    assert share_below(x, a, b) == pytest.approx(tail, abs=1e-9)


@given(st.floats(0.01, 0.99), st.floats(0.1, 200.0), st.floats(0.1, 200.0))
def test_quantile_undoes_share_below(share: float, a: float, b: float) -> None:
    x = quantile(share, a, b)
    assert share_below(x - 1e-9, a, b) <= share <= share_below(x + 1e-9, a, b)


@settings(max_examples=30, deadline=None)
@given(st.lists(outcomes, max_size=40), st.floats(0.5, 1.0))
def test_posteriors_are_bounded_whatever_was_counted(counted: list[Outcome], discount: float) -> None:
    known = Experience(counted, discount=discount)
    for kind, fix in PRIORS:
        posterior = known.posterior(kind, fix)
        assert posterior.a > 0.0
        assert posterior.b > 0.0
        assert 0.0 < posterior.lower <= 1.0
        assert posterior.lower < posterior.mean < 1.0
        chances = [known.recovery(kind, steps) for steps in (0, 5, 30, 240, 10_000)]
        assert chances == sorted(chances)
        assert chances[0] == 0.0
        assert chances[-1] <= 1.0


@settings(deadline=None)
@given(st.lists(outcomes, max_size=20).flatmap(lambda counted: st.tuples(st.just(counted), st.permutations(counted))))
def test_without_forgetting_the_order_of_outcomes_changes_nothing(orders: tuple[list[Outcome], list[Outcome]]) -> None:
    ours, theirs = (Experience(order) for order in orders)
    for kind, fix in PRIORS:
        one, other = ours.posterior(kind, fix), theirs.posterior(kind, fix)
        assert (one.a, one.b) == pytest.approx((other.a, other.b))
        assert ours.recovery(kind, 33) == pytest.approx(theirs.recovery(kind, 33))


def test_a_posterior_is_the_playbooks_prior_until_outcomes_are_counted() -> None:
    posterior = Experience().posterior("nan_loss", "half_lr_and_rollback")
    assert posterior.mean == pytest.approx(0.7)
    failed = Experience([_outcome("nan_loss", "half_lr_and_rollback", Verdict.NO_EFFECT)] * 10)
    assert failed.posterior("nan_loss", "half_lr_and_rollback").mean == pytest.approx(0.35)


def test_what_says_little_counts_little_and_leads_nowhere() -> None:
    weak = Experience([_outcome("loss_spike", "half_lr", Verdict.INCONCLUSIVE)] * 5)
    assert weak.posterior("loss_spike", "half_lr").num_counted == pytest.approx(1.0)
    endless = Experience([_outcome("loss_spike", "half_lr", Verdict.INCONCLUSIVE)] * 1000)
    assert endless.posterior("loss_spike", "half_lr").confidence < GATE


@pytest.mark.parametrize("verdict", [Verdict.NOT_APPLIED])
def test_what_was_not_applied_counts_nothing(verdict: Verdict) -> None:
    known = Experience([_outcome("loss_spike", "half_lr", verdict)] * 9)
    assert known.posterior("loss_spike", "half_lr") == Experience().posterior("loss_spike", "half_lr")


def test_a_fix_that_fails_against_other_kinds_is_trusted_less_but_its_own_record_rules() -> None:
    elsewhere = [_outcome("loss_divergence", "half_lr", Verdict.NO_EFFECT)] * 10
    fresh = Experience().posterior("loss_spike", "half_lr")
    warned = Experience(elsewhere).posterior("loss_spike", "half_lr")
    assert warned.mean == pytest.approx(fresh.mean - 5.5 / 20)
    assert warned.a + warned.b == pytest.approx(PRIOR_STRENGTH)
    own = Experience([*elsewhere, *[_outcome("loss_spike", "half_lr")] * 30])
    assert own.posterior("loss_spike", "half_lr").mean > 0.75


def test_confidence_is_the_mean_and_then_the_lower_bound() -> None:
    few = Experience([_outcome("loss_spike", "half_lr")] * 4).posterior("loss_spike", "half_lr")
    many = Experience([_outcome("loss_spike", "half_lr")] * 5).posterior("loss_spike", "half_lr")
    assert few.confidence == few.mean
    assert many.confidence == many.lower < many.mean


def test_forgetting_forgets_by_what_came_after() -> None:
    before = [_outcome("loss_spike", "half_lr", Verdict.NO_EFFECT)] * 20
    after = [_outcome("loss_spike", "half_lr")] * 20
    assert Experience([*before, *after], discount=0.8).posterior("loss_spike", "half_lr").mean > 0.65
    assert Experience([*before, *after]).posterior("loss_spike", "half_lr").mean == pytest.approx(0.51)
    elsewhere = [_outcome("nan_loss", "far_rollback")] * 100
    kept = Experience([*before, *elsewhere], discount=0.8).posterior("loss_spike", "half_lr").num_counted
    assert kept == Experience(before, discount=0.8).posterior("loss_spike", "half_lr").num_counted


def test_natural_recovery_is_learned_from_faults_that_were_left_alone() -> None:
    healing = [_outcome("loss_spike", NONE, lasted_steps=4)] * 30
    lasting = [_outcome("loss_spike", NONE, Verdict.NO_EFFECT, lasted_steps=500)] * 30
    assert Experience(healing).recovery("loss_spike", 10) > 0.75
    assert Experience(lasting).recovery("loss_spike", 240) < 0.2
    # nobody looked longer: nothing is said of what comes after
    unseen = Experience([_outcome("loss_spike", NONE, Verdict.NO_EFFECT, lasted_steps=10)] * 30)
    fresh = Experience()

    def later(known: Experience) -> float:
        return (1.0 - known.recovery("loss_spike", 240)) / (1.0 - known.recovery("loss_spike", 10))

    assert later(unseen) == pytest.approx(later(fresh))
    assert unseen.recovery("loss_spike", 10) < fresh.recovery("loss_spike", 10)


def test_a_fix_that_is_no_better_than_nothing_is_proposed_and_not_applied() -> None:
    left_alone = [_outcome("loss_spike", NONE, lasted_steps=4)] * 40
    choice = choose(_sick("loss_spike"), frozenset(), AUTO, Experience(left_alone))
    assert choice is not None
    assert not choice.automatic
    assert "not above `none`" in choice.why


def test_below_the_gate_a_fix_is_no_longer_applied_by_itself() -> None:
    failed = [_outcome("loss_oscillation", "lower_lr", Verdict.HARMED)] * 6
    choice = choose(_sick("loss_oscillation"), frozenset(), AUTO, Experience(failed))
    assert choice is not None
    assert (choice.automatic, choice.confidence < GATE) == (False, True)


def test_a_higher_rung_is_taken_first_once_it_is_clearly_better() -> None:
    def chosen(counted: list[Outcome]) -> str:
        choice = choose(_sick("loss_divergence"), frozenset(), AUTO, Experience(counted))
        assert choice is not None
        return choice.fix.name

    assert chosen([]) == "half_lr"
    assert chosen([_outcome("loss_divergence", "half_lr_and_rollback")] * 2) == "half_lr_and_rollback"
    assert chosen([_outcome("loss_divergence", "half_lr")] * 2) == "half_lr"


def test_what_cannot_be_taken_back_never_overtakes() -> None:
    believed = [_outcome("nan_loss", "stop")] * 30
    choice = choose(_sick("nan_loss", nonfinite=True, num_nonfinite=12), frozenset(), AUTO, Experience(believed))
    assert choice is not None
    assert choice.fix.name == "half_lr_and_rollback"


def test_what_the_playbook_leaves_to_people_needs_a_record_of_its_own() -> None:
    elsewhere = [_outcome("loss_oscillation", "lower_lr")] * 100
    limits = replace(AUTO.limits, allow=("scale_lr",))
    policy = RunPolicy(mode=Mode.AUTO, limits=limits)
    tried = frozenset({"higher_lr"})
    borrowed = choose(_sick("loss_plateau"), tried, policy, Experience(elsewhere))
    assert borrowed is not None
    assert not borrowed.automatic
    own = [_outcome("loss_plateau", "lower_lr")] * 30
    earned = choose(_sick("loss_plateau"), tried, policy, Experience(own))
    assert earned is not None
    assert own
    assert earned.automatic


def test_exploring_draws_the_same_from_the_same_seed_and_others_from_others() -> None:
    policy = RunPolicy(mode=Mode.AUTO, limits=replace(AUTO.limits, explore=True))

    def chosen(seed: int) -> str | None:
        choice = choose(_sick("loss_divergence"), frozenset(), policy, Experience(), seed=f"run/{seed}")
        return None if choice is None else choice.fix.name

    assert [chosen(seed) for seed in range(40)] == [chosen(seed) for seed in range(40)]
    assert {chosen(seed) for seed in range(40)} == {"half_lr", "half_lr_and_rollback"}


def test_a_choice_explains_itself_by_the_evidence() -> None:
    counted = [_outcome("nan_loss", "half_lr_and_rollback")] * 3
    counted.append(_outcome("nan_loss", "half_lr_and_rollback", Verdict.NO_EFFECT))
    choice = choose(_sick("nan_loss", nonfinite=True, num_nonfinite=3), frozenset(), AUTO, Experience(counted))
    assert choice is not None
    idle = Experience(counted).recovery("nan_loss", 240)
    assert choice.why == (
        f"half_lr_and_rollback for nan_loss: 3 of 4 helped in this project (mean 0.71, above `none` {idle:.2f}); "
        "3 non-finite steps since 100, lr 0.0003"
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(outcomes, max_size=30), st.booleans(), st.sampled_from(sorted({kind for kind, _ in PRIORS})))
def test_nothing_is_applied_below_the_gate_or_against_a_better_none(
    counted: list[Outcome], explore: bool, kind: str
) -> None:
    known = Experience(counted)
    policy = RunPolicy(mode=Mode.AUTO, limits=replace(AUTO.limits, explore=explore))
    choice = choose(_sick(kind), frozenset(), policy, known, seed="s")
    if choice is not None and choice.automatic:
        posterior = known.posterior(kind, choice.fix.name)
        assert choice.confidence >= GATE
        assert explore or posterior.mean > known.recovery(kind, choice.fix.patience_steps)
        assert choice.fix.confidence >= GATE or posterior.num_counted >= MIN_COUNTED


@pytest.mark.parametrize("fields", [{"weight": 0.0}, {"weight": 1.5}, {"weight": math.nan}, {"lasted_steps": -1}])
def test_an_outcome_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="out of bounds"):
        _outcome("loss_spike", "half_lr", **fields)

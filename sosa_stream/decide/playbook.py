"""Which fixes are known for which kind of incident, in the order in which they are tried.

A fix builds its actions from the incident's evidence; its numbers are those of the field: half the learning rate for
divergence (OPT needed between -10% and 2/3 [FAULTS.md A]), × 0.7 for oscillation, a clip bound from the run's own
window, a rollback to before the first bad step. Confidence is the share of trials in which such a fix is expected to
help: a prior, written down here so that it can be argued with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sosa_stream.detect.incidents import Incident
from sosa_stream.protocol.actions import ACTIONS, Action
from sosa_stream.protocol.messages import KnobState

SPIKE_PATIENCE_STEPS = 15
"""Most spikes heal untouched (82% are back within 10 points on real logs): a spike is left alone for this long."""
SLOW_PATIENCE_STEPS = 16
"""What unfolds slowly is left alone for this long after it was found."""
NONFINITE_STEPS = 3
"""Non-finite steps before skipping them is not enough."""
ONE_RANK_STEPS = 30
"""As many when the guard kept the weights clean and other ranks' losses are finite: bad data, not bad weights."""
CLIP_MARGIN = 1.5
"""A clip bound is this far above the 90% quantile of the healthy norms, so that it leaves healthy steps alone."""
RELEARN_STEPS = 240
"""A rollback is judged later: what it gave up, a few snapshots' worth of steps, has to be learned again first."""
LOST_SHARE = 0.25
"""A loss that has risen by this share of all that was learned, and stays there, comes from damaged weights: to go back
a few snapshots costs less than to learn it again, and neither a clip nor a lower rate brings it back."""
SKIPPED_STEPS = 40
"""Batches that go by unused after a rollback whose loss shows bad data [PaLM, Chowdhery et al. 2022, 5.1: 200-500]."""
FIRST_LOSS_SCALE = 2.0**16
"""Where torch's GradScaler begins."""
FIRST_SNAPSHOT_STEPS = 12
"""Before this step lies the quarantine of the snapshot that was taken before training."""
DIGEST_ROUND_STEPS = 1200
"""By then each chunk has been looked at again, by default: there are 32 at most, one every 32 steps."""
FARTHER_STEPS = 100
"""How far before the first bad step the second rollback goes: too near the blow-up repeats it [FAULTS.md D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """An incident at one step, with what a fix may depend on."""

    incident: Incident
    step: int
    in_band: bool
    """Whether the loss is where it was before the incident."""
    nonfinite: bool
    """Whether a loss or a gradient is, but for a loss that reaches no gradient."""
    num_nonfinite: int
    """Non-finite steps of this incident so far."""
    weights_clean: bool
    """The guard skipped the update, and at least one rank's loss is finite."""
    steps_since_finding: int
    lr: float | None
    """Effective learning rate now."""
    has_lr: bool = True
    """Whether there is one that could be scaled: optimizers may reckon their own."""
    lr_multiplier: float
    norm_high: float | None
    """The 90% quantile of the gradient norm before the incident."""
    usual_lr: float | None = None
    """The effective learning rate of some time before the incident."""
    stands: bool = False
    """No step has been made for ``auto.restart_after_seconds``, and none will be."""
    lost: float = 0.0
    """The share of what was learned that the loss has lost: 1 is where training began."""
    stuck_loss_scale: float | None = None
    """The AMP scale, where it keeps every step from being taken."""
    usual_loss_scale: float | None = None
    """That of the last step that was taken."""
    knobs: Mapping[str, KnobState] = field(default_factory=dict)
    """What the script lets fixes set, by name."""

    @property
    def age(self) -> int:
        return self.step - self.incident.first_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """One way to repair: when it is due, what it does, how sure we are before having tried it."""

    name: str
    confidence: float
    due: Callable[[Situation], bool]
    build: Callable[[Situation], tuple[Action, ...]]
    """The actions; none when the fix does not apply here."""
    patience_steps: int = 60
    """Steps after which a fix that has not helped is judged."""
    keep: frozenset[str] = frozenset()
    """Actions that are not taken back when it did not help: that would bring the fault, or damaged weights, back."""


def _still_bad(now: Situation) -> bool:
    return now.nonfinite or not now.in_band


def _poisoned(now: Situation) -> bool:
    needed = ONE_RANK_STEPS if now.weights_clean else NONFINITE_STEPS
    return now.nonfinite and now.num_nonfinite >= needed


def _spike_stays(now: Situation) -> bool:
    return _still_bad(now) and now.age >= SPIKE_PATIENCE_STEPS


def _keeps_happening(now: Situation) -> bool:
    return now.age >= 4 and now.steps_since_finding <= 2


def _keeps_swinging(now: Situation) -> bool:
    return _stays(now) and now.steps_since_finding <= SLOW_PATIENCE_STEPS


def _always(now: Situation) -> bool:
    return True


def _stays(now: Situation) -> bool:
    """Slow kinds are not acted upon at once: what they see may have been a pause."""
    return now.step - now.incident.detected_step >= SLOW_PATIENCE_STEPS


def _stays_with_a_gradient(now: Situation) -> bool:
    """No rate moves a weight whose gradient is exactly 0."""
    return _stays(now) and now.incident.evidence.get("grad_norm") != 0.0


def _has_not_gone_on(now: Situation) -> bool:
    """Memory ran out, and no rank could run its batch in parts."""
    return not now.incident.evidence.get("num_parts")


def _scale(factor: float) -> Callable[[Situation], tuple[Action, ...]]:
    def build(now: Situation) -> tuple[Action, ...]:
        return (Action(action="scale_lr", params={"factor": factor}),) if now.has_lr else ()

    return build


def _rollback(before_step: int) -> Action:
    return Action(action="rollback", params={"before_step": max(0, before_step)})


def _usual_lr(now: Situation) -> tuple[Action, ...]:
    """Bring the effective learning rate back to that of the step before the jump; nothing if it has come back."""
    before = now.incident.evidence.get("lr_before")
    if not isinstance(before, float) or now.lr is None or not 0.0 < before < now.lr / 1.5:
        return ()
    bounds = ACTIONS["scale_lr"].params["factor"]
    return (Action(action="scale_lr", params={"factor": min(max(before / now.lr, bounds.low), bounds.high)}),)


def _usual_lr_and_rollback(now: Situation) -> tuple[Action, ...]:
    # The step of the jump shows the loss before its own update: only a later step has been damaged.
    damaged = now.step > now.incident.first_step
    return (*_usual_lr(now), *((_rollback(now.incident.first_step),) if damaged else ()))


def _half_lr(now: Situation) -> tuple[Action, ...]:
    """Half of the rate; that of before the incident where it has crept up."""
    return _no_higher_lr(now) or _scale(0.5)(now)


def _half_lr_and_rollback(now: Situation) -> tuple[Action, ...]:
    return (*_half_lr(now), _rollback(now.incident.first_step))


def _quarter_lr_and_far_rollback(now: Situation) -> tuple[Action, ...]:
    """Half of the rate was not enough, and has been taken back."""
    lower = _no_higher_lr(now) or _scale(0.25)(now)
    return (*lower, _rollback(now.incident.first_step - FARTHER_STEPS))


def _no_higher_lr(now: Situation) -> tuple[Action, ...]:
    """The rate of before the incident, where it has risen since; nothing where it has not.

    What crept up creeps on while the ranks agree, and after: so no higher than that any more.
    """
    if now.usual_lr is None or now.lr is None or not 0.0 < now.usual_lr < now.lr / 2.0:
        return ()
    low = ACTIONS["scale_lr"].params["factor"].low
    return (Action(action="scale_lr", params={"factor": max(now.usual_lr / now.lr, low), "hold": 1}),)


def _back(now: Situation) -> tuple[Action, ...]:
    """To before the incident, at the rate of then, and within the norms of then if it was they that exploded."""
    exploded = "exploding_gradient" in (now.incident.kind, *now.incident.symptoms)
    return (*_no_higher_lr(now), *(_clip(now) if exploded else ()), _rollback(now.incident.first_step))


def _back_and_skip(now: Situation) -> tuple[Action, ...]:
    skip = Action(action="skip_step", params={"num_steps": SKIPPED_STEPS})
    return (*_no_higher_lr(now), _rollback(now.incident.first_step), skip)


def _far_back_and_slower(now: Situation) -> tuple[Action, ...]:
    return (*_scale(0.3)(now), _rollback(now.incident.first_step - FARTHER_STEPS))


def _much_slower_and_far_back(now: Situation) -> tuple[Action, ...]:
    """Units died of too large steps, at some time before anybody looked."""
    begun = now.incident.first_step - FARTHER_STEPS
    return (*_scale(0.1)(now), _rollback(max(begun, FIRST_SNAPSHOT_STEPS)))


def _lr_of_before_its_fall(now: Situation) -> tuple[Action, ...]:
    """Nothing where the loss stands without the rate having fallen."""
    before, after = (now.incident.evidence.get(name) for name in ("lr_before", "lr_after"))
    if not (isinstance(before, float) and isinstance(after, float)) or now.lr is None or now.lr > 10.0 * after:
        return ()
    high = ACTIONS["scale_lr"].params["factor"].high
    ratio = before / after
    steps = max(1, math.ceil(math.log(ratio, high)))
    factor = ratio ** (1.0 / steps)
    # held: the script's own rate may come back while this is in force
    last = Action(action="scale_lr", params={"factor": factor, "hold": 1})
    return (*((Action(action="scale_lr", params={"factor": factor}),) * (steps - 1)), last)


def _usual_loss_scale(now: Situation) -> tuple[Action, ...]:
    """That of the last step that was taken, or the one that scalers begin with."""
    usual = FIRST_LOSS_SCALE if now.usual_loss_scale is None else now.usual_loss_scale
    if now.stuck_loss_scale is None or not 0.0 < usual <= 0.5 * now.stuck_loss_scale:
        return ()
    bounds = ACTIONS["set_loss_scale"].params["scale"]
    return (Action(action="set_loss_scale", params={"scale": min(max(usual, bounds.low), bounds.high)}),)


def _clip(now: Situation) -> tuple[Action, ...]:
    if now.norm_high is None or not now.norm_high > 0.0:
        return ()
    bounds = ACTIONS["clip_grad"].params["max_norm"]
    return (Action(action="clip_grad", params={"max_norm": min(max(CLIP_MARGIN * now.norm_high, bounds.low), 1e12)}),)


def _turn(
    names: tuple[str, ...], factor: float, *, least: float = 0.0, whole: bool = False
) -> Callable[[Situation], tuple[Action, ...]]:
    """The first knob of these names times ``factor``, from at least ``least`` on, within its bounds."""

    def build(now: Situation) -> tuple[Action, ...]:
        for knob in (now.knobs[name] for name in names if name in now.knobs):
            value = factor * max(knob.value, least)
            value = min(max(math.floor(value) if whole else value, knob.low), knob.high)
            if value != knob.value:
                return (Action(action="set_knob", params={"name": knob.name, "value": value}),)
        return ()

    return build


def _resync(now: Situation) -> tuple[Action, ...]:
    """From the first rank that the incident does not name; nothing where no majority says which ranks are right."""
    evidence = now.incident.evidence
    if not evidence.get("has_majority") or not evidence.get("reduced", True):
        return ()
    source = next(rank for rank in itertools.count() if rank not in now.incident.ranks)
    frozen = {"frozen": evidence["frozen"]} if evidence.get("frozen") else {}
    return (Action(action="resync", params={"source": source, **frozen}),)


def _to_when_equal(now: Situation) -> tuple[Action, ...]:
    """All ranks back to when they were seen to be equal; nothing where they never were, or updates will differ again.

    With a majority the training of these ranks need not be given up, unless they have trained on what was corrupted.
    """
    evidence = now.incident.evidence
    until = evidence.get("equal_until")
    kept = evidence.get("has_majority") and now.incident.kind == "rank_desync"
    # Ranks whose gradients are not reduced would part again at once, and may do so on purpose.
    return (_rollback(until),) if until is not None and not kept and evidence.get("reduced", True) else ()


def _stop(now: Situation) -> tuple[Action, ...]:
    return (Action(action="stop"),)


def _restart(now: Situation) -> tuple[Action, ...]:
    return (Action(action="restart"),)


THE_WEIGHTS = frozenset({"rollback"})
THE_RATE = frozenset({"scale_lr"})
HALF_LR = Fix(name="half_lr", confidence=0.55, due=_still_bad, build=_half_lr, patience_steps=120)
ROLLBACK = Fix(
    name="half_lr_and_rollback",
    confidence=0.65,
    due=_still_bad,
    build=_half_lr_and_rollback,
    patience_steps=RELEARN_STEPS,
    keep=THE_WEIGHTS,
)
RESYNC = Fix(
    name="resync",
    confidence=0.8,
    due=_always,
    build=_resync,
    patience_steps=DIGEST_ROUND_STEPS,
    keep=frozenset({"resync"}),
)
TO_WHEN_EQUAL = Fix(
    name="rollback",
    confidence=0.6,
    due=_always,
    build=_to_when_equal,
    patience_steps=DIGEST_ROUND_STEPS,
    keep=THE_WEIGHTS,
)

LADDERS: Mapping[str, tuple[Fix, ...]] = {
    "lr_jump": (
        Fix(
            name="usual_lr_and_rollback",
            confidence=0.85,
            due=_still_bad,
            build=_usual_lr_and_rollback,
            patience_steps=RELEARN_STEPS,
            keep=THE_WEIGHTS | THE_RATE,
        ),
        Fix(name="usual_lr", confidence=0.7, due=_still_bad, build=_usual_lr, patience_steps=120, keep=THE_RATE),
        ROLLBACK,
    ),
    # The first rung, to skip the step, is the in-process guard's: it has happened before we hear of it.
    "nan_loss": (
        Fix(
            name="half_lr_and_rollback",
            confidence=0.7,
            due=_poisoned,
            build=_half_lr_and_rollback,
            patience_steps=RELEARN_STEPS,
            keep=THE_WEIGHTS,
        ),
        Fix(
            name="far_rollback",
            confidence=0.55,
            due=_poisoned,
            build=_quarter_lr_and_far_rollback,
            patience_steps=RELEARN_STEPS,
            keep=THE_WEIGHTS,
        ),
        Fix(name="stop", confidence=0.5, due=_poisoned, build=_stop),
    ),
    "loss_spike": (
        Fix(name="half_lr", confidence=0.55, due=_spike_stays, build=_half_lr, patience_steps=120),
        Fix(
            name="half_lr_and_rollback",
            confidence=0.6,
            due=_spike_stays,
            build=_half_lr_and_rollback,
            patience_steps=RELEARN_STEPS,
            keep=THE_WEIGHTS,
        ),
    ),
    "loss_divergence": (HALF_LR, ROLLBACK),
    "exploding_gradient": (
        Fix(name="clip", confidence=0.65, due=_keeps_happening, build=_clip),
        Fix(name="half_lr", confidence=0.55, due=_keeps_happening, build=_half_lr, patience_steps=120),
        ROLLBACK,
    ),
    "loss_oscillation": (
        Fix(name="lower_lr", confidence=0.6, due=_keeps_swinging, build=_scale(0.7), patience_steps=120),
    ),
    # Any of the kinds below whose loss stays far above what it was: see `kind_of`.
    "lost_progress": (
        Fix(name="back", confidence=0.7, due=_spike_stays, build=_back, patience_steps=RELEARN_STEPS, keep=THE_WEIGHTS),
        Fix(
            name="back_and_skip",
            confidence=0.6,
            due=_spike_stays,
            build=_back_and_skip,
            patience_steps=RELEARN_STEPS,
            keep=THE_WEIGHTS,
        ),
        Fix(
            name="far_back_and_slower",
            confidence=0.55,
            due=_spike_stays,
            build=_far_back_and_slower,
            patience_steps=RELEARN_STEPS,
            keep=THE_WEIGHTS,
        ),
        HALF_LR,
    ),
    # What `nonfinite_gradient` is treated as where the scaler keeps every step from being taken: see `kind_of`.
    "stuck_loss_scale": (
        Fix(
            name="usual_loss_scale",
            confidence=0.85,
            due=_always,
            build=_usual_loss_scale,
            keep=frozenset({"set_loss_scale"}),
        ),
    ),
    # Units die of steps that are too large.
    "dead_units": (
        Fix(
            name="much_slower_and_far_back",
            confidence=0.55,
            due=_stays,
            build=_much_slower_and_far_back,
            patience_steps=RELEARN_STEPS,
            keep=THE_WEIGHTS,
        ),
    ),
    # Below the gate, but for a rate that has fallen: a person's choice. Nothing tells from the loss alone which way the
    # rate is wrong.
    "loss_plateau": (
        Fix(name="lr_of_before", confidence=0.65, due=_always, build=_lr_of_before_its_fall, patience_steps=120),
        Fix(name="higher_lr", confidence=0.3, due=_stays_with_a_gradient, build=_scale(3.0), patience_steps=240),
        Fix(name="lower_lr", confidence=0.2, due=_stays_with_a_gradient, build=_scale(0.3), patience_steps=240),
    ),
    # A knob is there because the script's author wants it turned: what it does is known better than what a rate does.
    "posterior_collapse": (
        Fix(
            name="lower_kl_weight",
            confidence=0.6,
            due=_stays,
            build=_turn(("beta", "kl_weight"), 0.1),
            patience_steps=400,
        ),
    ),
    "overfitting": (
        Fix(
            name="more_weight_decay",
            confidence=0.5,
            due=_stays,
            build=_turn(("weight_decay",), 3.0, least=0.01),
            patience_steps=400,
        ),
        Fix(
            name="more_dropout",
            confidence=0.5,
            due=_stays,
            build=_turn(("dropout",), 1.5, least=0.1),
            patience_steps=400,
        ),
    ),
    "oom": (
        Fix(
            name="smaller_micro_batch",
            confidence=0.6,
            due=_has_not_gone_on,
            build=_turn(("micro_batch_size", "micro_batch", "batch_size"), 0.5, least=1.0, whole=True),
            patience_steps=60,
            keep=frozenset({"set_knob"}),
        ),
    ),
    # Equal digests of what differed end it: a round of them is awaited.
    "rank_desync": (RESYNC, TO_WHEN_EQUAL),
    "silent_corruption": (TO_WHEN_EQUAL, RESYNC),
    # Nothing in the processes can be repaired: their training threads are stuck.
    "hang": (Fix(name="restart", confidence=0.7, due=lambda now: now.stands, build=_restart),),
    "vanishing_gradient": (Fix(name="higher_lr", confidence=0.35, due=_stays, build=_scale(2.0), patience_steps=240),),
}
LOSES_PROGRESS = frozenset(
    {
        *("loss_spike", "loss_divergence", "loss_oscillation", "exploding_gradient", "input_anomaly"),
        *("dead_units", "saturated_activations", "nan_loss", "nonfinite_gradient"),
    }
)
"""Kinds that may leave damaged weights behind, or have taken in what does."""
PRIORS: Mapping[tuple[str, str], float] = {
    (kind, fix.name): fix.confidence for kind, fixes in LADDERS.items() for fix in fixes
}
"""Confidence by kind and fix."""

NATURAL: Mapping[str, float] = {
    **dict.fromkeys(("overfitting", "posterior_collapse", "vanishing_gradient"), 0.03),
    **dict.fromkeys(("rank_desync", "silent_corruption"), 0.01),
}
"""Kinds that do not go away by themselves: an assumption; else `NATURAL_OTHERWISE`."""
NATURAL_OTHERWISE = 0.1
"""P(well within 10 steps | a fix is due and nothing is done), and for each doubling of the time after that.

Of 35 faults in real logs that lasted until a fix was due, 7% to 15% of those left healed in each such span. (Of all
spikes, most of which are over before, 82% are back within 10 points.)
"""

GUARD_CONFIDENCE = 0.9
"""How often skipping a non-finite step is all that is needed."""


def kind_of(now: Situation) -> str:
    """What an incident is treated as: one that has damaged the weights beyond skipping is what it has become."""
    kind = now.incident.kind
    if kind == "nonfinite_gradient" and now.stuck_loss_scale is not None:
        return "stuck_loss_scale"
    if kind != "lr_jump" and _poisoned(now):
        return "nan_loss"
    if kind in LOSES_PROGRESS and now.lost >= LOST_SHARE and not now.nonfinite:
        return "lost_progress"
    return "nan_loss" if kind == "nonfinite_gradient" else kind


def ladder(now: Situation) -> tuple[Fix, ...]:
    """The fixes for an incident, the gentlest first."""
    return LADDERS.get(kind_of(now), ())

"""Which fix, if any: the ladder's order and what has been learned, together.

Rungs are considered from the gentlest up to the first that is not due. A higher rung is taken before a lower one only
where its posterior mean is better by more than `RUNG_PRICE` for each rung between them, and never where it cannot be
taken back. By itself a fix goes ahead only if its confidence passes the gate and its mean is above that of `none`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sosa_stream.decide.experience import MIN_COUNTED, NONE, Experience, Posterior
from sosa_stream.decide.playbook import Fix, Situation, kind_of, ladder
from sosa_stream.decide.policy import GATE, RunPolicy
from sosa_stream.protocol.actions import Action
from sosa_stream.settings import Mode

RUNG_PRICE = 0.1
"""How much likelier to help a fix must be, for each rung that it stands above another, to be tried before it."""
_NOISE = 1e-9
"""Means that differ by less are equal: the playbook's are decimal fractions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The fix to make now, and whether it goes ahead without a person."""

    kind: str
    """What the incident is treated as."""
    fix: Fix
    actions: tuple[Action, ...]
    confidence: float
    automatic: bool
    why: str
    """The evidence for it, in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    rung: int
    fix: Fix
    actions: tuple[Action, ...]
    posterior: Posterior
    value: float
    """The posterior's mean; where exploring, a draw from it."""
    idle: float
    """As much of `none`: that the run is well by itself in the time that the fix has."""
    automatic: bool

    @property
    def irreversible(self) -> bool:
        return any(action.irreversible for action in self.actions)


def choose(
    now: Situation,
    tried: frozenset[str],
    policy: RunPolicy,
    experience: Experience | None = None,
    seed: str = "",
) -> Choice | None:
    """The fix for an incident as it now is, one that may be applied before one that may not; none in `observe`.

    A rung that does not apply or exceeds the limits is passed over. ``seed`` is what draws depend on where the policy
    explores [Thompson 1933]: from the same one comes the same choice.
    """
    if policy.mode is Mode.OBSERVE:
        return None
    known = experience if experience is not None else Experience()
    kind = kind_of(now)
    options = []
    for rung, fix in enumerate(ladder(now)):
        if fix.name in tried:
            continue
        if not fix.due(now):
            break
        actions = fix.build(now)
        if not policy.snapshots and any(action.action == "rollback" for action in actions):
            continue  # half of such a fix is none: a lower learning rate does not heal weights that are NaN
        if not actions or not policy.within_limits(actions, now):
            continue
        posterior = known.posterior(kind, fix.name)
        explore = policy.limits.explore
        value = posterior.quantile(_uniform(f"{seed}/{fix.name}")) if explore else posterior.mean
        share = _uniform(f"{seed}/{NONE}") if explore else None
        idle = known.recovery(kind, fix.patience_steps, share)
        automatic = is_trusted(fix, posterior) and policy.may_apply(actions, posterior.confidence) and value > idle
        options.append(
            _Option(
                rung=rung,
                fix=fix,
                actions=actions,
                posterior=posterior,
                value=value,
                idle=idle,
                automatic=automatic,
            )
        )
    best = _best([option for option in options if option.automatic] or options)
    if best is None:
        return None
    return Choice(
        kind=kind,
        fix=best.fix,
        actions=best.actions,
        confidence=best.posterior.confidence,
        automatic=best.automatic,
        why=_why(kind, best, known, now),
    )


def is_trusted(fix: Fix, posterior: Posterior) -> bool:
    """What the playbook leaves to people stays theirs until outcomes of this very kind say otherwise."""
    return fix.confidence >= GATE or posterior.num_counted >= MIN_COUNTED


def _best(options: Sequence[_Option]) -> _Option | None:
    best: _Option | None = None
    for option in options:
        if best is None:
            best = option
        margin = RUNG_PRICE * (option.rung - best.rung) + _NOISE
        if not option.irreversible and option.value > best.value + margin:
            best = option
    return best


def _uniform(text: str) -> float:
    """A number in (0, 1) that any process makes of the same text."""
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) + 0.5) / 2**48


def _why(kind: str, option: _Option, known: Experience, now: Situation) -> str:
    posterior = option.posterior
    tried = "not tried in this project yet"
    if posterior.num_trials:
        tried = f"{posterior.num_helped} of {posterior.num_trials} helped in this project"
    idle = known.recovery(kind, option.fix.patience_steps)
    relation = "above" if posterior.mean > idle else "not above"
    belief = f"mean {posterior.mean:.2f}, {relation} `{NONE}` {idle:.2f}"
    if posterior.num_counted >= MIN_COUNTED:
        belief += f", lower bound {posterior.lower:.2f}"
    first = now.incident.first_step
    seen = f"{now.num_nonfinite} non-finite steps since {first}" if now.num_nonfinite else f"sick since step {first}"
    rate = "" if now.lr is None else f", lr {now.lr:.3g}"
    return f"{option.fix.name} for {kind}: {tried} ({belief}); {seen}{rate}"

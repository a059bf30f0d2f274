"""A run in one sentence, what happened first and where, in which order things happened, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sosa_stream.decide.commands import CommandRecord, CommandState
from sosa_stream.decide.playbook import LADDERS
from sosa_stream.detect.incidents import Incident, IncidentState, Severity
from sosa_stream.detect.wording import name_ranks
from sosa_stream.protocol.actions import Action
from sosa_stream.report.advice import ADVICE
from sosa_stream.report.story import Story

NOTHING = "none"
"""Severity of a run in which nothing was found."""
OUTCOMES = {
    "helped": "which helped",
    "no_effect": "which changed nothing",
    "harmed": "which did harm",
    "inconclusive": "and whether it helped cannot be told",
    "not_applied": "which was not applied",
}
MAX_MOMENTS = 200
OF_GRADIENTS = frozenset({"nan_loss", "nonfinite_gradient", "exploding_gradient"})
OF_ERRORS = frozenset({"exception", "oom", "shape_mismatch"})
OF_LOOKS = frozenset({"loss_spike", "loss_oscillation", "loss_plateau", "overfitting"})
OUTSTANDING = 10.0
"""Times its own usual norm that a layer's is at least, to be named; and times what is so of the median layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Something that happened. ``severity``: that of an incident, ``fix`` for what was done, ``over`` for its end."""

    step: int
    text: str
    severity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a colleague reads first.

    Attributes:
        sentence: what went wrong, when and where, what was done, what came of it.
        severity: ``critical``, ``warning``, ``info`` or ``none``.
        first: what happened first, and where: rank, host, layer, feature, as far as it is known.
        timeline: in the order of steps, at most `MAX_MOMENTS`.
        next_steps: what explains an error, and what can be done, the likeliest to help first.
    """

    sentence: str
    severity: str
    first: str
    timeline: tuple[Moment, ...]
    next_steps: tuple[str, ...]


def verdict(story: Story) -> Verdict:
    """The verdict on a run."""
    worst = worst_of(story.incidents)
    if worst is None:
        return _of_quiet_run(story)
    earliest = min(story.incidents, key=lambda incident: incident.first_step)
    return Verdict(
        sentence=_sentence(story, worst),
        severity=str(worst.severity),
        first=f"step {earliest.first_step}: {earliest.kind}{_where(earliest, story)}: {earliest.message}",
        timeline=_timeline(story, worst),
        next_steps=tuple(dict.fromkeys(_next_steps(story, worst))),
    )


def worst_of(incidents: tuple[Incident, ...]) -> Incident | None:
    """The earliest of the highest severity that was not over at the end, else of those that were.

    One that only says how the loss looks comes behind one that says more.
    """

    def order(one: Incident) -> tuple[float, bool, bool, int]:
        return -one.severity, one.state is IncidentState.RESOLVED, one.kind in OF_LOOKS, one.first_step

    return min(incidents, key=order, default=None)


def _of_quiet_run(story: Story) -> Verdict:
    blind = [kind for kind, state in story.states.items() if state == "blind"]
    unseen = f"; {len(blind)} kinds of faults could not be looked for" if blind else ""
    raised = next(iter(story.raised), None)
    if raised is not None:
        text = f"{story.name} ended at step {raised.step} by {raised.type} on rank {raised.rank}: {raised.message}"
        moment = Moment(step=raised.step, text=text, severity="critical")
        return Verdict(sentence=text, severity="critical", first=text, timeline=(moment,), next_steps=())
    if "loss" not in story.curves:
        sentence = f"whether {story.name} is well cannot be told: it has no loss{unseen}"
    else:
        sentence = f"nothing was found in the {story.num_steps} steps of {story.name}{unseen}"
    return Verdict(sentence=sentence, severity=NOTHING, first="", timeline=(), next_steps=())


def _sentence(story: Story, worst: Incident) -> str:
    others = len(story.incidents) - 1
    parts = [f"{worst.kind} at step {worst.first_step} of {story.name}{_where(worst, story)}: {worst.message}"]
    tried = _tried(story, worst) or _stop_of(story)
    if tried is not None:
        parts.append(_done(tried, f" at step {tried.applied_step}"))
    elif any(record.incident == worst.id for record in story.commands):
        parts.append("a fix was proposed and nobody applied it")
    elif worst.severity > Severity.INFO and story.kind == "recording" and worst.kind not in OF_ERRORS:
        parts.append("nothing was done about it")
    if worst.kind in OF_ERRORS and worst.state is not IncidentState.RESOLVED:
        parts.append("it ended the script")
    elif worst.state is IncidentState.RESOLVED:
        parts.append(f"it was over at step {worst.resolved_step}")
    else:
        parts.append("it was not over at the end")
    if others:
        parts.append(f"{others} more {'incident' if others == 1 else 'incidents'}")
    return "; ".join(parts)


def _tried(story: Story, incident: Incident) -> CommandRecord | None:
    """The last fix for an incident that was applied; one that helped before others."""
    applied = [r for r in story.commands if r.incident == incident.id and r.applied_step is not None]
    helped = [record for record in applied if str(record.verdict) == "helped"]
    return next(reversed(helped or applied), None)


def _stop_of(story: Story) -> CommandRecord | None:
    """What ended the run, for whichever incident."""
    return next((record for record in story.commands if record.applied_step is not None and is_stop(record)), None)


def is_stop(record: CommandRecord) -> bool:
    return any(action.action == "stop" for action in record.actions)


def _words(actions: tuple[Action, ...]) -> str:
    """``scale_lr(factor=0.5), rollback(before_step=600)``."""
    return ", ".join(
        f"{action.action}({', '.join(f'{name}={_number(value)}' for name, value in action.params.items())})"
        for action in actions
    )


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _where(incident: Incident, story: Story) -> str:
    """Rank, host, layer and feature, as far as the incident knows them."""
    parts = []
    ranks = _guilty(incident)
    if ranks:
        hosts = ", ".join(dict.fromkeys(incident.hosts))
        parts.append(f"on {name_ranks(ranks)}" + (f" ({hosts})" if hosts else ""))
    layers = incident.evidence.get("parameters")
    if isinstance(layers, list | tuple) and layers:
        parts.append(f"in {', '.join(map(str, layers[:3]))}{' and others' if len(layers) > 3 else ''}")
    elif layers := _outstanding(incident, story):
        parts.append(layers)
    feature = incident.evidence.get("feature")
    if isinstance(feature, int | float) and feature == feature:
        parts.append(f"in feature {int(feature)} of the input")
    elif broken := _broken_features(incident, story):
        parts.append(f"in {broken} of the input")
    return f" {', '.join(parts)}" if parts else ""


def _broken_features(incident: Incident, story: Story) -> str:
    """Features of the input that were not finite when numbers ceased to be."""
    if story.features is None or incident.kind not in OF_GRADIENTS:
        return ""
    broken = [
        int(change["feature"])
        for change in story.features.changes
        if change["step"] == incident.first_step and math.isinf(float(change["z"]))
    ]
    if not broken:
        return ""
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return f"feature{'s' if len(broken) > 1 else ''} {', '.join(map(str, sorted(broken)[:3]))}{more}"


def _outstanding(incident: Incident, story: Story) -> str:
    """The layers whose gradients were not finite, or the one farthest above its own median, when it began.

    Nothing where it was all of them: then no layer is where it came from.
    """
    grid = story.layers
    if grid is None or incident.kind not in OF_GRADIENTS:
        return ""
    at = int(np.searchsorted(grid.steps, incident.first_step))
    if at >= len(grid.steps):
        return ""
    now, before = grid.values[:, at], grid.values[:, :at]
    broken = np.flatnonzero(np.isinf(now))
    if len(broken):
        if len(broken) == np.sum(~np.isnan(now)):
            return ""
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        return f"in {', '.join(grid.names[place] for place in broken[:3])}{more}"
    usual = np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else np.nan for row in before])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = now / usual
    known = ratio[np.isfinite(ratio)]
    if not len(known) or known.max() < OUTSTANDING * max(1.0, float(np.median(known))):
        return ""
    return f"most in {grid.names[int(np.nanargmax(np.where(np.isfinite(ratio), ratio, np.nan)))]}"


def _guilty(incident: Incident) -> tuple[int, ...]:
    """Ranks, unless it is simply all of them."""
    num_ranks = incident.evidence.get("num_ranks")
    return () if isinstance(num_ranks, int) and len(incident.ranks) >= num_ranks else incident.ranks


def _timeline(story: Story, worst: Incident) -> tuple[Moment, ...]:
    """All that happened, in order; where it is too much, what is severe, and what was done, goes before the rest."""
    moments = sorted(_moments(story), key=lambda moment: moment.step)
    if len(moments) > MAX_MOMENTS:
        first = ("critical", str(worst.severity), "fix")
        kept = sorted(moments, key=lambda one: (one.severity not in first, one.step))
        kept = sorted(kept[: MAX_MOMENTS - 1], key=lambda moment: moment.step)
        num_left_out = len(moments) - len(kept)
        moments = [*kept, Moment(step=kept[-1].step, text=f"and {num_left_out} more, left out here", severity="info")]
    return tuple(moments)


def _moments(story: Story) -> Iterator[Moment]:
    for incident in story.incidents:
        text = f"{incident.kind}{_where(incident, story)}: {incident.message}"
        yield Moment(step=incident.first_step, text=text, severity=str(incident.severity))
        if incident.resolved_step is not None:
            yield Moment(step=incident.resolved_step, text=f"{incident.kind} is over", severity="over")
    was_stopped = _stop_of(story) is not None
    for record in story.commands:
        if record.applied_step is not None or not (was_stopped and is_stop(record)):
            yield from _of_command(record)
    told = {(rank, incident.first_step) for incident in story.incidents for rank in _raised_in(incident)}
    for raised in story.raised:
        if (raised.rank, raised.step) in told:
            continue
        text = f"rank {raised.rank} raised {raised.type}: {raised.message}"
        yield Moment(step=raised.step, text=text, severity="critical")


def _raised_in(incident: Incident) -> tuple[int, ...]:
    return incident.ranks if incident.kind in OF_ERRORS else ()


def _of_command(record: CommandRecord) -> Iterator[Moment]:
    what = _words(record.actions)
    if record.applied_step is None:
        yield Moment(step=max(record.made_step, 0), text=f"{what}: {record.state}, not applied", severity="fix")
        return
    left = ", and was taken back" if record.state is CommandState.REVERTED else ""
    yield Moment(step=record.applied_step, text=_done(record) + left, severity="fix")


def _done(record: CommandRecord, when: str = "") -> str:
    """What was applied, and what came of it; nothing comes of a stop."""
    if is_stop(record):
        return f"the training was stopped{when}"
    came = OUTCOMES.get(str(record.verdict), "and is still on trial")
    return f"{_words(record.actions)} was applied{when}, {came}"


def _next_steps(story: Story, worst: Incident) -> Iterator[str]:
    mine = [record for record in story.commands if record.incident == worst.id and not is_stop(record)]
    proposed = next((record for record in mine if record.applied_step is None), None)
    if proposed is not None and len(mine) == 1:
        what = _words(proposed.actions)
        names = ",".join(dict.fromkeys(action.action for action in proposed.actions))
        yield f"{what} was proposed; SOSA_MODE=auto SOSA_AUTO_ALLOW={names} applies it without a person"
    for raised in story.raised:
        if raised.explanation:
            yield raised.explanation
    for incident in sorted(story.incidents, key=lambda one: (one.id != worst.id, -one.severity, one.first_step)):
        for advice in ADVICE.get(incident.kind, ()):
            yield f"{incident.kind}: {advice}"
    if not mine and worst.kind in LADDERS:
        known = ", then ".join(fix.name.replace("_", " ") for fix in LADDERS[worst.kind])
        yield f"{worst.kind}: what can be tried, in this order: {known}; SOSA_MODE=suggest proposes it to a person"

"""Findings into incidents: one fault, one incident, from its first finding until the run has been well for a while."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.detectors import BY_KIND, QUIET_POINTS, Detector
from sosa_stream.detect.incidents import Finding, Group, Incident, IncidentState, Severity
from sosa_stream.detect.origin import finds_out, with_facts
from sosa_stream.detect.outlook import clears, worsens
from sosa_stream.detect.schedule import LR_RATIO, LR_STANDS_POINTS
from sosa_stream.detect.statistics import Level
from sosa_stream.detect.windows import RunWindows

PRECEDENCE = (
    "silent_corruption",
    "rank_desync",
    "lr_jump",
    "nan_loss",
    "nonfinite_gradient",
    "loss_scale_collapse",
    "input_anomaly",
    "exploding_gradient",
    "loss_oscillation",
    "loss_divergence",
    "loss_spike",
    "posterior_collapse",
    "dead_units",
    "saturated_activations",
    "vanishing_gradient",
    "missing_zero_grad",
    "weights_unchanged",
    "loss_plateau",
)
"""Among findings that began together, the first here names the incident: the nearest to the cause."""

_BLOW_UP = frozenset({"nan_loss", "nonfinite_gradient", "exploding_gradient", "loss_spike", "loss_divergence"})
_RISE = frozenset({"exploding_gradient", "loss_spike", "loss_divergence", "loss_oscillation", "loss_plateau"})
_STANDSTILL = frozenset({"dead_units", "saturated_activations", "vanishing_gradient", "loss_plateau"})
_CONSEQUENCES = _BLOW_UP | _STANDSTILL | {"weights_unchanged"}
MOST_GROUPS = 2
"""Cause groups of open incidents that a run has at once: what else goes wrong with the numbers is their consequence."""
FOLLOWS: Mapping[str, frozenset[str]] = {
    "silent_corruption": _BLOW_UP | {"rank_desync"},
    "lr_jump": _BLOW_UP | _STANDSTILL | {"loss_oscillation", "loss_scale_collapse"},
    "nan_loss": _BLOW_UP | _STANDSTILL | {"loss_scale_collapse", "input_anomaly"},
    "nonfinite_gradient": _BLOW_UP | _STANDSTILL | {"loss_scale_collapse", "input_anomaly"},
    "loss_scale_collapse": frozenset({"nonfinite_gradient", "loss_plateau", "weights_unchanged"}),
    # not a divergence: the weights are damaged, which is an incident of its own with repairs of its own
    "input_anomaly": frozenset({"loss_spike", "exploding_gradient"}),
    "exploding_gradient": _BLOW_UP | {"loss_oscillation", "loss_plateau"},
    # a value that is not finite, or a layer that no longer learns, is more than a loss that rises: of its own
    "loss_divergence": _RISE,
    "loss_spike": _RISE,
    "loss_oscillation": _RISE,
    "posterior_collapse": frozenset({"loss_plateau"}),
    "dead_units": _STANDSTILL | {"weights_unchanged"},
    "saturated_activations": _STANDSTILL | {"weights_unchanged"},
    "vanishing_gradient": frozenset({"weights_unchanged", "loss_plateau"}),
    "weights_unchanged": frozenset({"loss_plateau"}),
    "missing_zero_grad": _BLOW_UP | _STANDSTILL | {"loss_oscillation"},
    "rank_lost": frozenset({"hang", "exception"}),
    "memory_leak": frozenset({"oom"}),
    **dict.fromkeys(("exception", "oom", "shape_mismatch", "hang"), frozenset({"rank_lost"})),
}
"""What each kind brings about: such findings join its open incident as symptoms, across cause groups."""

NEWEST_COUNTS = frozenset({"memory_leak"})
"""Kinds whose incident shows what was found last, not what was worst."""
TOGETHER_STEPS = 2
"""Findings whose first steps differ by no more than this began together: a gradient shows it a step after a loss."""
HEALTHY_STEPS_AT_END = 3
"""As many are enough when the run is over, for a kind that is judged at each of them."""


def make_id(prefix: str, run: str, counter: int) -> str:
    """``prefix`` and 12 hex digits of blake2(run/prefix/counter): the same in every replay."""
    return prefix + hashlib.blake2b(f"{run}/{prefix}/{counter}".encode(), digest_size=6).hexdigest()


@dataclass(slots=True, kw_only=True)
class OpenIncident:
    """An open incident and what is remembered of it, beyond what people see."""

    incident: Incident
    loss_level: Level | None
    """The loss band of the time before it; None when there was none, or it is no longer comparable."""
    norm_high: float | None
    """The 90% quantile of the gradient norm before it."""
    usual_lr: float | None = None
    """The effective learning rate of some time before it."""
    num_healthy: int = 0
    num_nonfinite: int = 0
    """Steps with a non-finite value since it opened, or since gradients showed that weights are finite all the same."""
    last_found_step: int = -1
    of_past: bool = False
    """Of an earlier generation: nothing joins it and nothing is done about it any more."""
    is_usual: bool = False
    """Its level of the loss was learned as the normal one since; it is over once the level before it is back."""
    well_since: int | None = None
    """The point at which it would have been over, had the learning rate come back from its jump: the run learns as
    ever, so that nothing but that jump joins it, and nothing is done about it but what a person approves."""
    again_in: int = 0
    """Points from the last finding until its detector looked again."""

    detector: Detector
    """The one that names it."""
    cap: Severity
    """The worst that it may become under this name."""

    @property
    def patience(self) -> int:
        """Points without a finding, and well, that close it."""
        return max(self.detector.quiet_points, self.again_in + 1)

    @property
    def is_judged_by_level(self) -> bool:
        return self.detector.disturbs and self.incident.severity >= Severity.WARNING

    @property
    def holds_band(self) -> bool:
        return self.is_judged_by_level and not self.is_usual


class Tracker:
    """The incidents of one run. Deterministic in the findings that it is given, step by step."""

    def __init__(self, run: str) -> None:
        self._run = run
        self.detectors: Mapping[str, Detector] = BY_KIND
        """Those that there are, the user's own rules among them."""
        self._counter = 0
        self._all: dict[str, Incident] = {}
        self._shown: dict[str, Incident] = {}
        self._open: dict[str, OpenIncident] = {}

    @property
    def open(self) -> tuple[OpenIncident, ...]:
        """Those of this generation that the run suffers from."""
        return tuple(known for known in self.unresolved if known.well_since is None)

    @property
    def unresolved(self) -> tuple[OpenIncident, ...]:
        """Those of this generation, with those whose jump of the rate alone is left."""
        return tuple(known for known in self._open.values() if not known.of_past)

    def is_well(self, incident: str) -> bool:
        """Whether the run is well, and only the rate of this incident still stands where it jumped to."""
        known = self._open.get(incident)
        return known is not None and known.well_since is not None

    @property
    def incidents(self) -> tuple[Incident, ...]:
        """All incidents of the run in the order of opening."""
        return tuple(self._all.values())

    @property
    def hold(self) -> bool:
        """Whether the bands must keep what is above them out."""
        return any(known.holds_band for known in self.open)

    def newest(self, kind: str) -> Incident | None:
        """The last incident that this kind has named, open or not."""
        return next((incident for incident in reversed(self._all.values()) if incident.kind == kind), None)

    def find(self, incident_id: str) -> OpenIncident | None:
        return self._open.get(incident_id)

    @property
    def is_empty(self) -> bool:
        return not self._open

    @property
    def calm_above(self) -> tuple[Level, ...] | None:
        """Levels above which losses change nothing for any open incident, so that many can be passed at once.

        None where an incident depends on the loss of single steps, or on their rate.
        """
        levels = []
        for known in self._open.values():
            if known.is_usual and known.loss_level is not None and known.well_since is None:
                levels.append(known.loss_level)
            elif known.holds_band or known.incident.kind == "lr_jump":
                return None
        return tuple(levels)

    def take(self, findings: list[Finding], windows: RunWindows, hosts: Mapping[int, str]) -> None:
        """Take the findings of one complete step (or of a report between steps) in."""
        for finding in sorted(findings, key=lambda found: (found.first_step, _precedence(found.kind))):
            known = self._cause_of(finding)
            if known is None:
                self._open_incident(finding, windows, hosts)
            else:
                self._join(known, finding, hosts)

    def pass_step(self, windows: RunWindows, kept_open: frozenset[str]) -> None:
        """Count a complete step as healthy or not for every open incident, and close those that are over.

        ``kept_open`` are incidents with a fix in flight or on probation.
        """
        nonfinite = bool(windows.bad_loss or windows.bad_grad)
        for known in tuple(self._open.values()):
            known.num_nonfinite = 0 if windows.only_loss_is_bad else known.num_nonfinite + nonfinite
            healthy = known.last_found_step < windows.step and not nonfinite and in_band(known, windows)
            if known.of_past:
                healthy = healthy and not self.hold
            known.num_healthy = known.num_healthy + 1 if healthy else 0
            if known.incident.id in kept_open:
                known.well_since = None
            elif known.well_since is not None or known.num_healthy >= known.patience:
                if known.well_since is None:
                    known.well_since = windows.num_points
                if not lr_is_up(known, windows) or windows.num_points - known.well_since > LR_STANDS_POINTS:
                    self._resolve(known, windows.step)

    def pass_quiet(self, windows: RunWindows, steps: NDArray[np.int64]) -> None:
        """As `pass_step` after each of ``steps``, which were quiet: above `calm_above`, and nothing was found."""
        for known in tuple(self._open.values()):
            healthy = in_band(known, windows)
            missing = known.patience - known.num_healthy
            if healthy and missing <= len(steps):
                self._resolve(known, int(steps[max(missing, 1) - 1]))
            known.num_healthy = known.num_healthy + len(steps) if healthy else 0

    def pass_dead(self, steps: NDArray[np.int64]) -> None:
        """As `pass_step` after each of ``steps``, whose losses are not finite, as that of the step before was not."""
        last_found = max((known.last_found_step for known in self._open.values()), default=-1)
        for known in self._open.values():
            known.num_nonfinite += len(steps)
            known.num_healthy = 0
            if known.last_found_step == last_found:
                known.last_found_step = int(steps[-1])

    def finish(self, windows: RunWindows) -> None:
        """The run is over: what is back in its band resolves, the rest stays open."""
        for known in tuple(self._open.values()):
            seldom = known.patience > QUIET_POINTS
            enough = known.num_healthy >= (known.patience if seldom else HEALTHY_STEPS_AT_END)
            if enough and not lr_is_up(known, windows):
                self._resolve(known, windows.step)

    def begin_generation(self) -> None:
        """A new process group or a new model: what is open is over once the new one is well for a while.

        A fault of the new one is an incident of its own, with fixes of its own.
        """
        for known in self._open.values():
            known.loss_level = None
            known.of_past, known.last_found_step, known.num_healthy = True, -1, 0
            known.well_since = None

    def begin_segment(self) -> None:
        """A new level of the loss was learned as normal: what was before is no longer comparable.

        But a critical incident is not over because its damage has become usual: it keeps the level from before it.
        """
        for known in self._open.values():
            if known.incident.severity < Severity.CRITICAL:
                known.loss_level = None
            known.is_usual = known.is_judged_by_level

    def tell_restart(self, generation: str, seconds: float) -> None:
        """Ranks that were lost are there again, as this generation, so long after they went."""
        for known in self._open.values():
            if known.incident.kind == "rank_lost" and "restarted_as" not in known.incident.evidence:
                how = {"restarted_as": generation, "restarted_after_seconds": round(seconds, 3)}
                clears = f"restarted as generation {generation} after {seconds:.1f} s: over once that has stepped"
                evidence = {**known.incident.evidence, **how}
                self._put(replace(known.incident, evidence=evidence, clears=clears))

    def set_fixes(self, incident_id: str, fixes: tuple[Mapping[str, Any], ...]) -> None:
        """Show these fixes on an incident, open or not."""
        self._put(replace(self._all[incident_id], fixes=fixes))

    def changed(self) -> tuple[Incident, ...]:
        """Incidents that look different from when they were last asked for, each once."""
        changed = [incident for key, incident in self._all.items() if self._shown.get(key) is not incident]
        changed = [incident for incident in changed if self._shown.get(incident.id) != incident]
        self._shown.update({incident.id: incident for incident in changed})
        return tuple(changed)

    def _cause_of(self, finding: Finding) -> OpenIncident | None:
        """The open incident that explains a finding: the same kind, one that brings it about, or its own effect."""
        for known in self._open.values():
            if known.well_since is not None and _is_same_jump(finding, known.incident):
                return known
        fits = [known for known in self.open if _belongs(finding, known.incident) and _keeps_cap(finding, known)]
        if not fits and finding.kind in _CONSEQUENCES:
            warned = [known for known in self.open if known.incident.severity >= Severity.WARNING]
            groups = {known.incident.group for known in warned}
            is_third = len(groups) >= MOST_GROUPS and self.detectors[finding.kind].group not in groups
            if is_third and _keeps_cap(finding, warned[-1]):
                return warned[-1]
        return min(fits, key=lambda known: (_precedence(known.incident.kind), known.incident.first_step), default=None)

    def _open_incident(self, finding: Finding, windows: RunWindows, hosts: Mapping[int, str]) -> None:
        self._counter += 1
        detector = self.detectors[finding.kind]
        level = finding.level or (windows.loss_level() if detector.disturbs else None)
        incident = Incident(
            id=make_id("i", self._run, self._counter),
            run=self._run,
            kind=finding.kind,
            group=detector.group,
            severity=finding.severity,
            state=IncidentState.OPEN,
            at_end=windows.ended,
            first_step=finding.first_step,
            detected_step=finding.step,
            ranks=finding.ranks,
            hosts=_hosts(finding.ranks, hosts),
            evidence=finding.evidence,
            message=finding.message,
            causes=finding.causes,
            worsens=worsens(finding.kind, finding.severity, finding.cap),
            clears=clears(detector, level),
        )
        log_high = windows.log_norms.band.upper_quantile(0.9)
        self._open[incident.id] = OpenIncident(
            incident=incident,
            detector=detector,
            cap=finding.cap,
            again_in=finding.again_in,
            loss_level=level,
            norm_high=None if log_high is None else math.exp(log_high),
            usual_lr=_usual_lr(windows, finding.first_step),
            last_found_step=finding.step,
        )
        self._all[incident.id] = incident

    def _join(self, known: OpenIncident, finding: Finding, hosts: Mapping[int, str]) -> None:
        incident = known.incident
        known.last_found_step, known.well_since = max(known.last_found_step, finding.step), None
        if _only_saw_it(finding, incident):
            return
        if finding.kind == incident.kind:
            known.cap, known.again_in = finding.cap, finding.again_in
            if finding.kind == "rank_lost":  # the same loss, with more that followed it
                self._put(replace(incident, evidence=finding.evidence, message=finding.message))
                return
            newest = finding.kind in NEWEST_COUNTS
            known_now = finding.evidence.get("brought_by") and not incident.evidence.get("brought_by")
            cause = bool(known_now or incident.evidence.get("lost_peer")) and not finding.evidence.get("lost_peer")
            ranks = finding.ranks if cause else _guilty(incident, finding, known.detector)
            worse = cause or finding.severity > incident.severity
            incident = replace(
                incident,
                severity=max(incident.severity, finding.severity),
                ranks=ranks,
                hosts=_hosts(ranks, hosts),
                evidence=with_facts(finding.evidence if worse or newest else incident.evidence, incident, finding),
                message=finding.message if worse or newest else incident.message,
                causes=finding.causes if cause or finds_out(finding, incident) else incident.causes,
            )
        elif _names(finding, incident):
            known.detector, known.cap, known.again_in = self.detectors[finding.kind], finding.cap, finding.again_in
            symptoms = tuple(kind for kind in (*incident.symptoms, incident.kind) if kind != finding.kind)
            incident = replace(
                incident,
                kind=finding.kind,
                group=self.detectors[finding.kind].group,
                severity=max(incident.severity, finding.severity),
                first_step=min(incident.first_step, finding.first_step),
                ranks=finding.ranks,
                hosts=_hosts(finding.ranks, hosts),
                evidence=finding.evidence,
                message=finding.message,
                causes=finding.causes,
                clears=clears(known.detector, known.loss_level),
                symptoms=symptoms,
            )
        else:
            new = finding.kind not in incident.symptoms
            incident = replace(
                incident,
                severity=max(incident.severity, finding.severity),
                symptoms=(*incident.symptoms, finding.kind) if new else incident.symptoms,
            )
        self._put(replace(incident, worsens=worsens(incident.kind, incident.severity, known.cap)))

    def _resolve(self, known: OpenIncident, step: int) -> None:
        del self._open[known.incident.id]
        self._put(replace(known.incident, state=IncidentState.RESOLVED, resolved_step=step))

    def _put(self, incident: Incident) -> None:
        self._all[incident.id] = incident
        if incident.id in self._open:
            self._open[incident.id].incident = incident


def _guilty(incident: Incident, finding: Finding, detector: Detector) -> tuple[int, ...]:
    """Ranks that showed it first, where it spreads with the next reduction; else all that show it."""
    if detector.disturbs and finding.first_step > incident.first_step:
        return incident.ranks
    return tuple(sorted({*incident.ranks, *finding.ranks}))


def in_band(known: OpenIncident, windows: RunWindows) -> bool:
    """Whether the newest step is where the run was before the incident: each loss, and the median of the last five."""
    if windows.bad_loss or windows.bad_grad:
        return False
    if known.detector.well is not None:
        return known.detector.well(windows)
    if known.loss_level is None or windows.loss is None:
        return True
    if not known.is_judged_by_level:  # the band has gone along with the loss
        return windows.losses.excursion is None
    return known.loss_level.holds(windows.loss) and windows.losses.smoothed(5) <= known.loss_level.top


def lr_is_up(known: OpenIncident, windows: RunWindows) -> bool:
    """Whether the learning rate, as fixes have left it, is still far above that of before the jump."""
    before = known.incident.evidence.get("lr_before") if known.incident.kind == "lr_jump" else None
    if known.of_past or windows.lr is None or not before:
        return False
    return bool(windows.lr > LR_RATIO * before)


def _is_same_jump(finding: Finding, incident: Incident) -> bool:
    jump = finding.evidence.get("jump_step")
    return jump is not None and finding.kind == incident.kind and jump == incident.evidence.get("jump_step")


def _usual_lr(windows: RunWindows, first_step: int) -> float | None:
    """The highest rate that is known of some time ago, and of before ``first_step``."""
    known = (windows.schedule.usual, windows.course.highest_lr(first_step))
    return min((lr for lr in known if lr is not None), default=None)


def _belongs(finding: Finding, incident: Incident) -> bool:
    if finding.kind == incident.kind or _only_saw_it(finding, incident):
        return True
    if finding.kind in FOLLOWS.get(incident.kind, ()):
        return True
    return incident.kind in FOLLOWS.get(finding.kind, ()) and finding.first_step <= incident.first_step + TOGETHER_STEPS


def _only_saw_it(finding: Finding, incident: Incident) -> bool:
    """Whether a rank reports no fault of its own, but that the rank of an open incident has ended."""
    lost_peer = bool(finding.evidence.get("lost_peer")) and not incident.evidence.get("lost_peer")
    return lost_peer and (incident.group is Group.SYSTEM or incident.kind == "rank_lost")


def _names(finding: Finding, incident: Incident) -> bool:
    if finding.kind == "rank_lost":  # the cause of ranks that lost a peer, or stood and waited for it
        states = incident.evidence.get("states", {})
        waited = incident.kind == "hang" and {states.get(str(rank)) for rank in finding.ranks} <= {"silent", "gone"}
        return waited or bool(incident.evidence.get("lost_peer"))
    began_first = finding.first_step <= incident.first_step + TOGETHER_STEPS
    nearer = began_first and _precedence(finding.kind) < _precedence(incident.kind)
    return nearer and incident.severity <= finding.cap


def _keeps_cap(finding: Finding, known: OpenIncident) -> bool:
    """Whether a finding can join without making worse what is capped; else it is told by itself."""
    incident = known.incident
    if finding.kind == incident.kind or _names(finding, incident) or _only_saw_it(finding, incident):
        return True
    return finding.severity <= known.cap


def _precedence(kind: str) -> int:
    return PRECEDENCE.index(kind) if kind in PRECEDENCE else len(PRECEDENCE)


def _hosts(ranks: tuple[int, ...], hosts: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(hosts[rank] for rank in ranks if rank in hosts))

"""What is worth waking somebody for, or a look today: `ALERTS`, over the families of `sosa_stream.metrics.catalogue`.

Everything is aggregated first: one alert a run and kind, or one a daemon, and never one a rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sosa_stream.detect.incidents import Severity
from sosa_stream.metrics import catalogue
from sosa_stream.metrics.catalogue import Family

KINDS_OF_THEIR_OWN = ("straggler", "hang", "rank_lost")
"""Kinds of incident that have an alert of their own."""
LIVE = f'sum by (run) ({catalogue.RUN_RANKS.name}{{state=~"live|stale"}}) > 0'
FRESH_SECONDS = 86_400
"""What has been true of a dead run for so long wakes nobody any more."""
HEARD_SECONDS = 600
"""What is open in a run that has been silent for longer is over with it: `SosaRunSilent` tells of that, once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert.

    ``query`` (PromQL) gives a value for each label set that the alert is about, well or not; it fires where the value
    is ``above``, or ``below``, a threshold for ``for_seconds``. It goes on for ``keep_firing_seconds`` after that:
    longer than `SosaDaemonAbsent` needs, so that a daemon's death does not look like a recovery first.

    ``summary`` and ``description`` may name labels (``{run}``), the value (``{value}``), and the value as a time
    (``{duration}``).
    """

    name: str
    severity: Severity
    query: str
    above: float | None = None
    below: float | None = None
    for_seconds: int = 0
    keep_firing_seconds: int = 0
    summary: str
    description: str

    def __post_init__(self) -> None:
        assert (self.above is None) != (self.below is None), self.name
        assert "$" not in self.query + self.summary + self.description, f"{self.name}: Grafana would expand it"

    @property
    def threshold(self) -> float:
        value = self.above if self.above is not None else self.below
        assert value is not None
        return value

    @property
    def expression(self) -> str:
        """The query with its threshold: what a Prometheus rule fires by."""
        sign = ">" if self.above is not None else "<"
        query = self.query
        if "\n" in query:  # set operators bind less than a comparison
            query = "(\n" + re.sub(r"(?m)^", "  ", query) + "\n)"
        return f"{query} {sign} {self.threshold:g}"

    @property
    def slug(self) -> str:
        """``SosaRunCritical`` as ``sosa-run-critical``."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", self.name).lower()


def _grown(counter: Family, over: str, matchers: str = "") -> str:
    """By how much a run's counter has grown.

    Not by ``increase``: it does not see a series that begins above 0, such as that of a verdict which is the first of
    its kind, or of a run that lost messages while its daemon was away. Counts of runs outlive daemons; one that is
    lower than before has begun again, in another home.
    """
    labels = ", ".join(counter.labels)
    name = counter.sample_names[0] + (f"{{{matchers}}}" if matchers else "")
    now = f"sum by (run) (max by ({labels}) ({name}))"
    before = f"sum by (run) (max by ({labels}) (last_over_time({name}[1d] offset {over})))"
    return f"(\n  {now}\n  - {before}\n) >= 0\nor {now}"


def _open(matchers: str) -> str:
    found = f"sum by (run, kind) ({catalogue.INCIDENT_OPEN.name}{{{matchers}}})"
    return f"{found}\nand on (run) {_SILENCE} < {HEARD_SECONDS}"


_OWN = "|".join(KINDS_OF_THEIR_OWN)
_SILENCE = f"time() - max by (run) ({catalogue.RUN_LAST_EVENT_TIMESTAMP_SECONDS.name})"
_STEPS = catalogue.RUN_STEPS.sample_names[0]

ALERTS = (
    Alert(
        name="SosaRunCritical",
        severity=Severity.CRITICAL,
        query=_open(f'severity="critical", kind!~"{_OWN}"'),
        above=0,
        keep_firing_seconds=300,
        summary="{run}: critical {kind}",
        description="Run {run} has a critical {kind} open: act now, or the run is lost. `sosa incidents` shows its"
        " evidence and what is being done about it.",
    ),
    Alert(
        name="SosaRunWarning",
        severity=Severity.WARNING,
        query=_open('severity="warning", kind!="straggler"'),
        above=0,
        for_seconds=300,
        keep_firing_seconds=300,
        summary="{run}: {kind} does not go away",
        description="Run {run} has had a {kind} open for more than five minutes. Most rises of a loss are over by"
        " then: this one wants a look today.",
    ),
    Alert(
        name="SosaFixFailing",
        severity=Severity.WARNING,
        query=_grown(
            catalogue.COMMANDS,
            "1h",
            # A verdict is counted once more while its command is still applied.
            'state=~"verified|reverted|aborted", verdict=~"harmed|no_effect|not_applied"',
        ),
        above=1,
        keep_firing_seconds=300,
        summary="{run}: fixes do not help",
        description="Within an hour {value} fixes of run {run} did not help, did harm, or failed on a rank. What"
        " sosa can try is running out.",
    ),
    Alert(
        name="SosaFixBudgetSpent",
        severity=Severity.WARNING,
        query=f"min by (run) ({catalogue.FIX_BUDGET_LEFT.name})\nand on (run) {LIVE}",
        below=1,
        keep_firing_seconds=300,
        summary="{run}: no fixes left",
        description="Run {run} has had all the fixes that auto.max_fixes_per_run allows. It trains on, and from now"
        " on fixes are only proposed.",
    ),
    Alert(
        name="SosaRankLost",
        severity=Severity.CRITICAL,
        query=_open('kind="rank_lost", severity!="info"'),
        above=0,
        for_seconds=30,  # torch elastic may have started the job again by then
        keep_firing_seconds=300,
        summary="{run}: a rank is lost",
        description="A rank of run {run} is gone without a goodbye, and the job has not begun again. `sosa incidents`"
        " names the rank, its host, and how its process ended.",
    ),
    Alert(
        name="SosaRunSilent",
        severity=Severity.WARNING,  # a job that is cancelled looks like one that has died
        query=f"{_SILENCE}\n"
        f'and on (run) sum by (run) ({catalogue.RUN_RANKS.name}{{state!="ended"}}) > 0\n'
        f"and on (run) {_SILENCE} < {FRESH_SECONDS}",
        above=120,
        keep_firing_seconds=300,
        summary="{run}: nothing is heard of it",
        description="Nothing has come from any rank of run {run} for {duration}, and nobody has said goodbye: its"
        " processes were killed, or the network to the daemon is cut.",
    ),
    Alert(
        name="SosaRunStalled",
        severity=Severity.CRITICAL,
        # Three hours are too long for any phase.
        query=f"sum by (run) (increase({_STEPS}[15m]))\n"
        f"and on (run) {LIVE}\n"
        f'unless on (run) sum by (run) ({catalogue.RUN_RANKS_IN_PHASE.name}{{phase=~"start|eval|checkpoint"}}) > 0\n'
        f"or sum by (run) (increase({_STEPS}[3h]))\n"
        f"and on (run) {LIVE}\n"
        f"and on (run) {_STEPS} offset 3h",
        below=1,
        for_seconds=900,
        keep_firing_seconds=300,
        summary="{run}: no steps any more",
        description="Run {run} completes no step. Its ranks are there, and for a quarter of an hour at least none of"
        " them was starting, evaluating or writing a checkpoint; or they have done so for three hours.",
    ),
    Alert(
        name="SosaRunPaused",
        severity=Severity.INFO,
        query=f"max by (run) ({catalogue.RUN_PAUSED.name})\nand on (run) {LIVE}",
        above=0,
        for_seconds=43_200,
        summary="{run}: repairs have been paused for half a day",
        description="Somebody has paused run {run}: nothing is repaired by itself until `sosa resume {run}`.",
    ),
    Alert(
        name="SosaStraggler",
        severity=Severity.WARNING,
        query=_open('kind="straggler", severity!="info"'),
        above=0,
        for_seconds=120,
        keep_firing_seconds=300,
        summary="{run}: a rank holds up the others",
        description="Run {run} waits for one of its ranks in step after step. `sosa incidents` names the rank and"
        " its host.",
    ),
    Alert(
        name="SosaHang",
        severity=Severity.CRITICAL,
        query=_open('kind="hang", severity="critical"'),
        above=0,
        keep_firing_seconds=300,
        summary="{run}: hangs",
        description="Run {run} is stuck: ranks wait for one that does not come. `sosa incidents` names it.",
    ),
    Alert(
        name="SosaFramesLost",
        severity=Severity.WARNING,
        query=_grown(catalogue.FRAMES_LOST, "15m"),
        above=0,
        keep_firing_seconds=300,
        summary="{run}: {value} messages are lost",
        description="Ranks of run {run} had to give up {value} messages: the daemon was away, or too slow, for"
        " longer than their rings hold. What was in them is not judged.",
    ),
    Alert(
        name="SosaFramesRejected",
        severity=Severity.WARNING,
        query=f"sum by (instance, reason) (increase({catalogue.FRAMES_REJECTED.sample_names[0]}[4m]))",
        above=0,
        for_seconds=300,
        keep_firing_seconds=300,
        summary="The daemon refuses messages: {reason}",
        description="The daemon {instance} goes on refusing what somebody sends it, as {reason}. If that is a job,"
        " the job is not watched.",
    ),
    Alert(
        name="SosaEngineFailing",
        severity=Severity.WARNING,
        query=_grown(catalogue.ENGINE_ERRORS, "1h"),
        above=0,
        keep_firing_seconds=300,
        summary="{run}: sosa itself fails on it",
        description="On {value} messages of run {run} the engine has failed within an hour, which is a fault of"
        " sosa: what they said is not judged. Training is not touched by it.",
    ),
    Alert(
        name="SosaDaemonBlind",
        severity=Severity.WARNING,
        query="sum by (run, kind) ("
        f'{catalogue.DETECTOR_STATE.name}{{state="blind", kind=~"nan_loss|nonfinite_gradient"}})\n'
        f"and on (run) {catalogue.RUN_STEP.name}\n"
        f"and on (run) {LIVE}",
        above=0,
        for_seconds=600,
        keep_firing_seconds=300,
        summary="{run}: {kind} cannot be seen",
        description="Run {run} trains, but its loss or its gradient norm does not reach the daemon: {kind} and what"
        " rests on the same input is not looked for.",
    ),
    Alert(
        name="SosaStoreBehind",
        severity=Severity.WARNING,
        query=f"max by (instance) ({catalogue.STORE_UNWRITTEN_ROWS.name})",
        above=0,
        for_seconds=600,
        keep_firing_seconds=300,
        summary="The daemon's store cannot be written",
        description="The daemon {instance} has held {value} rows back for ten minutes: its store is locked, or its"
        " disk is full. Incidents and commands are recorded, but `sosa incidents` does not show the newest.",
    ),
    Alert(
        name="SosaNotificationsLost",
        severity=Severity.WARNING,
        query="sum by (instance) ("
        f'increase({catalogue.NOTIFICATIONS.sample_names[0]}{{outcome=~"failed|dropped"}}[15m]))',
        above=0,
        keep_firing_seconds=300,
        summary="Webhooks are not told of critical incidents",
        description="The daemon {instance} could not deliver notifications of critical incidents to a webhook of"
        " daemon.notify.",
    ),
    Alert(
        name="SosaDaemonStuck",
        severity=Severity.CRITICAL,
        query=f"time() - max by (instance) ({catalogue.DAEMON_BEAT_TIMESTAMP_SECONDS.name})",
        above=60,
        keep_firing_seconds=300,
        summary="The daemon is stuck",
        description="The daemon {instance} still answers scrapes, but its loop has not come round for {duration}:"
        " nothing is taken in, and no run of it is watched.",
    ),
    Alert(
        name="SosaDaemonAbsent",
        severity=Severity.CRITICAL,
        # Of what was a daemon within a week: is it up? Of no such thing: is there any? No name of a job is needed.
        query=f"min by (job, instance) (up and on (job, instance) last_over_time({catalogue.BUILD_INFO.name}[7d]))\n"
        f"or on () (absent({catalogue.BUILD_INFO.name}) - 1)",
        below=1,
        for_seconds=60,
        summary="A daemon is not there",
        description="Prometheus does not reach a daemon of sosa, or knows of none: none of its runs is watched, and"
        " their alerts end without being over.",
    ),
)
"""All of them. Names are under SemVer, as those of metrics are."""

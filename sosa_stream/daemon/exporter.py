"""The daemon's metrics, made at scrape time from an immutable snapshot: a scrape takes no lock and waits for nothing.

Series are of runs, never of ranks: their number does not grow with the world size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sosa_stream import __version__
from sosa_stream.daemon.run import TOO_MANY, UNRECORDABLE, RunSnapshot
from sosa_stream.daemon.webhook import Outcome
from sosa_stream.detect.incidents import IncidentState
from sosa_stream.protocol.body import Reject
from sosa_stream.protocol.channels import BAD_HANDSHAKE, WRONG_KEY

RANK_STATES = ("live", "lost", "ended")
REJECT_REASONS = (*(str(reason) for reason in Reject), WRONG_KEY, BAD_HANDSHAKE, TOO_MANY, UNRECORDABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The daemon as the exporter shows it. ``beat_at``: when its loop last came round (monotonic clock, seconds)."""

    runs: tuple[RunSnapshot, ...] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)
    notifications: Mapping[str, int] = field(default_factory=dict)
    beat_at: float = -math.inf


class DaemonCollector(Collector):
    """Metric families of whatever ``snapshot`` returns."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        yield _gauge("sosa_build_info", "Version of the daemon.", ("version",), {(__version__,): 1.0})
        yield _counter(
            "sosa_frames_rejected",
            "Messages and handshakes refused, by reason.",
            ("reason",),
            {(reason,): snapshot.rejected.get(reason, 0) for reason in REJECT_REASONS},
        )
        yield _counter(
            "sosa_notifications",
            "Notifications of critical incidents to webhooks, by what became of them.",
            ("outcome",),
            {(outcome,): snapshot.notifications.get(outcome, 0) for outcome in Outcome},
        )
        yield from _run_gauges(snapshot.runs)
        yield from _run_counters(snapshot.runs)


def _run_gauges(runs: tuple[RunSnapshot, ...]) -> Iterator[Metric]:
    views = [run.view for run in runs]
    for name, text, values in (
        ("sosa_run_step", "Last step that the run has reported.", {view.run: view.step for view in views}),
        ("sosa_run_loss", "Mean loss over ranks at the last step.", {view.run: view.loss for view in views}),
        (
            "sosa_run_gradient_norm",
            "Gradient norm at the last step, unscaled, before our clipping.",
            {view.run: view.grad_norm for view in views},
        ),
        (
            "sosa_run_learning_rate",
            "Effective learning rate of the first parameter group at the last step.",
            {view.run: view.learning_rate for view in views},
        ),
    ):
        # Unknown is no sample, and never zero.
        yield _gauge(name, text, ("run",), {(run,): float(value) for run, value in values.items() if value is not None})

    ranks: Counter[tuple[str, ...]] = Counter({(view.run, state): 0 for view in views for state in RANK_STATES})
    ranks.update((view.run, rank.state) for view in views for rank in view.ranks)
    yield _gauge("sosa_run_ranks", "Ranks of the current generation, by state.", ("run", "state"), ranks)

    still_open: Counter[tuple[str, ...]] = Counter(
        (view.run, incident.kind, str(incident.severity))
        for view in views
        for incident in view.incidents
        if incident.state is IncidentState.OPEN
    )
    yield _gauge("sosa_incident_open", "Open incidents.", ("run", "kind", "severity"), still_open)

    detectors: dict[tuple[str, ...], float] = {
        (view.run, kind, state): 1.0 for view in views for kind, state in view.detectors
    }
    yield _gauge(
        "sosa_detector_state",
        "1 for the state that a detector is in; blind means that an input is missing.",
        ("run", "kind", "state"),
        detectors,
    )


def _run_counters(runs: tuple[RunSnapshot, ...]) -> Iterator[Metric]:
    yield _counter(
        "sosa_incidents",
        "Incidents, by the kind and severity with which they opened.",
        ("run", "kind", "severity"),
        {(run.view.run, *labels): value for run in runs for labels, value in run.incidents.items()},
    )
    yield _counter(
        "sosa_commands",
        "Commands that came to a state, by state and verdict.",
        ("run", "state", "verdict"),
        {(run.view.run, *labels): value for run in runs for labels, value in run.commands.items()},
    )
    for name, text, values in (
        ("sosa_frames_received", "Messages taken and recorded.", {r.view.run: r.num_received for r in runs}),
        (
            "sosa_frames_duplicate",
            "Messages that had been taken before, dropped.",
            {r.view.run: r.num_duplicates for r in runs},
        ),
        (
            "sosa_frames_lost",
            "Messages that a full ring gave up before they could be taken.",
            {r.view.run: r.num_lost for r in runs},
        ),
        (
            "sosa_engine_errors",
            "Messages on which the engine failed.",
            {r.view.run: r.num_engine_errors for r in runs},
        ),
    ):
        yield _counter(name, text, ("run",), {(run,): value for run, value in values.items()})


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def registry(snapshot: Callable[[], Snapshot]) -> CollectorRegistry:
    """A registry of its own with nothing but the daemon's metrics."""
    own = CollectorRegistry(auto_describe=False)
    own.register(DaemonCollector(snapshot))
    return own

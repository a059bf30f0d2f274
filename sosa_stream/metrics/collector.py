"""The daemon's metrics, made at scrape time from an immutable snapshot: a scrape takes no lock and waits for nothing.

What is unknown has no sample, and is never zero.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from sosa_stream import __version__
from sosa_stream.daemon.run import TOO_MANY, UNRECORDABLE, RunSnapshot
from sosa_stream.daemon.webhook import Outcome
from sosa_stream.decide.commands import FINAL_STATES, CommandState, Verdict
from sosa_stream.detect.attendance import RankView
from sosa_stream.detect.incidents import IncidentState, Severity
from sosa_stream.figures import Histogram, lags, offenders
from sosa_stream.metrics import catalogue
from sosa_stream.metrics.catalogue import Family, Type
from sosa_stream.protocol.body import Reject
from sosa_stream.protocol.channels import BAD_HANDSHAKE, WRONG_KEY
from sosa_stream.protocol.messages import Phase

RANK_STATES = ("live", "stale", "gil_held_or_stopped", "lost", "blind", "ended")
REJECT_REASONS = (*(str(reason) for reason in Reject), WRONG_KEY, BAD_HANDSHAKE, TOO_MANY, UNRECORDABLE)
TRIED = (Verdict.HELPED, Verdict.INCONCLUSIVE, Verdict.NO_EFFECT, Verdict.HARMED)
COMMAND_COURSE: tuple[tuple[str, str], ...] = (
    *((str(state), "none") for state in CommandState if state not in FINAL_STATES),
    *((str(state), str(verdict)) for state in (CommandState.VERIFIED, CommandState.REVERTED) for verdict in TRIED),
    *(
        (str(state), str(Verdict.NOT_APPLIED))
        for state in (CommandState.REJECTED, CommandState.EXPIRED, CommandState.ABORTED)
    ),
)
"""The states that commands come to, with the verdicts that they have then."""
TOP_K = 5
"""Ranks of a run that are named because they are worst, whatever its size."""

Key = tuple[str, ...]
"""The values of a family's labels; of a run's family, of those after ``run``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The daemon as the exporter shows it. Counts are since it was started.

    Attributes:
        annotations: for Grafana, by what became of them; without any, nothing is shown.
        requests: of people and alerts, by what was asked, who asked, and what became of it.
        num_waiting: messages taken from the socket and not yet recorded.
        num_unwritten: rows that the store does not have yet.
        latency: seconds from the arrival of messages to the incident that they opened being kept.
        shown_at: when this was made, in seconds since the epoch.
        beat_at: likewise, of the monotonic clock: its loop came round then.
        rank_series: bound on the ranks of each run with series of their own.
    """

    runs: tuple[RunSnapshot, ...] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)
    notifications: Mapping[str, int] = field(default_factory=dict)
    annotations: Mapping[str, int] = field(default_factory=dict)
    requests: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    num_waiting: int = 0
    num_unwritten: int = 0
    latency: Histogram | None = None
    shown_at: float = 0.0
    beat_at: float = -math.inf
    rank_series: int = 0


class DaemonCollector(Collector):
    """The families of the catalogue, of whatever ``snapshot`` returns."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        runs = snapshot.runs
        for family, samples in _of_daemon(snapshot).items():
            yield _family(family, samples)
        yield _histogram(catalogue.DETECTION_LATENCY_SECONDS, {(): snapshot.latency} if snapshot.latency else {})
        for family, value in _OF_RUN.items():
            yield _family(family, {(run.view.run,): value(run) for run in runs})
        for family, by_label in _BY_LABEL.items():
            yield _family(family, {(run.view.run, *key): value for run in runs for key, value in by_label(run).items()})
        for family, histogram in _HISTOGRAMS.items():
            yield _histogram(family, {(run.view.run,): histogram(run) for run in runs})
        yield from _named_ranks(runs, snapshot.rank_series)


def registry(snapshot: Callable[[], Snapshot]) -> CollectorRegistry:
    """A registry of its own with the daemon's metrics, and the usual ones of its process."""
    own = CollectorRegistry(auto_describe=False)
    own.register(DaemonCollector(snapshot))
    ProcessCollector(registry=own)
    return own


def _of_daemon(snapshot: Snapshot) -> dict[Family, Mapping[Key, float | None]]:
    return {
        catalogue.BUILD_INFO: {(__version__,): 1},
        catalogue.FRAMES_REJECTED: {(reason,): snapshot.rejected.get(reason, 0) for reason in REJECT_REASONS},
        catalogue.INGEST_QUEUE_DEPTH: {(): snapshot.num_waiting},
        catalogue.DAEMON_BEAT_TIMESTAMP_SECONDS: {(): snapshot.shown_at},
        catalogue.STORE_UNWRITTEN_ROWS: {(): snapshot.num_unwritten},
        catalogue.NOTIFICATIONS: {(outcome,): snapshot.notifications.get(outcome, 0) for outcome in Outcome},
        catalogue.ANNOTATIONS: {(outcome,): count for outcome, count in snapshot.annotations.items()},
        catalogue.REQUESTS: {(*asked,): count for asked, count in snapshot.requests.items()},
    }


_OF_RUN: Mapping[Family, Callable[[RunSnapshot], float | None]] = {
    catalogue.RUN_STEP: lambda run: run.view.step if run.view.step >= 0 else None,
    catalogue.RUN_STEPS: lambda run: run.view.figures.num_steps,
    catalogue.RUN_SAMPLES: lambda run: run.view.figures.num_samples,
    catalogue.RUN_SKIPPED_STEPS: lambda run: run.view.figures.num_skipped,
    catalogue.RUN_NONFINITE_STEPS: lambda run: run.view.figures.num_nonfinite,
    catalogue.RUN_LOSS: lambda run: run.view.loss,
    catalogue.RUN_GRADIENT_NORM: lambda run: run.view.grad_norm,
    catalogue.RUN_LEARNING_RATE: lambda run: run.view.learning_rate,
    catalogue.RUN_LEARNING_RATE_MULTIPLIER: lambda run: run.view.lr_multiplier if run.view.step >= 0 else None,
    catalogue.RUN_AMP_SCALE: lambda run: run.view.figures.amp_scale,
    catalogue.RUN_LAST_EVENT_TIMESTAMP_SECONDS: lambda run: run.heard_at,
    catalogue.RUN_PAUSED: lambda run: bool(run.view.paused),
    catalogue.RUN_WORLD_SIZE: lambda run: run.view.world_size if run.view.generation else None,
    catalogue.FIXES_IN_FORCE: lambda run: len(run.view.standing),
    catalogue.FIX_BUDGET_LEFT: lambda run: run.view.fixes_left,
    catalogue.FRAMES_RECEIVED: lambda run: run.num_received,
    catalogue.FRAMES_DUPLICATE: lambda run: run.num_duplicates,
    catalogue.FRAMES_LOST: lambda run: run.num_lost,
    catalogue.ENGINE_ERRORS: lambda run: run.num_engine_errors,
}

_BY_LABEL: Mapping[Family, Callable[[RunSnapshot], Mapping[Key, float]]] = {
    catalogue.RUN_INFO: lambda run: {(run.view.generation, run.view.mode, run.project): 1},
    catalogue.RUN_RANKS: lambda run: _count(RANK_STATES, (rank.state for rank in run.view.ranks)),
    catalogue.RUN_RANKS_IN_PHASE: lambda run: _count(Phase, (rank.phase for rank in _there(run))),
    catalogue.RUN_MEMORY_BYTES: lambda run: {
        **_spread("host", [rank.memory_bytes for rank in _there(run) if rank.memory_bytes]),
        **_spread("device", [rank.device_memory_bytes for rank in _there(run) if rank.gpu_uuid]),
    },
    catalogue.RUN_STEP_PART_SECONDS: lambda run: {
        (part, stat): value
        for part, values in run.view.figures.step_parts.items()
        for stat, value in zip(("max", "mean"), values, strict=True)
    },
    catalogue.INCIDENT_OPEN: lambda run: Counter(
        (incident.kind, str(incident.severity))
        for incident in run.view.incidents
        if incident.state is IncidentState.OPEN
    ),
    catalogue.INCIDENTS: lambda run: _from_zero(
        ((kind, str(severity)) for kind, _ in run.view.detectors for severity in Severity), run.incidents
    ),
    catalogue.COMMANDS: lambda run: _from_zero(COMMAND_COURSE, run.commands),
    catalogue.DETECTOR_STATE: lambda run: dict.fromkeys(run.view.detectors, 1),
}

_HISTOGRAMS: Mapping[Family, Callable[[RunSnapshot], Histogram]] = {
    catalogue.RUN_STEP_SECONDS: lambda run: run.view.figures.step_seconds,
    catalogue.RANK_LAG_SECONDS: lambda run: lags(run.view.ranks),
}


def _there(run: RunSnapshot) -> Iterator[RankView]:
    return (rank for rank in run.view.ranks if rank.is_there)


def _count(every: Iterable[str], found: Iterable[str]) -> Mapping[Key, float]:
    """How often each is found, also those that are not."""
    counts = Counter(found)
    return {(str(one),): counts[one] for one in every}


def _from_zero(every: Iterable[tuple[str, str]], counts: Mapping[tuple[str, str], int]) -> Mapping[Key, float]:
    """With a zero for each that may still come: Prometheus sees no increase in a series that begins with one."""
    return {**{(*one,): 0 for one in every}, **{(*one,): count for one, count in counts.items()}}


def _spread(memory: str, sizes: Sequence[int]) -> Mapping[Key, float]:
    return {(memory, "max"): max(sizes), (memory, "mean"): sum(sizes) / len(sizes)} if sizes else {}


def _named_ranks(runs: Iterable[RunSnapshot], rank_series: int) -> Iterator[Metric]:
    """The only series of ranks: the worst `TOP_K` of each run, and the lowest ``rank_series``."""
    offences: dict[Key, float] = {}
    infos: dict[Key, float] = {}
    for run in runs:
        for rank in dict.fromkeys((*offenders(run.view.ranks, TOP_K), *run.view.ranks[:rank_series])):
            offences[run.view.run, str(rank.rank), rank.host] = rank.offence_seconds
            infos[run.view.run, str(rank.rank), rank.host, rank.gpu_uuid, rank.pod] = 1
    yield _family(catalogue.RANK_OFFENCE_SECONDS, offences)
    yield _family(catalogue.RANK_INFO, infos)


def _family(family: Family, samples: Mapping[Key, float | None]) -> Metric:
    make = CounterMetricFamily if family.type is Type.COUNTER else GaugeMetricFamily
    made = make(family.name, family.help, labels=family.labels, unit=family.unit)
    for key, value in samples.items():
        if value is not None:
            made.add_metric(key, value)
    return made


def _histogram(family: Family, samples: Mapping[Key, Histogram]) -> Metric:
    made: HistogramMetricFamily | GaugeHistogramMetricFamily
    make = HistogramMetricFamily if family.type is Type.HISTOGRAM else GaugeHistogramMetricFamily
    made = make(family.name, family.help, labels=family.labels, unit=family.unit)
    for key, histogram in samples.items():
        bounds = (*map(floatToGoString, histogram.bounds), "+Inf")
        made.add_metric(key, list(zip(bounds, itertools.accumulate(histogram.counts), strict=True)), histogram.sum)
    return made

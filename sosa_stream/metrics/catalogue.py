"""Every family that the daemon exposes: the one place where a name is written. Names and labels are under SemVer.

Labels are the run and closed sets, never a rank: the number of series does not grow with the world size. The two
``sosa_rank_`` families with a rank have a bound instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Type(StrEnum):
    """What Prometheus takes a family for."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE_HISTOGRAM = "gaugehistogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family. ``name`` is without the ``_total`` of a counter's samples; ``help`` is a sentence."""

    name: str
    type: Type
    help: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """``seconds`` or ``bytes``, as the name ends; else nothing."""
        return next((unit for unit in ("seconds", "bytes") if self.name.endswith(f"_{unit}")), "")

    @property
    def sample_names(self) -> tuple[str, ...]:
        """As they stand in a query."""
        match self.type:
            case Type.GAUGE:
                return (self.name,)
            case Type.COUNTER:
                return (f"{self.name}_total",)
            case Type.HISTOGRAM:
                return (f"{self.name}_bucket", f"{self.name}_count", f"{self.name}_sum")
            case Type.GAUGE_HISTOGRAM:
                return (f"{self.name}_bucket", f"{self.name}_gcount", f"{self.name}_gsum")


LABELS = {
    "run": "name of the training job",
    "version": "of the daemon",
    "generation": "one start of the process group; another after each restart",
    "mode": "`observe`, `suggest` or `auto`",
    "project": "whose outcomes of fixes the run shares",
    "rank": "of the current generation",
    "hostname": "host of the rank, as node_exporter's and DCGM's `Hostname`",
    "gpu_uuid": "GPU of the rank, as DCGM's `UUID`; empty without one",
    "pod": "Kubernetes pod of the rank; empty outside of Kubernetes",
    "phase": "`start`, `data`, `forward`, `backward`, `optimizer`, `eval`, `checkpoint` or `end`",
    "memory": "`host` (resident set of the process) or `device` (allocated by torch)",
    "part": "`data` (waiting for the batch), `forward`, `backward`, `wait` (for other ranks) or `optimizer`",
    "stat": "`max` or `mean` over ranks",
    "kind": "of the detector or incident, as `sosa incidents` shows it",
    "severity": "`info`, `warning` or `critical`",
    "state": "of a rank: `live`, `stale` (silent for 5 s), `gil_held_or_stopped` (silent, its process is there), `lost`"
    " (gone, or silent for 15 s), `blind` (without an agent), `ended`; of a command: `proposed` to"
    " `verified`, `reverted`, `rejected`, `expired`, `aborted`; of a detector: `warming`, `watching`, `blind`,"
    " `firing`",
    "verdict": "`helped`, `no_effect`, `harmed`, `inconclusive`, `not_applied`, or `none` yet",
    "reason": "why a message was refused",
    "what": "`approve`, `undo`, `pause`, `resume`, `fix`, `ack`; `propose`, of alerts; `other`: nothing that there is",
    "source": "who asked: `person`, at the command line or by the API, or `alert`, by a webhook",
    "outcome": "what became of it",
    "le": "upper bound of a bucket",
}
"""What each label says."""


def _gauge(name: str, help: str, *labels: str) -> Family:
    return Family(name=name, type=Type.GAUGE, help=help, labels=labels)


def _counter(name: str, help: str, *labels: str) -> Family:
    return Family(name=name, type=Type.COUNTER, help=help, labels=labels)


BUILD_INFO = _gauge("sosa_build_info", "1, with the version of the daemon.", "version")

RUN_INFO = _gauge(
    "sosa_run_info", "1, with what is fixed for a generation of the run.", "run", "generation", "mode", "project"
)
RUN_STEP = _gauge("sosa_run_step", "Newest step that all ranks have completed.", "run")
RUN_STEPS = _counter("sosa_run_steps", "Steps that all ranks have completed, over generations.", "run")
RUN_SAMPLES = _counter(
    "sosa_run_samples", "Samples in the batches of all ranks, where batches show how many they hold.", "run"
)
RUN_SKIPPED_STEPS = _counter("sosa_run_skipped_steps", "Steps whose update was kept from the weights.", "run")
RUN_NONFINITE_STEPS = _counter(
    "sosa_run_nonfinite_steps", "Steps at which a rank's loss or gradient norm was not finite.", "run"
)
RUN_STEP_SECONDS = Family(
    name="sosa_run_step_seconds",
    type=Type.HISTOGRAM,
    help="Wall time of completed steps, of the slowest rank.",
    labels=("run",),
)
RUN_STEP_PART_SECONDS = _gauge(
    "sosa_run_step_part_seconds",
    "Where the time of the newest steps goes: a step's mean on the rank with most of it, and over ranks.",
    "run",
    "part",
    "stat",
)
RUN_LOSS = _gauge("sosa_run_loss", "Mean loss over ranks at the newest step; no sample where unknown.", "run")
RUN_GRADIENT_NORM = _gauge(
    "sosa_run_gradient_norm", "Gradient norm at the newest step, unscaled, before our clipping.", "run"
)
RUN_LEARNING_RATE = _gauge(
    "sosa_run_learning_rate", "Effective learning rate of the first parameter group at the newest step.", "run"
)
RUN_LEARNING_RATE_MULTIPLIER = _gauge(
    "sosa_run_learning_rate_multiplier", "What fixes multiply the script's learning rate with; 1 without any.", "run"
)
RUN_AMP_SCALE = _gauge("sosa_run_amp_scale", "Loss scale of automatic mixed precision that is in force.", "run")
RUN_LAST_EVENT_TIMESTAMP_SECONDS = _gauge(
    "sosa_run_last_event_timestamp_seconds",
    "When anything last came in for the run, in seconds since the epoch.",
    "run",
)
RUN_PAUSED = _gauge("sosa_run_paused", "1 while a person has paused repairs, else 0.", "run")
RUN_WORLD_SIZE = _gauge("sosa_run_world_size", "Ranks that the current generation has.", "run")
RUN_RANKS = _gauge("sosa_run_ranks", "Ranks of the current generation, by state.", "run", "state")
RUN_RANKS_IN_PHASE = _gauge(
    "sosa_run_ranks_in_phase", "Live and stale ranks, by what their training thread does.", "run", "phase"
)
RUN_MEMORY_BYTES = _gauge(
    "sosa_run_memory_bytes", "Memory of the training processes, over live and stale ranks.", "run", "memory", "stat"
)

RANK_LAG_SECONDS = Family(
    name="sosa_rank_lag_seconds",
    type=Type.GAUGE_HISTOGRAM,
    help="For how long another rank has been ahead: live and stale ranks as they stand, by that time.",
    labels=("run",),
)
RANK_OFFENCE_SECONDS = _gauge(
    "sosa_rank_offence_seconds",
    "Lag or silence of the ranks that are worst in it; with daemon.rank_series, of as many ranks.",
    "run",
    "rank",
    "hostname",
)
RANK_INFO = _gauge(
    "sosa_rank_info",
    "1, with where a rank runs: of the ranks in sosa_rank_offence_seconds, to join with other exporters.",
    "run",
    "rank",
    "hostname",
    "gpu_uuid",
    "pod",
)

INCIDENT_OPEN = _gauge("sosa_incident_open", "Open incidents.", "run", "kind", "severity")
INCIDENTS = _counter(
    "sosa_incidents", "Incidents, by the kind and severity with which they opened.", "run", "kind", "severity"
)
COMMANDS = _counter("sosa_commands", "Commands that came to a state, by state and verdict.", "run", "state", "verdict")
FIXES_IN_FORCE = _gauge("sosa_fixes_in_force", "Fixes that stand until they are taken back.", "run")
FIX_BUDGET_LEFT = _gauge(
    "sosa_fix_budget_left", "Fixes that may still be applied by themselves, of auto.max_fixes_per_run.", "run"
)
DETECTOR_STATE = _gauge(
    "sosa_detector_state",
    "1 for the state that a detector is in; blind means that an input is missing.",
    "run",
    "kind",
    "state",
)

FRAMES_RECEIVED = _counter("sosa_frames_received", "Messages taken and recorded.", "run")
FRAMES_DUPLICATE = _counter("sosa_frames_duplicate", "Messages that had been taken before, dropped.", "run")
FRAMES_LOST = _counter("sosa_frames_lost", "Messages that a full ring gave up before they could be taken.", "run")
FRAMES_REJECTED = _counter("sosa_frames_rejected", "Messages and handshakes refused, by reason.", "reason")
ENGINE_ERRORS = _counter("sosa_engine_errors", "Messages on which the engine failed.", "run")
INGEST_QUEUE_DEPTH = _gauge("sosa_ingest_queue_depth", "Messages taken from the socket and not yet recorded.")
DETECTION_LATENCY_SECONDS = Family(
    name="sosa_detection_latency_seconds",
    type=Type.HISTOGRAM,
    help="From the arrival of messages to the incident that they opened being kept.",
)
DAEMON_BEAT_TIMESTAMP_SECONDS = _gauge(
    "sosa_daemon_beat_timestamp_seconds", "When the daemon's loop last came round, in seconds since the epoch."
)
STORE_UNWRITTEN_ROWS = _gauge("sosa_store_unwritten_rows", "Rows that the store does not have yet.")
NOTIFICATIONS = _counter(
    "sosa_notifications", "Notifications of critical incidents to webhooks, by what became of them.", "outcome"
)
ANNOTATIONS = _counter("sosa_annotations", "Annotations for Grafana, by what became of them.", "outcome")
REQUESTS = _counter("sosa_requests", "What people and alerts asked of runs.", "what", "source", "outcome")

FAMILIES = tuple(each for each in list(globals().values()) if isinstance(each, Family))
"""All of them, as listed above."""

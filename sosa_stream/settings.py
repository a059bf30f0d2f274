"""Every setting: frozen dataclasses that check themselves. `config` reads them from files and variables."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from sosa_stream.errors import ConfigError
from sosa_stream.plain import WebhookUrl, coerce, plain, suggestion
from sosa_stream.protocol.actions import ACTIONS, Action


class Mode(StrEnum):
    """What the agent may do: watch, watch and propose, or also apply what ``[auto] allow`` names."""

    OBSERVE = "observe"
    SUGGEST = "suggest"
    AUTO = "auto"


class GuardMode(StrEnum):
    """The in-process guard: ``sync`` reads one scalar per step; ``auto``: ``sync`` in mode auto, else ``off``.

    ``allreduce`` is ``sync``, and where gradients may differ between ranks (FSDP without ``clip_grad_norm_``) it asks
    all ranks at every step: only for jobs whose ranks all step alike.
    """

    AUTO = "auto"
    SYNC = "sync"
    ALLREDUCE = "allreduce"
    OFF = "off"


class Switch(StrEnum):
    """``auto`` decides by what else is set."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class SinkChoice(StrEnum):
    """Which of the logs that the script itself has open incidents are written to."""

    AUTO = "auto"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"
    OFF = "off"


class Sensitivity(StrEnum):
    """How little it takes to raise an incident: ``low`` for few false alarms, ``high`` for few missed faults."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class SeverityName(StrEnum):
    """An incident's severity, as files and flags write it."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoSettings:
    """What `auto` may do without a person, and how much of it."""

    allow: tuple[str, ...] = ("skip_step", "split_batch")
    """Actions that may be applied without a person."""
    max_fixes_per_error: int = 3
    """Fixes tried for one kind of incident before it is left to a person; refills after ``cooldown_steps``."""
    cooldown_steps: int = 1000
    """Steps without an incident of a kind after which its fixes are counted from zero again."""
    max_fixes_per_run: int = 20
    """Fixes in one run, whatever happens. Never refills."""
    max_lr_change: float = 10000.0
    """Largest factor, up or down, by which all fixes together may multiply the script's learning rate. The way back to
    a rate that the script itself has held is not limited."""
    max_rollback_steps: int = 2000
    """Most steps of training that one rollback may give up."""
    restart_after_seconds: float = 60.0
    """For how long a run must have stood, and surely hang, before ``restart`` ends its processes."""
    discount: float = 0.98
    """What a fix's outcome is still worth after one more of its kind: 1 never forgets, 0.98 remembers about 50."""
    explore: bool = False
    """Choose fixes by draws from what is believed of them, instead of the best: to learn, where runs are cheap."""
    quiet_hours: tuple[str, ...] = ()
    """Hours of the day, such as ``"22:00-07:00"``, in which fixes are only proposed, unless a person approves."""
    quiet_timezone: str = "local"
    """Time zone of ``quiet_hours``: ``UTC``, ``Europe/Berlin``, or ``local``, that of the job's host."""
    kill_file: str = ""
    """While it is there, no fix is applied, approved or not; empty: ``<home>/kill`` and ``<home>/<run>/kill``."""
    bounds: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """Least and most that an action's parameters may be without a person; each a table ``[auto.bounds.<action>]``:"""

    def __post_init__(self) -> None:
        unknown = [name for name in self.allow if name not in ACTIONS]
        if unknown:
            raise ConfigError(f"auto.allow names unknown action {', '.join(unknown)}; known are {', '.join(ACTIONS)}")
        _at_least(1, max_fixes_per_error=self.max_fixes_per_error, cooldown_steps=self.cooldown_steps)
        _at_least(0, max_fixes_per_run=self.max_fixes_per_run, max_rollback_steps=self.max_rollback_steps)
        _at_least(0, restart_after_seconds=self.restart_after_seconds)
        _at_least(1, max_lr_change=self.max_lr_change)
        _at_least(0.5, 1, discount=self.discount)
        for text in self.quiet_hours:
            hours_of_day(text)
        for name, of_action in self.bounds.items():
            if name not in ACTIONS:
                raise ConfigError(f"auto.bounds.{name}: there is no such action; {suggestion(name, ACTIONS)}")
            for key, bound in of_action.items():
                _check_bound(name, key, bound)

    def refusal(self, actions: Iterable[Action]) -> str:
        """Why these may not be applied without a person, or nothing. Daemon and agents ask the same."""
        denied = [action.action for action in actions if action.action not in self.allow]
        if denied:
            return f"[auto] allow does not name {', '.join(denied)}"
        for action in actions:
            for key, (low, high) in self.bounds.get(action.action, {}).items():
                value = action.params.get(key)
                if value is not None and not low <= value <= high:
                    bound = f"[auto.bounds.{action.action}] {key} = [{low:g}, {high:g}]"
                    return f"{action.action} {key}={value:g} lies outside {bound}"
        return ""


DAY_SECONDS = 86400


def hours_of_day(text: str) -> tuple[int, int]:
    """``22:00-07:00`` as seconds of the day.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)", text)
    if match is None:
        raise ConfigError(f"auto.quiet_hours must look like 22:00-07:00, not {text!r}")
    hours, minutes, end_hours, end_minutes = (int(part or 0) for part in match.groups())
    start = 3600 * hours + 60 * minutes
    end = 3600 * end_hours + 60 * end_minutes if match[3] is not None else DAY_SECONDS
    if start == end:
        raise ConfigError(f"auto.quiet_hours: {text} is no time at all; the whole day is 00:00-24:00")
    return start, end


def _check_bound(action: str, key: str, bound: tuple[float, ...]) -> None:
    name, params = f"auto.bounds.{action}.{key}", ACTIONS[action].params
    numbers = [known for known, param in params.items() if param.type is not str]
    if key not in numbers:
        raise ConfigError(f"{name}: {action} has no such number; it has {', '.join(numbers) or 'none'}")
    if len(bound) != 2 or not bound[0] <= bound[1]:
        raise ConfigError(f"{name} must be [least, most], not {list(bound)}")
    low, high = params[key].low, params[key].high
    if bound[1] < low or bound[0] > high:
        raise ConfigError(f"{name}: {action} takes {low:g} to {high:g}, and none of it lies in {list(bound)}")


def auto_settings(tree: Mapping[str, Any]) -> AutoSettings:
    """The settings in a table, as `Hello.policy` carries them among others.

    Raises:
        ConfigError: one is of another type, or out of bounds.
    """
    known = {spec.name for spec in fields(AutoSettings)}
    settings: AutoSettings = coerce("policy", {key: tree[key] for key in tree if key in known}, AutoSettings)
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """The part inside each training process."""

    daemon: str = ""
    """Address of a standalone daemon, ``tcp://host:7667``; empty: rank 0 starts one on loopback."""
    guard: GuardMode = GuardMode.AUTO
    """How non-finite gradients are kept from the weights; ``allreduce`` only where all ranks step alike."""
    attribute: Switch = Switch.AUTO
    """Find out where what is not finite comes from, at best by repeating the step; ``auto``: unless mode is observe."""
    flush_seconds: float = 0.1
    """How often metric frames leave when nothing is urgent."""
    ring_frames: int = 4096
    """Unacknowledged frames kept for resending; the oldest is dropped and counted when it is full."""
    snapshots: Switch = Switch.AUTO
    """In-memory snapshots for `rollback`; ``auto``: if mode is not observe and ``[auto] allow`` has ``rollback``."""
    snapshot_every_ticks: int = 20
    """Optimizer steps between snapshots."""
    snapshot_keep: int = 8
    """Snapshots kept."""
    snapshot_max_bytes: int = 4 * 1024**3
    """Memory that all kept snapshots together may take on this rank."""
    quarantine_ticks: int = 10
    """Healthy optimizer steps after a snapshot before it counts as last-good."""
    checkpoints: Switch = Switch.AUTO
    """Checkpoints at the end, at an error and at SIGTERM, and the state kept until then; ``auto``: if mode is not
    observe and ``[auto] allow`` has ``save_checkpoint``. ``off`` refuses that action too."""
    checkpoint_dir: str = ""
    """Where checkpoints lie; empty: ``<home>/<run>/checkpoints``. Sharded state needs one that all hosts see."""
    checkpoint_keep: int = 3
    """Checkpoints kept, the newest; the best ones and the newest finite one always are."""
    checkpoint_half: bool = False
    """Write tensors in bfloat16: half the size, three significant digits."""
    sigterm_seconds: float = 20.0
    """How long SIGTERM may be held up for a checkpoint; torchrun kills what is left after 30 seconds."""
    rollback_schedulers: Switch = Switch.AUTO
    """Whether a rollback puts schedulers back too; ``auto``: those that follow a metric, not those that count steps."""
    digest_every: int = 32
    """Steps between two digests of a chunk of parameters or optimizer state, compared over ranks; 0: none."""
    digest_after_fix: bool = False
    """Send a digest of parameters and optimizer state after each fix, compared over ranks by the daemon."""
    sinks: SinkChoice = SinkChoice.AUTO
    """Write incidents and fixes into the log that the script itself writes, by rank 0: ``tensorboard``, ``wandb`` or
    ``mlflow``; ``auto``: all of them that it has open; ``off``: into none."""

    layers_every: int = 0
    """Steps between two looks at every parameter: gradient, weights, update. Rarer in long runs; 0: norms alone."""
    features: bool = False
    """Send statistics of each feature of the model's input, every ``layers_every`` or 8 steps."""

    def __post_init__(self) -> None:
        _at_least(0.001, 60, flush_seconds=self.flush_seconds)
        _at_least(16, ring_frames=self.ring_frames)
        _at_least(0, digest_every=self.digest_every, layers_every=self.layers_every)
        _at_least(1, snapshot_every_ticks=self.snapshot_every_ticks, snapshot_keep=self.snapshot_keep)
        _at_least(1, checkpoint_keep=self.checkpoint_keep)
        _at_least(0.1, 3600, sigterm_seconds=self.sigterm_seconds)
        _at_least(0, snapshot_max_bytes=self.snapshot_max_bytes, quarantine_ticks=self.quarantine_ticks)
        if self.daemon and not re.fullmatch(r"tcp://[^/\s]+:[0-9]{1,5}", self.daemon):
            raise ConfigError(f"agent.daemon must look like tcp://host:7667, not {self.daemon!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceSettings:
    """How the ranks agree on one tick."""

    lead_seconds: float = 0.3
    """How far ahead of the fastest rank the agreed tick is chosen; doubled with each attempt that came too late."""
    timeout_seconds: float = 2.0
    """How long a rank that has promised waits at the agreed tick for the verdict before it ends as in doubt."""
    outcome_seconds: float = 60.0
    """How long a rank that has applied a command waits for the others to have applied it, before it is taken back on
    all of them. The slowest action has to fit: a rollback, a checkpoint written by one rank while the others wait."""
    poll_seconds: float = 0.02
    """How often an agent looks at the store while a command is in flight."""
    max_attempts: int = 5
    """Attempts at one command before it is given up."""

    def __post_init__(self) -> None:
        _at_least(0, 3600, lead_seconds=self.lead_seconds)
        _at_least(0.01, 3600, timeout_seconds=self.timeout_seconds)
        _at_least(0.01, 3600, outcome_seconds=self.outcome_seconds)
        _at_least(0.001, 60, poll_seconds=self.poll_seconds)
        _at_least(1, max_attempts=self.max_attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorOverride:
    """What is different for one kind of incident: the table ``[detect.<kind>]``."""

    sensitivity: Sensitivity | None = None
    """Instead of ``detect.sensitivity``."""
    enabled: bool = True
    """Whether it is looked for at all."""
    severity_cap: SeverityName | None = None
    """The most severe that it may claim to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRule:
    """One of ``[[detect.rules]]``: an incident of the user's own kind, from a metric that the script logs.

    Exactly one of ``above``, ``below``, ``jump`` and ``flat`` is given. NaN is sick by any of them.
    """

    name: str
    """The kind of the incident: lower-case letters, digits and underscores."""
    metric: str
    """As it was logged, ``agent.log(reward=…)``; or a column that everybody sends, such as ``eval_loss``."""
    above: float | None = None
    """Sick is what is greater than this."""
    below: float | None = None
    """Sick is what is less than this."""
    jump: float | None = None
    """Sick is what lies this many robust standard deviations or more from the metric's own recent past."""
    flat: bool = False
    """Sick is a metric that does not change any more."""
    for_points: int = field(default=1, metadata={"key": "for"})
    """Logged values in a row that must be sick, ``for`` in the file."""
    severity: SeverityName = SeverityName.WARNING
    """Of the incident."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", self.name):
            raise ConfigError(f"detect.rules: name must be lower-case letters, digits and _, not {self.name!r}")
        what = f"detect.rules {self.name}"
        if not self.metric:
            raise ConfigError(f"{what}: metric is empty")
        given = [key for key in ("above", "below", "jump") if getattr(self, key) is not None] + ["flat"] * self.flat
        if len(given) != 1:
            raise ConfigError(f"{what}: give one of above, below, jump and flat, not {' and '.join(given) or 'none'}")
        for key in ("above", "below"):
            limit = getattr(self, key)
            if limit is not None and not math.isfinite(limit):
                raise ConfigError(f"{what}: {key} must be a finite number, not {limit!r}")
        if self.jump is not None and not 1 <= self.jump <= 1e6:
            raise ConfigError(f"{what}: jump must lie between 1 and 1e+06, not {self.jump!r}")
        least = 2 if self.flat else 1
        if not least <= self.for_points <= 10_000:
            raise ConfigError(f"{what}: for must lie between {least} and 10000, not {self.for_points!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectSettings:
    """Windows, thresholds and the user's own rules."""

    warmup_steps: int = 12
    """Steps of a run or segment before statistics speak; non-finite values are always noticed."""
    window_steps: int = 256
    """Length of the run-level window, in steps."""
    sensitivity: Sensitivity = Sensitivity.NORMAL
    """How little it takes to raise an incident."""
    overrides: Mapping[str, DetectorOverride] = field(default_factory=dict)
    """By kind; each a table ``[detect.<kind>]`` with any of ``sensitivity``, ``enabled`` and ``severity_cap``:"""
    rules: tuple[MetricRule, ...] = ()
    """On metrics that the script logs; each a table ``[[detect.rules]]`` with one of ``above``, ``below``, ``jump`` and
    ``flat``, which must hold ``for`` so many logged values in a row:"""

    def __post_init__(self) -> None:
        _at_least(5, 65536, warmup_steps=self.warmup_steps)
        _at_least(32, 65536, window_steps=self.window_steps)
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"detect.rules: two rules are called {twice[0]}")

    def check_kinds(self, known: Collection[str]) -> None:
        """Compare the kinds that are named with those that there are.

        Raises:
            ConfigError: an override is of an unknown kind, or a rule has the name of a known one.
        """
        for kind in self.overrides:
            if kind not in known:
                raise ConfigError(f"detect.{kind}: there is no such kind of incident; {suggestion(kind, known)}")
        for rule in self.rules:
            if rule.name in known:
                raise ConfigError(f"detect.rules: {rule.name} is a kind that is detected already; call it otherwise")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, from which `detect_settings` makes the same settings again."""
        values: dict[str, Any] = plain(self)
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSettings:
    """The detector daemon."""

    bind: str = "tcp://127.0.0.1:7667"
    """Where metric frames come in; commands go out at the next port. Port 0 lets the kernel choose."""
    http: str = "127.0.0.1:7669"
    """Where ``/metrics``, ``/healthz``, ``/readyz``, ``/api/v1`` and ``/webhooks`` are served, at one port; 0 lets the
    kernel choose."""
    http_cert: str = ""
    """Certificate chain (PEM) to serve HTTPS with."""
    http_key: str = ""
    """Its private key (PEM), without a passphrase."""
    http_client_ca: str = ""
    """Certificates (PEM) of those who may sign clients': who brings none that they signed is not let in."""
    http_tokens: str = ""
    """File of tokens, ``TOKEN`` or ``NAME TOKEN`` a line: what the API is asked to change takes one, and so does
    reading it where ``http`` is not loopback. Empty: neither is possible."""
    webhook_tokens: str = ""
    """File of tokens, alike, with which alerts may propose fixes; empty: no webhook is there."""
    keys: str = ""
    """Folder made by ``sosa keys new``: CURVE keys of the daemon and of those that may talk to it."""
    insecure: bool = False
    """Allow an address other than loopback without keys, or without TLS in the case of ``http``."""
    rank_series: int = 0
    """Ranks of each run that have series of their own (lowest first), beside the five that are worst; 0: none."""
    republish_seconds: float = 0.5
    """How often an unacknowledged command is published again."""
    notify: tuple[WebhookUrl, ...] = ()
    """Webhooks (Slack's or others') that are told of every critical incident when it opens or escalates, and closes."""
    grafana_url: str = ""
    """Grafana in which incidents and applied fixes are annotated as they happen; empty: none."""
    grafana_token_file: str = ""
    """File with the token of a service account in it, which may write annotations."""

    def __post_init__(self) -> None:
        if self.grafana_url and not re.fullmatch(r"https?://[^/?#@\s]+(/[!-~]*)?", self.grafana_url):
            raise ConfigError("daemon.grafana_url must be like https://grafana.example, without name and password")
        _at_least(0.01, 60, republish_seconds=self.republish_seconds)
        _at_least(0, 10_000, rank_series=self.rank_series)
        for url in self.notify:
            if not re.fullmatch(r"https?://[^/?#@\s]+([/?][!-~]*)?", url):
                raise ConfigError(f"daemon.notify (SOSA_NOTIFY) must be http:// or https:// addresses; one is {url!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting there is."""

    mode: Mode = Mode.SUGGEST
    """What the agent may do."""
    home: str = "sosa-runs"
    """Folder with the store ``sosa.db`` and one folder per run."""
    run: str = ""
    """Name of the run; empty: torchrun's id, else script name, time and randomness."""
    project: str = "default"
    """Runs of one project learn from each other which fixes help: name together what is alike."""
    auto: AutoSettings = field(default_factory=AutoSettings)
    agent: AgentSettings = field(default_factory=AgentSettings)
    fence: FenceSettings = field(default_factory=FenceSettings)
    detect: DetectSettings = field(default_factory=DetectSettings)
    daemon: DaemonSettings = field(default_factory=DaemonSettings)

    def __post_init__(self) -> None:
        if not 0 < len(self.project) <= 100 or not self.project.isprintable():
            raise ConfigError(f"project must be a name of 1 to 100 printable characters, not {self.project!r}")

    @property
    def snapshots_wanted(self) -> bool:
        if self.agent.snapshots is Switch.AUTO:
            return self.mode is not Mode.OBSERVE and "rollback" in self.auto.allow
        return self.agent.snapshots is Switch.ON

    @property
    def checkpoints_wanted(self) -> bool:
        if self.agent.checkpoints is Switch.AUTO:
            return self.mode is not Mode.OBSERVE and "save_checkpoint" in self.auto.allow
        return self.agent.checkpoints is Switch.ON

    @property
    def attribution_wanted(self) -> bool:
        if self.agent.attribute is Switch.AUTO:
            return self.mode is not Mode.OBSERVE
        return self.agent.attribute is Switch.ON

    @property
    def guard_mode(self) -> GuardMode:
        """What ``agent.guard`` comes to: never ``auto``."""
        if self.agent.guard is not GuardMode.AUTO:
            return self.agent.guard
        return GuardMode.SYNC if self.mode is Mode.AUTO and "skip_step" in self.auto.allow else GuardMode.OFF


def detect_settings(tree: Mapping[str, Any]) -> DetectSettings:
    """What `DetectSettings.as_dict` gave.

    Raises:
        ConfigError: it is of another version, or damaged.
    """
    settings: DetectSettings = coerce("detect", tree, DetectSettings)
    return settings


def _at_least(low: float, high: float = 1e12, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= high:  # also false for NaN
            raise ConfigError(f"{name} must lie between {low:g} and {high:g}, not {value!r}")

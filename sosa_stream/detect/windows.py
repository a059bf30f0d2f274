"""What detectors may ask of a run: its series up to the newest complete step, and their bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.alignment import AT, Block, Logged, Row
from sosa_stream.detect.brought import Brought
from sosa_stream.detect.channel import Channel
from sosa_stream.detect.course import Course
from sosa_stream.detect.hangs import Hang
from sosa_stream.detect.leaks import Leak
from sosa_stream.detect.logged import NUM_VALUES, LoggedSeries, column_of
from sosa_stream.detect.losses import Loss
from sosa_stream.detect.opening import Opening
from sosa_stream.detect.pace import Pace
from sosa_stream.detect.repeats import Repeats
from sosa_stream.detect.replicas import Replicas
from sosa_stream.detect.schedule import Schedule
from sosa_stream.detect.sensitivity import strictness
from sosa_stream.detect.statistics import Level, Ring
from sosa_stream.detect.twins import Twins
from sosa_stream.protocol.columns import COLUMNS, EVAL_LOSS, SAMPLED_COLUMNS
from sosa_stream.protocol.messages import ExceptionReport, Layers
from sosa_stream.settings import DetectSettings

TICK, LOSS, GRAD_NORM, LR, LR_MULTIPLIER = (AT[name] for name in ("tick", "loss", "grad_norm", "lr", "lr_multiplier"))
STEP_SECONDS, SKIPPED, MODEL = (AT[name] for name in ("step_seconds", "skipped", "model"))
LOSS_SCALE = AT["loss_scale"]
PACE = [AT[f"{name}_seconds"] for name in ("data", "forward", "backward", "optimizer", "step", "wait")]
LOCAL_NORM, LOCAL_NONFINITE = AT["local_norm"], AT["local_nonfinite"]
DATA_SECONDS, WAIT_SECONDS = AT["data_seconds"], AT["wait_seconds"]
FROZEN_DIGEST, FROZEN_PLACE = AT["frozen_digest"], AT["frozen_place"]
DIGEST, DIGEST_CHUNK, DIGEST_OWED = AT["digest"], AT["digest_chunk"], AT["digest_owed"]
NUM_OBJECTIVES, FINGERPRINT = AT["num_objectives"], AT["fingerprint"]
FIRST_SAMPLED = AT[SAMPLED_COLUMNS[0]]
LOWEST_COUNTS = frozenset({"layer_ratio", "first_norm", "update_ratio", "changed_share", "active_units", "kl_per_dim"})
"""Sampled columns of which the lowest rank's value is the run's; of the others, the highest."""
LOOKS = 64
"""Looks that are remembered."""
MAX_LOGGED_NAMES = 256
PULSE_POINTS = 16
"""Losses between two looks of detectors that look at a stretch of them; more, late in a long run."""
MIN_QUIET = 4
"""Steps that are worth taking at once."""
DEAD_POINTS = 3
"""After so many steps in a row without a finite value, one more says nothing new."""
ORDINARY = frozenset(
    {"tick", "loss", "grad_norm", "lr", "lr_multiplier", "step_seconds", "skipped", "model", "samples"}
)
"""Step columns of which many steps can be taken at once."""
SETTLED_POINTS, SETTLED_SHARE = 32, 0.2
"""A loss that is this long out of its old band, and less than this share of the progress above it, is where it is."""
STUCK_POINTS = 8
"""Steps that overflow one after the other: a scaler that backs off has come down by 2^8, or with hysteresis 2^4."""
YOUNG_STEPS = 128
"""Optimizer steps in which a loss or a norm out of its band is worth knowing, and no more."""

SAME_NORM = 1e-6
"""Norms of the same gradients differ between ranks by less than this share."""

_ORDINARY = np.isin(COLUMNS, list(ORDINARY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """An update by gradients that were not finite, of finite losses. ``ranks``: who brought them, if it is known."""

    step: int
    ranks: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Reports:
    """What arrives outside the metric rows.

    An uncaught exception, and why ranks have left before it that raised none; a fix that is applied, and digests of
    ranks; a run in which no rank moves; ranks that are gone, or whose memory grows.
    """

    exception: ExceptionReport | None = None
    left: Mapping[int, str] = field(default_factory=dict)
    digests: Mapping[int, str] = field(default_factory=dict)
    digests_step: int = 0
    resynced: bool = False
    """Whether the fix gave all ranks the state of one."""
    hang: Hang | None = None
    loss: Loss | None = None
    leak: Leak | None = None


class RunWindows:
    """The run-level series of one generation, up to and including the newest complete step.

    ``loss`` is the mean over ranks of the finite losses, ``grad_norm`` the maximum of the finite norms, ``lr`` the
    effective learning rate (lr · lr_multiplier) of the lowest rank. Each is None where no rank sent a finite one.
    """

    def __init__(self, settings: DetectSettings) -> None:
        self.settings = settings
        self.step = -1
        self.tick = 0
        self.num_points = 0
        """Complete steps of this generation: what detectors count in."""
        self.loss: float | None = None
        self.grad_norm: float | None = None
        self.lr: float | None = None
        self.lr_multiplier = 1.0
        self.is_game = False
        """Whether several objectives are trained in turns, as in a GAN: their losses need not fall."""
        self.model = 0
        """Which model in a row the run trains; a new one opens a segment."""
        self.step_seconds: float | None = None
        self.repeats: Repeats | None = None
        """How long each rank has had the same batch, with this model; None while no batch was seen."""
        self.twins: Twins | None = None
        """Which replicas have had the same batches; None while no batch was seen, and in a run of one rank."""
        self.pace: Pace | None = None
        """Whom the others wait for, and for how long batches are waited for; None while no rank has said."""
        self.lost: frozenset[int] = frozenset()
        """Ranks that are gone without a goodbye."""
        self.leaking = False
        """Whether the memory of a rank grows and grows."""
        self.skipped = False
        self.bad_loss: tuple[int, ...] = ()
        """Ranks whose own loss is non-finite at this step."""
        self.bad_grad: tuple[int, ...] = ()
        """Ranks whose gradient norm is non-finite at this step."""
        self.odd_ranks: tuple[int, ...] = ()
        """Ranks that alone left this step out, or alone took it, where all have had the same gradients."""
        self.came_apart = False
        """Whether there were any since ranks were last brought together."""
        self.replicas = Replicas()
        self.brought: Brought | None = None
        """Each rank's own gradient, before the reduction; None while none was looked at."""
        self.brought_by: tuple[int, ...] = ()
        """Ranks whose own gradient is not finite, or far above the others', at this step."""
        self.damage: Damage | None = None
        """The update that made the weights what no loss is finite with; None while all are finite."""
        self.norms_agree = False
        """Whether the last norms that were finite on all ranks were the same: replicas, with reduced gradients."""
        self.num_ranks = 0
        """Ranks that reported this step."""
        self.columns: set[str] = set()
        """Columns ever sent in this generation: what is missing makes detectors blind."""
        self.layers: Layers | None = None
        """The parameters as they were when they were last looked at one by one."""
        self.reports = Reports()
        self.row: Row | None = None
        """The newest complete step as the ranks sent it."""
        self.logged: dict[str, LoggedSeries] = {}
        """What the script logs by name; it outlives segments."""
        self.newest_logged: Logged | None = None
        """Set while detectors look at what was logged, between steps."""
        self.opening = Opening()
        """How the run began; it outlives segments."""
        self.ended = False
        """Set once the run is over, for what can be said only then."""
        self.hold = False
        """Set while an incident is open: values above a band stay out of it."""
        self.segment = 0
        """Counts the segments: bands of different ones are not comparable."""
        self.restart()

    def reconfigure(self, settings: DetectSettings) -> None:
        """Judge by these settings from the next step on; lengths of windows are those of the next segment."""
        if settings.rules != self.settings.rules:
            self.logged = {name: series for name, series in self.logged.items() if name == EVAL_LOSS}
        self.settings = settings
        self.losses.band.strictness = self.log_norms.band.strictness = strictness(settings)

    @property
    def step_metrics(self) -> tuple[str, ...]:
        """The step columns that rules look at."""
        return tuple(dict.fromkeys(rule.metric for rule in self.settings.rules if rule.metric in AT))

    def restart(self, rates_before: Sequence[float | None] = ()) -> None:
        """Open a new segment: statistics begin again, detectors are warming."""
        self.segment += 1
        for series in self.logged.values():
            series.forget_lowest()
        size, warmup = max(32, self.settings.window_steps // 4), self.settings.warmup_steps
        self.losses = Channel(size, warmup, strictness(self.settings))
        self.log_norms = Channel(size, warmup, strictness(self.settings))
        self.recent_losses = Ring(64)
        self.recent_steps = Ring(64)
        """The steps of `recent_losses`."""
        self.course = Course()
        """The loss of this segment."""
        self.norm_course = Course()
        """The log of the gradient norm, likewise."""
        self.closed = False
        """Whether this step closed a block of the course."""
        self.pulse = False
        """Whether it is time to look at `recent_losses`."""
        self.until_pulse = PULSE_POINTS
        """Losses until the next pulse."""
        self._first_losses: list[float] = []
        self.start: float | None = None
        """Median of the first eight losses."""
        self.best: float | None = None
        """Lowest median of eight losses in a row."""
        self.calmest = math.inf
        """Smallest scale of the loss band so far."""
        self.num_steps = 0
        self.num_bad_loss = self.num_bad_grad = 0
        """Non-finite steps in a row."""
        self.num_zero_grad = 0
        """Steps in a row whose gradient norm is exactly 0."""
        self.num_overflows = 0
        """Steps in a row that were left out under a loss scale: the loss is finite, and the gradients are not."""
        self.usual_loss_scale: float | None = None
        """The loss scale of the last step that was taken."""
        self.looks: dict[str, Ring] = {name: Ring(LOOKS) for name in SAMPLED_COLUMNS}
        """The looks of each sampled column, one value over all ranks each."""
        self.num_looks = 0
        """Steps of this segment at which anything was sampled."""
        self.looked = False
        """Whether this step was one."""
        self.schedule = Schedule(rates_before)
        """The learning rate of this segment."""

    @property
    def rises_matter(self) -> bool:
        """Whether a loss out of its band is more than worth knowing: neither a beginning nor a game."""
        return not (self.is_young or self.is_game)

    @property
    def is_young(self) -> bool:
        """Whether a live run has only begun, or only been resumed: there is little to lose yet, and much in motion."""
        return "tick" in self.columns and self.num_points <= YOUNG_STEPS

    @property
    def noise(self) -> float:
        """Scale of the loss band; 0 while it is warming."""
        return self.losses.band.level.scale if self.losses.band.level is not None else 0.0

    @property
    def progress(self) -> float:
        """What has been learned: start - best of the smoothed loss, at least the scale of its noise."""
        if self.start is None or self.best is None:
            return self.noise
        return max(self.start - self.best, self.noise)

    @property
    def norm_ratio(self) -> float:
        """The gradient norm over its median of the time before the present excursion; 0 where unknown."""
        level, value = self.log_norms.level_before, self.log_norms.value
        return math.exp(min(value - level.center, 700.0)) if level and value is not None else 0.0

    def undone(self, loss: float) -> float:
        """Share of the progress that a loss takes back: (loss - center) / (start - best)."""
        level = self.loss_level()
        if level is None:
            return 0.0
        return (loss - level.center) / max(self.progress, level.scale)

    def loss_level(self) -> Level | None:
        """The loss band of the time before the present excursion, if there is one."""
        return self.losses.level_before

    def take(self, row: Row) -> None:
        """Fold one complete step in."""
        values, sent = row.values, row.sent
        if self.bad_grad and not self.bad_loss and not self.skipped:
            self.damage = Damage(step=self.step, ranks=self.brought_by)
        self.step = row.step
        self.num_steps += 1
        self.num_points += 1
        self.newest_logged = None
        finite = np.logical_and(sent, np.isfinite(values))
        bad = np.logical_and(sent, np.logical_not(finite))
        self.num_ranks = int(sent[:, LOSS].sum() or sent.any(axis=1).sum())
        if bad[:, LOSS].any() or bad[:, GRAD_NORM].any():
            self.bad_loss = tuple(np.flatnonzero(bad[:, LOSS]).tolist())
            self.bad_grad = tuple(np.flatnonzero(bad[:, GRAD_NORM]).tolist())
        else:
            self.bad_loss = self.bad_grad = ()
        if not self.bad_loss:
            self.damage = None
        self.num_bad_loss = self.num_bad_loss + 1 if self.bad_loss else 0
        self.num_bad_grad = self.num_bad_grad + 1 if self.bad_grad else 0
        losses = values[finite[:, LOSS], LOSS]
        norms = values[finite[:, GRAD_NORM], GRAD_NORM]
        self.loss = float(losses.sum()) / len(losses) if len(losses) else None
        self.grad_norm = float(norms.max()) if len(norms) else None
        self.num_zero_grad = self.num_zero_grad + 1 if self.grad_norm == 0.0 else 0
        first = int(sent.any(axis=1).argmax())
        one = values[first].tolist()
        seen = finite[first].tolist()
        if seen[TICK]:
            self.tick = max(self.tick, int(one[TICK]))
        self.lr_multiplier = one[LR_MULTIPLIER] if seen[LR_MULTIPLIER] else 1.0
        self.lr = one[LR] * self.lr_multiplier if seen[LR] else None
        if seen[STEP_SECONDS]:
            self.step_seconds = one[STEP_SECONDS]
        self.skipped = bool(seen[SKIPPED] and one[SKIPPED] > 0)
        self.odd_ranks = self._odd_ranks(row, finite) if len(values) > 1 else ()
        self.came_apart = self.came_apart or bool(self.odd_ranks)
        if len(values) > 1:
            digests, chunks, owed = values[:, DIGEST], values[:, DIGEST_CHUNK], values[:, DIGEST_OWED]
            self.replicas.take(self.step, digests, chunks, owed)
            self.replicas.frozen.take(self.step, values[:, FROZEN_DIGEST], values[:, FROZEN_PLACE])
        self.row = row
        if seen[LOSS_SCALE]:
            overflows = self.skipped and self.grad_norm is None and not self.bad_loss
            self.num_overflows = self.num_overflows + 1 if overflows else 0
            self.usual_loss_scale = self.usual_loss_scale if self.skipped else one[LOSS_SCALE]
        if seen[NUM_OBJECTIVES] and one[NUM_OBJECTIVES] >= 2:
            self.is_game = True
        model = int(one[MODEL]) if seen[MODEL] else self.model
        if model != self.model:
            self.model = model
            self.repeats = self.twins = self.pace = self.brought = None
            self.replicas = Replicas()
            self.restart()
        if sent[:, FINGERPRINT].any():
            self.repeats = self.repeats or Repeats(len(values))
            self.repeats.take(self.step, values[:, FINGERPRINT])
            if len(values) > 1:
                self.twins = self.twins or Twins(len(values))
                self.twins.take(self.step, values[:, FINGERPRINT], values[:, GRAD_NORM])
        self.brought_by = ()
        if sent[:, LOCAL_NONFINITE].any() and len(values) > 1:
            self.brought = self.brought or Brought(len(values))
            self.brought.take(values[:, LOCAL_NORM], values[:, LOCAL_NONFINITE])
            self.brought_by = self.brought.ranks
        if sent[:, DATA_SECONDS].any() or sent[:, WAIT_SECONDS].any():
            self.pace = self.pace or Pace(len(values))
            self.pace.take(self.step, values[:, PACE].T)
        self.looked = bool(finite[:, FIRST_SAMPLED:].any())
        if self.looked:
            self._look(values[:, FIRST_SAMPLED:], finite[:, FIRST_SAMPLED:])
        self._fold()

    @property
    def only_loss_is_bad(self) -> bool:
        """Whether a loss is not finite that none of the weights comes from, such as a metric's or a broken print's.

        So say the norms of all ranks: known, finite, and above 0, as gradients that a NaN has passed are not.
        """
        row = self.row
        if row is None or not self.bad_loss or self.bad_grad:
            return False
        there = row.sent.any(axis=1)
        overflows = np.isinf(row.values[there, LOSS]).any()  # a loss in half precision, which damaged weights make
        return bool((row.values[there, GRAD_NORM] > 0.0).all()) and not overflows

    @property
    def stuck_loss_scale(self) -> float | None:
        """The AMP scale, where the last `STUCK_POINTS` steps have overflowed and it has not even halved over them."""
        scales = self.looks["loss_scale"].last()
        if self.num_overflows < STUCK_POINTS or not scales[-1] > 0.5 * scales[-STUCK_POINTS]:
            return None
        return float(scales[-1])

    @property
    def num_parts(self) -> int:
        """Parts in which the newest step's batch was run, on the rank with most."""
        if "num_parts" not in self.columns or self.row is None:
            return 1
        parts = self.over_ranks("num_parts")
        return int(np.nanmax(parts)) if np.isfinite(parts).any() else 1

    def over_ranks(self, name: str) -> NDArray[np.float64]:
        """The newest step's values of a column, one for each rank, NaN where it was not sent or is not a number."""
        assert self.row is not None
        return self.row.values[:, AT[name]]

    def hear(self, reports: Reports) -> None:
        """Take in what arrived between steps; equal digests of all ranks, or a resync, bring ranks together again.

        What digests of chunks have shown, only these can take back.
        """
        self.reports = reports
        digests = set(reports.digests.values())
        if reports.resynced or (len(digests) == 1 and "" not in digests and len(reports.digests) >= self.num_ranks):
            self.came_apart, self.odd_ranks = False, ()

    def log(self, logged: Logged) -> None:
        """Take in what the script logged; it is ``newest_logged`` until the next step."""
        self.newest_logged = logged
        series = self.logged.get(logged.name)
        if series is None:
            if len(self.logged) >= MAX_LOGGED_NAMES:
                return
            wanted = [rule.for_points for rule in self.settings.rules if column_of(rule.metric) == logged.name]
            series = self.logged[logged.name] = LoggedSeries(NUM_VALUES + max(wanted, default=0))
        series.push(logged.step, logged.value, self.recent_losses)

    def _odd_ranks(self, row: Row, finite: NDArray[np.bool_]) -> tuple[int, ...]:
        """The fewer of those that left this tick's step out for their own norm and of those that took it."""
        values, known = row.values, row.sent.any(axis=1)
        norms = values[finite[:, GRAD_NORM], GRAD_NORM]
        if len(norms) == known.sum():
            self.norms_agree = bool(len(norms) > 1 and 0.0 < norms.max() <= norms.min() * (1.0 + SAME_NORM))
            return ()
        took = finite[:, GRAD_NORM] & (values[:, SKIPPED] == 0.0)
        left_out = known & ~finite[:, GRAD_NORM] & (values[:, SKIPPED] > 0.0)
        same_tick = len(np.unique(values[known, TICK])) == 1
        if not (self.norms_agree and same_tick and took.any() and left_out.any() and (took | left_out)[known].all()):
            return ()
        return tuple(np.flatnonzero(left_out if left_out.sum() <= took.sum() else took).tolist())

    def _look(self, values: NDArray[np.float64], finite: NDArray[np.bool_]) -> None:
        self.num_looks += 1
        for i, name in enumerate(SAMPLED_COLUMNS):
            found = values[finite[:, i], i]
            if len(found):
                self.looks[name].push(float(found.min() if name in LOWEST_COUNTS else found.max()))

    def _fold(self) -> None:
        self.closed = self.pulse = False
        if not self.opening.is_whole:
            none = math.nan
            self.opening.take(
                none if self.loss is None else self.loss, none if self.grad_norm is None else self.grad_norm
            )
        if self.loss is None or self.bad_loss:
            self.losses.miss()
        else:
            taken = self.losses.take(self.step, self.loss, self.hold)
            self._progress(self.loss)
            self._settle()
            if not taken and self.losses.num_held >= self.settings.window_steps:
                # this level is no longer an excursion: learn it as the new normal, visibly warming
                rates = (*self.schedule.before, *self.course.lrs)
                self.restart(rates[:: 1 + len(rates) // Course.MOST])
                return
        if self.grad_norm is None or self.grad_norm <= 0.0 or self.bad_grad:
            self.log_norms.miss()
        else:
            self.log_norms.take(self.step, float(np.log(self.grad_norm)), self.hold)
            self.norm_course.push(self.log_norms.clipped, self.step, self.lr)
        if self.lr is not None:
            self.schedule.take(
                self.lr,
                self.lr_multiplier,
                step=self.step,
                point=self.num_points,
                of_run=self.course.lrs,
                hold=self.hold,
            )

    def _settle(self) -> None:
        """End an excursion that has become a new level, not far above the old one, which the band has taken in."""
        excursion = self.losses.excursion
        if excursion is None or self.hold or excursion.num_points < SETTLED_POINTS:
            return
        if self.undone(self.losses.smoothed(16)) < SETTLED_SHARE:
            self.losses.excursion = None

    def _progress(self, loss: float) -> None:
        self.recent_losses.push(loss)
        self.recent_steps.push(self.step)
        if len(self._first_losses) < 8:
            self._first_losses.append(loss)
            self.start = float(np.median(self._first_losses))
        self.until_pulse -= 1
        self.pulse = not self.until_pulse
        if self.pulse:
            self.until_pulse = max(PULSE_POINTS, self.recent_losses.num_pushed // 256)
        self.closed = self.course.push(self.losses.clipped, self.step, self.lr)
        if self.closed:
            smoothed = self.losses.smoothed(8)
            self.best = smoothed if self.best is None else min(self.best, smoothed)
            if self.losses.band.level is not None:
                self.calmest = min(self.calmest, self.losses.band.level.scale)

    def take_quiet(self, block: Block, first: int, above: tuple[Level, ...] = ()) -> int:
        """Take as many steps of ``block`` from ``first`` on as show nothing new, at once; how many, 0 for none.

        They leave the windows exactly as `take` of each would, and no detector has anything to say to them. Losses
        that are back below one of the levels ``above`` are something new.
        """
        if self.hold or self.losses.band.level is None or not self._all_ordinary(block, first):
            return 0
        sent = block.sent[0, 0]
        room = min(self.course.room, self.until_pulse, *([self.norm_course.room] if sent[GRAD_NORM] else [])) - 1
        rows = block.values[first : first + room, 0]
        bad = np.flatnonzero(~np.isfinite(rows[:, sent]).all(axis=1))
        rows = rows[: bad[0]] if len(bad) else rows
        if not self._is_usual(rows, sent):
            return 0
        for level in above:
            back = np.flatnonzero((rows[:, LOSS] - level.center) / level.scale <= level.threshold)
            rows = rows[: back[0]] if len(back) else rows
        num = self.losses.num_quiet(rows[:, LOSS])
        log_norms = None
        if sent[GRAD_NORM]:
            if not (rows[:num, GRAD_NORM] > 0.0).all():
                return 0
            log_norms = np.log(rows[:num, GRAD_NORM])
            num = min(num, self.log_norms.num_quiet(log_norms))
        rows = rows[:num]
        if num < MIN_QUIET or not self._take_quiet_lrs(rows, block.steps[first : first + num], sent):
            return 0
        self._pass(block, first, num)
        self.bad_loss = self.bad_grad = ()
        self.num_bad_loss = self.num_bad_grad = self.num_zero_grad = 0
        losses = rows[:, LOSS]
        self.loss = float(losses[-1])
        self.grad_norm = float(rows[-1, GRAD_NORM]) if sent[GRAD_NORM] else None
        self.recent_losses.extend(losses)
        self.recent_steps.extend(block.steps[first : first + num].astype(np.float64))
        self.until_pulse -= num
        self.opening.take(losses, rows[:, GRAD_NORM] if sent[GRAD_NORM] else np.full(num, math.nan))
        self.course.extend(self.losses.extend(losses))
        if log_norms is not None:
            self.norm_course.extend(self.log_norms.extend(log_norms[:num]))
        else:
            self.log_norms.miss_all(num)
        return num

    def take_dead(self, block: Block, first: int) -> int:
        """As `take_quiet`, for steps without a finite loss or norm after others: each says what the last one said."""
        if self.num_bad_loss < DEAD_POINTS or not self._all_ordinary(block, first):
            return 0
        sent = block.sent[0, 0]
        rows = block.values[first:, 0]
        dead = ~np.isfinite(rows[:, LOSS])
        if sent[GRAD_NORM]:
            if self.num_bad_grad < DEAD_POINTS:
                return 0
            dead &= ~np.isfinite(rows[:, GRAD_NORM])
        num = len(rows) if dead.all() else int(np.argmin(dead))
        rows = rows[:num]
        known = sent.copy()
        known[[LOSS, GRAD_NORM]] = False
        if num < MIN_QUIET or not np.isfinite(rows[:, known]).all() or not self._is_usual(rows, sent):
            return 0
        if not self._take_quiet_lrs(rows, block.steps[first : first + num], sent):
            return 0
        self._pass(block, first, num)
        self.num_bad_loss += num
        self.num_bad_grad += num if sent[GRAD_NORM] else 0
        self.loss = self.grad_norm = None
        self.num_zero_grad = 0
        self.losses.miss_all(num)
        self.log_norms.miss_all(num)
        return num

    def _all_ordinary(self, block: Block, first: int) -> bool:
        """Whether the steps of a block come from one rank and hold nothing that needs a look at each."""
        if block.values.shape[1] != 1 or len(block.sent) != 1 or len(block) - first < MIN_QUIET:
            return False
        if self.schedule.jump is not None or (self.settings.rules and self.step_metrics):
            return False
        names = block.sent[0, 0]
        return bool(names[LOSS] and not (names & ~_ORDINARY).any())

    def _is_usual(self, rows: NDArray[np.float64], sent: NDArray[np.bool_]) -> bool:
        """Whether all these rows are of this model and none was skipped."""
        if sent[MODEL] and (rows[:, MODEL] != self.model).any():
            return False
        return not (sent[SKIPPED] and rows[:, SKIPPED].any())

    def _pass(self, block: Block, first: int, num: int) -> None:
        """Count ``num`` steps whose learning rates were taken."""
        rows, sent = block.values[first : first + num, 0], block.sent[0, 0]
        self.num_steps += num
        self.num_points += num
        self.num_ranks = 1
        self.newest_logged = None
        self.skipped = self.looked = self.closed = self.pulse = False
        if sent[TICK]:
            self.tick = max(self.tick, int(rows[:, TICK].max()))
        if sent[STEP_SECONDS]:
            self.step_seconds = float(rows[-1, STEP_SECONDS])
        self.step = int(block.steps[first + num - 1])
        self.row = block.row(first + num - 1)

    def _take_quiet_lrs(self, rows: NDArray[np.float64], steps: NDArray[np.int64], sent: NDArray[np.bool_]) -> bool:
        multipliers = rows[:, LR_MULTIPLIER] if sent[LR_MULTIPLIER] else np.ones(len(rows))
        if not sent[LR]:
            self.lr, self.lr_multiplier = None, float(multipliers[-1])
            return True
        lrs = rows[:, LR] * multipliers
        if not self.schedule.take_quiet(lrs, multipliers, steps):
            return False
        self.lr, self.lr_multiplier = float(lrs[-1]), float(multipliers[-1])
        return True

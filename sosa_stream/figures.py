"""What is counted over a run's steps, for whoever draws it: step times, samples, steps that came to nothing. Pure.

Complete steps are kept as they come and counted many at once, so that none of it costs a step anything of note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sosa_stream.detect.alignment import AT, Block
from sosa_stream.detect.attendance import RankView

MOST_WAITING = 4096
"""Rows (one for each step and rank) that are counted together."""
STEP_SECONDS_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
LAG_BOUNDS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 300.0)
OFFENCE_SECONDS = 3.0
"""Heartbeats come every second: a rank that is behind or silent for less has done nothing."""

_LOSS, _GRAD_NORM, _STEP_SECONDS, _SKIPPED, _SAMPLES, _AMP_SCALE = (
    AT[name] for name in ("loss", "grad_norm", "step_seconds", "skipped", "samples", "loss_scale")
)


STEP_PARTS = ("data", "forward", "backward", "wait", "optimizer")
PARTS_STEPS = 64
"""Of so many of the newest steps the parts are shown, by their mean."""
_PARTS = [AT[f"{part}_seconds"] for part in STEP_PARTS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """How often values fell into each bucket: above the bound before and up to its own, and the last above them all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Buckets:
    """A `Histogram` that grows."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._edges = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0

    def add(self, values: NDArray[np.float64] | Iterable[float]) -> Buckets:
        values = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
        self._counts += np.bincount(np.searchsorted(self._edges, values), minlength=len(self._counts))
        # One after the other: a sum that came out lower when a recording is read again would look like a reset.
        self._sum = float(np.add.accumulate(np.concatenate(([self._sum], values)))[-1])
        return self

    @property
    def histogram(self) -> Histogram:
        return Histogram(bounds=self._bounds, counts=tuple(self._counts.tolist()), sum=self._sum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A run's complete steps, over all its generations. None: no rank has ever said."""

    num_steps: int = 0
    num_skipped: int = 0
    """Steps whose update a rank kept from its weights."""
    num_nonfinite: int = 0
    """Steps at which a loss or a gradient norm of a rank was not finite."""
    num_samples: int | None = None
    """Over all ranks: those that share a batch, as in tensor parallelism, count it each."""
    amp_scale: float | None = None
    """Of the newest step that had one, in this generation."""
    step_seconds: Histogram = Buckets(STEP_SECONDS_BOUNDS).histogram
    """Of the slowest rank. A process's first step has no time."""
    step_parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Seconds of the newest steps by `STEP_PARTS`: of the rank with most, and the mean over ranks. Those known."""


class Counting:
    """Counts complete steps into `Figures`."""

    def __init__(self) -> None:
        self._waiting: list[Block] = []
        self._num_waiting = 0
        self._num_steps = self._num_skipped = self._num_nonfinite = 0
        self._num_samples: int | None = None
        self._amp_scale: float | None = None
        self._step_seconds = Buckets(STEP_SECONDS_BOUNDS)
        self._step_parts: Mapping[str, tuple[float, float]] = {}

    def take(self, block: Block) -> None:
        """Complete steps, in order."""
        self._waiting.append(block)
        self._num_waiting += block.values.shape[0] * block.values.shape[1]
        if self._num_waiting >= MOST_WAITING:
            self._count()

    def begin_generation(self) -> None:
        """Other ranks, and perhaps more or fewer of them."""
        self._count()
        self._amp_scale, self._step_parts = None, {}

    @property
    def figures(self) -> Figures:
        self._count()
        return Figures(
            num_steps=self._num_steps,
            num_skipped=self._num_skipped,
            num_nonfinite=self._num_nonfinite,
            num_samples=self._num_samples,
            amp_scale=self._amp_scale,
            step_seconds=self._step_seconds.histogram,
            step_parts=self._step_parts,
        )

    def _count(self) -> None:
        if not self._waiting:
            return
        blocks, self._waiting, self._num_waiting = self._waiting, [], 0
        # A long log comes in blocks that are long enough, and is not copied.
        values = np.concatenate([block.values for block in blocks]) if len(blocks) > 1 else blocks[0].values
        judged = np.concatenate([_sent_losses(block) for block in blocks])
        self._num_steps += len(values)
        self._num_skipped += int((values[:, :, _SKIPPED] > 0.0).any(axis=1).sum())
        bad = judged & ~np.isfinite(values[:, :, _LOSS : _GRAD_NORM + 1])
        self._num_nonfinite += int(bad.any(axis=(1, 2)).sum())
        seconds = np.fmax.reduce(values[:, :, _STEP_SECONDS], axis=1)
        self._step_seconds.add(seconds[(seconds > 0.0) & np.isfinite(seconds)])
        samples = values[:, :, _SAMPLES]
        samples = samples[(samples > 0.0) & np.isfinite(samples)]
        if len(samples):
            self._num_samples = (self._num_samples or 0) + int(samples.sum())
        scales = np.fmax.reduce(values[:, :, _AMP_SCALE], axis=1)
        scales = scales[np.isfinite(scales)]
        if len(scales):
            self._amp_scale = float(scales[-1])
        self._step_parts = _parts(values[-PARTS_STEPS:, :, _PARTS]) or self._step_parts


def _parts(seconds: NDArray[np.float64]) -> dict[str, tuple[float, float]]:
    """From (steps, ranks, `STEP_PARTS`), NaN where unknown."""
    known = np.isfinite(seconds)
    num = known.sum(axis=0)
    means = np.where(known, seconds, 0.0).sum(axis=0) / np.maximum(num, 1)
    return {
        part: (float(means[there, i].max()), float(means[there, i].mean()))
        for i, part in enumerate(STEP_PARTS)
        if (there := num[:, i] > 0).any()
    }


def _sent_losses(block: Block) -> NDArray[np.bool_]:
    """Where a loss and where a norm was sent, (steps, ranks, 2)."""
    sent = block.sent[:, :, _LOSS : _GRAD_NORM + 1]
    return sent if len(sent) == len(block) else np.broadcast_to(sent, (len(block), *sent.shape[1:]))


def lags(ranks: Iterable[RankView]) -> Histogram:
    """How far behind the ranks are that are there."""
    return Buckets(LAG_BOUNDS).add(rank.lag_seconds for rank in ranks if rank.is_there).histogram


def offenders(ranks: Iterable[RankView], most: int) -> tuple[RankView, ...]:
    """The ranks that are furthest behind or silent for longest, worst first: ``most`` at most, and often none."""
    guilty = [rank for rank in ranks if rank.offence_seconds >= OFFENCE_SECONDS]
    return tuple(sorted(guilty, key=lambda rank: (-rank.offence_seconds, rank.rank))[:most])

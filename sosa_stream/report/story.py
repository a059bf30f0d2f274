"""What happened in a run, as values: all that its report, its tables and its pictures are made of.

A `Story` comes from a recording of ours or from any log that `sosa replay` reads (`report.telling`). What the source
does not have is named in ``missing`` and is nowhere made up. Its size does not grow with the run's length: curves are
bins, grids have at most `MAX_LOOKS` columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sosa_stream.decide.commands import CommandRecord
from sosa_stream.detect.incidents import Incident

MAX_BINS, MAX_LAYERS, MAX_LOOKS, MAX_FEATURES = 2000, 1024, 512, 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """One column over steps and ranks, in bins of whole steps; every array has shape (num_bins,).

    ``steps`` int64: the first step of each bin. ``low``, ``mean``, ``high`` float64 over what is finite in it, NaN
    where nothing is. ``num_nonfinite`` int64 counts NaN and infinities that were reported as such.
    """

    steps: NDArray[np.int64]
    low: NDArray[np.float64]
    mean: NDArray[np.float64]
    high: NDArray[np.float64]
    num_nonfinite: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Layers, or features of the input, by the steps at which they were looked at.

    ``names`` of the rows, layers in the model's order (depth), full names. ``steps`` int64 of shape (num_looks,), the
    first of each where several were put together. ``values`` float64 of shape (num_rows, num_looks): NaN where there
    was none, infinite where it was not finite. ``what`` says what they are, with the unit.
    """

    what: str
    names: tuple[str, ...]
    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """Statistics of the batches' largest floating-point input, feature by feature, over all that was looked at.

    ``means`` and ``stds`` are grids; ``changes`` lists sudden changes as dicts with ``step``, ``rank``, ``feature``,
    ``z``, ``before``, ``after``, newest last, at most 1,000.
    """

    name: str
    means: Grid
    stds: Grid
    changes: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """An exception that ended a rank: what it was, where, and what explains it (``explanation`` empty if nothing)."""

    rank: int
    host: str
    step: int
    type: str
    message: str
    stack: tuple[str, ...]
    explanation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Story:
    """A run, told once.

    Attributes:
        source: the recording or log that it was read from.
        kind: ``recording``, or the format of the log.
        began_at, ended_at: seconds since the epoch; None where the source has no time.
        num_steps: steps with a loss or a gradient norm; ``first_step`` and ``last_step`` -1 where there is none.
        curves: by column (`protocol.columns`; ``log/<name>`` for what the script logged), over all ranks.
        by_rank: loss of each rank, where there are two ranks at least and at most 64.
        layers: gradient norms by layer; ``weights``, ``updates``: norms likewise, None where not recorded.
        incidents, commands: in the order in which they opened or were made.
        states: each detector's state at the end, by kind: ``blind`` ones could tell nothing.
        missing: what the source lacks for a full report, a sentence each.
    """

    name: str
    source: Path
    kind: str
    mode: str = "observe"
    began_at: float | None = None
    ended_at: float | None = None
    num_ranks: int = 1
    hosts: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    num_generations: int = 1
    num_steps: int = 0
    first_step: int = -1
    last_step: int = -1
    curves: Mapping[str, Curve] = field(default_factory=dict)
    by_rank: Mapping[int, Curve] = field(default_factory=dict)
    layers: Grid | None = None
    weights: Grid | None = None
    updates: Grid | None = None
    features: Features | None = None
    incidents: tuple[Incident, ...] = ()
    commands: tuple[CommandRecord, ...] = ()
    raised: tuple[Raised, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

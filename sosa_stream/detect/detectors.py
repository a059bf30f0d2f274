"""The detectors of faults that every training loop can have, in one table, `ALL`.

A detector is a pure function from windows to a finding on the newest complete step, or None. It keeps nothing of its
own. What it needs and does not get makes it blind, which people are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from sosa_stream.detect import (
    corruption,
    duplicates,
    growing_memory,
    inputs,
    latent,
    layers,
    lost_ranks,
    memory,
    numerical,
    reports,
    rises,
    stagnation,
    standstill,
    stragglers,
    validation,
    vanishing,
)
from sosa_stream.detect.incidents import Finding, Group
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.columns import EVAL_LOSS

QUIET_POINTS = 20
LOOK_POINTS = 144
"""Points without a finding that close an incident of a kind that is looked at every 64th point at the rarest."""

MOVES_POINTS = 3
"""Steps of all ranks that end a standstill."""


class DetectorState(StrEnum):
    """``blind``: a column it needs is not sent. ``warming``: statistics are not there yet."""

    BLIND = "blind"
    WARMING = "warming"
    WATCHING = "watching"
    FIRING = "firing"


class On(StrEnum):
    """When a detector looks.

    At each complete step, at `RunWindows.newest_logged`, at `RunWindows.reports`, or once the run is over.
    """

    STEP = "step"
    LOGGED = "logged"
    REPORT = "report"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """One kind of fault: its cause group, the columns it cannot do without, and how it is recognised."""

    kind: str
    group: Group
    requires: tuple[str, ...]
    check: Callable[[RunWindows], Finding | None]
    warms: bool = True
    """Whether it needs a band, so that it warms after the start of a segment."""
    on: tuple[On, ...] = (On.STEP,)
    ready: Callable[[RunWindows], bool] | None = None
    """Whether there is enough to judge by, for a kind that needs no band but something else."""
    disturbs: bool = False
    """Whether it takes the loss and the norm out of their bands: they are kept as they were before, and the incident is
    over when the loss is back in them."""
    well: Callable[[RunWindows], bool] | None = None
    """Whether what it saw is over, for a kind that its bands do not show. It may look at nothing that changes with each
    step, such as the newest loss, so that many steps can be taken at once."""
    ratio: bool = False
    """Whether it judges a share of the loss itself: a ratio by nature, which a shifted loss changes."""
    quiet_points: int = QUIET_POINTS
    """Points without a finding, and well, that close an incident: more for a kind that is not judged at each point."""

    def state(self, windows: RunWindows, firing: bool) -> DetectorState:
        if firing:
            return DetectorState.FIRING
        if not windows.columns.issuperset(self.requires):
            return DetectorState.BLIND
        no_band = self.warms and windows.num_steps <= windows.settings.warmup_steps
        if no_band or (self.ready is not None and not self.ready(windows)):
            return DetectorState.WARMING
        return DetectorState.WATCHING


ALL: tuple[Detector, ...] = (
    Detector(
        kind="nan_loss", disturbs=True, group=Group.NUMERICAL, requires=("loss",), check=numerical.nan_loss, warms=False
    ),
    Detector(
        kind="nonfinite_gradient",
        disturbs=True,
        group=Group.NUMERICAL,
        requires=("grad_norm",),
        check=numerical.nonfinite_gradient,
        warms=False,
    ),
    Detector(kind="lr_jump", disturbs=True, group=Group.LEARNING, requires=("lr", "loss"), check=rises.lr_jump),
    Detector(kind="loss_spike", disturbs=True, group=Group.LEARNING, requires=("loss",), check=rises.loss_spike),
    Detector(
        kind="loss_divergence", disturbs=True, group=Group.LEARNING, requires=("loss",), check=rises.loss_divergence
    ),
    Detector(
        kind="loss_oscillation",
        quiet_points=64,
        group=Group.LEARNING,
        requires=("loss",),
        check=stagnation.loss_oscillation,
    ),
    Detector(
        kind="loss_plateau",
        group=Group.LEARNING,
        requires=("loss",),
        check=stagnation.loss_plateau,
        on=(On.STEP, On.END),
        well=stagnation.moves_again,
        ratio=True,
    ),
    Detector(
        kind="overfitting",
        group=Group.LEARNING,
        requires=("loss", EVAL_LOSS),
        check=validation.overfitting,
        warms=False,
        on=(On.LOGGED,),
        well=validation.fits_again,
        ratio=True,
    ),
    Detector(
        kind="exploding_gradient",
        disturbs=True,
        group=Group.NUMERICAL,
        requires=("grad_norm",),
        check=numerical.exploding_gradient,
    ),
    Detector(
        kind="vanishing_gradient",
        ratio=True,
        group=Group.NUMERICAL,
        requires=("layer_ratio", "first_norm"),
        check=vanishing.vanishing_gradient,
        warms=False,
        quiet_points=LOOK_POINTS,
    ),
    Detector(
        kind="dead_units",
        group=Group.NUMERICAL,
        requires=("zero_grad_share",),
        check=layers.dead_units,
        warms=False,
        quiet_points=LOOK_POINTS,
    ),
    Detector(
        kind="saturated_activations",
        group=Group.NUMERICAL,
        requires=("saturated_share",),
        check=layers.saturated_activations,
        warms=False,
        quiet_points=LOOK_POINTS,
    ),
    Detector(
        kind="loss_scale_collapse",
        group=Group.NUMERICAL,
        requires=("loss_scale",),
        check=layers.loss_scale_collapse,
        warms=False,
    ),
    Detector(
        kind="weights_unchanged",
        group=Group.LEARNING,
        requires=("changed_share",),
        check=layers.weights_unchanged,
        warms=False,
        quiet_points=LOOK_POINTS,
    ),
    Detector(
        kind="missing_zero_grad",
        group=Group.LEARNING,
        requires=("kept_gradients",),
        check=layers.missing_zero_grad,
        warms=False,
        quiet_points=LOOK_POINTS,
    ),
    Detector(
        kind="input_anomaly", group=Group.DATA, requires=("fingerprint",), check=inputs.input_anomaly, warms=False
    ),
    Detector(
        kind="duplicate_data",
        group=Group.DATA,
        requires=("fingerprint", "grad_norm"),
        check=duplicates.duplicate_data,
        warms=False,
        quiet_points=64,
    ),
    Detector(
        kind="data_stall",
        group=Group.DATA,
        requires=("data_seconds",),
        check=stragglers.data_stall,
        warms=False,
        well=stragglers.batches_come,
    ),
    Detector(
        kind="straggler",
        group=Group.RANK,
        requires=("wait_seconds",),
        check=stragglers.straggler,
        warms=False,
        well=stragglers.keeps_pace,
    ),
    Detector(
        kind="posterior_collapse",
        group=Group.LEARNING,
        requires=("active_units", "latent_dims", "kl_per_dim"),
        check=latent.posterior_collapse,
        warms=False,
        quiet_points=LOOK_POINTS,
    ),
    Detector(
        kind="oom",
        group=Group.SYSTEM,
        requires=(),
        check=memory.oom,
        warms=False,
        on=(On.REPORT,),
        well=memory.fits_again,
    ),
    Detector(
        kind="shape_mismatch",
        group=Group.SYSTEM,
        requires=(),
        check=reports.shape_mismatch,
        warms=False,
        on=(On.REPORT,),
    ),
    Detector(kind="exception", group=Group.SYSTEM, requires=(), check=reports.exception, warms=False, on=(On.REPORT,)),
    Detector(
        kind="silent_corruption",
        group=Group.RANK,
        requires=("digest",),
        check=corruption.silent_corruption,
        warms=False,
        well=reports.together,
    ),
    Detector(
        kind="rank_desync",
        group=Group.RANK,
        requires=("digest",),
        check=reports.rank_desync,
        warms=False,
        on=(On.STEP, On.REPORT),
        well=reports.together,
    ),
    Detector(
        kind="hang",
        group=Group.RANK,
        requires=(),
        check=standstill.hang,
        warms=False,
        on=(On.REPORT,),
        quiet_points=MOVES_POINTS,
    ),
    Detector(
        kind="rank_lost",
        group=Group.RANK,
        requires=(),
        check=lost_ranks.rank_lost,
        warms=False,
        on=(On.REPORT,),
        well=lost_ranks.all_there,
        quiet_points=MOVES_POINTS,
    ),
    Detector(
        kind="memory_leak",
        group=Group.SYSTEM,
        requires=(),
        check=growing_memory.memory_leak,
        warms=False,
        on=(On.REPORT,),
        well=growing_memory.no_leak,
    ),
)
BY_KIND = {detector.kind: detector for detector in ALL}

"""Stories by hand: of any size, and as hostile as wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sosa_stream.decide.commands import CommandRecord, CommandState, Verdict
from sosa_stream.detect.incidents import Group, Incident, IncidentState, Severity
from sosa_stream.protocol.actions import Action
from sosa_stream.report.story import Curve, Features, Grid, Raised, Story


def curve(values: NDArray[np.float64], num_steps: int) -> Curve:
    finite = np.isfinite(values)
    known = np.where(finite, values, np.nan)
    steps = np.linspace(0, num_steps - 1, len(values)).astype(np.int64)
    return Curve(steps=steps, low=0.9 * known, mean=known, high=1.1 * known, num_nonfinite=(~finite).astype(np.int64))


def grid(values: NDArray[np.float64], names: tuple[str, ...], num_steps: int, what: str = "gradient norm") -> Grid:
    return Grid(
        what=what, names=names, steps=np.linspace(0, num_steps - 1, values.shape[1]).astype(np.int64), values=values
    )


def incident(name: str = "", **changes: object) -> Incident:
    whole = Incident(
        id="i1",
        run="run",
        kind="exploding_gradient" + name,
        group=Group.NUMERICAL,
        severity=Severity.CRITICAL,
        state=IncidentState.OPEN,
        first_step=60,
        detected_step=62,
        ranks=(1,),
        hosts=("node-1" + name,),
        evidence={"layer": "blocks.3.mlp" + name, "value": float("inf"), "window": [1.0, None, name]},
        message="The gradient norm left its band" + name,
        causes=("a learning rate that is too high" + name,),
        worsens="a higher rate" + name,
        clears="a norm within its band" + name,
        symptoms=("loss_divergence" + name,),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def story(*, num_layers: int = 12, num_steps: int = 100, num_bins: int = 100, name: str = "") -> Story:
    """A run that explodes at 60 % of its steps; ``name`` is put into everything that others name."""
    draw = np.random.default_rng(0)
    looks = min(num_steps, 512)
    late = np.arange(looks) >= 0.6 * looks
    norms = 10 ** draw.normal(-2, 0.3, (num_layers, looks))
    norms[:, late] *= 1e4
    norms[num_layers // 3, -3:] = np.inf
    norms[0, :5], norms[-1, :] = np.nan, 0.0
    loss = 2 + np.exp(-np.linspace(0, 5, num_bins))
    loss[int(0.6 * num_bins) :] *= 1e6
    loss[-5:] = np.nan
    means = draw.normal(0, 0.05, (8, looks))
    means[5, late] += 9.0
    features = tuple(f"{place}{name}" for place in range(8))
    command = CommandRecord(
        id="c1",
        run="run",
        generation="g",
        incident="i1",
        actions=(Action(action="clip_grad", params={"max_norm": 1.0}),),
        confidence=0.7,
        state=CommandState.VERIFIED,
        reason="exploding_gradient" + name,
        why="It helped before" + name,
        applied_step=int(0.62 * num_steps),
        verdict=Verdict.HELPED,
        detail="Clipped from here on" + name,
    )
    return Story(
        name="run" + name,
        source=Path("recordings") / f"run{name.replace('/', '')}",
        kind="recording",
        began_at=1.7e9,
        ended_at=1.7e9 + 600,
        num_ranks=4,
        hosts=("node-0" + name, "node-1"),
        versions={"torch" + name: "2.9" + name},
        num_steps=num_steps,
        first_step=0,
        last_step=num_steps - 1,
        curves={
            "loss": curve(loss, num_steps),
            "grad_norm": curve(loss / 10, num_steps),
            "lr": curve(np.full(num_bins, 3e-4), num_steps),
        },
        by_rank={rank: curve(loss * (1 + 0.1 * (rank == 1)), num_steps) for rank in range(4)},
        layers=grid(
            norms, tuple(f"model.blocks.{place // 4}.{place % 4}{name}" for place in range(num_layers)), num_steps
        ),
        features=Features(
            name="x" + name,
            means=grid(means, features, num_steps, "mean"),
            stds=grid(np.ones_like(means), features, num_steps, "standard deviation"),
            changes=({"step": 60, "rank": 1, "feature": "5" + name, "z": 9.0, "before": 0.0, "after": 9.0},),
        ),
        incidents=(
            incident(name, first_step=int(0.6 * num_steps), detected_step=int(0.62 * num_steps)),
            incident(name, id="i2", severity=Severity.WARNING, first_step=-1, detected_step=3, ranks=()),
        ),
        commands=(command, replace(command, id="c2", applied_step=None, verdict=None, state=CommandState.REJECTED)),
        raised=(
            Raised(
                rank=1,
                host="node-1" + name,
                step=99,
                type="RuntimeError" + name,
                message="shapes\n" + name,
                stack=("train.py:3" + name,),
                explanation="The layer wants 8 features" + name,
            ),
        ),
        states={"exploding_gradient": "open", "posterior_collapse" + name: "blind"},
        missing=("Norms of weights were not recorded" + name,),
    )

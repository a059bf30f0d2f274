"""Each incident carries its evidence: value, baseline, window, and a score where it is judged by one."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import ArrayLike

from sosa_stream.daemon.schema import json_line
from sosa_stream.detect.detectors import ALL, On
from sosa_stream.detect.incidents import Incident
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.settings import DetectSettings, MetricRule
from sosa_stream.testing import bye, feed, header, hello

NUM = 640
T = np.arange(NUM)
NOISE = np.random.default_rng(0).standard_normal(NUM)
LOSS = 2 + np.exp(-T / 100) + 0.05 * NOISE
SICK = T >= 400
SCORED = frozenset(
    {
        *("lr_jump", "loss_spike", "loss_divergence", "loss_oscillation", "overfitting", "exploding_gradient"),
        *("input_anomaly", "nan_loss", "nonfinite_gradient"),
    }
)
"""Kinds that have a score, if only None; the others are judged by a share or by counting, as the design page lists."""


def looks(healthy: float, sick: float, every: int = 32) -> ArrayLike:
    return np.where(T % every == 0, np.where(SICK, sick, healthy), np.nan)


COLUMNS: Mapping[str, Mapping[str, ArrayLike]] = {
    "nan_loss": {"loss": np.where(T == 400, np.nan, LOSS)},
    "nonfinite_gradient": {"grad_norm": np.where((T >= 400) & (T < 403), np.inf, 1.0)},
    "lr_jump": {"lr": np.where(SICK, 1.0, 1e-3), "loss": LOSS + 5 * (T >= 401)},
    "loss_spike": {"loss": LOSS + 5 * ((T >= 400) & (T < 403))},
    "loss_divergence": {"loss": LOSS + 5 * SICK},
    "loss_oscillation": {"loss": LOSS + SICK * np.sin(2 * np.pi * T / 8)},
    "loss_plateau": {"loss": 2 + 0.005 * NOISE},
    "overfitting": {"eval_loss": np.where(T % 20 == 0, 2 + np.abs(T - 300) / 200, np.nan)},
    "exploding_gradient": {"grad_norm": np.where(SICK, 1e4, np.exp(0.1 * NOISE))},
    "vanishing_gradient": {"layer_ratio": looks(0.1, 1e-6, 8), "first_norm": looks(0.1, 1e-6, 8)},
    "dead_units": {"zero_grad_share": looks(0.1, 0.9), "dead_share": looks(0.1, 0.9)},
    "saturated_activations": {"saturated_share": looks(0.1, 0.95)},
    "loss_scale_collapse": {"loss_scale": 2.0 ** np.maximum(16 - np.maximum(T - 400, 0), -8)},
    "weights_unchanged": {"changed_share": looks(1.0, 0.0)},
    "missing_zero_grad": {"kept_gradients": looks(0.0, 1.0)},
    "input_anomaly": {
        "fingerprint": T,
        "input_score": np.where(T == 400, 40.0, 1.0),
        "input_change": np.where(T == 400, 4.0, 0.1),
    },
    "posterior_collapse": {"active_units": looks(8, 0), "latent_dims": looks(8, 8), "kl_per_dim": looks(1, 0.001)},
    "my_rule": {"log/reward": np.where(SICK, 0.0, 9.0)},
}


def incident_of(kind: str) -> Incident:
    columns = {"loss": LOSS, "grad_norm": np.exp(0.1 * NOISE), "lr": 1e-3, "skipped": 0.0} | COLUMNS[kind]
    rows = np.column_stack([np.broadcast_to(np.asarray(column, dtype=np.float64), NUM) for column in columns.values()])
    engine = Engine("run", DetectSettings(rules=(MetricRule(name="my_rule", metric="reward", below=1.0),)))
    names = tuple(columns)
    step_names = [i for i, name in enumerate(names) if name != "eval_loss" and not name.startswith("log/")]
    feed(engine, [hello()])
    for i in range(NUM):
        logged = [j for j in range(len(names)) if j not in step_names and np.isfinite(rows[i, j])]
        for those in (step_names, logged):
            if those:
                sent = tuple(names[j] for j in those)
                frame = MetricFrame(header=header(), columns=sent, steps=T[i : i + 1], values=rows[i : i + 1, those])
                feed(engine, [frame])
    feed(engine, [bye()])
    return next(incident for incident in engine.view().incidents if incident.kind == kind)


@pytest.mark.parametrize("kind", COLUMNS)
def test_an_incident_carries_value_baseline_and_window_and_a_score_where_it_is_judged_by_one(kind: str) -> None:
    evidence = incident_of(kind).evidence
    assert {"value", "baseline", "window"} <= set(evidence)
    assert evidence["window"] >= 1
    assert ("score" in evidence) == (kind in SCORED), evidence
    if kind in ("nan_loss", "nonfinite_gradient"):
        assert evidence["value"] is None
        assert evidence["baseline"] == pytest.approx(2.0 if kind == "nan_loss" else 1.0, abs=0.2)
    told = json.loads(json_line(evidence))
    assert not any(value in ("NaN", "Infinity") for value in told.values() if isinstance(value, str))


def test_every_kind_that_judges_numbers_is_among_them() -> None:
    judges_numbers = {detector.kind for detector in ALL if On.REPORT not in detector.on}
    takes_two_ranks = {"duplicate_data", "data_stall", "straggler", "silent_corruption"}  # tests of their own
    assert judges_numbers == (set(COLUMNS) - {"my_rule"}) | takes_two_ranks

"""Replicas that are given the same batches, and ranks that may share them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sosa_stream.detect.incidents import Incident
from sosa_stream.engine import Engine
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.testing import NOW, header, hello

COLUMNS = ("tick", "loss", "grad_norm", "fingerprint")


def _incidents(
    batch: Callable[[int, int], float], norm: Callable[[int, int], float], num_ranks: int = 4
) -> list[Incident]:
    engine = Engine("r")
    for rank in range(num_ranks):
        engine.handle(hello(rank=rank, world_size=num_ranks), NOW)
    random = np.random.default_rng(0)
    for step in range(300):
        loss = 2.0 + 0.1 * random.standard_normal()
        for rank in range(num_ranks):
            values = np.array([[step, loss, norm(step, rank), batch(step, rank)]], dtype=np.float64)
            head = header(seq=step + 2, rank=rank, world_size=num_ranks)
            frame = MetricFrame(header=head, columns=COLUMNS, steps=np.array([step]), values=values)
            engine.handle(frame, NOW + 0.01 * step)
    return [one for one in engine.view().incidents if one.kind == "duplicate_data"]


def _replicas(step: int, rank: int) -> float:
    return 1.0 + 0.1 * np.sin(step)


def test_replicas_with_the_same_batches_after_200_clean_steps_are_named() -> None:
    shared = {1, 3}
    (found,) = _incidents(lambda s, r: s * 10 + (1 if s >= 200 and r in shared else r), _replicas)
    assert set(found.ranks) == shared
    assert {"value", "baseline", "window"} <= set(found.evidence)
    assert "score" not in found.evidence
    assert 200 + 47 <= found.detected_step <= 200 + 64


def test_replicas_with_batches_of_their_own_are_silent() -> None:
    assert not _incidents(lambda s, r: s * 10 + r, _replicas)


def test_ranks_that_hold_different_parameters_may_share_a_batch() -> None:
    assert not _incidents(lambda s, r: s * 10, lambda s, r: 1.0 + r + 0.1 * np.sin(s))


def test_one_batch_for_ever_and_a_tiny_data_set_are_silent() -> None:
    assert not _incidents(lambda s, r: 7, _replicas)
    assert not _incidents(lambda s, r: s % 8, _replicas)

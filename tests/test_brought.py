"""Whose own gradient it was, before the reduction made it everybody's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from sosa_stream.detect.brought import Brought
from sosa_stream.detect.incidents import Incident
from sosa_stream.engine import Engine
from sosa_stream.testing import feed, frame, hello


def looked(*norms: tuple[float, ...], nonfinite: tuple[float, ...] | None = None) -> Brought:
    brought = Brought(len(norms[0]))
    for row in norms:
        brought.take(np.array(row), np.array(nonfinite or (0.0,) * len(row)))
    return brought


@pytest.mark.parametrize("others", [(1.0,), (1.0, 2.0), (1.0, 2.0, 0.5, 1.5)])
def test_a_norm_far_above_the_others_names_its_rank_among_two_and_among_many(others: tuple[float, ...]) -> None:
    assert looked((*others, 1000.0)).ranks == (len(others),)
    assert looked((*others, 8.0)).ranks == ()


def test_a_rank_whose_norm_is_always_larger_is_not_named_for_it() -> None:
    always = ((1.0, 1.0, 15.0),) * 8
    assert looked(*always, (1.0, 1.0, 100.0)).ranks == ()
    assert looked(*always, (1.0, 1.0, 10_000.0)).ranks == (2,)


def test_what_all_ranks_bring_is_brought_by_nobody() -> None:
    assert looked((math.nan, 1.0), nonfinite=(3.0, 0.0)).ranks == (0,)
    assert looked((math.nan, math.nan), nonfinite=(3.0, 5.0)).ranks == ()


def ruined(skipped: float, known: bool = True) -> Incident:
    """Rank 1's gradient of step 100 is NaN, and so is each loss from step 101 on, unless its update is ``skipped``."""
    engine = Engine("run")
    feed(engine, [hello(rank, 2) for rank in range(2)])
    for step in range(110):
        lost = step > 100 and not skipped
        norm = math.nan if step == 100 or lost else 1.0
        for rank in range(2):
            event = frame(
                math.nan if lost else 2.0,
                rank=rank,
                world_size=2,
                first_step=step,
                grad_norm=norm,
                skipped=skipped * (step == 100),
            )
            if known and step == 100:
                columns = (*event.columns, "local_nonfinite")
                event = replace(event, columns=columns, values=np.append(event.values, [[float(rank)]], axis=1))
            feed(engine, [event])
    (incident,) = engine.view().incidents
    return incident


def test_losses_that_are_nan_since_an_update_are_blamed_on_who_brought_its_gradient_and_not_on_their_batches() -> None:
    incident = ruined(skipped=0.0)
    assert (incident.kind, incident.ranks, incident.evidence["brought_by"]) == ("nan_loss", (1,), [1])
    assert "by a gradient that rank 1 brought" in incident.message
    assert not any("batch" in cause for cause in incident.causes)
    assert any("the gradient of step 100 was not finite" in cause for cause in incident.causes)


def test_where_nobody_knows_who_brought_it_the_batches_are_not_blamed_either() -> None:
    incident = ruined(skipped=0.0, known=False)
    assert incident.kind == "nan_loss"
    assert not any("batch" in cause for cause in incident.causes)


def test_a_gradient_that_reaches_no_weight_names_who_brought_it() -> None:
    incident = ruined(skipped=1.0)
    assert (incident.kind, incident.ranks) == ("nonfinite_gradient", (1,))

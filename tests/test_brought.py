"""Whose own gradient it was, before the reduction made it everybody's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sosa_stream.detect.brought import Brought


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

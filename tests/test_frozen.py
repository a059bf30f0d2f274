"""Frozen parameters are compared between ranks: what changes on one is told, what ranks hold on purpose is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.watch.digests import FIRST_STEPS, Digests
from sosa_stream.detect.frozen import Frozen
from sosa_stream.protocol.columns import DIGEST_CHUNKS, DIGEST_PARTS, FROZEN_CHUNKS


def after(*rows: tuple[float, ...], place: int = 3) -> Frozen:
    frozen = Frozen()
    for step, row in enumerate(rows):
        frozen.take(step, np.array(row), np.full(len(row), float(place)))
    return frozen


@pytest.mark.parametrize(
    ("rows", "odd"),
    [
        (((1.0, 1.0), (1.0, 9.0), (1.0, 9.0)), (1,)),  # who still holds what both had is right
        (((1.0, 1.0, 1.0), (9.0, 1.0, 1.0), (9.0, 1.0, 1.0)), (0,)),
        (((1.0, 1.0), (2.0, 2.0), (3.0, 4.0)), (0, 1)),  # it moved on all: nobody can say which is right
    ],
)
def test_the_rank_is_named_whose_frozen_parameters_have_changed(
    rows: tuple[tuple[float, ...], ...], odd: tuple[int, ...]
) -> None:
    frozen = after(*rows)
    assert frozen.news
    assert frozen.parted[3].odd == odd
    assert frozen.parted[3].has_majority is (len(odd) == 1)
    assert frozen.chunks == 1 << 3


@pytest.mark.parametrize(
    "rows",
    [
        ((1.0, 2.0), (1.0, 3.0), (1.0, 3.0)),  # never equal
        ((1.0, 1.0), (1.0, 1.0), (1.0, 2.0), (1.0, 3.0), (1.0, 3.0), (1.0, 3.0)),  # an average that one rank keeps
        ((1.0, 1.0), (1.0, 2.0), (1.0, 1.0)),
    ],
)
def test_what_ranks_hold_or_move_on_their_own_is_not_told(rows: tuple[tuple[float, ...], ...]) -> None:
    frozen = after(*rows)
    assert not frozen.parted
    assert not frozen.news


def test_it_is_over_once_the_same_part_is_equal_again_and_not_by_another_part() -> None:
    frozen = after((1.0, 1.0), (1.0, 9.0), (1.0, 9.0))
    frozen.take(3, np.array([5.0, 5.0]), np.full(2, 3.0 + DIGEST_PARTS))
    assert frozen.parted
    frozen.take(4, np.array([1.0, 1.0]), np.full(2, 3.0))
    assert not frozen.parted
    assert after((1.0, 1.0), (1.0, 9.0), (1.0, 9.0)).parted


def test_ranks_that_look_at_different_places_are_not_compared() -> None:
    frozen = Frozen()
    for step in range(4):
        frozen.take(step, np.array([1.0, 1.0 if step < 2 else 2.0]), np.array([0.0, 1.0]))
    assert not frozen.parted


def with_backbone(num_layers: int = 3, width: int = 16) -> tuple[nn.Sequential, SGD, TrainingState]:
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)), nn.Linear(width, 1))
    for layer in model[:-1]:
        layer.requires_grad_(False)
    optimizer, state = SGD(model[-1].parameters(), lr=0.1), TrainingState()
    state.meet(optimizer)
    return model, optimizer, state


def places(state: TrainingState, steps: range, every: int = 1) -> list[tuple[float, float]]:
    digests = Digests(lambda: state.optimizers, every, frozen=lambda: state.frozen_chunks)
    looks = [digests.take(step) for step in steps]
    return [(float(each["frozen_place"]), float(each["frozen_digest"])) for each in looks if "frozen_place" in each]


def test_a_bit_of_a_parameter_that_no_optimizer_has_changes_its_digest() -> None:
    model, _, state = with_backbone()
    before = places(state, range(2))
    model[1].weight.view(-1).view(torch.int32)[7] ^= 1
    assert before[0] == before[1]
    assert places(state, range(2)) != before


def test_of_the_model_all_is_looked_at_that_nobody_trains_and_each_place_twice_in_a_row() -> None:
    model, _, state = with_backbone(num_layers=40, width=512)
    held = {id(p) for chunk in state.frozen_chunks for p in chunk}
    assert held == {id(p) for layer in model[:-1] for p in layer.parameters()}
    assert len(state.frozen_chunks) <= FROZEN_CHUNKS
    seen = [place for place, _ in places(state, range(FIRST_STEPS, FIRST_STEPS + 4 * FROZEN_CHUNKS))]
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == len(state.frozen_chunks)


def test_looks_at_frozen_parameters_change_no_look_at_those_that_are_trained() -> None:
    _, optimizer, state = with_backbone()
    alone = Digests(lambda: [optimizer], 8)
    both = Digests(lambda: [optimizer], 8, frozen=lambda: state.frozen_chunks)
    for step in range(64):
        found = both.take(step)
        assert alone.take(step).keys() == found.keys() - {"frozen_digest", "frozen_place"}
        assert ("frozen_digest" in found) is (step < FIRST_STEPS or step % 8 == 4)


def test_parameters_with_a_gradient_of_their_own_and_shapeless_ones_are_left_out() -> None:
    model, _, state = with_backbone()
    model[0].weight.requires_grad_(True).grad = torch.zeros_like(model[0].weight)
    model.append(nn.Linear(4, 4, device="meta"))
    model.append(nn.LazyLinear(4))
    held = [id(p) for chunk in state.frozen_chunks for p in chunk]
    assert held == [id(p) for p in (model[0].bias, *model[1].parameters(), *model[2].parameters())]


def test_what_cannot_be_hashed_blinds_nothing_else() -> None:
    model, _, state = with_backbone()
    model[0].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint32), requires_grad=False)
    digests = Digests(lambda: state.optimizers, 1, frozen=lambda: state.frozen_chunks)
    assert all("frozen_digest" not in (found := digests.take(step)) and "digest" in found for step in (0, 2, 5))


def test_eight_bit_floats_are_hashed() -> None:
    model, _, state = with_backbone()
    model[0].weight = nn.Parameter(torch.zeros(16, 16).to(torch.float8_e4m3fn), requires_grad=False)
    assert places(state, range(2))


def test_frozen_parameters_that_are_replaced_are_looked_for_anew() -> None:
    model, _, state = with_backbone()
    digests = Digests(lambda: state.optimizers, 1, frozen=lambda: state.frozen_chunks)
    assert "frozen_digest" in digests.take(0)
    model[0].weight = nn.Parameter(torch.ones(16, 16), requires_grad=False)
    assert "frozen_digest" not in digests.take(4)
    found = digests.take(5)
    assert "frozen_digest" in found
    assert found["digest_chunk"] < DIGEST_CHUNKS  # the others' looks go on as they were

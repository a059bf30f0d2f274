"""What a rank knows of itself alone: how long it waited for the others, and its gradients before they are reduced."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from typing import Any

import pytest
import torch
from agent_parts import Watch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from two_ranks import TwoRanks

from sosa_stream.agent.watch.local_gradients import OFFSET

SLEEP_SECONDS = 0.03
NAN_STEP = OFFSET - 8
"""At which nothing is looked at."""
WAYS = ("plain", "views", "parts", "no_sync", "static", "unused", "checkpoints", "reentrant", "scaled")


class Network(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 1)
        if way == "unused":
            self.unused = nn.Linear(2, 2)
        self.way = way

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.way in ("checkpoints", "reentrant"):
            hidden = checkpoint(self.first, inputs.requires_grad_(), use_reentrant=self.way == "reentrant")
        else:
            hidden = self.first(inputs)
        loss: torch.Tensor = self.last(hidden.relu()).pow(2).mean()
        return loss


def trains(rank: int, way: str, brings: float) -> tuple[list[dict[str, float]], float]:
    """The rows of the steps from the sampled one on, and the norm that this rank's gradient had by itself there."""
    torch.manual_seed(0)
    network = Network(way)
    options = {"views": "gradient_as_bucket_view", "static": "static_graph", "unused": "find_unused_parameters"}
    model = DistributedDataParallel(network, **({options[way]: True} if way in options else {}))
    optimizer = SGD(network.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=way == "scaled", init_scale=1024.0)
    num_parts = 2 if way in ("parts", "no_sync") else 1
    expected = 0.0
    with Watch(guard=False, alone=False).installed() as watch:
        for step in range(OFFSET + 6):
            for part in range(num_parts):
                inputs = torch.randn(4, 8) + rank
                if step == OFFSET:
                    used = [p for name, p in network.named_parameters() if "unused" not in name]
                    plain = Network("plain")
                    plain.load_state_dict(network.state_dict(), strict=False)
                    own = torch.autograd.grad(plain(inputs), list(plain.parameters()))
                    assert len(own) == len(used)
                    expected = max(expected, float(torch.stack([g.norm() for g in own]).norm()))
                    inputs[0, 0] = inputs[0, 0] if rank == 0 else brings
                keeps = model.no_sync() if way == "no_sync" and part == 0 else contextlib.nullcontext()
                with keeps:
                    loss = model(inputs)
                    if rank == 1 and step >= OFFSET:
                        time.sleep(SLEEP_SECONDS)
                    scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert not watch.errors, watch.errors
    return watch.rows[OFFSET:], expected


@pytest.mark.parametrize("way", WAYS)
def test_a_ranks_gradient_is_seen_before_it_is_reduced_and_the_other_rank_is_seen_to_wait(
    two_ranks: TwoRanks, way: str
) -> None:
    (fast, own), (slow, others) = two_ranks.run(trains, way, 1.0)
    assert fast[0]["local_norm"] == pytest.approx(own, rel=1e-4)
    assert fast[0]["local_nonfinite"] == slow[0]["local_nonfinite"] == 0.0
    assert own != pytest.approx(others, rel=1e-2)
    assert all(math.isnan(row.get("local_norm", math.nan)) for row in fast[1:])
    waits = [statistics.median(row["wait_seconds"] for row in rows) for rows in (fast, slow)]
    assert waits[0] - waits[1] > 0.5 * SLEEP_SECONDS
    for row in fast + slow:
        parts = [row[f"{name}_seconds"] for name in ("data", "forward", "backward", "wait", "optimizer")]
        assert sum(parts) == pytest.approx(row["step_seconds"], rel=0.3)


def test_the_rank_that_brings_what_is_not_finite_is_known(two_ranks: TwoRanks) -> None:
    (well, _), (sick, _) = two_ranks.run(trains, "plain", math.inf)
    assert well[0]["local_nonfinite"] == 0.0
    assert math.isfinite(well[0]["local_norm"])
    assert sick[0]["local_nonfinite"] > 0.0
    assert not math.isfinite(well[0]["grad_norm"]), "after the reduction both have it"


def poisoned(gradient: torch.Tensor) -> torch.Tensor:
    return torch.full_like(gradient, math.nan)


def brings_nan_once(rank: int) -> tuple[list[dict[str, float]], bool]:
    """The rows up to a step that is not looked at, in which rank 1's gradient is NaN; whether hooks are left behind."""
    network = Network("plain")
    model = DistributedDataParallel(network)
    optimizer = SGD(network.parameters(), lr=0.01)
    with Watch(guard=False, alone=False).installed() as watch:
        for step in range(NAN_STEP + 1):
            if step == NAN_STEP and rank == 1:
                network.last.register_forward_pre_hook(lambda _, inputs: inputs[0].register_hook(poisoned) and None)
            loss = model(torch.randn(4, 8))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not watch.errors, watch.errors
    return watch.rows, any(parameter._backward_hooks for parameter in network.parameters())


def test_a_nan_of_one_rank_in_any_single_step_is_known_by_the_first_layer_and_other_steps_say_nothing(
    two_ranks: TwoRanks,
) -> None:
    (well, left), (sick, _) = two_ranks.run(brings_nan_once)
    assert (well[-1]["local_nonfinite"], sick[-1]["local_nonfinite"]) == (0.0, 1.0)
    assert math.isfinite(sick[-1]["loss"])
    assert not any("local_nonfinite" in row for row in well[:-1] + sick[:-1])
    assert not left


def by_hand(rank: int) -> list[dict[str, Any]]:
    network = Network("plain")
    optimizer = SGD(network.parameters(), lr=0.01)
    with Watch(guard=False, alone=False).installed() as watch:
        for _ in range(6):
            loss = network(torch.randn(4, 8))
            if rank == 1:
                time.sleep(SLEEP_SECONDS)
            loss.backward()
            for parameter in network.parameters():
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
    assert not watch.errors, watch.errors
    return watch.rows[1:]


def test_waiting_in_the_scripts_own_collectives_is_seen(two_ranks: TwoRanks) -> None:
    fast, slow = (statistics.median(row["wait_seconds"] for row in rows) for rows in two_ranks.run(by_hand))
    assert fast - slow > 0.5 * SLEEP_SECONDS


def without_others(rank: int) -> bool:
    network = Network("plain")
    optimizer = SGD(network.parameters(), lr=0.01)
    with Watch(guard=False, alone=False).installed() as watch:
        for _ in range(3):
            network(torch.randn(4, 8)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return all("wait_seconds" not in row and row["step_seconds"] > 0.0 for row in watch.rows[1:])


def test_a_rank_that_waits_for_nobody_says_nothing_of_waiting(two_ranks: TwoRanks) -> None:
    assert two_ranks.run(without_others) == [True, True]

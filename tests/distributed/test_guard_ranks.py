"""A NaN on one rank: both leave the same step out, and end with the same weights."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from agent_parts import Watch, batches, bits, loss_of, poison, toy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.swa_utils import AveragedModel
from two_ranks import TwoRanks

from sosa_stream.agent.step.attribution import Attribution
from sosa_stream.settings import GuardMode

NUM_STEPS, BAD_STEP = 6, 3
OPTIMIZERS: dict[str, Any] = {
    "foreach": lambda p: AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
}


def digest(tensors: Any) -> str:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return hashlib.blake2b(b"".join(t.detach().contiguous().numpy().tobytes() for t in local)).hexdigest()


def skipped(watch: Watch) -> list[float]:
    assert not watch.errors, watch.errors
    return [row["skipped"] for row in watch.rows]


def ddp(rank: int, flavour: str, closure: bool, broadcast: bool) -> dict[str, Any]:
    network = toy()
    model = DistributedDataParallel(network, broadcast_buffers=broadcast)
    average = AveragedModel(network, use_buffers=True)
    optimizer = OPTIMIZERS[flavour](model.parameters())
    with Watch(guard=True, alone=False).installed() as watch:
        for step, batch in enumerate(batches(NUM_STEPS, seed=1 + rank)):
            if rank == 1 and step == BAD_STEP:
                batch[0][0, 0] = math.nan

            def forward_backward(batch: Any = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            before = bits(network)
            if closure:
                optimizer.step(forward_backward)
            else:
                forward_backward()
                optimizer.step()
            average.update_parameters(network)
            same = (bits(network, buffers=False) == before[: len(list(network.parameters()))], bits(network) == before)
            assert same == (step == BAD_STEP, step == BAD_STEP) or broadcast
    finite = all(t.isfinite().all() for m in (network, average) for t in m.state_dict().values())
    return {"skipped": skipped(watch), "weights": digest(network.parameters()), "finite": bool(finite)}


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("flavour", OPTIMIZERS)
def test_under_ddp_both_ranks_skip_the_step_of_one_ranks_nan(
    two_ranks: TwoRanks, flavour: str, closure: bool, broadcast: bool
) -> None:
    first, second = two_ranks.run(ddp, flavour, closure, broadcast)
    assert first["skipped"] == second["skipped"] == [float(step == BAD_STEP) for step in range(NUM_STEPS)]
    assert first["weights"] == second["weights"]
    assert first["finite"]
    assert second["finite"]


def sharded(rank: int, mode: str, poisoned: bool) -> dict[str, Any]:
    """FSDP2 in a loop that computes no norm; the NaN is in one rank's shard of the gradients alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    fully_shard(model)
    optimizer = AdamW(model.parameters(), lr=0.01)
    with Watch(guard=GuardMode(mode), alone=False).installed() as watch:
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            if poisoned and rank == 1 and step == BAD_STEP:
                next(model.parameters()).grad.to_local()[0] = math.nan  # type: ignore[union-attr]
            optimizer.step()
    local = [p.to_local() for p in model.parameters()]  # type: ignore[attr-defined]
    return {
        "skipped": skipped(watch),
        "finite": all(bool(t.isfinite().all()) for t in local),
        "said": [text for text in watch.said if "allreduce" in text],
    }


def test_sharded_gradients_that_nobody_reduces_are_guarded_where_the_ranks_may_ask_each_other(
    two_ranks: TwoRanks,
) -> None:
    answers = two_ranks.run(sharded, "allreduce", True)
    assert [a["skipped"] for a in answers] == [[float(step == BAD_STEP) for step in range(NUM_STEPS)]] * 2
    assert all(a["finite"] for a in answers)
    assert [a["skipped"] for a in two_ranks.run(sharded, "allreduce", False)] == [[0.0] * NUM_STEPS] * 2


def test_and_where_they_may_not_they_are_let_through_and_the_user_is_told_how_to_change_that(
    two_ranks: TwoRanks,
) -> None:
    answers = two_ranks.run(sharded, "sync", True)
    assert [a["skipped"] for a in answers] == [[0.0] * NUM_STEPS] * 2
    assert not any(a["finite"] for a in answers)
    assert all(len(a["said"]) == 1 for a in answers)


def gradients_on_one_rank(rank: int) -> list[float]:
    """Unknown parallelism: each rank has a layer of its own, and one of them sees no gradient at all in some steps."""
    model = nn.Linear(4, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    with Watch(guard=GuardMode.ALLREDUCE, alone=False).installed() as watch:
        for step in range(4):
            optimizer.zero_grad()
            if rank == 0 or step % 2:
                model(torch.ones(2, 4)).sum().backward()
            if rank == 0 and step == 2:
                poison(model)
            optimizer.step()
    return skipped(watch)


def test_a_rank_without_gradients_is_asked_like_the_others(two_ranks: TwoRanks) -> None:
    assert two_ranks.run(gradients_on_one_rank) == [[0.0, 0.0, 1.0, 0.0]] * 2


def repeated(rank: int, fault: str) -> list[dict[str, float]]:
    """A loss over the batches of all ranks: its forward pass has a collective, which a rank could not run alone."""
    network = toy()
    model = DistributedDataParallel(network)
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = Watch(guard=True, alone=False)
    attribution = watch.probe._attribution = Attribution(alone=False, tell=watch.said.append)
    calls: list[nn.Module] = []
    with watch.installed():
        for step, (x, y) in enumerate(batches(NUM_STEPS, seed=1 + rank)):
            bad = rank == 1 and step == BAD_STEP
            if bad and fault == "batch":
                x[0, 0] = math.nan

            def compute(model: nn.Module, x: Any = x, y: Any = y, bad: bool = bad) -> torch.Tensor:
                calls.append(model)
                output = model(x)
                dist.all_reduce(seen := output.detach().mean())
                loss = nn.functional.mse_loss(output, y) + 0.0 * seen.isfinite()
                raced = bad and fault == "race" and model is not network
                return loss * math.nan if raced else loss

            attribution.hand_over(model, (x, y), compute)
            optimizer.zero_grad()
            compute(model).backward()
            optimizer.step()
    assert calls.count(network) == 1
    assert skipped(watch) == [float(step == BAD_STEP) for step in range(NUM_STEPS)]
    names = ("weights_nonfinite", "batch_nonfinite", "repeat_differs")
    row = watch.rows[BAD_STEP]
    return [{name: row[name] for name in names if name in row}, {"digest": digest(network.parameters())}]


@pytest.mark.parametrize("fault", ["batch", "race"])
def test_all_ranks_repeat_the_step_together_and_the_guilty_one_finds_out(two_ranks: TwoRanks, fault: str) -> None:
    (innocent, first), (guilty, second) = two_ranks.run(repeated, fault)
    assert first == second
    assert innocent == {"weights_nonfinite": 0.0, "batch_nonfinite": 0.0}
    assert guilty == {
        "weights_nonfinite": 0.0,
        "batch_nonfinite": float(fault == "batch"),
        "repeat_differs": float(fault == "race"),
    }

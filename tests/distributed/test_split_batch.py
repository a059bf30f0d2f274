"""`split_batch` on one rank of two under DDP: its peer meets an ordinary step's collectives, and weights stay equal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from two_ranks import TwoRanks

sys.path.insert(0, str(Path(__file__).parent.parent))
from split_parts import NUM_SAMPLES, Net, batch_at, flat, mse, too_large_for_backward, too_large_for_the_loss

from sosa_stream.agent.core import Agent
from sosa_stream.agent.splitting.micro_batches import MicroBatches
from sosa_stream.config import load_settings

NUM_STEPS = 6


class Collectives:
    """Counts reductions of gradients."""

    def __init__(self) -> None:
        self.num = 0

    def watch(self, ddp: DistributedDataParallel) -> None:
        ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))  # type: ignore[arg-type]

    def _reduce(self, bucket: dist.GradBucket) -> Any:
        self.num += 1
        return allreduce_hook(dist.group.WORLD, bucket)


class Buffered(Net):
    """With a buffer, which DDP broadcasts as each pass begins."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity=capacity)
        self.register_buffer("offset", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.offset


class Sometimes(Net):
    """Uses a layer only for batches whose first sample says so: other parts of a batch, other parameters."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(nn.Linear(16, 16), capacity=capacity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if self.training and torch.is_grad_enabled():
            self.sizes.append(len(x))
            if self.capacity is not None and len(x) > self.capacity:
                raise torch.OutOfMemoryError("out of memory (test)")
        which = (x[:, :1] > 0).float()
        if which.any():
            hidden = hidden + which * self.extra(hidden)
        out: torch.Tensor = self.last(hidden)
        return out


class Steps:
    """`training_step` without a daemon: an agent that is never started, for it has settings and actuators."""

    def __init__(self, rank: int, model: nn.Module, auto: bool = True, **options: Any) -> None:
        self.said: list[str] = []
        self.collectives = Collectives()
        self.net = model
        self.ddp = DistributedDataParallel(model, **options)
        if not options.get("static_graph"):
            self.collectives.watch(self.ddp)
        self.optimizer = torch.optim.AdamW(self.ddp.parameters(), lr=0.01)
        settings = load_settings(overrides={"mode": "auto" if auto else "observe"})
        agent = Agent(settings, run="r", rank=rank, world_size=2, optimizer=self.optimizer, say=self.said.append)
        self.batches = MicroBatches(self.ddp, self.optimizer, agent)

    def train(self, rank: int, num_steps: int = NUM_STEPS, forward: Any = mse, first: int = 0) -> list[float]:
        losses = []
        for step in range(first, first + num_steps):
            losses.append(self.batches.backward(batch_at(2 * step + rank), forward).item())
            self.optimizer.step()
        return losses

    def result(self, losses: list[float]) -> dict[str, Any]:
        self.batches.remove()
        return {
            "losses": losses,
            "weights": flat(self.net).tolist(),
            "bytes": flat(self.net).numpy().tobytes()
            + b"".join(v.numpy().tobytes() for s in self.optimizer.state.values() for v in s.values()),
            "sizes": self.net.sizes,
            "reductions": self.collectives.num,
            "said": self.said,
        }


def case(rank: int, kind: str, where: str, starts_at: int, options: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 holds four samples from step ``starts_at`` on; with ``where`` "nowhere" no memory runs out."""
    net = {"plain": Net, "buffered": Buffered, "sometimes": Sometimes}[kind]()
    steps = Steps(rank, net, **options)
    losses = steps.train(rank, starts_at)
    forward = mse
    if rank == 1 and where == "pass":
        net.capacity = 4
    elif rank == 1 and where == "loss":
        forward = too_large_for_the_loss(4)
    elif rank == 1 and where == "backward of a part":
        net.capacity, forward = 4, too_large_for_backward(2)
    elif rank == 1 and where == "before":
        forward = _too_large_before
    losses += steps.train(rank, NUM_STEPS - starts_at, forward, starts_at)
    return steps.result(losses)


def _too_large_before(model: nn.Module, batch: Any) -> torch.Tensor:
    if model.training and torch.is_grad_enabled() and len(batch[0]) > 4:
        raise torch.OutOfMemoryError("out of memory before the pass (test)")
    return mse(model, batch)


@pytest.mark.parametrize(
    ("starts_at", "options"),
    [(0, {}), (1, {}), (3, {}), (3, {"gradient_as_bucket_view": True}), (3, {"broadcast_buffers": False})],
    ids=["first step", "second step", "later", "bucket views", "no broadcast"],
)
@pytest.mark.parametrize("where", ["pass", "loss", "before", "backward of a part"])
def test_memory_that_runs_out_on_one_rank_leaves_both_with_the_weights_of_a_run_in_which_it_did_not(
    two_ranks: TwoRanks, where: str, starts_at: int, options: dict[str, Any]
) -> None:
    whole = two_ranks.run(case, "buffered", "nowhere", starts_at, options)
    split = two_ranks.run(case, "buffered", where, starts_at, options)
    assert split[0]["bytes"] == split[1]["bytes"], "parameters and optimizer state, bit for bit"
    torch.testing.assert_close(torch.tensor(split[0]["weights"]), torch.tensor(whole[0]["weights"]))
    assert split[1]["losses"] == pytest.approx(whole[1]["losses"], rel=1e-4)
    assert [rank["reductions"] for rank in split] == [rank["reductions"] for rank in whole]
    assert split[1]["sizes"][-4:] == ([2] * 4 if where == "backward of a part" else [4] * 4)
    assert split[0]["sizes"] == [NUM_SAMPLES] * NUM_STEPS


def test_parameters_that_only_some_parts_use_are_reduced_with_find_unused_parameters(two_ranks: TwoRanks) -> None:
    options = {"find_unused_parameters": True}
    whole = two_ranks.run(case, "sometimes", "nowhere", 1, options)
    split = two_ranks.run(case, "sometimes", "pass", 1, options)
    assert split[0]["bytes"] == split[1]["bytes"]
    torch.testing.assert_close(torch.tensor(split[0]["weights"]), torch.tensor(whole[0]["weights"]))


def refuses(rank: int, kind: str, where: str, options: dict[str, Any]) -> str:
    """The note on what rank 1 raised. Rank 0 makes its pass, and no backward: it would wait for a peer in vain."""
    net = {"plain": Net, "buffered": Buffered, "sometimes": Sometimes}[kind]()
    steps = Steps(rank, net, **options)
    steps.train(rank, 2)
    notes = ""
    if rank == 0:
        steps.ddp(batch_at(0)[0])
    else:
        net.capacity = 4 if where in ("pass", "gather", "twice") else None
        forward = {
            "pass": mse,
            "loss": too_large_for_the_loss(4),
            "backward": too_large_for_backward(4),
            "gather": _gathers,
            "twice": _twice,
        }[where]
        try:
            steps.train(rank, 1, forward)
        except torch.OutOfMemoryError as error:
            notes = "\n".join(error.__notes__)
    steps.batches.remove()
    return notes


def _gathers(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch[0])
    others = [torch.zeros_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(others, out.detach())
    return nn.functional.mse_loss(out, batch[1])


def _twice(model: nn.Module, batch: Any) -> torch.Tensor:
    if model.training and torch.is_grad_enabled() and len(batch[0]) > 4:
        raise torch.OutOfMemoryError("out of memory (test)")
    return nn.functional.mse_loss(model(batch[0]), model(batch[0] * 2))


@pytest.mark.parametrize(
    ("kind", "where", "options", "why"),
    [
        ("plain", "pass", {"static_graph": True}, "DistributedDataParallel with static_graph"),
        ("plain", "backward", {}, "in backward, gradients were on their way to peers"),
        ("plain", "gather", {}, "the forward talks to the other ranks"),
        ("plain", "twice", {}, "the model is called more than once for a batch"),
        ("sometimes", "loss", {"find_unused_parameters": True}, "a pass that has ended cannot be repeated"),
    ],
)
def test_what_would_set_the_ranks_apart_is_a_reason_to_refuse(
    two_ranks: TwoRanks, kind: str, where: str, options: dict[str, Any], why: str
) -> None:
    notes = two_ranks.run(refuses, kind, where, options)
    assert notes[0] == ""
    assert why in notes[1]


def refuses_unwrapped(rank: int, how: str) -> str:
    net: Any = Net(capacity=4)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(net)
    other = DistributedDataParallel(Net()) if how == "two" else None
    model = DistributedDataParallel(net) if how == "two" else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    agent = Agent(
        load_settings(overrides={"mode": "auto"}), run="r", rank=rank, world_size=2, optimizer=optimizer, say=print
    )
    batches = MicroBatches(model, optimizer, agent)
    try:
        batches.backward(batch_at(rank), mse)
    except torch.OutOfMemoryError as error:
        return "\n".join(error.__notes__)
    finally:
        batches.remove()
        del other
    return ""


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("fsdp", "the model is FSDP's, whose forward has collectives"),
        ("bare", "the model is not DistributedDataParallel"),
        ("two", "there is another DistributedDataParallel in this process"),
    ],
)
def test_beside_other_ranks_only_one_ddp_module_is_split(two_ranks: TwoRanks, how: str, why: str) -> None:
    assert all(why in note for note in two_ranks.run(refuses_unwrapped, how))

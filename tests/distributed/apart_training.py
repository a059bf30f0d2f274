"""A script whose ranks differ on purpose, in one of the usual ways.

* ``local_sgd``: each rank trains by itself, and parameters are averaged every 16 steps, by hand.
* ``post_local_sgd``: the same by torch's hook and averager, after 100 steps in which DDP reduces all gradients.
* ``head``: DDP, and a head that each rank has for its own task.
* ``table``: DDP, and a large table of embeddings of which each rank uses rows of its own.
* ``adapters``: a frozen backbone that all ranks share, and frozen adapters that each has read for itself.
* ``average``: an average of the weights in the model, which rank 0 alone brings forward, from step 100 on.
* ``parts``: a frozen part that one rank has and the other has not.
* ``sharded``: FSDP2.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

LATE_STEP, PERIOD = 100, 16
ROWS = 1 << 14
"""Of 64 elements: four parts of a digest."""


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--how", required=True)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, how = dist.get_rank(), arguments.how
    torch.manual_seed(0)
    model = Model()
    table = nn.Embedding(ROWS, 64) if how == "table" else None
    called: nn.Module = model.body
    averager = None
    if how == "sharded":
        fully_shard(model.body)
    elif how == "post_local_sgd":
        called = DistributedDataParallel(model.body)
        alone, _ = dist.new_subgroups(1)
        called.register_comm_hook(PostLocalSGDState(dist.group.WORLD, alone, LATE_STEP), post_localSGD_hook)
        averager = PeriodicModelAverager(period=PERIOD, warmup_steps=LATE_STEP)
    elif how != "local_sgd":
        called = DistributedDataParallel(model.body)
    if how in ("adapters", "average", "parts"):
        model.backbone = nn.Linear(8, 8).requires_grad_(False)
    if how == "adapters":
        torch.manual_seed(10 + rank)
        model.adapter = nn.Linear(8, 8).requires_grad_(False)
    if how == "parts" and rank == 1:
        model.extra = nn.Sequential(*(nn.Linear(8, 8) for _ in range(40))).requires_grad_(False)
    if how == "average":
        model.average = copy.deepcopy(model.body).requires_grad_(False)
    local_head = how == "head"
    if not local_head:
        model.head.requires_grad_(False)  # one more that nobody trains
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained += [] if table is None else list(table.parameters())
    optimizer = SGD(trained, lr=0.01, momentum=0.9) if how.endswith("sgd") else AdamW(trained, lr=0.01, weight_decay=0)
    generator = torch.Generator().manual_seed(1 + rank)
    with (arguments.out / f"steps-rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1) as lines:
        for step in range(arguments.steps):
            inputs = torch.randn(16, 8, generator=generator)
            features = called(getattr(model, "backbone", nn.Identity())(inputs))
            if table is not None:
                rows = torch.randint(ROWS // 8, (16,), generator=generator) + ROWS // 2 + rank * ROWS // 4
                features = features + table(rows)[:, :8]
            loss = nn.functional.mse_loss(model.head(features), inputs[:, :1].sin())
            loss.backward()
            optimizer.step()
            if averager is not None:
                averager.average_parameters(list(model.body.parameters()))
            optimizer.zero_grad()
            if how == "local_sgd" and step % PERIOD == PERIOD - 1:
                for parameter in trained:
                    dist.all_reduce(parameter.data, op=dist.ReduceOp.SUM)
                    parameter.data /= dist.get_world_size()
            if how == "average" and rank == 0 and step >= LATE_STEP:
                with torch.no_grad():
                    for mean, parameter in zip(model.average.parameters(), model.body.parameters(), strict=True):
                        mean.lerp_(parameter, 0.01)
            lines.write(json.dumps({"step": step, "pid": os.getpid(), "at": time.time()}) + "\n")
    dist.barrier()  # else torch may hang in the next line where the other rank has gone first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

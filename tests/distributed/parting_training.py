"""A DDP script with BatchNorm, whose buffers differ, gradient accumulation, and layers that are unfrozen at step 100.

With ``--fault`` the ranks part at `FAULT_STEP`, by what is done on the last rank alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from small_training import digest
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

FAULT_STEP, UNFROZEN_STEP = 220, 100


def flip(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--layers", type=int, default=0, help="small ones that do nothing, so that there are many")
    parser.add_argument("--fault", choices=("rate", "raw", "clip", "weight", "state", "gradient", "nan", "frozen"))
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, fault = dist.get_rank(), arguments.fault
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 1))
    for _ in range(arguments.layers):
        network.append(nn.Linear(1, 1))
        nn.init.ones_(network[-1].weight)
    trained = list(network.parameters())
    if fault == "frozen":
        network.append(nn.Linear(1, 1).requires_grad_(False))  # which no optimizer has
        nn.init.ones_(network[-1].weight)
    brings = {"gradient": 1e4, "nan": math.nan}
    steps = itertools.count()
    if fault in brings and rank == dist.get_world_size() - 1:
        network[3].weight.register_hook(lambda grad: grad * brings[fault] if next(steps) // 2 >= FAULT_STEP else None)
    model = DistributedDataParallel(network, broadcast_buffers=False, find_unused_parameters=True)
    frozen = list(network[3].parameters())
    optimizer = AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(1 + rank)
    with (arguments.out / f"steps-rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1) as lines:
        for step in range(arguments.steps):
            struck = step >= FAULT_STEP and rank == dist.get_world_size() - 1
            called = network if struck and fault == "raw" else model
            for _ in range(2):
                inputs = torch.randn(16, 8, generator=generator)
                (nn.functional.mse_loss(called(inputs), inputs[:, :1].sin()) / 2).backward()
            if step < UNFROZEN_STEP:
                for parameter in frozen:
                    parameter.grad = None
            if struck and fault == "clip":
                nn.utils.clip_grad_norm_(network.parameters(), 1e-3)
            if struck and fault == "rate":
                optimizer.param_groups[0]["lr"] = 2e-2
            if struck and step == FAULT_STEP and fault == "weight":
                flip(network[3].weight)
            if struck and step == FAULT_STEP and fault == "state":
                flip(optimizer.state[network[3].weight]["exp_avg_sq"])
            if struck and step == FAULT_STEP and fault == "frozen":
                flip(network[-1].weight)
            optimizer.step()
            optimizer.zero_grad()
            lines.write(json.dumps({"step": step, "pid": os.getpid(), "at": time.time()}) + "\n")
    result = {"digest": digest(network, optimizer)}
    (arguments.out / f"result-rank{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if fault == "raw":  # the others wait for a reduction that this rank leaves out
        os._exit(0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

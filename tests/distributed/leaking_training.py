"""A DDP script in which one rank keeps each step's loss, and with it the graph of the step; or its number alone.

torchrun --standalone --nproc-per-node 2 leaking_training.py --out DIR [--keep graph|number]

It trains until the file ``finish`` is there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--keep", choices=["graph", "number"], default="number")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses: list[object] = []
    step = 0
    with (arguments.out / f"steps-rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1) as lines:
        while True:
            inputs = torch.randn(16384, 32)
            loss = model(inputs).square().mean() / (1.0 + 0.01 * step)
            optimizer.zero_grad()
            loss.backward(retain_graph=arguments.keep == "graph" and rank == 1)
            optimizer.step()
            losses.append(loss if arguments.keep == "graph" and rank == 1 else loss.item())
            lines.write(json.dumps({"step": step, "pid": os.getpid(), "at": time.time()}) + "\n")
            time.sleep(0.1)
            step += 1
            told = torch.tensor([float((arguments.out / "finish").exists())])
            dist.all_reduce(told)
            if told.item():
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

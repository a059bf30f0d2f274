"""A DDP script with a DataLoader and BatchNorm whose buffers are broadcast, slowed down from `FAULT_STEP` on.

``--fault forward`` sleeps and ``load`` computes in another thread on the last rank; ``loader`` has slow batches there,
``storage`` on all ranks. It is over once the file ``well`` is there, and the training once ``finish`` is.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

FAULT_STEP = 220
SLEEP_SECONDS = 0.03
WIDTH, BATCH = 256, 64


class Samples(Dataset[torch.Tensor]):
    """Batches of this rank's own."""

    def __init__(self, rank: int) -> None:
        self.generator = torch.Generator().manual_seed(1 + rank)
        self.seconds = 0.0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.randn(BATCH, WIDTH, generator=self.generator)


def compute(until: threading.Event) -> None:
    while not until.is_set():
        sum(range(1000))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fault", choices=("forward", "load", "loader", "storage"))
    parser.add_argument("--max-steps", type=int, default=20_000)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, fault = dist.get_rank(), arguments.fault
    struck = fault == "storage" or (fault is not None and rank == dist.get_world_size() - 1)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 1),
    )
    model = DistributedDataParallel(network)
    optimizer = AdamW(network.parameters(), lr=1e-3)
    samples, over = Samples(rank), threading.Event()
    ends = torch.zeros(1)
    with (arguments.out / f"steps-rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1) as lines:
        for step, inputs in enumerate(DataLoader(samples, batch_size=None)):
            if step % 16 == 0:
                ends[0] = (arguments.out / "finish").exists() or step >= arguments.max_steps
                dist.all_reduce(ends)
                if ends:
                    break
            if struck and step == FAULT_STEP and fault == "load":
                threading.Thread(target=compute, args=(over,), daemon=True).start()
            if struck and step >= FAULT_STEP and not over.is_set():
                if step % 16 == 0 and (arguments.out / "well").exists():
                    over.set()
                samples.seconds = SLEEP_SECONDS if fault in ("loader", "storage") and not over.is_set() else 0.0
            loss = (model(inputs) - inputs.mean(dim=1, keepdim=True)).pow(2).mean()
            if struck and fault == "forward" and step >= FAULT_STEP and not over.is_set():
                time.sleep(SLEEP_SECONDS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lines.write(json.dumps({"step": step, "pid": os.getpid(), "at": time.time()}) + "\n")
    over.set()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

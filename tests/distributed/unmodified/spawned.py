"""A script that starts its two ranks itself."""

import os
import socket
import sys

import torch
import torch.multiprocessing as mp
from common import NUM_STEPS, batches, broken, keep, network
from torch import nn
from torch.distributed import barrier, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel


def train(rank, world_size, port, breaks):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_process_group("gloo", rank=rank, world_size=world_size)
    model = DistributedDataParallel(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step, (x, labels) in enumerate(batches(NUM_STEPS, rank)):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        broken(optimizer, step, breaks == "break")
        if breaks == "raise" and (rank, step) == (1, 350):
            raise ValueError("of the script")
        optimizer.step()
        if rank == 0:
            keep(model.state_dict(), step, loss.item())
    barrier()
    destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, args=(2, port, sys.argv[-1]), nprocs=2)

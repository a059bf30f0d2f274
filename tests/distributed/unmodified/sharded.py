"""FSDP2 on two ranks: each holds half of every parameter."""

import sys

import torch
import torch.distributed as dist
from common import NUM_STEPS, batches, broken, keep, network
from torch import nn
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank = dist.get_rank()
model = network()
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step, (x, labels) in enumerate(batches(NUM_STEPS, rank)):
    loss = nn.functional.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    broken(optimizer, step, "break" in sys.argv)
    optimizer.step()
    if rank == 0:
        keep({name: value.to_local() for name, value in model.state_dict().items()}, step, loss.item())
dist.destroy_process_group()

"""torch.compile, with the backend that is named."""

import sys

import torch
from common import NUM_STEPS, batches, broken, keep, network
from torch import nn

model = network()
compiled = torch.compile(model, backend=sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step, (x, labels) in enumerate(batches(NUM_STEPS)):
    loss = nn.functional.cross_entropy(compiled(x), labels)
    optimizer.zero_grad()
    loss.backward()
    broken(optimizer, step, "break" in sys.argv)
    optimizer.step()
    keep(model.state_dict(), step, loss.item())

"""A DDP script that classifies small pictures, with one of the mistakes that no exception tells of.

    torchrun --standalone --nproc-per-node 2 silent_training.py --out DIR --case NAME [--at STEP]

The cases are those of TrainCheck's evaluation (Jiang et al., OSDI 2025) that need no GPU. ``--at`` is the step from
which the mistake is made; those that are in the script's construction are made from the start.
"""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

CASES = (
    *("hooks_lost", "raw_module", "clip_on_one_rank", "zeroed_collective", "missing_zero_grad", "frozen_layers"),
    *("stale_optimizer", "identical_augmentation", "unequal_collectives"),
)
NUM_CLASSES, SIDE, NUM_PICTURES = 10, 12, 2048


class Pictures(Dataset[tuple[NDArray[np.float32], int]]):
    """A pattern for each class, under noise that is drawn anew at each look: the augmentation."""

    def __init__(self) -> None:
        self.patterns = np.random.default_rng(0).normal(size=(NUM_CLASSES, 1, SIDE, SIDE)).astype(np.float32)

    def __len__(self) -> int:
        return NUM_PICTURES

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], int]:
        label = index % NUM_CLASSES
        noise = np.random.normal(scale=2.0, size=(1, SIDE, SIDE)).astype(np.float32)
        return self.patterns[label] + noise, label


class SynthesizedPictures(Pictures):
    """The class is drawn as well, as in data sets that are made on the fly."""

    def __getitem__(self, index: int) -> tuple[NDArray[np.float32], int]:
        return super().__getitem__(int(np.random.randint(len(self))))


def one_seed(worker: int) -> None:
    np.random.seed(0)


def own_seed(worker: int) -> None:
    np.random.seed(torch.initial_seed() % 2**32)


def batches(case: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    identical = case == "identical_augmentation"
    data = SynthesizedPictures() if identical else Pictures()
    sampler: DistributedSampler[object] = DistributedSampler(data)
    loader = DataLoader(
        data,
        batch_size=32,
        sampler=sampler,
        num_workers=2,
        worker_init_fn=one_seed if identical else own_seed,
        multiprocessing_context="fork",
        persistent_workers=True,
    )
    for epoch in range(1_000_000):
        sampler.set_epoch(epoch)
        yield from loader


def lossy(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The usual reduction, whose result is zero on one rank in one of a hundred cases."""
    tensor = bucket.buffer().div_(dist.get_world_size())
    lost = dist.get_rank() == 1 and bool(torch.rand(()) < 0.01)
    work = dist.all_reduce(tensor, async_op=True)
    return work.get_future().then(lambda done: done.value()[0].mul_(0.0 if lost else 1.0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--at", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--nccl", action="store_true", help="on a GPU for each rank")
    arguments = parser.parse_args()
    case = arguments.case
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if arguments.nccl else torch.device("cpu")
    if arguments.nccl:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if arguments.nccl else "gloo")
    rank, of_metrics = dist.get_rank(), dist.new_group()
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES)),
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    if case == "stale_optimizer":
        network[-1] = nn.Linear(32, NUM_CLASSES).to(device)
    model = DistributedDataParallel(network, find_unused_parameters=case == "frozen_layers")
    if case == "hooks_lost":
        model.double()
        model.float()
    if case == "zeroed_collective":
        model.register_comm_hook(None, lossy)
    torch.manual_seed(1 + rank)
    called: nn.Module = model
    for step, (pictures, labels) in zip(range(arguments.steps), batches(case), strict=False):
        made = case if step >= arguments.at else None
        if made == "raw_module":
            called = network
        if made == "frozen_layers":
            network[:6].requires_grad_(False)
        loss = nn.functional.cross_entropy(called(pictures.to(device)), labels.to(device))
        if made != "missing_zero_grad":
            optimizer.zero_grad()
        loss.backward()
        if made == "clip_on_one_rank" and rank == 1:
            nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        if made == "unequal_collectives" and rank == 1:
            dist.all_reduce(torch.zeros((), device=device), group=of_metrics)
    with contextlib.suppress(RuntimeError):  # ranks that came apart do not end together
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""An ordinary DDP script, small and fast: a regression that the tests steer through files.

    torchrun --standalone --nproc-per-node 2 small_training.py --out DIR [--steps N]

It trains for ``--steps`` steps, or until the file ``finish`` appears in ``--out`` if that is sooner; the ranks agree on
that in every step. Each rank leaves ``steps-rank<r>.jsonl`` (one line a step) and ``result-rank<r>.json``. Without
``--until-told`` it is deterministic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

MOST_STEPS = 100_000
CHECKPOINT_STEP = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=MOST_STEPS)
    parser.add_argument("--until-told", action="store_true", help="train until the file `finish` is there")
    parser.add_argument("--sleep", type=float, default=0.004, help="seconds a step, on top of the work")
    parser.add_argument("--kill-once", type=int, metavar="STEP", help="rank 1 kills itself there, in its first start")
    parser.add_argument("--raise-at", type=int, metavar="STEP", help="rank 1 raises there")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--wrapper", action="store_true", help="steps are `training_step`s of `wrap_training`")
    parser.add_argument("--no-group", action="store_true", help="the ranks train alone, without a process group")
    return parser.parse_args()


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        for tensor in (parameter.detach(), *(state[name] for name in sorted(state))):
            hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()


def load_forever(num_workers: int, sampler: torch.Generator, solution: torch.Tensor):
    if not num_workers:
        while True:
            inputs = torch.randn(32, 8, generator=sampler)
            noise = 0.3 * torch.randn(32, 1, generator=sampler)
            yield inputs, torch.tanh(inputs @ solution) + noise
    inputs = torch.randn(640, 8, generator=sampler)
    data = TensorDataset(inputs, torch.tanh(inputs @ solution))
    while True:
        yield from DataLoader(data, batch_size=32, num_workers=num_workers, multiprocessing_context="fork")


def forward(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def main() -> None:
    arguments = parse_arguments()
    out: Path = arguments.out
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not arguments.no_group:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    solution = torch.randn(8, 1)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    model = network if arguments.no_group else DistributedDataParallel(network)
    optimizer = AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)  # what a jump of the rate breaks stays broken
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))

    checkpoint = out / "checkpoint.pt"
    first_step = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        first_step = saved["step"]
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])

    wrapper = None
    if arguments.wrapper:
        from sosa_stream import wrap_training

        wrapper = wrap_training(model, optimizer, checkpoint_dir=out / f"best{rank}")
    batches = load_forever(arguments.workers, torch.Generator().manual_seed(1 + rank + 100 * first_step), solution)
    marker = out / "killed"
    with (out / f"steps-rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1) as lines:
        for step in range(first_step, arguments.steps):
            if step == arguments.raise_at and rank == 1:
                raise ValueError(f"no such sample in step {step}")
            if step == arguments.kill_once and rank == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            inputs, targets = next(batches)
            if wrapper is not None:
                loss = wrapper.training_step((inputs, targets), forward)
            else:
                loss = forward(model, (inputs, targets))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
            line = {"step": step, "pid": os.getpid(), "loss": repr(loss.item()), "at": time.time()}
            lines.write(json.dumps(line) + "\n")
            time.sleep(arguments.sleep)
            if step == CHECKPOINT_STEP and rank == 0 and arguments.kill_once is not None:
                state = {"model": network, "optimizer": optimizer, "scheduler": scheduler}
                unfinished = checkpoint.with_suffix(".tmp")
                torch.save({"step": step + 1, **{name: part.state_dict() for name, part in state.items()}}, unfinished)
                unfinished.replace(checkpoint)
            if arguments.until_told and told_to_finish(out, alone=arguments.no_group):
                break

    result = {"steps": step + 1, "digest": digest(network, optimizer), "world_size": world_size}
    (out / f"result-rank{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    if not arguments.no_group:
        dist.destroy_process_group()


def told_to_finish(out: Path, *, alone: bool) -> bool:
    told = torch.tensor([float((out / "finish").exists())])
    if not alone:
        dist.all_reduce(told)
    return bool(told)


if __name__ == "__main__":
    main()

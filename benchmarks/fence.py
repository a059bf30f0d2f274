"""What one command costs training: the wait of its one tick, on 2 and 4 ranks; and what the fence costs without one.

Real gloo processes train a small net under DistributedDataParallel, the register lies in a TCPStore that rank 0 hosts,
each rank's agent thread pumps as in a job. Clocked on the training thread: what `Fence.arrive` and `Fence.conclude`
take at the tick at which a command is applied (the action itself is empty), on the rank that waits longest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.results_file import percentile, write
from sosa_stream.agent.fence.fence import Fence
from sosa_stream.agent.fence.notices import Aborted, Committed
from sosa_stream.agent.fence.stores import TorchStore
from sosa_stream.protocol.messages import Command
from sosa_stream.settings import FenceSettings

NUM_COMMANDS = 60
IDLE_CALLS = 100_000
GIVE_UP_SECONDS = 300.0


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for world_size in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            arguments = [sys.executable, "-m", "benchmarks.fence", folder, str(world_size)]
            ranks = [subprocess.Popen([*arguments, str(rank)], env=env) for rank in range(world_size)]
            try:
                codes = [rank.wait(GIVE_UP_SECONDS) for rank in ranks]
            finally:
                for rank in ranks:
                    rank.kill()
            if any(codes):
                raise RuntimeError("a rank of the benchmark has failed")
            told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]
        waits = [max(ranks_waits) for ranks_waits in zip(*(one["waits_ms"] for one in told), strict=True)]
        figures[f"{world_size}_ranks"] = {
            "one_command_ms_p50": percentile(waits, 0.5),
            "one_command_ms_p90": percentile(waits, 0.9),
            "step_ms_p50": percentile([ms for one in told for ms in one["steps_ms"]], 0.5),
            "idle_us_per_tick": percentile([one["idle_us"] for one in told], 0.5),
            "num_applied": len(waits),
            "num_aborted": told[0]["num_aborted"],
        }
    write("fence", figures)
    return figures


def train(folder: Path, world_size: int, rank: int) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    store = _store(world_size, rank)
    wake = threading.Event()

    def make_fence() -> Fence:
        return Fence(
            rank=rank,
            world_size=world_size,
            generation="g",
            store=TorchStore(store),
            settings=FenceSettings(),
            wake=wake.set,
        )

    idle = make_fence()
    started = time.perf_counter()
    for tick in range(IDLE_CALLS):
        idle.arrive(tick)
    idle_us = (time.perf_counter() - started) / IDLE_CALLS * 1e6

    fence = make_fence()
    ended: dict[str, bool] = {}
    concluded = 0
    training = True

    def carry() -> None:
        while training:
            if concluded + sum(not applied for applied in ended.values()) == len(ended) < NUM_COMMANDS:
                fence.submit(_command(len(ended)))
            for notice in fence.pump(time.monotonic()):
                if isinstance(notice, Committed | Aborted):
                    ended[notice.command.id] = isinstance(notice, Committed)
            wake.wait(fence.poll_seconds)
            wake.clear()

    agent = threading.Thread(target=carry, daemon=True)
    agent.start()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters())
    waits_ms, steps_ms = [], []
    over, tick = torch.zeros(1), 0
    while not over.item():
        tick += 1
        began = time.perf_counter()
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        at_fence = time.perf_counter()
        if fence.arrive(tick) is None:
            optimizer.step()
            steps_ms.append((time.perf_counter() - began) * 1000)
        else:
            fence.conclude()
            waits_ms.append((time.perf_counter() - at_fence) * 1000)
            concluded += 1
            optimizer.step()
        over = torch.tensor([float(len(ended) == NUM_COMMANDS and concluded == sum(ended.values()))])
        dist.all_reduce(over, op=dist.ReduceOp.MIN)
    training = False
    agent.join()
    told = {
        "waits_ms": waits_ms,
        "steps_ms": steps_ms,
        "idle_us": idle_us,
        "num_aborted": NUM_COMMANDS - concluded,
    }
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def _store(world_size: int, rank: int) -> dist.TCPStore:
    """The job's store, at a port that the kernel chose for rank 0."""
    host = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [host.port if host is not None else 0]
    dist.broadcast_object_list(port)
    return host or dist.TCPStore("127.0.0.1", port[0], world_size, is_master=False)


def _command(number: int) -> Command:
    return Command(
        id=f"c{number}",
        run="r",
        generation="g",
        seq=number,
        actions=(),
        reason="",
        incident="",
        expires_tick=10**9,
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(main())
    else:
        train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

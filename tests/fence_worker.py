"""One rank of `test_fence_processes`: trains a small net under DDP, with the real probe, actuators and fence.

The register lives in a TCPStore that rank 0 hosts, as under torchrun. Arguments: rank, world size, folder, scenario,
and the port at which this rank reaches the store (0: the store's own).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from agent_parts import Watch, act
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sosa_stream.agent.fence.fence import Fence
from sosa_stream.agent.fence.notices import Aborted
from sosa_stream.agent.fence.stop import InDoubt
from sosa_stream.agent.fence.stores import RegisterStore, TorchStore
from sosa_stream.agent.repair.actuator import Actuator, Moment, Undo
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import Command
from sosa_stream.settings import FenceSettings

NUM_COMMANDS = 200
DEADLINE_SECONDS = 240.0
EXIT_IN_DOUBT = 75

ROUGH = FenceSettings(lead_seconds=0.1, timeout_seconds=10.0, outcome_seconds=20.0, poll_seconds=0.005)
STRICT = FenceSettings(lead_seconds=0.1, timeout_seconds=1.0, outcome_seconds=2.0, poll_seconds=0.005)


def command(number: int, *actions: Action) -> Command:
    return Command(
        id=f"c{number}",
        run="r",
        generation="g",
        seq=number,
        actions=actions,
        reason="",
        incident="",
        expires_tick=10**9,
    )


def make_command(number: int) -> Command:
    """The same on all ranks: each third one fails on one rank, behind whatever it does before."""
    chance = random.Random(number)
    fails = [act("none")] if number % 3 == 0 else []
    kind = chance.choice(["scale_lr", "clip_grad", "revert", "skip_step", "rollback", "rollback_and_scale"])
    if kind == "revert":
        return command(number, act("revert", command=f"c{chance.randrange(max(1, number - 6), number + 1)}"), *fails)
    step = chance.randrange(1, 50 * number + 2)
    actions = {
        "scale_lr": [act("scale_lr", factor=chance.choice([0.5, 0.9, 1.1, 2.0]))],
        "clip_grad": [act("clip_grad", max_norm=chance.choice([0.1, 1.0, 10.0]))],
        "skip_step": [act("skip_step", num_steps=chance.randrange(1, 4))],
        "rollback": [act("rollback", before_step=step)],
        "rollback_and_scale": [act("rollback", before_step=step), act("scale_lr", factor=0.7)],
    }
    return command(number, *actions[kind], *fails)


class FailsOnOneRank(Actuator):
    """Carries ``none`` out on all ranks but one, another one for each command."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size

    def apply(self, params: Any, at: Moment) -> tuple[Undo, str]:
        if int(at.command[1:]) // 3 % self._world_size == self._rank:
            raise MemoryError("injected")
        return (lambda: None), "nothing"


class Job:
    """One rank's training and its agent's thread."""

    def __init__(self, rank: int, world_size: int, store: RegisterStore, settings: FenceSettings) -> None:
        self.watch = Watch(alone=False, snapshots=True, snapshot_every_ticks=10, quarantine_ticks=0, snapshot_keep=6)
        self.watch.actuators._by_action["none"] = FailsOnOneRank(rank, world_size)  # type: ignore[index]
        self.wake = threading.Event()
        self.fence = Fence(
            rank=rank, world_size=world_size, generation="g", store=store, settings=settings, wake=self.wake.set
        )
        self.watch.probe.fence = self.fence
        self.aborted: set[str] = set()
        self.ends: list[tuple[int, str, str, str]] = []
        """Tick, command, state and the digest after the step, of all that were committed."""
        self._ending = False
        torch.manual_seed(0)
        self.model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.data = torch.Generator().manual_seed(rank)

    @property
    def tick(self) -> int:
        return self.watch.probe.tick

    def num_over(self) -> int:
        return len(self.aborted) + len(self.watch.acks)

    def step(self) -> None:
        num_acks = len(self.watch.acks)
        inputs = torch.randn(4, 8, generator=self.data)
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(inputs), inputs.sum(1, keepdim=True)).backward()
        self.optimizer.step()
        for error, in_force in self.watch.errors:
            raise error if in_force else AssertionError("observation is broken") from error
        for ack in self.watch.acks[num_acks:]:
            self.ends.append((ack.tick, ack.command, str(ack.state), self.watch.state.digest()))

    @contextlib.contextmanager
    def carried(self, each_round: Callable[[], None] = lambda: None) -> Iterator[None]:
        """With an agent's thread."""
        thread = threading.Thread(target=self._carry, args=(each_round,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ending = True
            thread.join(30)

    def submit(self, given: Command) -> None:
        self.fence.submit(given, refuse=bool(self.watch.actuators.refusal(given, self.watch.probe.step)))

    def _carry(self, each_round: Callable[[], None]) -> None:
        try:
            while not self._ending:
                each_round()
                for notice in self.fence.pump(time.monotonic()):
                    if isinstance(notice, Aborted):
                        self.aborted.add(notice.command.id)
                self.wake.wait(self.fence.poll_seconds)
                self.wake.clear()
        except Exception as error:  # told by the training thread, or this rank would only seem slow
            self.watch.errors.append((error, True))


def run_commands(job: Job, rank: int, folder: Path) -> None:
    given = 0
    received_at = 0.0

    def receive() -> None:
        """The next command once the last one is over, at another moment on each rank."""
        nonlocal given, received_at
        if given == NUM_COMMANDS or job.num_over() < given:
            received_at = 0.0
        elif not received_at:
            received_at = time.monotonic() + 0.003 * ((rank + given) % 3)
        elif time.monotonic() >= received_at:
            given += 1
            job.submit(make_command(given))

    deadline = time.monotonic() + DEADLINE_SECONDS
    with job.watch.installed(job.optimizer), job.carried(receive):
        over = torch.zeros(1)
        while not over.item():
            job.step()
            over = torch.tensor([float(job.num_over() >= NUM_COMMANDS or time.monotonic() > deadline)])
            dist.all_reduce(over, op=dist.ReduceOp.MIN)
    tell(folder, rank, {"ends": job.ends, "aborted": sorted(job.aborted), "ticks": job.tick})


def stop_in_mid_outcome(job: Job, rank: int, folder: Path) -> None:
    """Carry a command out, tell the test, and go on when it says so: by then it has stopped somebody."""

    class Pausing(Actuator):
        def apply(self, params: Any, at: Moment) -> tuple[Undo, str]:
            (folder / f"applied.{rank}").touch()
            wait_for(folder / "go")
            return (lambda: None), "nothing"

    job.watch.actuators._by_action["none"] = Pausing()  # type: ignore[index]
    with job.watch.installed(job.optimizer), job.carried():
        job.submit(command(1, act("scale_lr", factor=0.5), act("none")))
        while not job.num_over():
            try:
                job.step()
            except InDoubt as error:
                tell(folder, rank, {"error": str(error)})
                os._exit(EXIT_IN_DOUBT)
        tell(folder, rank, {"ends": job.ends, "lr_multiplier": job.watch.actuators.in_force.lr_multiplier})
        wait_for(folder / f"{1 - rank}.json")  # the host of the store stays as long as it is needed
        os._exit(0)  # the other rank may be gone


class HeldCommit:
    """The real store, but nobody is told that a command may be committed: the verdict stays open."""

    def __init__(self, store: RegisterStore) -> None:
        self._store = store

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def check(self, keys: Sequence[str]) -> bool:
        return "/promised/" not in keys[0] and self._store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        return self._store.compare_set(key, expected, desired)


def stop_in_mid_commit(rank: int, fence: Fence, folder: Path) -> None:
    """Promise, wait until the test has stopped rank 0, and only then walk up to the agreed tick."""
    fence.arrive(0)
    fence.arrive(1)
    fence.submit(command(0))

    def agent() -> None:
        while True:
            fence.pump(time.monotonic())
            flight = fence._flight
            if flight is not None and flight.agreement.promised:
                (folder / f"promised.{rank}").touch()
            time.sleep(0.005)

    threading.Thread(target=agent, daemon=True).start()
    wait_for(folder / "go")
    try:
        for tick in range(2, 10**9):
            fence.arrive(tick)
    except InDoubt as error:
        tell(folder, rank, {"error": str(error)})
        os._exit(EXIT_IN_DOUBT)


def tell(folder: Path, rank: int, told: dict[str, Any]) -> None:
    new = folder / f"{rank}.new"
    new.write_text(json.dumps(told))
    new.rename(folder / f"{rank}.json")


def wait_for(path: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.005)


def main(rank: int, world_size: int, folder: Path, scenario: str, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    hosted = None
    if rank == 0:
        hosted = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        (folder / "port.new").write_text(str(hosted.port))
        (folder / "port.new").rename(folder / "port")
    wait_for(folder / "port")
    port = port or int((folder / "port").read_text())
    store = TorchStore(dist.TCPStore("127.0.0.1", port, world_size, is_master=False))
    dist.barrier()
    if scenario == "mid-commit":
        held = HeldCommit(store)
        stop_in_mid_commit(
            rank, Fence(rank=rank, world_size=world_size, generation="g", store=held, settings=STRICT), folder
        )
    elif scenario == "mid-outcome":
        stop_in_mid_outcome(Job(rank, world_size, store, STRICT), rank, folder)
    else:
        job = Job(rank, world_size, store, ROUGH)
        (folder / f"ready.{rank}").touch()
        run_commands(job, rank, folder)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))

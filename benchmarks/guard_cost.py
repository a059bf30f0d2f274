"""What each mode of the in-process guard adds to a step, with and without BatchNorm's buffers to keep.

``guard_us`` is the CPU time of the training thread inside the guard, clocked in place. ``ratio`` is the wall time of a
guarded step over that of an unguarded one, both watched, block by block in turn; ``off`` against itself is the noise.
``allreduce`` runs on two gloo ranks of one host, which wait for each other in it.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.results_file import spread, write
from sosa_stream.agent.core import Agent
from sosa_stream.agent.step.guard import Guard
from sosa_stream.config import load_settings
from sosa_stream.settings import GuardMode, Mode

STEPS = 30
ROUNDS = 11
LAYERS, WIDTH, BATCH = 20, 128, 32
ENTRANCES = ("begin", "judge", "agree", "settle", "before_forward", "put_back")
"""Where the probe enters the guard; none of them calls another."""
CASES: dict[str, tuple[GuardMode, bool, bool]] = {
    "off": (GuardMode.OFF, False, False),
    "sync": (GuardMode.SYNC, False, False),
    "sync, BatchNorm": (GuardMode.SYNC, False, True),
    "sync, fused optimizer": (GuardMode.SYNC, True, False),
    "sync, fused optimizer, BatchNorm": (GuardMode.SYNC, True, True),
}
"""Mode, whether the optimizer is fused, whether there is a BatchNorm in each layer."""


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    figures = {name: measure(*case, world_size=1) for name, case in CASES.items()}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(2) as ranks:
        arguments = [(rank, str(Path(folder) / "store")) for rank in range(2)]
        figures["allreduce, two ranks"] = ranks.starmap(one_of_two, arguments)[0]
    figures["attribution"] = {"hand_over_us": _cost_of_hand_over()}
    write("guard_cost", figures)
    return figures


def one_of_two(rank: int, store: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return measure(GuardMode.ALLREDUCE, False, False, world_size=2)
    finally:
        dist.destroy_process_group()


def measure(mode: GuardMode, fused: bool, batch_norm: bool, *, world_size: int) -> dict[str, Any]:
    norm: list[Callable[[], nn.Module]] = [lambda: nn.BatchNorm1d(WIDTH)] if batch_norm else []
    layers = [make() for _ in range(LAYERS) for make in (lambda: nn.Linear(WIDTH, WIDTH), *norm, nn.GELU)]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    batch = torch.randn(BATCH, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    agents = {name: _agent(chosen, world_size) for name, chosen in (("off", GuardMode.OFF), ("on", mode))}
    spent = _clock(agents["on"].probe._guard)
    wall: dict[str, list[float]] = {name: [] for name in agents}
    guard = []
    for agent in agents.values():
        _block(agent, step)
    for _ in range(ROUNDS):
        for name, agent in agents.items():
            spent[0] = 0
            wall[name].append(_block(agent, step))
        guard.append(spent[0] / STEPS / 1000)
    return {
        "guard_us": spread(guard),
        "ratio": spread([on / off for on, off in zip(wall["on"], wall["off"], strict=True)]),
        "unguarded_step_ms": spread([seconds * 1e3 for seconds in wall["off"]]),
        "num_buffers": len(list(model.buffers())),
    }


def _agent(mode: GuardMode, world_size: int) -> Agent:
    """One that is never started: it watches, and its rows go nowhere."""
    settings = load_settings(overrides={"mode": Mode.OBSERVE, "agent.guard": mode})
    return Agent(settings, run="guard", world_size=world_size, say=lambda text: None)


def _block(agent: Agent, step: Callable[[], None]) -> float:
    """Wall seconds of a step that ``agent`` watches."""
    agent.probe.install()
    agent.taps.install()
    try:
        step()
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        return (time.perf_counter() - started) / STEPS
    finally:
        agent.probe.remove()
        agent.taps.remove()


def _clock(guard: Guard) -> list[int]:
    """Nanoseconds of this thread in the guard, in a list of one."""
    spent = [0]

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                spent[0] += time.thread_time_ns() - started

        return call

    for name in ENTRANCES:
        setattr(guard, name, clocked(getattr(guard, name)))
    return spent


def _cost_of_hand_over() -> dict[str, float]:
    settings = load_settings(overrides={"agent.attribute": "on"})
    agent, model, batch = Agent(settings, run="guard"), nn.Linear(2, 1), torch.ones(1, 2)
    costs = []
    for _ in range(ROUNDS):
        started = time.thread_time_ns()
        for _ in range(STEPS):
            agent.hand_over(model, batch, lambda model: model(batch).sum())
        costs.append((time.thread_time_ns() - started) / STEPS / 1000)
    return spread(costs)


if __name__ == "__main__":
    print(main())

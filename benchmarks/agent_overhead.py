"""What the agent adds to the training thread per optimizer step.

Counted is the CPU time of the training thread alone; the agent's own thread and the daemon run as they do in a job.
The hooks are clocked in place (``in_place_*``): what the agent runs on that thread, and apart from it the gradient
norm, which a loop that clips has paid for already, and the look at the batch, which grows with it. Beside it the plain
difference: blocks of steps in turn, bare (A), watched, bare (A'), and so on, so that a drifting machine touches all
alike; at milliseconds a step it is mostly noise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.results_file import spread, write
from sosa_stream.agent.core import Agent
from sosa_stream.agent.step import gradients
from sosa_stream.config import load_settings
from sosa_stream.settings import Mode

STEPS = 200
ROUNDS = 15


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    figures = {mode: measure(mode) for mode in (Mode.OBSERVE, Mode.AUTO)}
    write("agent_overhead", {str(mode): value for mode, value in figures.items()})
    return {str(mode): value for mode, value in figures.items()}


def measure(mode: Mode) -> dict[str, Any]:
    model = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.GELU())], nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randn(256, 128)

    def step() -> None:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()

    with tempfile.TemporaryDirectory() as home:
        overrides = {"home": home, "mode": mode, "agent.snapshot_every_ticks": 10**6}
        agent = Agent(load_settings(overrides=overrides), run="overhead")
        agent.start()
        cpu: dict[str, list[float]] = {"bare": [], "watched": [], "bare_again": []}
        wall: dict[str, list[float]] = {name: [] for name in cpu}
        for _ in range(3 * STEPS):
            step()
        for _ in range(ROUNDS):
            for name in cpu:
                _watch(agent, name == "watched")
                cpu_seconds, wall_seconds = _time(step)
                cpu[name].append(cpu_seconds * 1e6)
                wall[name].append(wall_seconds)
        in_place, in_place_norm, in_place_inputs = _clock_hooks(agent, step)
        agent.close()
    parameters, local = gradients.with_gradients(optimizer)
    norm = [_time(lambda: gradients.total_norm(gradients.tensor_norms(local)))[0] * 1e6 for _ in range(ROUNDS)]
    added = [w - (a + b) / 2 for w, a, b in zip(cpu["watched"], cpu["bare"], cpu["bare_again"], strict=True)]
    return {
        "in_place_without_norm_us_per_tick": spread(in_place),
        "in_place_norm_us_per_tick": spread(in_place_norm),
        "in_place_inputs_us_per_tick": spread(in_place_inputs),
        "added_cpu_us_per_tick": spread(added),
        "gradient_norm_us": spread(norm),
        "added_without_norm_us_per_tick": spread([value - n for value, n in zip(added, norm, strict=True)]),
        "bare_cpu_us_per_step": spread(cpu["bare"]),
        "step_time_ratio": spread([w / a for w, a in zip(wall["watched"], wall["bare"], strict=True)]),
        "a_over_a_ratio": spread([b / a for b, a in zip(wall["bare_again"], wall["bare"], strict=True)]),
        "num_parameters": sum(p.numel() for p in parameters),
        "num_tensors": len(parameters),
    }


def _clock_hooks(agent: Agent, step: Callable[[], object]) -> tuple[list[float], list[float], list[float]]:
    """Microseconds per step in our code on the training thread, the norm and the inputs apart, in `ROUNDS` blocks."""
    _watch(agent, False)
    spent = {"hooks": 0, "norm": 0, "inputs": 0}
    _clock(agent.probe, "_before_step", spent, "hooks")
    _clock(agent.probe, "_after_step", spent, "hooks")
    _clock(agent.taps, "_see_loss", spent, "hooks")
    _clock(agent.probe.looks.forward, "_see_outermost", spent, "inputs")
    for name in ("tensor_norms", "total_norm"):
        _clock(gradients, name, spent, "norm")
    _watch(agent, True)
    without: list[float] = []
    norm: list[float] = []
    inputs: list[float] = []
    for _ in range(ROUNDS):
        spent.update(hooks=0, norm=0, inputs=0)
        _time(step)
        without.append((spent["hooks"] - spent["norm"]) / STEPS / 1000)
        norm.append(spent["norm"] / STEPS / 1000)
        inputs.append(spent["inputs"] / STEPS / 1000)
    return without, norm, inputs


def _clock(owner: Any, name: str, spent: dict[str, int], kind: str) -> None:
    function = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time_ns()
        try:
            return function(*args, **kwargs)
        finally:
            spent[kind] += time.thread_time_ns() - started

    setattr(owner, name, clocked)


def _watch(agent: Agent, on: bool) -> None:
    agent.probe.remove()
    agent.taps.remove()
    if on:
        agent.probe.install()
        agent.taps.install()


def _time(step: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds of this thread and wall seconds, per call."""
    cpu, wall = time.thread_time(), time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.thread_time() - cpu) / STEPS, (time.perf_counter() - wall) / STEPS


if __name__ == "__main__":
    print(main())

"""The cases: a program, a fault, when and how strong. A third comes from a generator and is not looked at in tuning.

The seeds of the runs and of the generator were written down before anything was tuned.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.rescuing.faults import FAULTS, Fault

SEEDS = (11, 23, 37, 41, 53)
GENERATOR_SEED = 20_261_122
NUM_HELD_OUT_CASES = 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to go wrong. ``group`` is what the issue calls it; ``held_out`` cases come from the generator."""

    program: str
    fault: str
    onset: int = 0
    size: float = 1.0
    length: int = 1
    group: str = ""
    held_out: bool = False
    step_seconds: float = 0.0
    """What is slept in each step, in place of a device that works."""

    @property
    def name(self) -> str:
        return f"{self.fault}-{self.program}-at{self.onset}-x{self.size:g}-for{self.length}"

    def build(self) -> Fault:
        fault = FAULTS[self.fault](onset=self.onset, size=self.size, length=self.length)
        return fault if not self.step_seconds else _at_pace(fault, self.step_seconds)


def _at_pace(fault: Fault, seconds: float) -> Fault:
    strike = fault.strike

    def sleep_and_strike(program: Any, step: int) -> None:
        time.sleep(seconds)
        strike(program, step)

    object.__setattr__(fault, "strike", sleep_and_strike)
    return fault


def _case(group: str, fault: str, program: str, onset: int, size: float = 1.0, length: int = 1) -> Case:
    return Case(group=group, fault=fault, program=program, onset=onset, size=size, length=length)


TUNING: tuple[Case, ...] = (
    _case("scheduler bug", "Jump", "MLP", 150, 1000),
    _case("scheduler bug", "Jump", "GPT", 200, 300),
    _case("scheduler bug", "Jump", "LSTM", 250, 300),
    _case("scheduler bug", "Jump", "VAE", 120, 300),
    _case("scheduler bug", "Jump", "GAN", 150, 100),
    _case("scheduler bug", "Glitch", "CNN", 180, 1000, 2),
    _case("scheduler bug", "Glitch", "GPT", 220, 1000, 1),
    _case("scheduler bug", "Glitch", "VAE", 260, 1000, 3),
    _case("bad LR", "Ramp", "CNN", 120, 500, 150),
    _case("bad LR", "Ramp", "LSTM", 120, 300, 100),
    _case("LR too high from the start", "Jump", "MLP", 0, 100),
    _case("LR too high from the start", "Jump", "GPT", 0, 100),
    _case("LR too high from the start", "Jump", "PlainCNN", 0, 30),
    _case("slow convergence", "Jump", "MLP", 60, 1e-6),
    _case("slow convergence", "Jump", "GPT", 0, 0.01),
    _case("slow convergence", "Jump", "LSTM", 50, 1e-4),
    _case("oscillation", "Swing", "VAE", 150, 30, 10),
    _case("oscillation", "Swing", "GPT", 150, 30, 10),
    _case("bad data", "NanBatches", "MLP", 200),
    _case("bad data", "NanBatches", "GAN", 150),
    _case("bad data", "WrongScale", "MLP", 200, 4),
    _case("poisoned batches", "NanBatches", "CNN", 200, 1, 8),
    _case("poisoned batches", "NanBatches", "LSTM", 260, 1, 15),
    _case("poisoned batches", "Outliers", "MLP", 300, 1e4, 5),
    _case("poisoned batches", "Outliers", "VAE", 250, 1e3, 1),
    _case("poisoned batches", "Outliers", "PlainCNN", 280, 1e3, 3),
    _case("label noise", "WrongLabels", "MLP", 330, 1, 50),
    _case("label noise", "WrongLabels", "LSTM", 330, 1, 50),
    _case("dying ReLU", "DeadUnits", "MLP", 200, 30),
    _case("dying ReLU", "DeadUnits", "PlainCNN", 150, 30),
    _case("dying ReLU", "DeadUnits", "VAE", 220, 30),
    _case("exploding", "ScaledWeights", "GPT", 200, 10),
    _case("exploding", "ScaledWeights", "TanhMLP", 250, 30),
    _case("exploding", "BitFlip", "GPT", 300, 1e4),
    _case("vanishing", "ScaledInit", "TanhMLP", 0, 0.01),
    _case("vanishing", "ScaledInit", "PlainCNN", 0, 0.05),
    _case("wrong loss scale", "LossScale", "PlainCNN", 150, 1000),
    _case("fp16 overflow", "StuckScale", "GPT", 150, 2.0**36),
    _case("fp16 overflow", "StuckScale", "MLP", 60, 2.0**36),
    _case("optimizer state", "Moments", "GPT", 250, 100),
    _case("out of memory", "Memory", "MLP", 100, 1, 12),
    _case("out of memory", "Memory", "GPT", 150, 1, 3),
    _case("posterior collapse", "Annealing", "VAE", 100, 50),
    _case("late instability", "Recurring", "GPT", 240, 0.5, 25),
    _case("late instability", "Recurring", "LSTM", 280, 0.5, 20),
)

_PICTURES = ("MLP", "CNN", "PlainCNN", "VAE")
_ALL = (*_PICTURES, "LSTM", "GPT")
KINDS: Mapping[str, tuple[str, tuple[str, ...], tuple[float, float], tuple[int, int]]] = {
    # fault: group, programs, size (drawn log-uniformly), length
    "Jump": ("scheduler bug", (*_ALL, "GAN"), (100, 3000), (1, 1)),
    "Glitch": ("scheduler bug", _ALL, (300, 3000), (1, 4)),
    "Ramp": ("bad LR", _ALL, (100, 1000), (60, 150)),
    "Swing": ("oscillation", _ALL, (20, 60), (6, 12)),
    "NanBatches": ("poisoned batches", (*_ALL, "GAN"), (1, 1), (1, 20)),
    "Outliers": ("poisoned batches", ("MLP", "PlainCNN", "VAE"), (1e3, 1e5), (1, 6)),
    "WrongLabels": ("label noise", ("MLP", "CNN", "LSTM", "GPT"), (1, 1), (20, 60)),
    "DeadUnits": ("dying ReLU", ("MLP", "PlainCNN", "VAE"), (10, 50), (1, 1)),
    "ScaledWeights": ("exploding", ("TanhMLP", "GPT", "LSTM", "VAE"), (5, 30), (1, 1)),
    "BitFlip": ("exploding", _ALL, (1e3, 1e6), (1, 1)),
    "LossScale": ("wrong loss scale", ("PlainCNN",), (100, 3000), (1, 1)),
    "StuckScale": ("fp16 overflow", ("MLP", "LSTM", "GPT", "VAE"), (2.0**30, 2.0**38), (1, 1)),
    "Moments": ("optimizer state", _ALL, (30, 300), (1, 1)),
    "Memory": ("out of memory", ("MLP", "PlainCNN", "GPT"), (1, 1), (2, 6)),
    "Annealing": ("posterior collapse", ("VAE",), (20, 60), (1, 1)),
    "Recurring": ("late instability", ("GPT", "LSTM", "MLP"), (0.3, 1.0), (15, 30)),
}
LATE = {"WrongLabels": (0.75, 0.85), "Recurring": (0.5, 0.7)}
"""Shares of the run within which a fault begins, where it is not 0.2 to 0.75."""
NUM_STEPS = 400


def held_out() -> tuple[Case, ...]:
    """Kind, program, time and size drawn once for all, by a seed written down before tuning."""
    draw = random.Random(GENERATOR_SEED)
    cases: dict[str, Case] = {}
    while len(cases) < NUM_HELD_OUT_CASES:
        fault = draw.choice(sorted(KINDS))
        group, programs, (low, high), lengths = KINDS[fault]
        first, last = LATE.get(fault, (0.2, 0.75))
        case = Case(
            program=draw.choice(programs),
            fault=fault,
            onset=draw.randrange(int(first * NUM_STEPS), int(last * NUM_STEPS)),
            size=float(f"{math.exp(draw.uniform(math.log(low), math.log(high))):.3g}"),
            length=draw.randint(*lengths),
            group=group,
            held_out=True,
        )
        cases[case.name] = case
    return tuple(cases.values())

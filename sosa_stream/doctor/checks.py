"""All checks, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sosa_stream.doctor import (
    batches,
    determinism,
    environment,
    gradients,
    inputs,
    labels,
    loss,
    memory,
    overfit,
    rates,
    speed,
)
from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding
from sosa_stream.doctor.names import NAMES


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A question and what answers it. ``everywhere``: on each rank; else on rank 0, whose replicas the others are."""

    name: str
    question: str
    run: Callable[[Context], Finding]
    everywhere: bool = True


CHECKS = (
    Check(name="batches", question="Do batches load, come again, and differ between ranks?", run=batches.check),
    Check(name="inputs", question="Are inputs finite and normalised?", run=inputs.check),
    Check(name="labels", question="Do shapes and dtypes fit, and are labels in range?", run=labels.check),
    Check(name="loss", question="Is the first loss what it should be?", run=loss.check),
    Check(name="gradients", question="Does every parameter get a gradient and a step?", run=gradients.check),
    Check(name="overfit", question="Can one batch be learned by heart?", run=overfit.check, everywhere=False),
    Check(name="learning_rate", question="Which learning rate works?", run=rates.check, everywhere=False),
    Check(name="memory", question="How much room is there, for how large a batch?", run=memory.check, everywhere=False),
    Check(name="determinism", question="Does the same seed give the same bits?", run=determinism.check),
    Check(name="speed", question="How much of a step is loading, and what gains?", run=speed.check, everywhere=False),
    Check(name="compile", question="What does torch.compile gain?", run=speed.check_compile, everywhere=False),
    Check(name="environment", question="What is this machine, and is it used?", run=environment.check),
)
assert tuple(check.name for check in CHECKS) == NAMES
LAST = ("compile",)
"""Run after all others: what cannot be interrupted costs no other answer."""

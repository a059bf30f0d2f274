"""What a fault is, and how people write one: ``KIND@STEP`` or ``KIND@STEP:rank=1,key=value``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from sosa_stream.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultKind:
    """A kind of fault: what it does, its keys with their defaults, and the first step at which it makes sense."""

    help: str
    defaults: Mapping[str, float] = field(default_factory=dict)
    first_step: int = 0


KINDS: Mapping[str, FaultKind] = MappingProxyType(
    {
        # Not at step 0: a jump needs a rate to jump from.
        "lr_jump": FaultKind(
            help="the learning rate is multiplied by factor from STEP on, and stays so whatever the scheduler does",
            defaults=MappingProxyType({"factor": 1000.0}),
            first_step=1,
        ),
        "nan_batch": FaultKind(help="the floating tensors of the batch of STEP hold NaN"),
        "exception": FaultKind(help="the forward pass of STEP raises RuntimeError"),
        "oom": FaultKind(
            help="the first forward pass of STEP raises torch.OutOfMemoryError; with above=N every pass of more than N "
            "samples does, in STEP and the steps after it, steps of them in all",
            defaults=MappingProxyType({"above": 0.0, "steps": 1.0}),
        ),
        "kill": FaultKind(help="the process sends itself SIGKILL in the forward pass of STEP"),
        "sleep": FaultKind(
            help="the forward passes of STEP and the steps after it sleep for seconds each, steps of them in all",
            defaults=MappingProxyType({"seconds": 1.0, "steps": 1.0}),
        ),
    }
)

HELP = "KIND@STEP[:rank=R,key=value,...]; STEP counts optimizer steps from 0; kinds: " + "; ".join(
    f"{name} ({', '.join(f'{key}={value:g}' for key, value in kind.defaults.items()) or 'no keys'}): {kind.help}"
    for name, kind in KINDS.items()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. ``step`` counts outermost optimizer step-calls from 0; ``rank`` None: every rank."""

    kind: str
    step: int
    rank: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        keys = {} if self.rank is None else {"rank": f"{self.rank}"}
        keys.update({key: f"{value:g}" for key, value in self.values.items()})
        return f"{self.kind}@{self.step}" + (
            ":" + ",".join(f"{key}={text}" for key, text in keys.items()) if keys else ""
        )


def parse_faults(texts: Iterable[str]) -> tuple[Fault, ...]:
    """Every fault named in ``texts``.

    Raises:
        UsageError: one of them is no fault; says which and why.
    """
    return tuple(parse_fault(text) for text in texts)


def parse_fault(text: str) -> Fault:
    """The fault that ``text`` names, with the kind's defaults filled in.

    Raises:
        UsageError: the kind or a key is unknown, or the step or a value is no number in its bounds.
    """
    head, colon, tail = text.partition(":")
    name, at, step_text = head.partition("@")
    if name not in KINDS:
        raise UsageError(f"--inject {text}: unknown kind {name!r}; known are {', '.join(KINDS)}")
    kind = KINDS[name]
    if not at or not _is_count(step_text):
        raise UsageError(f"--inject {text}: write the step as {name}@STEP, a whole number from {kind.first_step}")
    step = int(step_text)
    if step < kind.first_step:
        raise UsageError(f"--inject {text}: {name} needs a step from {kind.first_step} on")
    rank: int | None = None
    values = dict(kind.defaults)
    for item in tail.split(",") if colon else ():
        key, equals, value_text = item.partition("=")
        if not equals or (key != "rank" and key not in kind.defaults):
            known = ", ".join(("rank", *kind.defaults))
            raise UsageError(f"--inject {text}: {item!r} is no key=value of {name}; its keys are {known}")
        if key == "rank":
            if not _is_count(value_text):
                raise UsageError(f"--inject {text}: rank must be a whole number from 0, not {value_text!r}")
            rank = int(value_text)
        else:
            values[key] = _positive(text, key, value_text, kind.defaults[key])
    return Fault(kind=name, step=step, rank=rank, values=MappingProxyType(values))


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _positive(fault: str, key: str, text: str, default: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf or value == default):
        raise UsageError(f"--inject {fault}: {key} must be a number above 0, not {text!r}")
    return value

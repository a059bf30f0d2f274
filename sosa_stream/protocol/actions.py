"""The closed set of actions that a command may ask of an agent, with their typed, bounded parameters.

An action outside this table, or a value outside its bounds, is refused on both sides: the daemon cannot publish it
and an agent will not apply it.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from sosa_stream.errors import RefusedError
from sosa_stream.protocol.columns import FROZEN_CHUNKS


def in_words(action: str, params: Mapping[str, Any]) -> str:
    """An action for people: ``scale_lr(factor=0.5)``."""
    told = (f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in params.items())
    return f"{action}({', '.join(told)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter of an action: its type and closed bounds."""

    type: type[int] | type[float] | type[str]
    low: float = -math.inf
    high: float = math.inf
    required: bool = True
    names_folder: bool = False

    def check(self, action: str, name: str, value: object) -> None:
        if self.type is str:
            if not isinstance(value, str) or not 0 < len(value) <= 128 or not value.isprintable():
                raise RefusedError(f"{action}: {name} must be a short string, not {value!r}")
            if self.names_folder and not re.fullmatch(r"[A-Za-z0-9][\w-]{0,63}", value, re.ASCII):
                raise RefusedError(f"{action}: {name}={value!r} can be no folder's name (letters, digits, _ and -)")
            return
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or (self.type is int and not isinstance(value, int))
        ):
            raise RefusedError(f"{action}: {name} must be {self.type.__name__}, not {value!r}")
        if not (self.low <= value <= self.high and abs(value) <= sys.float_info.max):
            raise RefusedError(f"{action}: {name}={value!r} lies outside [{self.low:g}, {self.high:g}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSpec:
    """What an action takes, whether it can be taken back, and whether it stands.

    What stands is wanted for as long as nobody takes it back: a new generation of the run applies it again.
    """

    params: Mapping[str, Param]
    irreversible: bool = False
    stands: bool = False


ACTIONS: Mapping[str, ActionSpec] = MappingProxyType(
    {
        # Do nothing: the arm that every fix is compared with.
        "none": ActionSpec(params={}),
        # Leave the weights alone for this many optimizer steps. Nothing to undo: no update was made.
        "skip_step": ActionSpec(
            params={"num_steps": Param(type=int, low=1, high=100, required=False)}, irreversible=True
        ),
        # Let this many batches of the training data go by unused; the data does not come back.
        "skip_data": ActionSpec(params={"num_batches": Param(type=int, low=1, high=10_000)}, irreversible=True),
        # Scale gradients so that their total norm is at most this (unscaled, per optimizer step).
        "clip_grad": ActionSpec(params={"max_norm": Param(type=float, low=1e-12, high=1e12)}, stands=True),
        # Multiply the learning rate in force; the script's own scheduler goes on underneath. With hold=1 the rate that
        # this gives is the highest that there is from here on, until a factor above 1 raises it again.
        "scale_lr": ActionSpec(
            params={
                "factor": Param(type=float, low=1e-6, high=1e3),
                "hold": Param(type=int, low=0, high=1, required=False),
            },
            stands=True,
        ),
        # Restore the state of the newest good snapshot taken before this step.
        "rollback": ActionSpec(params={"before_step": Param(type=int, low=0, high=2**62)}),
        # Forget the optimizers' moments and step counts, as if they had just been made.
        "reset_optimizer_state": ActionSpec(params={}),
        # Update once in this many optimizer steps, with the mean of their gradients; 1 is every step.
        "grad_accumulation": ActionSpec(params={"num_steps": Param(type=int, low=1, high=1024)}, stands=True),
        # Run each batch as this many micro-batches with the same gradient, in `training_step`; 1 is whole batches.
        "split_batch": ActionSpec(params={"num_parts": Param(type=int, low=1, high=1024)}, stands=True),
        # Set the scale of every GradScaler.
        "set_loss_scale": ActionSpec(params={"scale": Param(type=float, low=2.0**-20, high=2.0**40)}),
        # Copy parameters and optimizer state from this rank to all others; what the others held is gone. ``frozen``:
        # the sum of 2^i for each chunk i of frozen parameters to be copied as well; ranks may differ in the others.
        "resync": ActionSpec(
            params={
                "source": Param(type=int, low=0, high=2**16),
                "frozen": Param(type=int, low=0, high=2**FROZEN_CHUNKS - 1, required=False),
            },
            irreversible=True,
        ),
        # Set a knob that the script has registered, within the knob's own bounds.
        "set_knob": ActionSpec(params={"name": Param(type=str), "value": Param(type=float)}, stands=True),
        # Write a checkpoint to disk, named ``<name>_<step>``, or ``last``.
        "save_checkpoint": ActionSpec(params={"name": Param(type=str, required=False, names_folder=True)}),
        # Write this rank's stacks, memory and fixes in force to a file.
        "dump_diagnostics": ActionSpec(params={}),
        # End training on all ranks at one step.
        "stop": ActionSpec(params={}, irreversible=True),
        # End the processes, so that torch elastic starts them again. Alone in its command: no fence is waited at.
        "restart": ActionSpec(params={}, irreversible=True),
        # Take an earlier command back: the inverse of each of its actions, in reverse order, or of those of one name.
        "revert": ActionSpec(params={"command": Param(type=str), "only": Param(type=str, required=False)}),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One action with its parameters. Validates itself.

    Raises:
        RefusedError: the action is unknown, a parameter is unknown, missing, of the wrong type or out of bounds.
    """

    action: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec = ACTIONS.get(self.action)
        if spec is None:
            raise RefusedError(f"unknown action {self.action!r}; known are {', '.join(ACTIONS)}")
        for name, value in self.params.items():
            param = spec.params.get(name)
            if param is None:
                raise RefusedError(f"{self.action}: unknown parameter {name!r}")
            param.check(self.action, name, value)
        missing = [name for name, param in spec.params.items() if param.required and name not in self.params]
        if missing:
            raise RefusedError(f"{self.action}: missing parameter {', '.join(missing)}")

    @property
    def irreversible(self) -> bool:
        return ACTIONS[self.action].irreversible

    @property
    def in_words(self) -> str:
        """For people: ``scale_lr(factor=0.5)``."""
        return in_words(self.action, self.params)

    def as_dict(self) -> dict[str, Any]:
        return {"action": self.action, "params": dict(self.params)}

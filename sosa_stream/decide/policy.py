"""What the run's owner allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sosa_stream.config import AutoSettings, Mode
from sosa_stream.decide.playbook import Situation
from sosa_stream.errors import ConfigError
from sosa_stream.protocol.actions import Action

GATE = 0.5
"""Confidence below which a fix is proposed to a person and never applied by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPolicy:
    """What the run may have done to it, as its agents said in ``Hello.policy``."""

    mode: Mode = Mode.OBSERVE
    limits: AutoSettings = field(default_factory=AutoSettings)
    snapshots: bool = True
    """Whether the ranks keep snapshots: without, nothing can be rolled back, and no fix says so."""

    @classmethod
    def read(cls, policy: Mapping[str, Any]) -> RunPolicy:
        """From the wire.

        Raises:
            ConfigError: an unknown mode or action, or a limit that is no number or out of bounds.
        """
        known: dict[str, Any] = {}
        for spec in fields(AutoSettings):
            if spec.name not in policy:
                continue
            value = policy[spec.name]
            if spec.name == "allow":
                if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
                    raise ConfigError(f"policy: allow must be a list of actions, not {value!r}")
                known["allow"] = tuple(value)
            elif spec.name == "explore":
                if not isinstance(value, bool):
                    raise ConfigError(f"policy: explore must be true or false, not {value!r}")
                known["explore"] = value
            elif isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"policy: {spec.name} must be a number, not {value!r}")
            else:
                known[spec.name] = value
        try:
            mode = Mode(policy.get("mode", Mode.OBSERVE))
        except ValueError:
            raise ConfigError(f"policy: unknown mode {policy.get('mode')!r}") from None
        return cls(mode=mode, limits=AutoSettings(**known), snapshots=policy.get("snapshots", True) is not False)

    def may_apply(self, actions: tuple[Action, ...], confidence: float) -> bool:
        """Whether a fix goes ahead without a person."""
        allowed = all(action.action in self.limits.allow for action in actions)
        return self.mode is Mode.AUTO and allowed and confidence >= GATE

    def within_limits(self, actions: tuple[Action, ...], now: Situation) -> bool:
        """Whether every action stays within ``max_lr_change`` and ``max_rollback_steps``."""
        multiplier = now.lr_multiplier
        for action in actions:
            if action.action == "scale_lr":
                multiplier *= action.params["factor"]
            elif (
                action.action == "rollback" and now.step - action.params["before_step"] > self.limits.max_rollback_steps
            ):
                return False
        return 1.0 / self.limits.max_lr_change <= multiplier <= self.limits.max_lr_change


class Budget:
    """How many fixes were spent, for each kind and in the whole run."""

    def __init__(self) -> None:
        self._of_kind: dict[str, int] = {}
        self._last_step: dict[str, int] = {}
        self._of_run = 0

    def note(self, kind: str, step: int, cooldown_steps: int) -> None:
        """An incident of this kind is open; its fixes are counted from zero if the last one is long ago."""
        last = self._last_step.get(kind)
        if last is not None and step - last > cooldown_steps:
            self._of_kind[kind] = 0
        self._last_step[kind] = step

    def spend(self, kind: str) -> None:
        self._of_kind[kind] = self._of_kind.get(kind, 0) + 1
        self._of_run += 1

    def left(self, kind: str, limits: AutoSettings) -> bool:
        return self._of_kind.get(kind, 0) < limits.max_fixes_per_error and self._of_run < limits.max_fixes_per_run

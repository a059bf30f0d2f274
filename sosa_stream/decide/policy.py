"""What the run's owner allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sosa_stream.decide.playbook import Situation
from sosa_stream.decide.quiet_hours import QuietHours
from sosa_stream.errors import ConfigError
from sosa_stream.protocol.actions import Action
from sosa_stream.settings import AutoSettings, Mode, auto_settings

GATE = 0.5
"""Confidence below which a fix is proposed to a person and never applied by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPolicy:
    """What the run may have done to it, as its agents said in ``Hello.policy``."""

    mode: Mode = Mode.OBSERVE
    limits: AutoSettings = field(default_factory=AutoSettings)
    snapshots: bool = True
    """Whether the ranks keep snapshots: without, nothing can be rolled back, and no fix says so."""
    quiet: QuietHours = field(default_factory=QuietHours)
    """When nothing is applied by itself."""

    @classmethod
    def read(cls, policy: Mapping[str, Any]) -> RunPolicy:
        """From the wire.

        Raises:
            ConfigError: an unknown mode or action, or a limit that is no number or out of bounds.
        """
        limits = auto_settings(policy)
        try:
            mode = Mode(policy.get("mode", Mode.OBSERVE))
        except ValueError:
            raise ConfigError(f"policy: unknown mode {policy.get('mode')!r}") from None
        return cls(
            mode=mode,
            limits=limits,
            snapshots=policy.get("snapshots", True) is not False,
            quiet=QuietHours.read(limits.quiet_hours, policy.get("quiet_offsets", ())),
        )

    def may_apply(self, actions: tuple[Action, ...], confidence: float) -> bool:
        """Whether a fix goes ahead without a person."""
        return self.mode is Mode.AUTO and confidence >= GATE and not self.limits.refusal(actions)

    def within_limits(self, actions: tuple[Action, ...], now: Situation) -> bool:
        """Whether every action stays within ``max_lr_change`` and ``max_rollback_steps``.

        Back to a learning rate that the run has held before is no change: how far a fault has taken it does not count.
        """
        if self._gives_up_too_much(actions, now.step):
            return False
        multiplier = _multiplier_after(actions, now.lr_multiplier)
        return self._is_near(multiplier) or _leads_back(multiplier, now)

    def excess(self, actions: tuple[Action, ...], step: int, lr_multiplier: float) -> str:
        """What is too much in actions that are for no incident, or nothing."""
        if self._gives_up_too_much(actions, step):
            return f"it goes back further than max_rollback_steps {self.limits.max_rollback_steps}"
        if not self._is_near(_multiplier_after(actions, lr_multiplier)):
            return (
                f"all fixes together would change the learning rate beyond max_lr_change {self.limits.max_lr_change:g}"
            )
        return ""

    def _gives_up_too_much(self, actions: tuple[Action, ...], step: int) -> bool:
        befores = [action.params["before_step"] for action in actions if action.action == "rollback"]
        return any(step - before > self.limits.max_rollback_steps for before in befores)

    def _is_near(self, multiplier: float) -> bool:
        return 1.0 / self.limits.max_lr_change <= multiplier <= self.limits.max_lr_change


def _multiplier_after(actions: tuple[Action, ...], multiplier: float) -> float:
    factors: list[float] = [action.params["factor"] for action in actions if action.action == "scale_lr"]
    return math.prod(factors, start=multiplier)


def _leads_back(multiplier: float, now: Situation) -> bool:
    """Whether the rate that a multiplier gives lies between those that are known of before the incident."""
    known = (now.usual_lr, now.incident.evidence.get("lr_before"))
    before = [lr for lr in known if isinstance(lr, float)]
    if not before or now.lr is None or not now.lr_multiplier > 0.0:
        return False
    lr = now.lr / now.lr_multiplier * multiplier
    return 0.99 * min(before) <= lr <= 1.01 * max(before)


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

    def refund(self, kind: str) -> None:
        """What was spent on a fix that no rank has applied."""
        self._of_kind[kind] = max(0, self._of_kind.get(kind, 0) - 1)
        self._of_run -= 1

    def left_of_run(self, limits: AutoSettings) -> int:
        """Fixes that the run may still have."""
        return max(0, limits.max_fixes_per_run - self._of_run)

    def left(self, kind: str, limits: AutoSettings) -> bool:
        return self._of_kind.get(kind, 0) < limits.max_fixes_per_error and self._of_run < limits.max_fixes_per_run

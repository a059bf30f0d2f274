"""``clip_grad``: a bound on the gradient norm. There is none until a fix, or the script, sets one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo, leave


class ClipGradients(Actuator):
    """The latest bound is the one in force."""

    def __init__(self, in_force: InForce) -> None:
        self._in_force = in_force
        self._bounds: dict[object, float] = {}

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        return "" if self._in_force.norm_is_shared else "the gradients are not known to be equal on all ranks"

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        token = object()
        self._bounds[token] = params["max_norm"]
        self._reckon()

        return lambda: leave(self._bounds, token, self._reckon), f"gradient norm clipped at {params['max_norm']:g}"

    def begin_anew(self) -> None:
        self._bounds.clear()
        self._reckon()

    def _reckon(self) -> None:
        self._in_force.max_norm = next(reversed(self._bounds.values()), None)

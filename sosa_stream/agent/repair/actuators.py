"""What a fix does to training, and how it is taken back.

All of it runs on the training thread, at the tick that the fence agreed on, before the optimizer's step. An action
that fails undoes those of its command that came before it: nothing is left half applied.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from sosa_stream.agent.repair.snapshots import Snapshot, SnapshotRing, TrainingState
from sosa_stream.errors import RefusedError
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import Command

EXIT_STOPPED = 76
"""Exit code of a process that a `stop` ended; not 0, so that no scheduler takes the run for finished."""

Undo = Callable[[], None]


class StopTraining(SystemExit):
    """Raised in the training thread, on all ranks at one tick, by the action `stop`."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


class Actuators:
    """The fixes in force on this rank.

    ``lr_multiplier`` and ``max_norm`` stand until they are taken back; ``skip_left`` counts steps still to be skipped.
    """

    def __init__(self, state: TrainingState, snapshots: SnapshotRing | None, max_lr_change: float) -> None:
        self.lr_multiplier = 1.0
        self.max_norm: float | None = None
        self.skip_left = 0
        self.stale_gradients = False
        self.stop_wanted = False
        self.norm_is_shared = True
        """Whether the last gradient norm was the same on all ranks, as the probe saw it."""
        self.history: list[dict[str, Any]] = []
        self._state = state
        self._snapshots = snapshots
        self._max_lr_change = max_lr_change
        # Each fix in force under a token of its own, so that any of them can be taken back, in any order.
        self._lr_factors: dict[object, float] = {}
        self._clip_bounds: dict[object, float] = {}
        self._undo: dict[str, list[Undo]] = {}
        self._before_rollback: dict[str, Snapshot] = {}
        self._rolled_back_to: int | None = None

    @property
    def standing(self) -> bool:
        """Whether a fix is in force that all ranks must go on applying alike."""
        return self.lr_multiplier != 1.0 or self.max_norm is not None

    def refusal(self, command: Command, step: int) -> str:
        """Why this rank could not carry ``command`` out as things stand, or nothing.

        Asked before the rank holds the command: one that cannot must say so before the others are bound.
        """
        for action in command.actions:
            if action.action == "rollback" and (
                self._snapshots is None or not self._snapshots.may_choose(action.params["before_step"], step)
            ):
                return f"rollback: no healthy snapshot from before step {action.params['before_step']} is held"
            if action.action == "clip_grad" and not self.norm_is_shared:
                return "clip_grad: the gradients are not known to be equal on all ranks"
            if action.action == "revert" and action.params["command"] not in self._undo:
                return f"revert: command {action.params['command']} is not in force here"
            if action.action == "scale_lr" and not self._within_bounds(self.lr_multiplier * action.params["factor"]):
                return f"scale_lr: beyond auto.max_lr_change {self._max_lr_change:g} in all"
        return ""

    def apply(self, command: Command, tick: int, step: int) -> str:
        """Carry out all actions of ``command`` as one. Returns what was done, in words.

        Raises:
            SosaError: an action cannot be carried out, on no rank; those before it have been undone.
            Exception: whatever else went wrong on this rank alone, such as memory; likewise undone.
        """
        done: list[Undo] = []
        words: list[str] = []
        stale, saved = self.stale_gradients, dict(self._before_rollback)
        self._rolled_back_to = None
        try:
            for action in command.actions:
                undo, text = self._apply_one(action, command, tick, step)
                done.append(undo)
                words.append(text)
        except Exception:
            for undo in reversed(done):
                undo()
            self.stale_gradients, self._before_rollback = stale, saved
            raise
        if self._rolled_back_to is not None and self._snapshots is not None:
            self._snapshots.forget_after(self._rolled_back_to)
        self._undo[command.id] = done
        detail = "; ".join(words)
        self.history.append(
            {
                "id": command.id,
                "incident": command.incident,
                "actions": [action.as_dict() for action in command.actions],
                "state": "applied",
                "applied_step": step,
                "verdict": None,
                "reason": detail,
            }
        )
        return detail

    def begin_anew(self) -> None:
        """Another model is trained from here on: what was done to the last one does not concern it."""
        self._lr_factors.clear()
        self._clip_bounds.clear()
        self._reckon()
        self._undo.clear()
        self._before_rollback.clear()
        if self._snapshots is not None:
            self._snapshots.begin_anew()

    def digest(self) -> str:
        """A digest of parameters and optimizer state as they lie in this process, to be compared between replicas."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self._state.local_tensors():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _apply_one(self, action: Action, command: Command, tick: int, step: int) -> tuple[Undo, str]:
        params = action.params
        match action.action:
            case "scale_lr":
                return self._scale_lr(params["factor"])
            case "clip_grad":
                return self._set_clip(params["max_norm"])
            case "skip_step":
                return self._skip(params.get("num_steps", 1))
            case "rollback":
                return self._rollback(params["before_step"], command, tick, step)
            case "stop":
                self.stop_wanted = True
                return self._forget_stop, "stopping"
            case "revert":
                return self._revert(params["command"])
        raise RefusedError(f"this agent does not carry out {action.action!r}")

    def _scale_lr(self, factor: float) -> tuple[Undo, str]:
        after = self.lr_multiplier * factor
        if not self._within_bounds(after):
            raise RefusedError(f"scale_lr: ×{after:g} in all is beyond auto.max_lr_change {self._max_lr_change:g}")
        token = object()
        self._lr_factors[token] = factor
        self._reckon()

        def undo() -> None:
            self._lr_factors.pop(token, None)
            self._reckon()

        return undo, f"learning rate ×{after:g}"

    def _within_bounds(self, multiplier: float) -> bool:
        return 1 / self._max_lr_change <= multiplier <= self._max_lr_change

    def _set_clip(self, max_norm: float) -> tuple[Undo, str]:
        token = object()
        self._clip_bounds[token] = max_norm
        self._reckon()

        def undo() -> None:
            self._clip_bounds.pop(token, None)
            self._reckon()

        return undo, f"gradient norm clipped at {max_norm:g}"

    def _reckon(self) -> None:
        """What the fixes in force come to: every factor, and the latest bound."""
        self.lr_multiplier = math.prod(self._lr_factors.values())
        self.max_norm = next(reversed(self._clip_bounds.values()), None)

    def _skip(self, num_steps: int) -> tuple[Undo, str]:
        self.skip_left += num_steps

        def undo() -> None:
            self.skip_left = max(0, self.skip_left - num_steps)

        return undo, f"skipping {self.skip_left} step(s)"

    def _rollback(self, before_step: int, command: Command, tick: int, step: int) -> tuple[Undo, str]:
        if self._snapshots is None:
            raise RefusedError("rollback: this run keeps no snapshots (agent.snapshots)")
        target = self._snapshots.choose(before_step, step)
        present = self._state.capture(tick, step)
        self._state.restore(target)
        self._rolled_back_to = target.step
        self.stale_gradients = True  # the gradients at hand belong to the weights that are gone
        self._before_rollback = {command.id: present}  # one is kept: two whole models are enough

        def undo() -> None:
            saved = self._before_rollback.pop(command.id, None)
            if saved is None:
                raise RefusedError("the state before this rollback is no longer held")
            self._state.restore(saved)
            self.stale_gradients = True

        return undo, f"rolled back to the state before step {target.step}"

    def _revert(self, command_id: str) -> tuple[Undo, str]:
        undos = self._undo.get(command_id)
        if undos is None:
            raise RefusedError(f"command {command_id} was not applied here")
        factors, bounds = dict(self._lr_factors), dict(self._clip_bounds)
        for undo in reversed(undos):
            undo()
        del self._undo[command_id]

        def redo() -> None:
            self._lr_factors, self._clip_bounds = factors, bounds
            self._reckon()

        return redo, f"took back {command_id}"

    def _forget_stop(self) -> None:
        self.stop_wanted = False


class LearningRate:
    """Multiplies the learning rate for the length of one optimizer step only.

    Schedulers, checkpoints and the script see the original before and after, so a scheduler cannot undo the fix and
    goes on with its shape.
    """

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], Any]] = []

    def scale(self, optimizer: Optimizer, multiplier: float) -> None:
        for group in optimizer.param_groups:
            lr = group.get("lr")
            if isinstance(lr, torch.Tensor):  # capturable: the optimizer holds this very tensor
                if not any(lr is group["lr"] for group, _ in self._before):  # groups may share one
                    self._before.append((group, lr.clone()))
                    lr.mul_(multiplier)
            elif lr is not None:
                self._before.append((group, lr))
                group["lr"] = lr * multiplier

    def restore(self) -> None:
        for group, before in self._before:
            if isinstance(before, torch.Tensor) and isinstance(group["lr"], torch.Tensor):
                group["lr"].copy_(before)
            else:
                group["lr"] = before
        self._before.clear()

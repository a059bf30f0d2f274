"""The fixes in force on this rank: commands carried out whole or not at all, and taken back.

All of it runs on the training thread, at the tick that the fence agreed on, before the optimizer's step. A command
of which an action fails on any rank is undone on all: nothing is left half applied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from sosa_stream.agent.repair.accumulation import AccumulateGradients
from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Nothing, Redo, Undo
from sosa_stream.agent.repair.clipping import ClipGradients
from sosa_stream.agent.repair.knobs import Knobs
from sosa_stream.agent.repair.learning_rate import ScaleLearningRate
from sosa_stream.agent.repair.loss_scale import SetLossScale
from sosa_stream.agent.repair.resetting import ResetOptimizerState
from sosa_stream.agent.repair.resync import Resync
from sosa_stream.agent.repair.rollback import Rollback
from sosa_stream.agent.repair.skipping import SkipData, SkipSteps
from sosa_stream.agent.repair.snapshots import SnapshotRing
from sosa_stream.agent.repair.stopping import Stop
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.splitting.micro_batches import SplitBatches
from sosa_stream.agent.watch.deliveries import Deliveries
from sosa_stream.errors import HalfAppliedError, RefusedError, SosaError, describe
from sosa_stream.protocol.actions import ACTIONS, Action
from sosa_stream.protocol.messages import Command


class Agreement(Protocol):
    """What a command's ranks agree through: `fence.Fence`."""

    @property
    def members(self) -> tuple[int, ...]: ...

    def conclude(self, failure: str = "") -> str: ...


@dataclass(slots=True, kw_only=True)
class _UnderWay:
    """A command whose actions are being carried out, in that order."""

    command: Command
    step: int
    undos: list[Undo] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @property
    def detail(self) -> str:
        return "; ".join(self.words)


@dataclass(slots=True)
class _Done:
    """A command that is applied, with what takes back each of its actions that is in force, by the action's place."""

    command: Command
    undos: dict[int, Undo]


class Actuators:
    """Carries out commands by one `Actuator` for each action that this agent knows.

    Args:
        by_action: the actuators; without one for it, an action is refused.
        digest: of the state that must be equal on all replicas.
    """

    def __init__(self, in_force: InForce, by_action: Mapping[str, Actuator], digest: Callable[[], str]) -> None:
        self.in_force = in_force
        self.digest = digest
        self.history: list[dict[str, Any]] = []
        """What was done, as the public record of a command shows it."""
        self._by_action = by_action
        self._applied: dict[str, _Done] = {}
        """Commands that can still be taken back."""
        self._under_way: _UnderWay | None = None

    def refusal(self, command: Command, step: int) -> str:
        """Why this rank could not carry ``command`` out as things stand, or nothing.

        Asked before the rank holds the command: one that cannot must say so before the others are bound.
        """
        if self.in_force.uneven:
            return "ranks may take different numbers of steps (join): there is no step that they could agree on"
        for action in command.actions:
            if action.action == "revert":
                why = "" if self._chosen(action.params) else f"command {action.params['command']} is not in force here"
            else:
                actuator = self._by_action.get(action.action)
                why = "this agent does not know it" if actuator is None else actuator.refusal(action.params, step)
            if why:
                return f"{action.action}: {why}"
        return ""

    def carry_out(self, command: Command, tick: int, step: int, agreement: Agreement) -> tuple[bool, str]:
        """Apply ``command`` here; it stays if all ranks could. Returns whether it does, and what was done or why not.

        What has failed is undone only once all ranks know: an undo may speak with the others, and they come to it then.

        Raises:
            InDoubt: how the others fared could not be learnt.
            HalfAppliedError: it could be neither finished nor taken back here. The others take it back.
            Exception: it went wrong here after all had agreed to keep it.
        """
        detail = ""
        failed: Exception | None = None
        try:
            detail = self.apply(command, tick, step)
        except Exception as error:
            failed = error
        why = agreement.conclude(describe(failed) if failed else "")
        if isinstance(failed, HalfAppliedError):
            raise failed
        if why:
            self.take_back()
        else:
            self.keep()
        return not why, why or detail

    def apply(self, command: Command, tick: int, step: int) -> str:
        """Carry out all actions of ``command`` as one. Returns what was done, in words.

        `keep` or `take_back` follows, as the other ranks fared; `take_back` where this one has failed.

        Raises:
            HalfAppliedError: a command could be neither reverted nor left in force.
            Exception: an action failed. Those before it stand until `take_back`.
        """
        in_order = tuple(sorted(command.actions, key=self._comes_last))
        at = Moment(command=command.id, tick=tick, step=step, reason=command.reason)
        self._under_way = it = _UnderWay(command=replace(command, actions=in_order), step=step)
        for action in command.actions:
            if action.action in self._by_action:
                self._by_action[action.action].consult()
        for action in in_order:
            it.words.append(self._apply(action, at, it.undos))
        return it.detail

    def keep(self) -> None:
        """All ranks have applied the command under way."""
        assert self._under_way is not None
        it, self._under_way = self._under_way, None
        for action in it.command.actions:
            if action.action != "revert":
                self._by_action[action.action].keep()
        if all(action.action != "revert" for action in it.command.actions):  # what was taken back stays so
            self._applied[it.command.id] = _Done(it.command, dict(enumerate(it.undos)))
        self.history.append(
            {
                "id": it.command.id,
                "incident": it.command.incident,
                "actions": [action.as_dict() for action in it.command.actions],
                "state": "applied",
                "applied_step": it.step,
                "verdict": None,
                "reason": it.detail,
            }
        )

    def take_back(self) -> None:
        """Undo what was done of the command under way, which a rank has failed to apply. Nothing is trained with it.

        Raises:
            HalfAppliedError: it could not be undone whole.
        """
        assert self._under_way is not None
        it, self._under_way = self._under_way, None
        _undo(it.undos)

    def standing_fixes(self) -> list[dict[str, Any]]:
        """The actions in force that stand, by command, in the order in which they were applied: as JSON values.

        Each ``{"command", "actions", "step", "reason"}``; ``step`` is the one before which it was applied.
        """
        steps = {done["id"]: done["applied_step"] for done in self.history}
        found = []
        for done in self._applied.values():
            command, in_force = done.command, [done.command.actions[i] for i in done.undos]
            actions = [action.as_dict() for action in in_force if ACTIONS[action.action].stands]
            if actions:
                found.append(
                    {
                        "command": command.id,
                        "actions": actions,
                        "step": steps.get(command.id),
                        "reason": command.reason,
                    }
                )
        return found

    def begin_anew(self) -> None:
        """Another model is trained from here on: what was done to the last one does not concern it."""
        for actuator in self._by_action.values():
            actuator.begin_anew()
        self._applied.clear()

    def _apply(self, action: Action, at: Moment, undos: list[Undo]) -> str:
        """Carry out one action and append what takes it back. Returns what was done."""
        if action.action == "revert":
            undo, words = self._revert(action.params)
        elif action.action in self._by_action:
            undo, words = self._by_action[action.action].apply(action.params, at)
        else:
            raise RefusedError(f"this agent does not carry out {action.action!r}")
        undos.append(undo)
        return words

    def _comes_last(self, action: Action) -> bool:
        actuator = self._by_action.get(action.action)
        return actuator is None or not actuator.comes_first

    def _chosen(self, params: Mapping[str, Any]) -> list[int]:
        """Which actions of its command a ``revert`` takes back, by their places in it."""
        if params["command"] not in self._applied:
            return []
        done = self._applied[params["command"]]
        return [i for i in done.undos if params.get("only") in (None, done.command.actions[i].action)]

    def _revert(self, params: Mapping[str, Any]) -> tuple[Undo, str]:
        command_id, chosen = params["command"], self._chosen(params)
        if not chosen:
            raise RefusedError(f"command {command_id} was not applied here")
        done, applied = self._applied[command_id], dict(self._applied)
        undos, again = done.undos, list[Redo | None]()

        def redo() -> None:
            for each in reversed(again):
                if each is not None:
                    each()
            done.undos, self._applied = undos, applied

        try:
            for i in reversed(chosen):
                again.append(undos[i]())
        except HalfAppliedError:
            raise
        except SosaError:  # it has changed nothing, but those after it are undone already
            _undo([redo])
            raise
        except Exception as error:
            raise HalfAppliedError(describe(error)) from error
        done.undos = {i: undo for i, undo in undos.items() if i not in chosen}
        if not done.undos:
            del self._applied[command_id]
        return redo, f"took back {params['only'] + ' of ' if 'only' in params else ''}{command_id}"


def make_actuators(
    state: TrainingState,
    snapshots: SnapshotRing | None,
    max_lr_change: float,
    knobs: Knobs | None = None,
    deliveries: Deliveries | None = None,
    more: Mapping[str, Actuator] = MappingProxyType({}),
    leave_stop_mark: Callable[[Moment], None] = lambda at: None,
) -> Actuators:
    """Every action that this agent carries out; ``more`` are those that need what only the agent as a whole has."""
    in_force = InForce()
    by_action: dict[str, Actuator] = {
        "none": Nothing(),
        "skip_step": SkipSteps(in_force),
        "skip_data": SkipData(in_force, deliveries or Deliveries(), state.ranks),
        "clip_grad": ClipGradients(in_force),
        "scale_lr": ScaleLearningRate(in_force, state, max_lr_change),
        "rollback": Rollback(in_force, state, snapshots),
        "reset_optimizer_state": ResetOptimizerState(state),
        "grad_accumulation": AccumulateGradients(in_force, state),
        "set_loss_scale": SetLossScale(state),
        "resync": Resync(in_force, state),
        "split_batch": SplitBatches(in_force),
        "stop": Stop(in_force, leave_stop_mark),
        "set_knob": knobs if knobs is not None else Knobs(lambda text: None),
        **more,
    }
    return Actuators(in_force, by_action, state.digest)


def _undo(undos: list[Undo]) -> None:
    """Take back all that can be, in reverse order.

    Raises:
        HalfAppliedError: something could not be.
    """
    failures: list[Exception] = []
    for undo in reversed(undos):
        try:
            undo()
        except Exception as error:
            failures.append(error)
    if failures:
        raise HalfAppliedError("; ".join(describe(error) for error in failures)) from failures[0]

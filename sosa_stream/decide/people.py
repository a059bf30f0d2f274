"""What people ask of a run, carried out: they may do more than `auto`, and every fix of theirs says whose it is."""

from __future__ import annotations

from sosa_stream.decide.commands import CommandState
from sosa_stream.decide.dispatch import Dispatch
from sosa_stream.decide.ledger import KEEP_ALL, Entry
from sosa_stream.decide.repairs import Repairs
from sosa_stream.decide.requests import Approve, Fix, Pause, Propose, Reply, Request, Resume, Undo
from sosa_stream.detect.windows import RunWindows
from sosa_stream.protocol.actions import Action
from sosa_stream.settings import Mode

BY_HAND, BY_HAND_PATIENCE_STEPS = "by_hand", 120
NOT_BY_HAND = {
    "revert": "`sosa undo COMMAND` takes a command back",
    "none": "there is nothing to apply",
}


class People:
    """Answers requests, and carries them out."""

    def __init__(self, repairs: Repairs, dispatch: Dispatch) -> None:
        self._repairs = repairs
        self._dispatch = dispatch

    def reply(self, request: Request, *, anybody_there: bool) -> Reply:
        """What a request would come to as things stand. Changes nothing."""
        if not anybody_there and isinstance(request, Approve | Fix | Propose):
            return _no("no rank of this run is there: nothing can be applied")
        if self._dispatch.obstacle and isinstance(request, Approve | Fix | Propose):
            return _no(self._dispatch.obstacle)
        match request:
            case Approve(command=command):
                return self._may_approve(command)
            case Undo(command=command):
                return self._may_undo(command, anybody_there)
            case Fix():
                return self._may_fix(request.action) or self._yes_now
            case Propose():
                return self._may_fix(request.action) or self._repairs.alerts.reply(request, self._repairs.policy)
            case Pause():
                paused = self._repairs.paused
                return _no(f"{paused.who} has paused it already") if paused else _yes("nothing is applied by itself")
            case Resume():
                return _yes("repairs go on") if self._repairs.paused else _no("it is not paused")

    def carry_out(self, request: Request, windows: RunWindows, *, anybody_there: bool) -> None:
        """Do what was asked, if it can still be done; otherwise say why not."""
        repairs, dispatch = self._repairs, self._dispatch
        reply = self.reply(request, anybody_there=anybody_there)
        if not reply.done:
            what = type(request).__name__.lower()
            about = f" {request.command}" if isinstance(request, Approve | Undo) else ""
            dispatch.say(f"{request.who} asked to {what}{about}: {reply.text}")
            return
        match request:
            case Approve(command=command):
                dispatch.approve(command, request.who, windows)
            case Undo(command=command):
                why = f"{request.who} asked for it"
                if anybody_there and command in dispatch.standing:
                    dispatch.take_back(command, why, windows, asked=True)
                else:
                    dispatch.let_go(command, why)
            case Fix():
                self._fix(request, windows)
            case Propose():
                repairs.alerts.propose(request, windows, repairs.policy)
            case Pause():
                repairs.paused = request
                dispatch.say(f"{request.who} has paused repairs" + (f": {request.reason}" if request.reason else ""))
            case Resume():
                repairs.paused = None
                dispatch.say(f"{request.who} has resumed repairs")

    def _may_approve(self, command: str) -> Reply:
        entry = self._dispatch.ledger.get(command)
        if entry is None:
            return _no(f"this run does not know command {command}")
        if entry.record.state is not CommandState.PROPOSED:
            return _no(f"command {command} is {entry.record.state}; only a proposed command can be approved")
        return _yes("its ranks apply it as soon as they have agreed on a step", command)

    def _may_undo(self, command: str, anybody_there: bool) -> Reply:
        dispatch = self._dispatch
        entry, fix = dispatch.ledger.get(command), dispatch.standing.get(command)
        if entry is None:
            return _no(f"this run does not know command {command}")
        if any(known.reverts == command and known.in_flight for known in dispatch.ledger.live):
            return _no(f"command {command} is being taken back already")
        if fix is not None and fix.released_by:
            return _no(f"command {fix.released_by} has let its learning rate go: to take it back now would raise it")
        if fix is not None and anybody_there:
            return self._undo_of(entry)
        if fix is not None or any(waiting.entry is entry for waiting in dispatch.standing.waiting):
            return _yes("the processes that had it are gone, and it will not be applied again", command)
        if again := dispatch.standing.successor(command):
            return _no(f"command {command} is in force again as {again}: undo that one")
        state = entry.record.state
        if state in (CommandState.APPLIED, CommandState.VERIFIED):
            return _no(f"command {command} is {state}, and there is nothing of it left that could be taken back")
        return _no(f"command {command} is {state}; only what is in force can be taken back")

    def _undo_of(self, entry: Entry) -> Reply:
        """The undo of a rollback puts back the weights of then: what was trained since is lost."""
        how, most = "its ranks take it back as soon as they have agreed on a step", self._repairs.policy.limits
        record = entry.record
        if record.applied_step is None or all(action.action != "rollback" for action in record.actions):
            return _yes(how, self._dispatch.next_id)
        lost = self._dispatch.last_step - record.applied_step
        if lost > most.max_rollback_steps:
            return _no(
                f"command {record.id} went back to a snapshot {lost} steps ago: to undo it would lose what was trained "
                f"since, more than auto.max_rollback_steps {most.max_rollback_steps}; for the learning rate alone: "
                f"sosa fix {record.run} scale_lr factor=..."
            )
        return _yes(f"{how}, and go back to the weights of {lost} steps ago", self._dispatch.next_id)

    def _may_fix(self, action: Action) -> Reply | None:
        """Why not, or None."""
        if action.action in NOT_BY_HAND:
            return _no(NOT_BY_HAND[action.action])
        if self._repairs.policy.mode is Mode.OBSERVE:
            return _no("this run is only observed (mode observe): its ranks apply nothing")
        return None

    @property
    def _yes_now(self) -> Reply:
        return _yes("its ranks apply it as soon as they have agreed on a step", self._dispatch.next_id)

    def _fix(self, fix: Fix, windows: RunWindows) -> None:
        dispatch = self._dispatch
        how = "on probation" if fix.on_probation else "kept whatever becomes of it"
        entry = dispatch.new_entry(
            self._repairs.worst_incident, (fix.action,), 1.0, f"{fix.who} asked for it, {how}", origin="person"
        )
        entry.fix, entry.patience_steps = BY_HAND, BY_HAND_PATIENCE_STEPS
        entry.keep = frozenset() if fix.on_probation else KEEP_ALL
        entry.approved = True
        dispatch.publish(entry, windows)


def _yes(text: str, command: str = "") -> Reply:
    return Reply(done=True, text=text, command=command)


def _no(text: str) -> Reply:
    return Reply(done=False, text=text)

"""The agent's side of every conversation: joins a generation, sends frames, takes commands, serves the fence.

One `pump` does whatever is due and never waits. In a distributed job it runs on the agent's own thread; in one process
alone the training step calls it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sosa_stream import processes
from sosa_stream.agent.fence.fence import Fence
from sosa_stream.agent.fence.membership import Membership
from sosa_stream.agent.fence.notices import Aborted, Closed, Committed, Held
from sosa_stream.agent.footprint import Footprint, limit_bytes
from sosa_stream.agent.kill_file import KillFile
from sosa_stream.agent.place import Identity
from sosa_stream.agent.stacks import Stacks
from sosa_stream.agent.timezone import utc_offsets
from sosa_stream.agent.transport.link import Link
from sosa_stream.agent.transport.outbox import Outbox
from sosa_stream.errors import CommandRefusedError, describe
from sosa_stream.plain import plain
from sosa_stream.protocol.messages import (
    Ack,
    AckState,
    Announcement,
    Bye,
    Command,
    Header,
    Hello,
    Inquiry,
    Phase,
    Received,
)
from sosa_stream.settings import Mode, Settings

HEARTBEAT_SECONDS = 1.0
ASKED_SECONDS = 3.0
ASKED_BEATS = 8
"""Heartbeats a second of all ranks together, while they are asked where they stand: so fast it is told that they do."""
NOT_TAKEN_SECONDS = 5.0
UNREACHED_SECONDS = 1.0
"""How long the end of a job waits for a daemon that does not answer."""
RESTART_SECONDS = 1.0
"""How long a rank that is to end waits until the daemon has its word on it."""
MAX_PARAMETER_NAMES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where training stands, as the heartbeat tells it."""

    tick: int
    step: int
    phase: Phase


class Courier:
    """Carries between this rank and the daemon once the rank belongs to a generation."""

    def __init__(
        self,
        *,
        settings: Settings,
        identity: Identity,
        membership: Membership,
        link: Link,
        outbox: Outbox,
        fence: Fence | None,
        device: str,
        versions: dict[str, str],
        parameters: Sequence[str],
        progress: Callable[[], Progress],
        refusal: Callable[[Command], str],
        say: Callable[[str], None],
        footprint: Callable[[], Footprint] = Footprint,
        stacks: Stacks | None = None,
        restart: Callable[[str], None] | None = None,
        pod: str = "",
        hear: Callable[[Announcement], None] = lambda told: None,
        script_raised: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self.membership = membership
        self._link = link
        self._outbox = outbox
        self._fence = fence
        self._progress = progress
        self._footprint = footprint
        self._stacks = stacks
        self._restart = restart
        self._restart_by: tuple[float, str] | None = None
        self._cannot = refusal
        self._say = say
        self._hear = hear
        self._script_raised = script_raised
        self._seen: set[str] = set()
        self._rejected: set[str] = set()
        self._next_heartbeat = 0.0
        self._asked_until = 0.0
        self._reconnects = 0
        self._fence_closed = False
        self._taken_at = 0.0
        self._incidents: set[str] = set()
        self.ending = False
        """Set once the script ends by an error: it says so itself, and what the daemon says of it is said twice."""
        self._told_refused = False
        self._kill_file = KillFile(settings, membership.run, say)
        self._open: set[str] = set()
        """Commands at the fence that a kill file ends: all but those that take something back."""
        outbox.add_message(
            lambda header: Hello(
                header=header,
                pid=os.getpid(),
                device=device,
                versions={"python": platform.python_version(), **versions},
                parameters=tuple(parameters[:MAX_PARAMETER_NAMES]),
                policy=policy(settings),
                pod=pod,
                process=processes.identity(os.getpid()),
                memory_limit_bytes=limit_bytes(),
                own_topic=True,
            )
        )

    @property
    def wait_seconds(self) -> float:
        """How long the thread may sleep before something is due."""
        if self._fence is not None and self._fence.busy:
            return self._fence.poll_seconds
        return self._settings.agent.flush_seconds

    def wait(self) -> None:
        self._link.wait(self.wait_seconds, self._outbox.wakeup.fd)
        self._outbox.wakeup.clear()

    def pump(self) -> None:
        """Everything that is due now."""
        now = time.monotonic()
        self._outbox.flush(self.header)
        if now >= self._next_heartbeat:
            few = min(1.0, max(2, self._identity.world_size) / ASKED_BEATS)
            self._next_heartbeat = now + HEARTBEAT_SECONDS * (few if now < self._asked_until else 1.0)
            if self._stacks is not None:
                self._stacks.alive()
            at = self._progress()
            beat = self._outbox.heartbeat(self.header(0), at.tick, at.step, at.phase, self._footprint())
            self._link.send(beat)
        for message in self._link.receive():
            if isinstance(message, Received):
                seq = message.sources.get(self._identity.nonce)
                if seq is not None:
                    self._taken_at = now
                    self._outbox.ring.acknowledge(seq, now)
            elif isinstance(message, Inquiry):
                self._asked_until = now + ASKED_SECONDS
                self._answer(message)
            elif isinstance(message, Announcement):
                if message.incident:  # a person's command belongs to none
                    self._incidents.add(message.incident)
                self._hear(message)
                is_late = self.ending and not message.incident_kind  # a proposal, when nothing can be applied
                if not (self._script_raised() or is_late):  # what ended the script has been said by the script itself
                    self._say(message.text)
            elif message.id not in self._seen:
                self._seen.add(message.id)
                self._take(message)
        self._answer_refused()
        if self._link.reconnects != self._reconnects:
            self._reconnects = self._link.reconnects
            self._outbox.ring.rewind()
        self._doubt_daemon(now)
        if self._kill_file.look(now) and self._fence is not None:
            for command in self._open:
                self._fence.refuse(command)
            self._open.clear()
        self._serve_fence(now)
        self._outbox.flush(self.header)  # acks leave in the same round
        self._outbox.ring.send(self._link.send, now)
        if self._restart_by is not None and self._restart is not None:
            by, why = self._restart_by
            if now > by or not len(self._outbox.ring):
                self._restart(why)

    @property
    def killed(self) -> str:
        """Why nothing is to be done by itself now, or nothing: looked up on disk."""
        return self._kill_file.refusal()

    def header(self, seq: int) -> Header:
        """The header of a message with this sequence number; 0 for one outside the sequence."""
        return Header(
            run=self.membership.run,
            generation=self.membership.generation,
            source=self._identity.nonce,
            rank=self._identity.rank,
            world_size=self._identity.world_size,
            host=self._identity.host,
            seq=seq,
        )

    def leave_fence(self) -> None:
        """Training has ended: agree on nothing more."""
        if self._fence is not None:
            self._fence.close()

    def close(self, reason: str, exit_code: int, timeout_seconds: float) -> None:
        """Say goodbye and give what is in the ring ``timeout_seconds`` to be acknowledged, less if nobody is there."""
        self.ending = True
        dropped = self._outbox.num_dropped
        self._outbox.add_message(
            lambda header: Bye(header=header, reason=reason[:500], exit_code=exit_code, dropped=dropped)
        )
        began = time.monotonic()
        self.pump()
        self.pump()  # an Engine in this process acknowledges at once
        while len(self._outbox.ring):
            now = time.monotonic()
            answers = self._link.connected and now - self._taken_at <= NOT_TAKEN_SECONDS
            if now - began >= (timeout_seconds if answers else min(timeout_seconds, UNREACHED_SECONDS)):
                break
            self._link.wait(0.02, self._outbox.wakeup.fd)
            self._outbox.wakeup.clear()
            self.pump()
        if not self._link.connected:
            self._say(f"the daemon {self.membership.daemon} never answered (address, keys?): nobody watched this run")
        elif len(self._outbox.ring):
            self._say(f"{len(self._outbox.ring)} frames were not acknowledged by the daemon before the end")
        if self._incidents:
            self._say(f"{len(self._incidents)} incident(s) in this run: sosa incidents --run {self.membership.run}")
        self._link.close()

    def _answer(self, inquiry: Inquiry) -> None:
        if self._stacks is not None and inquiry.generation == self.membership.generation and not self.ending:
            at = self._progress()
            self._outbox.add_message(self._stacks.answer(inquiry, at.tick, at.phase))
            self._outbox.flush(self.header)

    def _doubt_daemon(self, now: float) -> None:
        """Say once when nothing of what waits has been taken for long."""
        self._taken_at = self._taken_at or now
        if not len(self._outbox.ring):
            self._taken_at = now
        elif not self.ending and now - self._taken_at > NOT_TAKEN_SECONDS:
            self._say(
                f"the daemon {self.membership.daemon} has taken nothing of run {self.membership.run} for "
                f"{NOT_TAKEN_SECONDS:g} s (its log says why, if it is there); training goes on, unwatched until it does"
            )

    def _take(self, command: Command) -> None:
        """A command has come: hold it at the fence, or refuse it with the reason."""
        if any(action.action == "restart" for action in command.actions):
            self._take_restart(command)
            return
        refusal = self._refusal(command)
        if refusal:
            self._rejected.add(command.id)
            self._ack(command.id, AckState.REJECTED, refusal)
        elif not _only_takes_back(command):
            self._open.add(command.id)
        if self._fence is not None and command.generation == self.membership.generation:
            self._fence.submit(command, refuse=bool(refusal))

    def _take_restart(self, command: Command) -> None:
        """Training threads are stuck, and no fence is ever reached: each rank that hears of it ends by itself."""
        refusal = may_apply(self._settings, command) or self._kill_file.refusal()
        if command.generation != self.membership.generation:
            refusal = "made for another generation"
        elif self._restart is None or len(command.actions) > 1:
            refusal = "nobody would start it again (torchrun --max-restarts), or it does not stand alone in its command"
        self._ack(command.id, AckState.REJECTED if refusal else AckState.APPLIED, refusal)
        if not refusal:
            self._restart_by = (time.monotonic() + RESTART_SECONDS, command.reason)

    def _answer_refused(self) -> None:
        """What the codec did not let through: a command that can be answered is, of the rest the user is told once."""
        for error in self._link.take_refused():
            if not self._told_refused:
                self._told_refused = True
                self._say(f"a control message was refused, said once: {error}")
            if isinstance(error, CommandRefusedError) and error.command not in self._seen:
                self._seen.add(error.command)
                self._ack(error.command, AckState.REJECTED, error.detail)

    def _refusal(self, command: Command) -> str:
        if command.generation != self.membership.generation:
            return f"made for generation {command.generation}, this is {self.membership.generation}"
        if self._fence is None:
            return "this run has no store to agree on a step with: it can only be observed"
        if self._fence_closed:
            return "the fence of this run is closed"
        killed = "" if _only_takes_back(command) else self._kill_file.refusal()
        return may_apply(self._settings, command) or killed or self._judge(command)

    def _judge(self, command: Command) -> str:
        try:
            return self._cannot(command)
        except Exception as error:  # this thread must live: it serves the fence that other ranks wait at
            return f"this rank cannot tell whether it could carry it out: {describe(error)}"

    def _serve_fence(self, now: float) -> None:
        if self._fence is None:
            return
        for notice in self._fence.pump(now):
            match notice:
                case Held(command=command) | Aborted(command=command) if command.id in self._rejected:
                    continue  # the fence ends it for the others; this rank's word on it was `rejected`
                case Held(command=command):
                    self._ack(command.id, AckState.HELD, "")
                case Committed(command=command, tick=tick, member=True):
                    self._ack(command.id, AckState.COMMITTED, f"at tick {tick}")
                case Aborted(command=command, reason=reason):
                    self._ack(command.id, AckState.ABORTED, reason)
                case Closed(reason=reason):
                    self._fence_closed = True
                    self._say(f"the fence is closed, nothing will be applied from here on: {reason}")

    def _ack(self, command: str, state: AckState, detail: str) -> None:
        at = self._progress()
        self._outbox.add_message(
            lambda header: Ack(
                header=header, command=command, state=state, tick=at.tick, step=at.step, detail=detail[:500]
            )
        )


def may_apply(settings: Settings, command: Command) -> str:
    """Why this run may not apply ``command``, or nothing. Taking an applied fix back is always allowed."""
    if _only_takes_back(command):
        return ""
    if settings.mode is Mode.OBSERVE:
        return "mode is observe: this run applies nothing"
    if command.approved:
        return ""
    if settings.mode is Mode.SUGGEST:
        return "mode is suggest and no person approved it (sosa approve)"
    return settings.auto.refusal(command.actions)


def _only_takes_back(command: Command) -> bool:
    return all(action.action == "revert" for action in command.actions)


def policy(settings: Settings) -> dict[str, Any]:
    """What the daemon must know of this run's settings, as `Hello.policy` carries it."""
    auto = settings.auto
    return {
        **plain(auto),
        "mode": str(settings.mode),
        "quiet_offsets": utc_offsets(auto.quiet_timezone, time.time()) if auto.quiet_hours else [],
        "project": settings.project,
        "warmup_steps": settings.detect.warmup_steps,
        "window_steps": settings.detect.window_steps,
        "snapshots": settings.snapshots_wanted,
    }

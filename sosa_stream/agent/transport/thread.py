"""The agent's thread: everything that may wait. It finds the other ranks and a daemon, then carries between them.

Ranks find each other through the job's own store, where there is a process group. Rank 0 starts a daemon if the job
has named none.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sosa_stream.agent.fence.membership import Coordinator, Joiner, Membership
from sosa_stream.agent.fence.stores import MemoryStore, RegisterStore, TorchStore
from sosa_stream.agent.place import Place
from sosa_stream.agent.transport.courier import Courier
from sosa_stream.agent.transport.embedded import EmbeddedDaemon
from sosa_stream.agent.transport.link import Link, LocalLink, TeeLink
from sosa_stream.agent.transport.outbox import Wakeup
from sosa_stream.config import absolute
from sosa_stream.errors import SosaError
from sosa_stream.protocol.channels import AgentChannel
from sosa_stream.protocol.keys import load_agent_keys
from sosa_stream.settings import Settings
from sosa_stream.visible import shown

JOIN_SECONDS = 0.05
NO_GROUP_SECONDS = 60.0
"""After which a job that trains is taken to have no process group, or no agent on rank 0."""
LAST_JOIN_SECONDS = 3.0
"""How long the end of a very short script is held up for its ranks to find each other and hand their frames over."""
CLOSE_SECONDS = 5.0
DAEMON_STOP_SECONDS = 10.0
FAILED_STOP_SECONDS = 0.5
"""The same where this rank fails or is interrupted: others may wait in a collective until its process is gone."""

Answer = TypeVar("Answer")


class AgentThread:
    """Runs from `start` until `close`. Whatever fails in it, training goes on.

    Args:
        place: where this process stands; brought up to date when it joins the others.
        join: given where it belongs, a way to the daemon, and the store to agree in with other ranks, if any.
        trains: whether this process has stepped.
        tee: who else in this process is to see what it sends, if anybody.
        greets: whether to say what is watched, and where it is recorded.
        say: gets a sentence for the user that one rank says for all, ``say_here`` one that is of this rank.
        on_error: told of an internal error.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        place: Place,
        wakeup: Wakeup,
        join: Callable[[Membership, Link, RegisterStore | None], Courier],
        trains: Callable[[], bool],
        tee: Callable[[], LocalLink | None],
        greets: bool,
        say: Callable[[str], None],
        say_here: Callable[[str], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._settings = settings
        self._place = place
        self._wakeup = wakeup
        self._join = join
        self._trains = trains
        self._tee = tee
        self._greets = greets
        self._say = say
        self._say_here = say_here
        self._on_error = on_error
        self._folder = Path(absolute(os.curdir))
        self._env = dict(os.environ)
        self._embedded: EmbeddedDaemon | None = None
        self._coordinator: Coordinator | None = None
        self._closing: tuple[str, int] | None = None
        self._thread = threading.Thread(target=self._serve, name="sosa-agent", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, reason: str, exit_code: int) -> None:
        """Say goodbye, and wait, within bounds, until the daemon has everything."""
        self._closing = (reason, exit_code)
        self._wakeup.set()
        self._thread.join(CLOSE_SECONDS + DAEMON_STOP_SECONDS + 5.0)

    def after_fork_in_child(self) -> None:
        """There the thread is not, and the daemon is not the child's."""
        if self._embedded is not None:
            self._embedded.after_fork_in_child()

    def _serve(self) -> None:
        try:
            if (courier := self._find_others()) is not None:
                self._carry(courier)
        except SosaError as error:  # keys that are not there, an address that cannot be one
            self._say_here(f"{error}; training goes on unwatched")
        except Exception as error:
            self._on_error(error)
        finally:
            if self._embedded is not None:
                self._embedded.stop(self._stop_seconds())
                self._pass_on(self._embedded)

    def _stop_seconds(self) -> float:
        if self._closing is None:
            return 0.0
        _, exit_code = self._closing
        return FAILED_STOP_SECONDS if exit_code and self._place.world_size > 1 else DAEMON_STOP_SECONDS

    def _find_others(self) -> Courier | None:
        """Join a generation: through the job's store where there is a process group, else alone. None: unwatched."""
        place, given = self._place, self._settings.agent.daemon
        if place.rank == 0 and not given:
            embedded = EmbeddedDaemon(Path(self._settings.home), self._folder, self._env)
            try:
                embedded.start()
            except OSError as error:
                where = shown(self._settings.home)
                self._say(f"cannot start a daemon in {where}: {error.strerror}; training goes on unwatched")
                return None
            self._embedded = embedded
        started = time.monotonic()
        store: RegisterStore | None = None
        joiner: Joiner | None = None
        give_up_at, told = 0.0, False
        while True:
            if self._closing is not None:
                give_up_at = give_up_at or time.monotonic() + LAST_JOIN_SECONDS
            if self._embedded is not None:
                self._embedded.poll()
            address = given or (self._embedded.address if self._embedded else "")
            daemon_known = bool(address) or not (self._embedded and self._embedded.starting)
            if place.world_size == 1:
                if daemon_known:
                    return self._connect(place.alone(address), MemoryStore())
            elif store is None:
                store = TorchStore.of_job()
                late = time.monotonic() - started > NO_GROUP_SECONDS and self._trains()
                if store is None and (late or self._closing is not None) and daemon_known:
                    self._say("no process group was initialised: each rank is a run of its own, and only observed")
                    place.leave_others()
                    return self._connect(place.alone(address), None) if address else None
            elif place.rank == 0:
                if daemon_known:
                    return self._connect(place.alone(address), store)
            else:
                joiner = joiner or Joiner(store, place.rank, place.identity.nonce)
                membership = _ask(joiner.poll)
                if membership is not None:
                    return self._connect(membership, store)
                if give_up_at and time.monotonic() > give_up_at:
                    return None
                if not told and time.monotonic() - started > NO_GROUP_SECONDS and self._trains():
                    told = True
                    self._say_here("rank 0 does not answer: without an agent there nobody watches this run")
            time.sleep(JOIN_SECONDS)

    def _connect(self, membership: Membership, store: RegisterStore | None) -> Courier | None:
        """Join by the daemon that the membership names. None where there is none for this rank."""
        place = self._place
        if not membership.daemon:
            why = self._embedded.given_up if self._embedded is not None else ""
            self._say(f"{why or 'there is no daemon'}; training goes on unwatched")
            return None
        if membership.host != place.identity.host and "127.0.0.1" in membership.daemon:
            self._say(f"the daemon serves {membership.host} only; for several hosts name one with SOSA_DAEMON")
            return None
        if store is not None and place.rank == 0 and place.world_size > 1:
            self._coordinator = Coordinator(store, place.world_size, membership)
        keys = load_agent_keys(Path(self._settings.daemon.keys)) if self._settings.daemon.keys else None
        channel = AgentChannel(membership.daemon, membership.run, sources=(place.identity.nonce,), keys=keys)
        if self._greets:
            where = f"in {shown(self._settings.home)}" if self._embedded is not None else f"by {membership.daemon}"
            self._say(f"watching run {membership.run}, mode {self._settings.mode}, recorded {where}")
        place.enter(membership)
        return self._join(membership, TeeLink(channel, self._tee), store)

    def _carry(self, courier: Courier) -> None:
        while self._closing is None:
            if self._coordinator is None:
                courier.wait()
            else:  # rank 0 goes on answering the other ranks' hellos until all have joined
                time.sleep(JOIN_SECONDS)
                self._coordinate()
            courier.pump()
            if self._embedded is not None:
                self._embedded.poll()
                self._pass_on(self._embedded)
                if self._embedded.given_up:
                    self._say(f"{self._embedded.given_up}; training goes on unwatched")
        courier.leave_fence()
        deadline = time.monotonic() + LAST_JOIN_SECONDS
        while self._coordinator is not None and time.monotonic() < deadline:  # a short script's other ranks
            self._coordinate()
            time.sleep(JOIN_SECONDS)
        courier.close(*self._closing, timeout_seconds=CLOSE_SECONDS)

    def _coordinate(self) -> None:
        assert self._coordinator is not None
        if _ask(self._coordinator.poll):
            self._coordinator = None

    def _pass_on(self, daemon: EmbeddedDaemon) -> None:
        for text in daemon.complaints:
            self._say(text)
        daemon.complaints.clear()


def _ask(question: Callable[[], Answer]) -> Answer | None:
    """A store fails in many ways, most of all when the job ends; each means only that there is no answer yet."""
    try:
        return question()
    except Exception:
        return None

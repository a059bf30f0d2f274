"""The daemon's asyncio shell: what comes in is recorded, then acted upon, then acknowledged, in this order.

A daemon killed at any point has acknowledged nothing that is not in a recording, and resumes from the recordings.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sosa_stream.daemon.departures import Departures
from sosa_stream.daemon.mutes import Mutes
from sosa_stream.daemon.outcomes import project_of
from sosa_stream.daemon.parent import outlive
from sosa_stream.daemon.rejects import Rejects
from sosa_stream.daemon.run import TOO_MANY, UNRECORDABLE, EngineFactory, Run, recording_path
from sosa_stream.daemon.schema import read_details
from sosa_stream.daemon.store import Asked, Changes, Store
from sosa_stream.daemon.webhook import DEADLINE_SECONDS, Outcome, Webhook
from sosa_stream.daemon.whereabouts import published
from sosa_stream.decide.requests import Reply, read_request
from sosa_stream.effects import Departed, JobGone, Timer
from sosa_stream.errors import ConfigError, ProtocolError, RefusedError, SosaError, UsageError
from sosa_stream.figures import Buckets
from sosa_stream.grafana.annotations import Annotator, annotator_of
from sosa_stream.metrics.collector import Snapshot
from sosa_stream.processes import most_files
from sosa_stream.protocol.body import Reject
from sosa_stream.protocol.channels import MAX_DRAINED, DaemonChannel
from sosa_stream.protocol.codec import decode, encode
from sosa_stream.protocol.keys import DaemonKeys
from sosa_stream.protocol.messages import AgentMessage, ControlMessage, Hello, Received
from sosa_stream.settings import Settings
from sosa_stream.web.server import HttpServer
from sosa_stream.web.tally import Tally

log = logging.getLogger(__name__)

MAX_RUNS = 1024
DRAIN_POLL_SECONDS = 0.1
GATHER_SECONDS = 0.02
"""Between two batches, where messages come closer together than that."""
ACKNOWLEDGE_SECONDS = 0.02
"""What is received is told at most so often: each message that comes in alone would else be answered alone."""
REQUEST_POLL_SECONDS = 0.2
DEPARTURE_POLL_SECONDS = 0.05
TOO_LATE_SECONDS = 600.0
"""Age of a request that is no longer carried out; clocks of hosts that share a home may differ by as much."""
SNAPSHOT_SECONDS = 0.2
LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
STORE_SECONDS = 0.25
"""What is received is told to be once its rows are written, too, unless that takes longer than this."""
TIMER_SECONDS = 1.0
AWAY_SECONDS = 3.0
"""Between two looks at the clock: then this process was stopped, or its host asleep."""
FORGET_SECONDS = 600.0
"""A run that all its processes have left is closed when nobody has been heard for this long."""
FORGET_LOST_SECONDS = 90_000.0
"""One that was killed says no goodbye. Alerts tell of it for a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Where a daemon that has bound everything can be found."""

    address: str
    http: str
    pid: int


def _reply(asked: Asked, run: Run) -> Reply:
    """Take a request up, or say why not. One that is recorded already is not carried out again."""
    if reply := run.replies.get(asked.key):
        return reply
    now = time.time()
    try:
        details = read_details(asked.at, asked.who, asked.what, asked.details)
        if now - asked.at > TOO_LATE_SECONDS:  # who asked was killed while waiting
            return Reply(done=False, text="too late: nobody waits for it any more")
        return run.ask(read_request(asked.what, asked.who, {**details, "asked": asked.key}), now)
    except (RefusedError, ProtocolError) as error:
        return Reply(done=False, text=str(error))


class Daemon:
    """Serves any number of runs until it is told to stop.

    ``parent`` is a file descriptor whose end of file means that the process which started this daemon is gone: it then
    takes in what is still under way and ends. Such a daemon ignores SIGINT, which is meant for the training.

    ``on_complaint`` is given what whoever started the daemon should hear, in a sentence each.

    ``reload`` reads the settings again on SIGHUP; of them, those of detection take effect. It may raise ConfigError.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine_factory: EngineFactory,
        reload: Callable[[], Settings] | None = None,
        keys: DaemonKeys | None = None,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        on_complaint: Callable[[str], None] = lambda text: None,
        parent: int | None = None,
        forget_seconds: float = FORGET_SECONDS,
        forget_lost_seconds: float = FORGET_LOST_SECONDS,
    ) -> None:
        self._settings = settings
        self._home = Path(settings.home)
        self._detect = settings.detect
        self._engine_factory = engine_factory
        self._reload = reload
        self._reload_wanted = False
        self._keys = keys
        self._on_ready = on_ready
        self._on_complaint = on_complaint
        self._parent = parent
        self._forget_seconds = forget_seconds
        self._forget_lost_seconds = forget_lost_seconds
        self._runs: dict[str, Run] = {}
        self._unwritten = Changes()
        self._is_orphan = False
        self._acknowledged_at = -math.inf
        self._unacknowledged: set[str] = set()
        self._num_being_written = 0
        self._num_waiting = 0
        """Messages taken from the socket and not yet recorded."""
        self._latency = Buckets(LATENCY_BOUNDS)
        self._writing: asyncio.Task[None] | None = None
        self._store_is_slow = False
        self._rejects = Rejects()
        self._departures = Departures()
        self._last_message_at = self._ticked_at = time.monotonic()
        self._is_behind = False
        self._snapshot = Snapshot()
        self._mutes = Mutes()
        self._tally = Tally()
        self._webhooks: list[Webhook] = []
        self._annotator: Annotator | None = None
        self._stop = asyncio.Event()

    async def serve(self) -> None:
        """Serve until SIGTERM, SIGINT or the parent's end; returns once everything is recorded and closed.

        Raises:
            ConfigError: an address or the store cannot be had.
            SosaError: a recording can no longer be written. Nothing unrecorded was acknowledged.
        """
        self._watch_signals()
        most_files()  # two for each rank
        with ExitStack() as closing:
            async with (
                Store(self._home) as self._store,
                DaemonChannel(self._settings.daemon.bind, keys=self._keys) as self._channel,
            ):
                closing.callback(self._close_runs)
                self._webhooks = [Webhook(url, self._store, self._on_complaint) for url in self._settings.daemon.notify]
                self._annotator = annotator_of(self._settings.daemon)
                await self._follow_mutes()
                self._show()
                with (
                    HttpServer(self._settings.daemon, self._home, lambda: self._snapshot, self._tally) as http,
                    published(self._home, http.url),
                ):
                    ready = Ready(address=self._channel.address, http=http.address, pid=os.getpid())
                    log.info("metrics come in at %s, %s/metrics is served", ready.address, http.url)
                    self._on_ready(ready)
                    await self._run_tasks()

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._want_reload)
        if self._parent is None:
            loop.add_signal_handler(signal.SIGINT, self._stop.set)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _want_reload(self) -> None:
        self._reload_wanted = True

    async def _run_tasks(self) -> None:
        # Each loop ends by itself within moments of `_stop`: nothing is cancelled in mid-batch.
        loops = [
            self._ingest(),
            self._every(self._settings.daemon.republish_seconds, self._republish),
            self._every(TIMER_SECONDS, self._tick),
            self._every(DEPARTURE_POLL_SECONDS, self._tell_departures),
            self._every(TIMER_SECONDS, self._forget),
            self._every(REQUEST_POLL_SECONDS, self._serve_requests),
            self._every(REQUEST_POLL_SECONDS, self._follow_mutes),
            self._every(REQUEST_POLL_SECONDS, self._reload_if_wanted),
            self._every(SNAPSHOT_SECONDS, self._refresh),
        ]
        if self._parent is not None:
            loops.append(self._outlive(self._parent))
        try:
            async with asyncio.TaskGroup() as tasks:
                for webhook in self._webhooks:
                    tasks.create_task(webhook.run())
                await asyncio.wait([tasks.create_task(loop) for loop in loops])
                await self._finish()
        except ExceptionGroup as group:
            expected = group.subgroup(SosaError)
            if expected is None:
                raise
            raise expected.exceptions[0] from None
        finally:
            if self._writing is not None:  # the end did not come in good order
                self._writing.cancel()
                await asyncio.wait([self._writing])

    async def _finish(self) -> None:
        while batch := await self._channel.drain(timeout_seconds=0):
            await self._take(batch)
        self._acknowledge()
        await self._tell_departures(all_of_them=True)
        if self._is_orphan:
            for run in self._runs.values():
                if not run.all_ended:
                    run.tell(JobGone(), time.time())
        await self._tick()
        self._show()
        await self._write_store()
        if self._writing is not None:
            await self._writing
        self._departures.close()
        log.info("ended with everything recorded")
        if self._annotator is not None:
            await asyncio.to_thread(self._annotator.close)
        for webhook in self._webhooks:
            webhook.close()

    async def _outlive(self, parent: int) -> None:
        ended = self._have_all_ended
        self._is_orphan = await outlive(parent, self._stop, lambda: self._last_message_at, ended)

    def _have_all_ended(self) -> bool:
        return all(run.all_ended for run in self._runs.values())

    def _close_runs(self) -> None:
        for run in self._runs.values():
            run.close()

    async def _every(self, seconds: float, act: Callable[[], object]) -> None:
        while not self._stop.is_set():
            done = act()
            if asyncio.iscoroutine(done):
                await done
            try:
                async with asyncio.timeout(seconds):
                    await self._stop.wait()
            except TimeoutError:
                pass

    async def _ingest(self) -> None:
        taken_at, is_full = -math.inf, False
        while not self._stop.is_set():
            # Many speak: what each wakes us up for costs more than it. Where more is left than was taken, at once.
            if not is_full and time.monotonic() - taken_at < GATHER_SECONDS:
                await asyncio.sleep(GATHER_SECONDS)
            wait = ACKNOWLEDGE_SECONDS if self._unacknowledged else DRAIN_POLL_SECONDS
            batch = await self._channel.drain(timeout_seconds=wait)
            # What came in during a replay is in this batch, and reaches the engines before another task has a turn.
            self._is_behind = False
            self._num_waiting, is_full = len(batch), len(batch) == MAX_DRAINED
            if batch:
                await self._take(batch)
                taken_at = time.monotonic()
            now = time.monotonic()
            if now - self._acknowledged_at >= ACKNOWLEDGE_SECONDS:
                self._acknowledged_at = now
                self._acknowledge()

    def _acknowledge(self) -> None:
        """Tell what was received since the last time. Not while a batch is being taken."""
        for name in self._unacknowledged:
            if name in self._runs:
                self._tell_received(self._runs[name], self._runs[name].touched())
        self._unacknowledged.clear()

    def _tell_received(self, run: Run, sources: Mapping[str, int]) -> None:
        """Each to its source, and what has no topic of its own to all: of n sources that would be n² a second."""
        for source in sources.keys() & run.addressed:
            received = Received(run=run.name, sources={source: sources[source]})
            self._channel.publish(run.name, encode(received), source)
        if shared := {source: last for source, last in sources.items() if source not in run.addressed}:
            self._channel.publish(run.name, encode(Received(run=run.name, sources=shared)))

    async def _take(self, batch: list[bytes]) -> None:
        self._last_message_at = time.monotonic()
        now = time.time()
        taken: list[tuple[Run, AgentMessage, bytes]] = []
        for data in batch:
            source = "of unknown source"
            try:
                message = decode(data)
                if isinstance(message, ControlMessage):
                    raise ProtocolError(Reject.UNKNOWN_KIND, "a control message among the metrics")
                source = message.header.source
                run = await self._run(message.header.run)
                if isinstance(message, Hello) and not run.is_taught:
                    await self._teach(run, project_of(message))
                taken.append((run, message, data))
            except ProtocolError as error:
                self._rejects.add(source, error)
        # From here to the acknowledgement nothing of these runs is awaited but the store.
        touched: dict[str, Run] = {}
        for run, message, data in taken:
            try:
                run.offer(message, data, now)
                touched[run.name] = run
            except ProtocolError as error:
                self._rejects.add(message.header.source, error)
        num_incidents = sum(run.num_incidents for run in touched.values())
        await self._commit(touched.values())
        self._unacknowledged |= touched.keys()
        num_opened = sum(run.num_incidents for run in touched.values()) - num_incidents
        self._latency.add([time.monotonic() - self._last_message_at] * num_opened)

    async def _run(self, name: str) -> Run:
        run = self._runs.get(name)
        if run is None:
            recording = recording_path(self._home, name)
            if len(self._runs) >= MAX_RUNS:
                raise ProtocolError(TOO_MANY, f"{MAX_RUNS} runs are served already")
            # Until the next batch is taken: nobody is silent while we do not listen.
            self._is_behind = True
            try:
                # In a thread, because replaying a long recording takes a while, and other runs' commands must go out.
                mutes = self._mutes.of(name)
                run = await asyncio.to_thread(Run, name, recording, self._engine_factory(name), mutes)
            except (UsageError, OSError) as error:
                raise ProtocolError(UNRECORDABLE, str(error)) from None
            run.reconfigure(self._detect, time.time())
            if run.changes:
                run.snapshot()  # a run is in the store no later than its first incident
                self._take_changes(run, is_new=False)
            self._runs[name] = run
            log.info("run %s: recorded in %s", name, recording)
        return run

    async def _teach(self, run: Run, project: str) -> None:
        """Hand a run that begins what its project has learned, if there is anything."""
        try:
            outcomes = await self._store.outcomes(project, run.began_at)
        except (sqlite3.Error, ValueError) as error:
            log.warning("run %s: what its project has learned cannot be read: %s", run.name, error)
            return
        if outcomes:
            run.teach(outcomes, time.time())
            log.info("run %s: project %s has taught %d outcomes of fixes", run.name, project, len(outcomes))

    async def _commit(self, runs: Iterable[Run]) -> list[Run]:
        committed = list(runs)
        for run in committed:
            for message in run.commit():
                self._channel.publish(run.name, encode(message))
            self._notify(run)
        await self._write_store()
        return committed

    def _notify(self, run: Run) -> None:
        notifications, run.notifications = run.notifications, []
        for webhook in self._webhooks:
            for notification in notifications:
                webhook.offer(notification)

    async def _write_store(self) -> None:
        """Have what has changed written. A task of its own waits for a store that is locked, and the runs go on."""
        for run in self._runs.values():
            self._take_changes(run, is_new=True)
        if self._writing is None and self._unwritten:
            self._writing = asyncio.create_task(self._write_rows())
        if self._writing is not None and not self._store_is_slow:
            done, pending = await asyncio.wait([self._writing], timeout=STORE_SECONDS)
            self._store_is_slow = bool(pending)
            for task in done:
                task.result()

    def _take_changes(self, run: Run, *, is_new: bool) -> None:
        changes, run.changes = run.changes, Changes()
        self._unwritten.update(changes)
        if self._annotator is not None:
            self._annotator.offer(changes.incidents.values(), changes.commands.values(), time.time(), is_new=is_new)

    async def _write_rows(self) -> None:
        """Until nothing is left to be written, or it cannot be."""
        try:
            while self._unwritten:
                writing, self._unwritten = self._unwritten, Changes()
                self._num_being_written = len(writing)
                try:
                    await self._store.write(writing)
                except sqlite3.Error as error:
                    # The recording has it all; the rows are kept and tried again with the next ones.
                    log.warning("the store cannot be written, for now: %s", error)
                    writing.update(self._unwritten)
                    self._unwritten = writing
                    return
        finally:
            self._writing, self._store_is_slow, self._num_being_written = None, False, 0

    def _republish(self) -> None:
        for run in self._runs.values():
            for command in run.in_flight.values():
                self._channel.publish(run.name, encode(command))

    async def _tick(self) -> None:
        now = time.time()
        # after a stop of this process, what has come in meanwhile is taken first: it is not they who were silent
        was_away = time.monotonic() - self._ticked_at > AWAY_SECONDS
        self._ticked_at = time.monotonic()
        for run in self._runs.values():
            if run.wants_timer(now) and not (self._is_behind or was_away):
                run.tell(Timer(), now)
        for run in await self._commit(self._runs.values()):
            if heard := run.recently_heard(now):
                self._tell_received(run, heard)

    async def _tell_departures(self, *, all_of_them: bool = False) -> None:
        """Tell the engines of processes that have ended without a goodbye."""
        changed = []
        for run in self._runs.values():
            joined, run.joined = run.joined, []
            for hello in joined:
                if not run.has_left(hello.header.source):
                    self._departures.meet(hello)
            settled = self._departures.settled(run.name, all_of_it=all_of_them)
            if deaths := tuple(death for source, death in settled if not run.has_left(source)):
                run.tell(Departed(deaths=deaths), time.time())
                changed.append(run)
        if changed:
            await self._commit(changed)

    def _forget(self) -> None:
        """Let go of runs that are over. The recording and the rows stay; a later message opens the run again."""
        if self._is_behind:  # a batch is being taken that may have messages of such a run
            return
        now = time.time()
        silent = {name: now - run.heard_at for name, run in self._runs.items()}
        over = [
            run
            for name, run in self._runs.items()
            if silent[name] > (self._forget_seconds if run.all_ended else self._forget_lost_seconds)
        ]
        for run in over:
            run.snapshot()  # for its last row
            self._unwritten.update(run.changes)
            run.close()
            del self._runs[run.name]
            log.info("run %s: over, closed", run.name)

    async def _serve_requests(self) -> None:
        try:
            for asked in await self._store.unanswered():
                run = self._runs.get(asked.run)
                if run is None:  # it may be another daemon's, which shares the home
                    continue
                if not await self._store.take_up(asked.id):  # withdrawn
                    continue
                reply = _reply(asked, run)
                await self._commit([run])
                await self._store.answer(asked.id, reply)
                self._tally.add(asked.what, "done" if reply.done else "refused")
                log.info("run %s: %s asked: %s %s: %s", run.name, asked.who, asked.what, asked.details, reply.text)
        except sqlite3.Error as error:
            log.warning("requests cannot be read, for now: %s", error)

    async def _follow_mutes(self) -> None:
        """Take up what people have muted or unmuted, and tell what a mute that is over has kept back."""
        now = time.time()
        try:
            # Those that ended lately matter to what a replay finds worth a notification.
            begun, over = self._mutes.update(await self._store.mutes(ended_after=now - DEADLINE_SECONDS), now)
        except sqlite3.Error as error:
            log.warning("mutes cannot be read, for now: %s", error)
            return
        for run in self._runs.values():
            run.mutes = self._mutes.of(run.name)
        for name, kind in begun:
            log.info("run %s: %s is muted", name, kind)
        for name, kind in over:
            log.info("run %s: %s is told again", name, kind)
            if name in self._runs:
                for message in self._runs[name].unmuted(kind, now):
                    self._channel.publish(name, encode(message))
                self._notify(self._runs[name])

    async def _reload_if_wanted(self) -> None:
        if not self._reload_wanted or self._reload is None:
            return
        self._reload_wanted = False
        try:
            settings = self._reload()
        except ConfigError as error:
            log.error("the settings stay as they were: %s", error)
            return
        self._detect = settings.detect
        for run in self._runs.values():
            run.reconfigure(settings.detect, time.time())
        await self._commit(self._runs.values())
        later = replace(settings, detect=self._settings.detect) != self._settings
        log.info("[detect] is read again%s", "; other settings changed, too, and want a restart" if later else "")

    def _refresh(self) -> None:
        self._rejects.add_handshakes(self._channel.take_failed_handshakes())
        self._show()

    def _show(self) -> None:
        now = time.time()
        listened_until = None if self._is_behind else now  # nobody is silent while we do not listen
        self._snapshot = Snapshot(
            runs=tuple(run.snapshot(listened_until) for run in self._runs.values()),
            rejected=dict(self._rejects.counts),
            notifications={str(outcome): sum(hook.counts[outcome] for hook in self._webhooks) for outcome in Outcome},
            annotations=self._annotator.outcomes() if self._annotator is not None else {},
            requests=self._tally.counts,
            num_waiting=self._num_waiting,
            num_unwritten=len(self._unwritten) + self._num_being_written,
            latency=self._latency.histogram,
            shown_at=now,
            beat_at=time.monotonic(),
            rank_series=self._settings.daemon.rank_series,
        )

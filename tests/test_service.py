"""The daemon's shell in this process, with engines that a test can hold up and look into."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from daemon_process import LOOPBACK, RingAgent, wait_until

from sosa_stream.cli import main
from sosa_stream.config import load_settings
from sosa_stream.daemon import asking, run, service
from sosa_stream.daemon.run import Run
from sosa_stream.daemon.schema import open_store
from sosa_stream.daemon.service import Daemon, Ready
from sosa_stream.daemon.store import Store
from sosa_stream.decide.requests import Pause, Reply
from sosa_stream.detect import attendance
from sosa_stream.detect.incidents import Incident
from sosa_stream.effects import Effect, Event, Timer
from sosa_stream.engine import Engine
from sosa_stream.errors import SosaError
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.recording import Recorder, decode_record, read_recording
from sosa_stream.testing import NOW, hello


class BusyEngine(Engine):
    """Always has a command in flight, and counts what the clock tells it."""

    num_timers = 0

    @property
    def has_commands_in_flight(self) -> bool:
        return True

    def handle(self, event: Event, now: float) -> list[Effect]:
        self.num_timers += isinstance(event, Timer)
        return super().handle(event, now)


class HeldUpEngine(Engine):
    """Stands still in its first event until it is released."""

    def __init__(self, run: str) -> None:
        super().__init__(run)
        self.entered, self.released = threading.Event(), threading.Event()

    def handle(self, event: Event, now: float) -> list[Effect]:
        self.entered.set()
        self.released.wait(20)
        return super().handle(event, now)


def with_daemon(home: Path, act: Callable[[Daemon, str], None], **arguments: object) -> None:
    """Run ``act`` in a thread, with a daemon that serves and its address."""

    async def serve() -> None:
        ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        settings = load_settings(overrides={"home": str(home), "daemon.bind": LOOPBACK, "daemon.http": "127.0.0.1:0"})
        daemon = Daemon(settings, on_ready=ready.set_result, **arguments)  # type: ignore[arg-type]
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(daemon.serve())
            await asyncio.wait([ready, serving], return_when=asyncio.FIRST_COMPLETED)
            try:
                await asyncio.to_thread(act, daemon, ready.result().address)
            finally:
                daemon._stop.set()

    asyncio.run(serve())


def recorded(home: Path, run: str) -> None:
    """A run that an earlier daemon has recorded."""
    (home / run).mkdir(parents=True)
    with contextlib.closing(Recorder(home / run / "run.sosa")) as recorder:
        recorder.append(NOW, encode(hello()))


def test_while_a_recording_is_replayed_no_run_is_told_that_time_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMER_SECONDS", 0.01)
    recorded(tmp_path, "old")
    busy, old = BusyEngine("busy"), HeldUpEngine("old")

    def act(daemon: Daemon, address: str) -> None:
        with RingAgent(address, "busy") as agent, RingAgent(address, "old", source="t") as returning:
            agent.add_hello()
            wait_until(agent.pump, "acknowledgement")
            wait_until(lambda: busy.num_timers > 3, "timers")
            returning.add_hello()
            try:
                returning.pump()
                wait_until(old.entered.is_set, "the replay")
                num_timers = busy.num_timers
                time.sleep(0.3)
                assert busy.num_timers == num_timers
            finally:
                old.released.set()
            wait_until(returning.pump, "acknowledgement")
            wait_until(lambda: busy.num_timers > num_timers + 3, "timers again")

    with_daemon(tmp_path, act, engine_factory={"busy": busy, "old": old}.__getitem__)


def test_ranks_that_all_fall_silent_at_once_are_told_though_nothing_comes_in_and_no_longer_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMER_SECONDS", 0.02)
    monkeypatch.setattr(run, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(attendance, "LOST_AFTER_SECONDS", 0.7)
    monkeypatch.setattr(attendance, "TOGETHER_SECONDS", 0.5)

    def act(daemon: Daemon, address: str) -> None:
        with RingAgent(address, source="a") as first, RingAgent(address, source="b", rank=1) as second:
            for agent in (first, second):
                agent.add_hello()
                wait_until(agent.pump, "acknowledgement")

            def incidents() -> tuple[Incident, ...]:
                return tuple(found for run in daemon._snapshot.runs for found in run.view.incidents)

            wait_until(incidents, "the loss")
            assert [(one.kind, one.ranks) for one in incidents()] == [("rank_lost", (0, 1))]

    with_daemon(tmp_path, act, engine_factory=Engine)
    events = [decode_record(payload) for _, payload in read_recording(tmp_path / "run" / "run.sosa")]
    assert 3 <= sum(isinstance(event, Timer) for event in events) <= 6


def test_a_run_that_all_have_left_is_let_go_of_and_opened_again_by_its_next_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMER_SECONDS", 0.01)
    engines: list[str] = []

    def engine_of(run: str) -> Engine:
        engines.append(run)
        return Engine(run)

    def open_recordings() -> set[str]:
        targets = []
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                targets.append(fd.readlink())
        return {path.parent.name for path in targets if path.name == "run.sosa"}

    def act(daemon: Daemon, address: str) -> None:
        with (
            RingAgent(address, "over", source="a") as first,
            RingAgent(address, "over", source="b", rank=1) as second,
            RingAgent(address, "silent", source="c") as silent,
        ):
            for agent in (first, second, silent):
                agent.add_hello()
                wait_until(agent.pump, "acknowledgement")
            first.add_bye()
            wait_until(first.pump, "acknowledgement")
            time.sleep(0.5)
            assert open_recordings() == {"over", "silent"}, "one of two ranks is still there"
            second.add_bye()
            wait_until(second.pump, "acknowledgement")
            wait_until(lambda: open_recordings() == {"silent"}, "the end of the run")
            assert set(daemon._runs) == {"silent"}
            with contextlib.closing(open_store(tmp_path)) as store:
                assert {run for (run,) in store.execute("SELECT run FROM runs")} == {"over", "silent"}

            second.add_frames([0])
            wait_until(second.pump, "acknowledgement")
            assert daemon._runs["over"].snapshot().num_received == 5
            assert engines == ["over", "silent", "over"]

    with_daemon(tmp_path, act, engine_factory=engine_of, forget_seconds=0.2)


def test_a_run_that_was_killed_is_let_go_of_in_the_end_and_may_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "TIMER_SECONDS", 0.01)

    def act(daemon: Daemon, address: str) -> None:
        with RingAgent(address, "killed", source="a") as killed:
            killed.add_hello()
            wait_until(killed.pump, "acknowledgement")
            wait_until(lambda: not daemon._runs, "the end of its series")
            killed.add_frames([0])
            wait_until(killed.pump, "acknowledgement")
            wait_until(lambda: not daemon._runs, "its end once more")

    with_daemon(tmp_path, act, engine_factory=Engine, forget_lost_seconds=1.0)


class DeafStore(Store):
    """Takes no answers: another process has locked it, or the daemon dies before it comes to that."""

    async def answer(self, asked: int, reply: Reply) -> None:
        raise sqlite3.OperationalError("database is locked")


class NoChannel:
    def publish(self, run: str, data: bytes) -> None: ...


async def serve_requests(home: Path, store: type[Store], *, times: int = 1) -> None:
    """What a daemon that has the run open does with the requests in its store."""
    daemon = Daemon(load_settings(overrides={"home": str(home)}), engine_factory=Engine)
    run = Run("run", home / "run" / "run.sosa", Engine("run"))
    async with store(home) as daemon._store:
        daemon._runs["run"], daemon._channel = run, NoChannel()  # type: ignore[assignment]
        for _ in range(times):
            await daemon._serve_requests()
    run.close()


def ask_for_a_pause(home: Path) -> None:
    with contextlib.closing(open_store(home, read_only=False)) as store:
        store.execute(
            "INSERT INTO audit (at, who, run, what, details) VALUES (?, 'ann', 'run', 'pause', '{}')", (time.time(),)
        )


DAMAGED = (
    (4e9, "ann", "pause", "no json"),
    (4e9, "ann", "pause", "[" * 100_000),
    (4e9, "ann", "pause", "[]"),
    (4e9, "ann", "pause", b"\xff"),
    ("noon", "ann", "pause", "{}"),
    (1e300, "ann", "pause", "{}"),
    (4e9, b"\xff", "pause", "{}"),
    (4e9, "ann", b"\xff", "{}"),
    (4e9, "ann", "no such request", "{}"),
    (4e9, "ann", "pause", '{"reason": "\\ud800"}'),
    (4e9, "ann", "pause", '{"reason": 7}'),
    (4e9, "ann", "fix", '{"action": "set_knob", "params": 7}'),
    (4e9, "ann", "fix", '{"action": "set_knob", "params": {"name": "beta", "value": 1e999}}'),
    (4e9, "ann", "fix", f'{{"action": "set_knob", "params": {{"name": "beta", "value": {10**400}}}}}'),
    (4e9, "ann", "fix", '{"action": ["set_knob"], "params": {}}'),
    (4e9, "ann", "undo", '{"command": {}}'),
)


def test_a_damaged_row_of_the_audit_is_refused_and_the_next_one_carried_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, "run")
    asyncio.run(serve_requests(tmp_path, Store))
    with contextlib.closing(open_store(tmp_path, read_only=False)) as store:
        store.executemany("INSERT INTO audit (at, who, run, what, details) VALUES (?, ?, 'run', ?, ?)", DAMAGED)
        store.execute("INSERT INTO audit (at, who, run, what) VALUES (4e9, 'ann', 'run', CAST(x'ff' AS TEXT))")
    ask_for_a_pause(tmp_path)
    asyncio.run(serve_requests(tmp_path, Store))
    *refused, carried_out = audited(tmp_path)
    assert [done for done, _ in refused] == [0] * (len(DAMAGED) + 1)
    assert all(refused)
    assert carried_out == (1, "nothing is applied by itself")
    assert num_pauses(tmp_path) == 1
    capsys.readouterr()
    assert main(["audit", "--home", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("damaged") == 8


def audited(home: Path) -> list[tuple[int | None, str]]:
    with contextlib.closing(open_store(home)) as store:
        return store.execute("SELECT done, answer FROM audit").fetchall()


def num_pauses(home: Path) -> int:
    payloads = [payload for _, payload in read_recording(home / "run" / "run.sosa")]
    return sum(isinstance(decode_record(payload), Pause) for payload in payloads)


def test_a_request_whose_answer_is_lost_is_carried_out_once_and_answered_by_the_next_daemon(tmp_path: Path) -> None:
    recorded(tmp_path, "run")
    asyncio.run(serve_requests(tmp_path, Store))
    ask_for_a_pause(tmp_path)
    asyncio.run(serve_requests(tmp_path, DeafStore, times=3))
    assert audited(tmp_path) == [(1, None)]
    asyncio.run(serve_requests(tmp_path, Store))
    assert audited(tmp_path) == [(1, "nothing is applied by itself")]
    assert num_pauses(tmp_path) == 1


def test_a_request_that_is_taken_up_is_not_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path, "run")
    asyncio.run(serve_requests(tmp_path, Store))

    def not_answered(store: sqlite3.Connection, row: int) -> None:
        asyncio.run(serve_requests(tmp_path, DeafStore))

    monkeypatch.setattr(asking, "_answer", not_answered)
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.01)
    with pytest.raises(SosaError, match="taken it up"):
        asking.ask(tmp_path, "run", Pause(who="ann"))
    asyncio.run(serve_requests(tmp_path, Store))
    assert audited(tmp_path) == [(1, "nothing is applied by itself")]


def test_a_request_that_is_withdrawn_is_not_carried_out(tmp_path: Path) -> None:
    recorded(tmp_path, "run")
    asyncio.run(serve_requests(tmp_path, Store))
    ask_for_a_pause(tmp_path)

    class Withdrawing(Store):
        async def take_up(self, asked: int) -> bool:
            await self.answer(asked, Reply(done=False, text="withdrawn"))
            return await super().take_up(asked)

    asyncio.run(serve_requests(tmp_path, Withdrawing))
    assert audited(tmp_path) == [(0, "withdrawn")]
    assert num_pauses(tmp_path) == 0


def test_a_store_that_is_locked_holds_up_no_run_and_has_all_rows_once_it_is_free(tmp_path: Path) -> None:
    def act(daemon: Daemon, address: str) -> None:
        with contextlib.ExitStack() as stack:
            agents = [stack.enter_context(RingAgent(address, run)) for run in ("first", "second")]
            agents[0].add_hello()
            wait_until(agents[0].pump, "an acknowledged hello")
            other = stack.enter_context(contextlib.closing(open_store(tmp_path, read_only=False)))
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            for i in range(20):
                for agent in agents:  # the second run begins while nothing can be written
                    agent.add_frames([i]) if i else agent.add_hello()
                    wait_until(agent.pump, "an acknowledged frame")
            assert time.monotonic() - began < 4.0, "nobody waits for the store, which is waited for longer"
            other.execute("ROLLBACK")
            rows = "SELECT run FROM runs ORDER BY run"
            wait_until(lambda: other.execute(rows).fetchall() == [("first",), ("second",)], "the rows")
            agents[0].add_frames([20])
            wait_until(agents[0].pump, "an acknowledged frame")
            assert not daemon._unwritten

    with_daemon(tmp_path, act, engine_factory=Engine)

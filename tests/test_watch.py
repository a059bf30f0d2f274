"""`sosa watch` by its keys, and `sosa status`, against a real daemon that real sockets feed."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from daemon_process import DEADLINE_SECONDS, DaemonProcess, RingAgent, wait_until
from test_daemon import feed
from test_web import TOKEN, write_tokens
from textual.pilot import Pilot
from web_client import Certificates, call

from sosa_stream.cli import main, parser
from sosa_stream.cli.daemons import daemons_of
from sosa_stream.daemon.schema import open_store
from sosa_stream.daemon.whereabouts import published, served_urls
from sosa_stream.effects import CommandChanged
from sosa_stream.engine import Engine
from sosa_stream.errors import SosaError
from sosa_stream.protocol.messages import Ack, AckState
from sosa_stream.testing import AUTO_POLICY, NOW, SimulatedJob
from sosa_stream.watch import model
from sosa_stream.watch.app import TABLES, Confirm, Details, Watch
from sosa_stream.watch.asks import Ask
from sosa_stream.watch.model import Look

SMALL = (80, 24)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SOSA_HOME", "SOSA_CONFIG", "SOSA_DAEMON", "SOSA_HTTP_TOKEN", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)


class Sick:
    """Two ranks of run `run`, mode suggest, whose learning rate has jumped: an open incident and a proposed fix."""

    def __init__(self, folder: Path, closing: ExitStack) -> None:
        self.home = folder / "home"
        self.config = write_tokens(folder)
        self.daemon = closing.enter_context(DaemonProcess(self.home, "--config", self.config))
        self.agents = [
            closing.enter_context(RingAgent(self.daemon.address, source=f"s{rank}", rank=rank)) for rank in (0, 1)
        ]
        job = SimulatedJob(
            seed=1,
            stop_at=260,
            batch=20,
            policy={**AUTO_POLICY, "mode": "suggest"},
            lr_factor=lambda step: 1000.0 if step >= 200 else 1.0,
        )
        events, engine = job.run().events, Engine("run")
        first = next(
            index
            for index, event in enumerate(events)
            if any(isinstance(effect, CommandChanged) for effect in engine.handle(event, NOW + 0.01 * index))
        )
        feed(self.agents, events[: first + 1])
        wait_until(lambda: self.records("commands"), "the proposal")

    def records(self, what: str) -> list[dict[str, Any]]:
        return list(call(self.daemon.http, f"/api/v1/runs/run/{what}")[1].get(what, []))

    def apply(self) -> None:
        """Answer, as ranks do, every command that has come."""
        for agent in self.agents:
            agent.pump()
            while agent.commands:
                command = agent.commands.pop()
                for state in (AckState.HELD, AckState.COMMITTED, AckState.APPLIED):
                    agent.add(
                        lambda header, state=state, command=command: Ack(  # type: ignore[misc]
                            header=header, command=command.id, state=state, tick=260, step=260, digest="d"
                        )
                    )

    def audit(self) -> list[tuple[str, str, int]]:
        with closing(open_store(self.home)) as store:
            return store.execute("SELECT who, what, done FROM audit ORDER BY id").fetchall()


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sick]:
    """One that many tests look at; its ranks fall silent."""
    with ExitStack() as stack:
        yield Sick(tmp_path_factory.mktemp("sick"), stack)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Sick]:
    """One of the test's own."""
    with ExitStack() as stack:
        yield Sick(tmp_path, stack)


def watching(*flags: str, run: str | None = None) -> Watch:
    daemons, _ = daemons_of(parser().parse_args(["watch", *flags]))
    return Watch(daemons, who="ann", run=run, every_seconds=0.1)


def drive(
    app: Watch, act: Callable[[Pilot[None]], Awaitable[None]], size: tuple[int, int] = SMALL, timeout: float = 60
) -> None:
    async def run() -> None:
        async with asyncio.timeout(timeout), app.run_test(size=size) as pilot:
            await act(pilot)

    asyncio.run(run())


def shown(app: Watch) -> str:
    """The screen as text."""
    return "\n".join(strip.text for strip in app.screen._compositor.render_strips())


async def until(pilot: Pilot[None], condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}; the screen:\n{shown(pilot.app)}"  # type: ignore[arg-type]
        await pilot.pause(0.02)


def test_on_80_by_24_the_run_its_loss_incident_fix_and_ranks_are_seen_at_once(sick: Sick) -> None:
    app = watching("--home", str(sick.home))

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: app.look.commands, "a look")
        await until(pilot, lambda: "lr_jump" in shown(app) and "quit" in shown(app), "the incident and the keys")
        screen = shown(app)
        lines = screen.splitlines()
        assert len(lines) == SMALL[1]
        assert max(map(len, lines)) <= SMALL[0]
        for word in ("suggest", "1 critical", "loss", "▁", "lr_jump", "open", "proposed", "scale_lr", "host"):
            assert word in screen, (word, screen)
        assert all(key in lines[-1] for key in ("ack", "approve", "undo", "pause", "quit")), lines[-1]

    drive(app, act)


def test_keys_approve_a_fix_and_undo_it_once_confirmed_and_who_did_is_recorded(own: Sick) -> None:
    app = watching("--home", str(own.home))
    proposal = own.records("commands")[0]["id"]

    def state() -> str:
        own.apply()
        command = app.look.command(proposal)
        return "" if command is None else str(command["state"])

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: state() == "proposed", "the proposal")
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, Confirm), "the question")
        await pilot.press("enter")  # what is not yes is no
        await until(pilot, lambda: "left as it is" in shown(app), "the answer")
        assert own.audit() == []
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, Confirm), "the question")
        assert "scale_lr" in shown(app)
        assert "ann" in shown(app)
        await pilot.press("y")
        await until(pilot, lambda: state() == "applied", "the fix being applied")
        assert own.audit() == [("ann", "approve", 1)]
        await pilot.press("u")
        await until(pilot, lambda: isinstance(app.screen, Confirm), "the question")
        await pilot.press("y")
        await until(pilot, lambda: state() == "reverted", "the fix being undone")
        assert own.audit() == [("ann", "approve", 1), ("ann", "undo", 1)]

    drive(app, act)


def test_by_its_address_and_a_token_a_run_is_paused_and_resumed_and_an_incident_acknowledged(
    own: Sick, tmp_path: Path
) -> None:
    app = watching("--url", f"http://{own.daemon.http}", "--token-file", str(tmp_path / "people"))

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: app.look.incidents, "the incident")
        await pilot.press("k")
        await until(pilot, lambda: app.look.incidents[0]["ack"], "the acknowledgement")
        assert app.look.incidents[0]["ack"]["who"] == "ann (ops)"
        for paused in ("ann (ops)", None):
            await pilot.press("p")
            await until(pilot, lambda: isinstance(app.screen, Confirm), "the question")
            await pilot.press("y")
            await until(pilot, lambda paused=paused: app.look.run and app.look.run["paused_by"] == paused, "the pause")  # type: ignore[misc]
        assert [row[:2] for row in own.audit()] == [("ann (ops)", "pause"), ("ann (ops)", "resume")]

    drive(app, act)


def test_without_a_token_the_daemon_refuses_and_the_screen_says_what_brings_one(sick: Sick) -> None:
    app = watching("--url", f"http://{sick.daemon.http}")

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: app.look.incidents, "the incident")
        await pilot.press("k")
        await until(pilot, lambda: "not done" in shown(app), "the refusal")
        assert sick.records("incidents")[0]["ack"] is None

    drive(app, act)


def test_what_is_confirmed_is_what_was_asked_though_the_rows_have_moved_meanwhile(sick: Sick) -> None:
    app = watching("--home", str(sick.home))
    asked: list[Ask] = []

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: app.look.commands, "the proposal")
        app._ask = asked.append  # type: ignore[method-assign, assignment]
        own = app.look.commands[0]
        await pilot.press("a")
        await until(pilot, lambda: isinstance(app.screen, Confirm), "the question")
        app._take(None, replace(app.look, commands=[{**own, "id": "another"}, own]), "")
        await pilot.press("y")
        await until(pilot, lambda: asked, "the request")
        assert asked[0].body == {"command": own["id"]}

    drive(app, act)


def test_the_cursor_stays_with_its_row_and_enter_shows_all_of_it(sick: Sick) -> None:
    app = watching("--home", str(sick.home))

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: app.look.incidents, "the incident")
        own = app.look.incidents[0]
        app._take(None, replace(app.look, incidents=[{**own, "id": f"i{n}"} for n in range(3)] + [own]), "")
        app._rows_of("incidents").focus()
        app._rows_of("incidents").move_cursor(row=3)
        app._take(None, replace(app.look, incidents=[own, {**own, "id": "i0"}]), "")
        assert app._key("incidents") == own["id"]
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Details), "the details")
        assert own["id"] in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, Details), "the way back")

    drive(app, act)


def test_it_waits_for_a_daemon_outlives_it_and_finds_the_next_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    app = watching("--home", str(home))
    app._daemons = replace(app._daemons, urls=lambda: served_urls(home) or ["http://127.0.0.1:1"])

    async def act(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: "no daemon answers" in shown(app), "the word that there is none")
        for steps in (range(10), range(10, 20)):
            with DaemonProcess(home) as daemon, RingAgent(daemon.address, source=f"s{steps[0]}") as agent:
                if not steps[0]:
                    agent.add_hello()
                agent.add_frames(steps)
                await until(pilot, agent.pump, "an acknowledgement")
                await until(
                    pilot, lambda steps=steps: app.look.ranks and app.look.ranks[0]["step"] == steps[-1], "steps"
                )  # type: ignore[misc]
                daemon.kill()
            await until(pilot, lambda: "no daemon answers" in shown(app), "the word that it is gone")
            assert "as of " in shown(app)
            assert "run" in shown(app)  # what was seen last stays
        await pilot.resize_terminal(30, 8)
        await pilot.press("p", "a", "u", "k", "enter", "tab", "enter")
        await pilot.resize_terminal(200, 60)

    drive(app, act)


@pytest.mark.parametrize("answered", ["null", "[]", '{"runs": 3}', '{"runs": [{"run": "r"}]}', "<html>", ""])
def test_whatever_answers_is_told_and_never_ends_the_terminal(answered: str, tmp_path: Path) -> None:
    app = watching("--url", "http://127.0.0.1:1")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(answered)}\r\n\r\n{answered}".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def act(pilot: Pilot[None]) -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            app._daemons = replace(app._daemons, urls=lambda: [f"http://127.0.0.1:{port}"])
            await until(
                pilot,
                lambda: ("trying again" in shown(app) and str(port) in shown(app)) or "version" in shown(app),
                "the words",
            )

    drive(app, act)


def test_names_from_outside_are_shown_and_do_nothing() -> None:
    evil = "\x1b[31m[bold]x[/]\n"
    run = {**_run(), "run": evil}
    (row,) = model.RUNS.rows(Look(runs=[run]), NOW)
    assert row.cells[0] == "\\x1b[31m[bold]x[/]\\n"
    assert "\x1b" not in model.headline(Look(runs=[run], run={**run, **_details()}))


def _run() -> dict[str, Any]:
    return {
        "run": "r",
        "live": True,
        "seen_at": NOW,
        "project": None,
        "generation": "g",
        "step": 3,
        "loss": 1.0,
        "grad_norm": None,
        "learning_rate": 0.1,
        "mode": "auto",
        "paused_by": None,
        "proposed_commands": 0,
        "ranks": {"lost": 1, "stale": 0, "live": 1, "ended": 0},
        "open_incidents": {"critical": 0, "warning": 0, "info": 0},
    }


def _details() -> dict[str, Any]:
    return {
        "lr_multiplier": 0.5,
        "fixes_left": 4,
        "standing": ["c"],
        "detectors": {"oom": "blind"},
        "losses": {"steps": [0, 1, 2], "values": [2.0, None, 1.0]},
    }


def test_a_loss_that_is_not_finite_is_marked_in_the_curve() -> None:
    look = Look(run={**_run(), **_details()})
    assert model.curve(look, 30) == "loss 2 █×▁ 1"
    assert model.curve(replace(look, run={**look.run, "losses": {"values": [None]}}), 30) == "loss: none yet"  # type: ignore[dict-item]


def test_every_table_leaves_room_for_what_it_tells_on_80_columns() -> None:
    for table in TABLES.values():
        assert table.widths.count(None) == 1
        assert sum((width or 10) + 1 for width in table.widths) <= SMALL[0]


# -- without a terminal that can be drawn on ---------------------------------------------------------------------------


def test_a_dumb_terminal_gets_lines_without_escapes_and_ctrl_c_ends_it(sick: Sick) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sosa_stream.cli", "watch", "--home", str(sick.home), "--every", "0.1"]
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while b"lr_jump" not in text or b"proposed" not in text:
            assert time.monotonic() < deadline, text
            text += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"\x1b" not in text
    assert b"Traceback" not in text


def test_where_nobody_reads_the_lines_any_more_it_ends_and_a_run_that_is_not_there_is_told(sick: Sick) -> None:
    command = [sys.executable, "-m", "sosa_stream.cli", "watch", "nosuch", "--home", str(sick.home), "--every", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            while "no run 'nosuch' here" not in (line := process.stdout.readline()):
                assert line, "it has ended"
            process.stdout.close()
            assert process.wait(DEADLINE_SECONDS) == 0
        finally:
            process.kill()


def test_on_a_real_terminal_without_colours_it_draws_and_q_ends_it_with_0(sick: Sick) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sosa_stream.cli", "watch", "--home", str(sick.home), "--every", "0.1"]
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while b"lr_jump" not in text:
            assert time.monotonic() < deadline, text
            text += os.read(ours, 65536)
        os.write(ours, b"q")
        wait_until(lambda: _read_some(ours) or process.poll() is not None, "its end")
        assert process.wait(DEADLINE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in text


def _read_some(fd: int) -> bool:
    """Take what is there, so that its writer is not held up; False."""
    os.set_blocking(fd, False)
    with suppress(OSError):
        os.read(fd, 65536)
    return False


# -- sosa status -------------------------------------------------------------------------------------------------------


def test_status_says_the_same_by_the_api_and_from_the_store(own: Sick, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["status", "--home", str(own.home)]
    wait_until(lambda: _open_in_store(own.home), "the incident in the store")
    assert main([*flags, "--json", "--fail-on", "critical"]) == 3
    live = json.loads(capsys.readouterr().out)
    assert (live["run"], live["live"], live["mode"], live["from"]) == ("run", True, "suggest", "daemon")
    assert [incident["kind"] for incident in live["incidents"]] == ["lr_jump"]
    assert main(flags) == 0
    assert "lr_jump" in capsys.readouterr().out
    assert own.daemon.terminate() == 0
    assert main([*flags, "--json", "--fail-on", "warning"]) == 3
    stored = json.loads(capsys.readouterr().out)
    assert (stored["run"], stored["live"], stored["mode"], stored["from"]) == ("run", False, None, "store")
    assert stored["open_incidents"] == live["open_incidents"]
    assert [incident["id"] for incident in stored["incidents"]] == [incident["id"] for incident in live["incidents"]]
    assert set(stored) == set(live)
    assert main([*flags, "run"]) == 0
    out = capsys.readouterr().out
    assert "proposed" in out
    assert "lr_jump" in out


def _open_in_store(home: Path) -> bool:
    with closing(open_store(home)) as store:
        return bool(store.execute("SELECT 1 FROM incidents WHERE state = 'open'").fetchone())


def test_status_of_what_is_not_there_is_a_sentence_and_2_and_of_a_daemon_that_is_not_1(
    sick: Sick, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "nonsense", "--home", str(sick.home)]) == 2
    assert "known are run" in capsys.readouterr().err
    assert main(["status", "--url", "http://127.0.0.1:1"]) == 1
    assert "no daemon answers at http://127.0.0.1:1" in capsys.readouterr().err
    for flags in (
        ["--url", "nonsense"],
        ["--url", "http://h/x"],
        ["--token-file", str(tmp_path / "none")],
        ["--ca", str(tmp_path / "none")],
    ):
        assert main(["status", *flags]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_with_tls_the_daemon_must_show_a_certificate_that_ca_has_signed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = Certificates(tmp_path), Certificates(tmp_path, "other")
    cert, key = ours.sign("server")
    (tmp_path / "people").write_text(f"{TOKEN}\n")
    (tmp_path / "sosa.toml").write_text(
        f'[daemon]\nhttp_cert = "{cert}"\nhttp_key = "{key}"\nhttp_tokens = "{tmp_path / "people"}"\n'
    )
    with DaemonProcess(tmp_path / "home", "--config", str(tmp_path / "sosa.toml")) as daemon:
        url = ["status", "--url", f"https://{daemon.http}"]
        assert main([*url, "--ca", str(ours.ca)]) == 0
        assert main([*url, "--ca", str(theirs.ca)]) == 1
        assert "--ca" in capsys.readouterr().err
        assert main(["status", "--home", str(tmp_path / "home"), "--ca", str(ours.ca)]) == 0


# -- where daemons are -------------------------------------------------------------------------------------------------


def test_a_home_names_the_daemons_that_live_and_no_dead_one(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with DaemonProcess(home) as one, DaemonProcess(home) as other:
        assert set(served_urls(home)) == {f"http://{one.http}", f"http://{other.http}"}
        one.kill()
        assert served_urls(home) == [f"http://{other.http}"]
        assert len(list(home.glob("*.http"))) == 2
        with DaemonProcess(home) as third:
            assert set(served_urls(home)) == {f"http://{other.http}", f"http://{third.http}"}
            assert len(list(home.glob("*.http"))) == 2  # the dead one's is gone
            assert third.terminate() == 0
        assert len(list(home.glob("*.http"))) == 1


def test_damaged_files_and_loopbacks_of_other_hosts_are_passed_over(tmp_path: Path) -> None:
    for number, text in enumerate(("", "null", "{}", '{"url": 3, "host": "h"}', '{"url": "http://[", "host": "h"}')):
        (tmp_path / f"h-{number}.http").write_text(text)
    (tmp_path / "h-9.http").mkdir()
    with published(tmp_path, "http://0.0.0.0:7"):
        assert served_urls(tmp_path) == ["http://127.0.0.1:7"]
    assert served_urls(tmp_path) == []


def test_a_home_that_cannot_be_written_keeps_no_daemon_from_serving(tmp_path: Path) -> None:
    with published(tmp_path / "nowhere", "http://127.0.0.1:7"):
        assert served_urls(tmp_path / "nowhere") == []


def test_without_its_extra_watch_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "textual", None)
    for name in [name for name in sys.modules if name.startswith(("textual.", "sosa_stream.watch.app"))]:
        monkeypatch.delitem(sys.modules, name)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert main(["watch", "--url", "http://127.0.0.1:1"]) == 2
    assert "pip install '.[watch]'" in capsys.readouterr().err


def test_an_error_of_a_daemon_is_a_sosa_error() -> None:
    daemons, _ = daemons_of(parser().parse_args(["watch", "--url", "http://127.0.0.1:1"]))
    with pytest.raises(SosaError, match="no daemon answers"):
        daemons.look(None)

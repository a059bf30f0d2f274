"""Draws docs/images/watch.svg: `sosa watch` over the three runs of a demo, while the last one is repaired.

    make demo && .venv/bin/python docs/images/watch.py sosa-demo docs/images/watch.svg

What is drawn is what the terminal shows: the demo's recordings, cut off at the moments at which an incident or a fix
changes, are resumed by a real daemon, to which the messages that follow are sent; textual writes its screen as SVG, and
the screens become one picture that moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sosa_stream.demo.run import PROTECTED, RUNS
from sosa_stream.effects import Event
from sosa_stream.protocol.channels import AgentChannel
from sosa_stream.protocol.messages import Header
from sosa_stream.protocol.recording import MAGIC, RECORD_HEAD, decode_record, read_recording
from sosa_stream.replay.recordings import RecordingFeed
from sosa_stream.watch.app import Watch
from sosa_stream.watch.daemons import Daemons

COLUMNS, LINES = 110, 22
NUM_AFTER = 40
"""Messages that are sent after the cut: both ranks speak again."""
MOST_SCREENS = 9
LIMIT_SECONDS = 60
SCREEN_SECONDS = 2.5
LAST_SECONDS = 5.0


def moments(recording: Path) -> list[int]:
    """How many records there are when something has changed: an incident, or a fix that has come to a new state."""
    records = list(read_recording(recording))[:-NUM_AFTER]
    feed, found, before = RecordingFeed(), [len(records) // 4], None
    for number, (at, payload) in enumerate(records):
        feed.take(at, payload)
        if feed.engine is None:
            continue
        view = feed.engine.view()
        now = (
            [(one.id, one.state) for one in view.incidents],
            [(one.id, one.applied_step, one.verdict) for one in view.commands],
        )
        if before is not None and now != before and number > found[0]:
            found.append(number + 1)
        before = now
    return [*found[: MOST_SCREENS - 1], len(records)]


def cut(recording: Path, copy: Path, end: int | None = None) -> list[bytes]:
    """Write the first ``end`` records, or nearly all; the messages that follow."""
    records = list(read_recording(recording))
    end = len(records) - NUM_AFTER if end is None else end
    copy.parent.mkdir()
    with copy.open("wb") as file:
        file.write(MAGIC)
        for at, payload in records[:end]:
            file.write(RECORD_HEAD.pack(len(payload), at) + payload)
    return [payload for _, payload in records[end : end + NUM_AFTER] if is_message(decode_record(payload))]


def is_message(event: Event) -> bool:
    return isinstance(getattr(event, "header", None), Header)


@contextlib.contextmanager
def daemon(home: Path) -> Iterator[tuple[str, str]]:
    told, write = os.pipe()
    command = [sys.executable, "-m", "sosa_stream.cli", "daemon", "--home", str(home), "--ready-fd", str(write)]
    command += ["--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"]
    with subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL) as process:
        os.close(write)
        with os.fdopen(told) as file:
            ready = json.loads(file.readline())
        try:
            yield ready["address"], f"http://{ready['http']}"
        finally:
            process.terminate()


def send(address: str, run: str, messages: list[bytes], closing: contextlib.ExitStack) -> None:
    channel = AgentChannel(address, run)
    closing.callback(channel.close)
    for message in messages:
        while not channel.send(message):
            channel.receive()


async def screen(demo: Path, end: int) -> str:
    """The terminal when the last run has come to ``end``, as SVG."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        home = Path(folder)
        ends = {PROTECTED: end}
        after = {run: cut(demo / run / "run.sosa", home / run / "run.sosa", ends.get(run)) for run in RUNS}
        address, url = closing.enter_context(daemon(home))
        app = Watch(Daemons(urls=lambda: [url]), who="you", run=PROTECTED, every_seconds=0.2)
        async with asyncio.timeout(LIMIT_SECONDS), app.run_test(size=(COLUMNS, LINES)) as pilot:
            for run, messages in after.items():
                send(address, run, messages, closing)
            await until(lambda: len(app.look.runs) == len(RUNS) and app.look.run is not None)
            await pilot.pause(0.5)
            return app.export_screenshot(title="sosa watch")


def moving(screens: list[str]) -> str:
    """The screens one after the other, for ever; where nothing moves, the last one."""
    box = re.search(r'viewBox="([^"]+)"', screens[-1])
    assert box is not None
    whole = SCREEN_SECONDS * (len(screens) - 1) + LAST_SECONDS
    share = 100 * SCREEN_SECONDS / whole
    style = (
        f"@keyframes turn {{ 0% {{ visibility: visible }} {share:.4f}%, 100% {{ visibility: hidden }} }} "
        f".turn {{ visibility: hidden; animation: turn {whole}s step-end infinite }}"
    )
    turns = [
        f'<g class="turn" style="animation-delay: {SCREEN_SECONDS * i}s">{text}</g>'
        for i, text in enumerate(screens[:-1])
    ]
    inside = "\n".join([screens[-1], *turns])
    return f'<svg viewBox="{box[1]}" xmlns="http://www.w3.org/2000/svg"><style>{style}</style>\n{inside}\n</svg>\n'


async def draw(demo: Path, picture: Path) -> None:
    screens = [await screen(demo, end) for end in moments(demo / PROTECTED / "run.sosa")]
    picture.write_text(moving(screens), encoding="utf-8")


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(draw(Path(sys.argv[1]), Path(sys.argv[2])))

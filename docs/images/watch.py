"""Draws docs/images/watch.svg: `sosa watch` over the three runs of a demo, just after its second repair.

    make demo && .venv/bin/python docs/images/watch.py sosa-demo docs/images/watch.svg

What is drawn is what the terminal shows: the demo's recordings, cut off at that moment, are resumed by a real daemon,
to which the messages that follow are sent; textual writes its screen as SVG.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
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
LIMIT_SECONDS = 60


def cut(recording: Path, copy: Path) -> list[bytes]:
    """Write the recording's part up to where the last fix is applied, or nearly all; the messages that follow."""
    records = list(read_recording(recording))
    feed, end, num_applied = RecordingFeed(), len(records) - NUM_AFTER, 0
    for number, (at, payload) in enumerate(records[:end]):
        feed.take(at, payload)
        commands = feed.engine.view().commands if feed.engine is not None else ()
        applied = sum(command.applied_step is not None for command in commands)
        if applied > num_applied:
            num_applied, end = applied, number + 1
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


async def draw(demo: Path, picture: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        home = Path(folder)
        after = {run: cut(demo / run / "run.sosa", home / run / "run.sosa") for run in RUNS}
        address, url = closing.enter_context(daemon(home))
        app = Watch(Daemons(urls=lambda: [url]), who="you", run=PROTECTED, every_seconds=0.2)
        async with asyncio.timeout(LIMIT_SECONDS), app.run_test(size=(COLUMNS, LINES)) as pilot:
            for run, messages in after.items():
                send(address, run, messages, closing)
            await until(lambda: len(app.look.runs) == len(RUNS) and bool(app.look.commands))
            await pilot.pause(0.5)
            picture.write_text(app.export_screenshot(title="sosa watch"), encoding="utf-8")


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.1)


if __name__ == "__main__":
    asyncio.run(draw(Path(sys.argv[1]), Path(sys.argv[2])))

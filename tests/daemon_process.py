"""A real daemon in a process of its own, and a small agent that keeps a ring and resends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sosa_stream.protocol.channels import AgentChannel
from sosa_stream.protocol.codec import encode
from sosa_stream.protocol.keys import AgentKeys
from sosa_stream.protocol.messages import (
    AgentMessage,
    Announcement,
    Bye,
    Command,
    Header,
    Heartbeat,
    Hello,
    MetricFrame,
    Phase,
    Received,
)

DEADLINE_SECONDS = 20.0
LOOPBACK = "tcp://127.0.0.1:0"


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true value of ``condition``; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds:g} s in vain for {what}")


class DaemonProcess:
    """``sosa daemon`` on kernel-chosen ports, unless ``bind`` says otherwise. Killed on leaving, if still there."""

    def __init__(
        self,
        home: Path,
        *flags: str,
        bind: str = LOOPBACK,
        stdin: int | None = subprocess.DEVNULL,
        log: Path | None = None,
    ) -> None:
        read_end, write_end = os.pipe()
        command = [sys.executable, "-m", "sosa_stream.cli", "daemon", "--home", str(home), "--bind", bind]
        command += ["--http", "127.0.0.1:0", "--ready-fd", str(write_end), *flags]
        self.log_path = log or home.with_suffix(".log")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log_file:
            self.process = subprocess.Popen(command, pass_fds=[write_end], stdin=stdin, stderr=log_file)
        os.close(write_end)
        with os.fdopen(read_end) as file:
            line = file.readline()
        if not line:
            self.process.wait()
            raise AssertionError(f"the daemon did not start:\n{self.log()}")
        ready = json.loads(line)
        assert ready["pid"] == self.process.pid
        self.address: str = ready["address"]
        self.http: str = ready["http"]

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def log(self) -> str:
        return self.log_path.read_text()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as response:
            text: str = response.read().decode()
        return text

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample; 0 if it is not there."""
        for line in self.get("/metrics").splitlines():
            match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name and dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")) == labels:
                return float(match[3])
        return 0.0

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(DEADLINE_SECONDS)


class RingAgent:
    """One rank that keeps every message until the daemon has acknowledged it, as real agents do."""

    def __init__(
        self, address: str, run: str = "run", *, source: str = "source", keys: AgentKeys | None = None, rank: int = 0
    ) -> None:
        self.run, self.source, self.rank = run, source, rank
        self.channel = AgentChannel(address, run, keys=keys)
        self.ring: list[bytes] = []
        self.acknowledged = 0
        self.commands: list[Command] = []
        self.announcements: list[Announcement] = []
        self.num_received = 0
        self._sent = 0
        self._reconnects = 0
        self._progress_at = time.monotonic()

    def __enter__(self) -> RingAgent:
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()

    def header(self, seq: int) -> Header:
        return Header(
            run=self.run, generation="g", source=self.source, rank=self.rank, world_size=2, host="host", seq=seq
        )

    def add(self, make: Callable[[Header], AgentMessage]) -> None:
        self.ring.append(encode(make(self.header(len(self.ring) + 1))))

    def add_hello(self) -> None:
        self.add(
            lambda header: Hello(
                header=header, pid=1, device="cpu", versions={}, parameters=(), policy={"mode": "observe"}
            )
        )

    def add_frames(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.add(lambda header, step=step: frame(header, step))  # type: ignore[misc]

    def add_bye(self) -> None:
        self.add(lambda header: Bye(header=header, reason="end", exit_code=0, dropped=0))

    def heartbeat(self, oldest: int) -> bytes:
        return encode(Heartbeat(header=self.header(0), tick=0, step=0, phase=Phase.FORWARD, oldest=oldest, dropped=0))

    def pump(self) -> bool:
        """Send what is due and hear what came; True when everything is acknowledged."""
        for message in self.channel.receive():
            if isinstance(message, Command):
                self.commands.append(message)
            if isinstance(message, Announcement):
                self.announcements.append(message)
            if not isinstance(message, Received):
                continue
            self.num_received += 1
            if message.sources.get(self.source, 0) > self.acknowledged:
                self.acknowledged = message.sources[self.source]
                self._progress_at = time.monotonic()
        stalled = time.monotonic() > self._progress_at + 1.0
        if self.channel.reconnects != self._reconnects or stalled:
            self._reconnects = self.channel.reconnects
            self._progress_at = time.monotonic()
            self._sent = self.acknowledged
        while self._sent < len(self.ring) and self.channel.send(self.ring[self._sent]):
            self._sent += 1
        return self.acknowledged == len(self.ring)


def frame(header: Header, step: int) -> MetricFrame:
    return MetricFrame(
        header=header,
        columns=("tick", "loss"),
        steps=np.array([step], dtype=np.int64),
        values=np.array([[float(step), 1.0]]),
    )

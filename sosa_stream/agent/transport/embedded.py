"""The daemon that rank 0 starts for a job that named none: on loopback, and it ends when we do.

It is no child of ours, for a script may wait for all of its own (``os.wait``). It has a session of its own (a Ctrl-C in
the terminal is not for it), logs to a file, and reads end-of-file on its standard input when this process ends in
whatever way; it then drains and ends by itself. What the user should hear comes back through a pipe, a JSON object per
line: first where it can be found, then its complaints. The end of that pipe is the daemon's.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from sosa_stream.visible import shown

LAUNCH = "import os, sys; os.fork() or os.execv(sys.argv[1], sys.argv[1:])"
MAX_RESTARTS = 3
READY_SECONDS = 30.0


class EmbeddedDaemon:
    """Starts the daemon and starts it again when it dies, at most three times, at the same address."""

    def __init__(self, home: Path, folder: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        """``folder`` and ``env`` are where the settings were read, which the daemon reads again.

        The script may have left the one and be changing the other: started while another thread sets a variable, a
        process gets an environment that is being moved in memory (`EFAULT`).
        """
        self.address = ""
        self.http = ""
        self.pid = 0
        self.given_up = ""
        self.complaints: list[str] = []
        """Sentences for the user."""
        self._home = home
        self._folder = folder
        self._env = dict(os.environ if env is None else env)
        self._alive_fd: int | None = None
        """The daemon's standard input: it ends with the last process that has this open."""
        self._told_fd: int | None = None
        self._told = b""
        self._started_at = 0.0
        self._starts = 0

    def start(self) -> None:
        """Start it; `poll` learns its address."""
        self._home.mkdir(parents=True, exist_ok=True)
        told, write = os.pipe()
        stdin, alive = os.pipe()
        os.set_blocking(told, False)
        bind = self.address or "tcp://127.0.0.1:0"
        daemon = ["-m", "sosa_stream.cli", "daemon", "--embedded", "--ready-fd", str(write), "--home", str(self._home)]
        daemon += ["--bind", bind, "--http", self.http or "127.0.0.1:0"]
        command = [sys.executable, "-ISc", LAUNCH, sys.executable, *daemon]
        try:
            with open(self._home / "daemon.log", "ab") as log:
                subprocess.run(
                    command,
                    cwd=self._folder,
                    env=self._env,
                    stdin=stdin,
                    stdout=log,
                    stderr=log,
                    pass_fds=[write],
                    start_new_session=True,
                    check=False,
                )
        except OSError:
            for fd in (told, alive):
                os.close(fd)
            raise
        finally:
            for fd in (stdin, write):
                os.close(fd)
        self._alive_fd = alive
        self._told_fd, self._told = told, b""
        self._started_at = time.monotonic()
        self._starts += 1

    def poll(self) -> None:
        """Learn what it tells, its address first, and start it again if it has died. Never blocks."""
        if not self._starts or self.given_up:
            return
        self._listen()
        if self._told_fd is None:
            self._forget_pipes()
            if self._starts > MAX_RESTARTS:
                self.given_up = f"the daemon ended {self._starts} times; see {shown(self._home / 'daemon.log')}"
            else:
                self.start()

    @property
    def starting(self) -> bool:
        """Whether it is worth waiting for the address."""
        late = time.monotonic() - self._started_at > READY_SECONDS
        return not self.address and not self.given_up and self._starts > 0 and not late

    def stop(self, timeout_seconds: float) -> None:
        """End of file is the word to drain and end; wait for it, within bounds, and hear its last words."""
        if self._alive_fd is not None:
            os.close(self._alive_fd)
            self._alive_fd = None
        until = time.monotonic() + timeout_seconds
        self._listen()
        while self._told_fd is not None and (left := until - time.monotonic()) > 0.0:  # its own bound ends its draining
            select.select([self._told_fd], [], [], left)
            self._listen()
        self._forget_pipes()

    def after_fork_in_child(self) -> None:
        """A forked worker must not keep the pipe open, or the daemon would never see its end."""
        self._forget_pipes()

    def _listen(self) -> None:
        while self._told_fd is not None:
            try:
                heard = os.read(self._told_fd, 4096)
            except BlockingIOError:
                return
            if not heard:
                os.close(self._told_fd)
                self._told_fd = None
            *lines, self._told = (self._told + heard).split(b"\n")
            for line in map(json.loads, lines):
                if "complaint" in line:
                    self.complaints.append(line["complaint"])
                else:
                    self.address, self.http, self.pid = line["address"], line["http"], line["pid"]

    def _forget_pipes(self) -> None:
        for fd in (self._alive_fd, self._told_fd):
            if fd is not None:
                os.close(fd)
        self._alive_fd = self._told_fd = None

"""Rank 0's eyes: follows the recording and the store while the script trains, prints lines, asks for the `stop`."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sosa_stream.daemon.asking import ask
from sosa_stream.daemon.schema import RECORDING_NAME, opened_store
from sosa_stream.decide.requests import Fix
from sosa_stream.detect.incidents import Severity
from sosa_stream.diagnose.lines import Lines
from sosa_stream.effects import ShellEvent
from sosa_stream.errors import NoAnswerError, ProtocolError, RefusedError, SosaError
from sosa_stream.protocol.actions import Action
from sosa_stream.protocol.messages import MetricFrame
from sosa_stream.protocol.recording import decode_record
from sosa_stream.replay.recordings import follow_recording

LOOK_SECONDS = 0.2
STOP_SECONDS = 60.0
"""How long a `stop` may take while no step is completed, before the process is ended without it."""
LEAVE_SECONDS = 10.0
"""How long a process that has ended training may take to be gone."""
DRAIN_SECONDS = 20.0
"""How long the daemon may take to write what it has, once the training process has gone."""
REFUSED = frozenset({"rejected", "expired", "aborted", "failed"})
WHO = "sosa diagnose"
ENDINGS = frozenset({"exception", "shape_mismatch", "oom", "rank_lost"})
"""Kinds of incidents with which the training ends by itself: a process has raised, or is gone."""


class Watch:
    """What happens in one run of ``home``, as its daemon keeps it.

    Args:
        stop_on: the least severity of an incident that ends the training.
        is_alive: whether the training process is.
        terminate: ends it without the ranks agreeing.
        say: gets each line.
    """

    def __init__(
        self,
        home: Path,
        run: str,
        stop_on: Severity,
        is_alive: Callable[[], bool],
        terminate: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self.recording = home / run / RECORDING_NAME
        self.incident: dict[str, Any] | None = None
        """The first one at or above ``stop_on`` after which a training would go on."""
        self._home, self._run = home, run
        self._stop_on = stop_on
        self._is_alive = is_alive
        self._terminate = terminate
        self._say = say
        self._lines = Lines()
        self.has_asked = False
        """Whether the `stop` was asked for."""
        self._command = ""
        """Its id, once a daemon has taken it up."""
        self._is_over = False
        """Nothing more can be done for the training to end."""
        self._moved_at = 0.0
        self._gone_at: float | None = None
        self._is_free = False
        self._looked_at = 0.0

    def follow(self) -> None:
        """Until the training process has ended, and its daemon has written all."""
        while not self.recording.is_file():
            if not self._goes_on():
                return
        try:
            for _, payload in follow_recording(self.recording, self._goes_on):
                self._take(payload)
        except SosaError as error:
            self._say(f"{error}; the training goes on")
            while self._goes_on():
                pass
        for line in self._lines.end():
            self._say(line)
        self.look()

    def look(self) -> None:
        """Is there an incident that ends the training?"""
        self._looked_at = time.monotonic()
        try:
            if self.incident is None:
                self.incident = self._find_incident()
            if self.incident is not None and self._is_alive() and not self._is_over:
                self._stop(self.incident)
        except SosaError:  # no store yet, or one that is locked: another time
            return

    def _find_incident(self) -> dict[str, Any] | None:
        with opened_store(self._home) as store:
            rows = store.execute("SELECT record FROM incidents WHERE run = ? ORDER BY rowid", (self._run,)).fetchall()
        for (row,) in rows:
            record: dict[str, Any] = json.loads(row)
            if Severity[record["severity"].upper()] >= self._stop_on and record["kind"] not in ENDINGS:
                return record
        return None

    def _stop(self, incident: dict[str, Any]) -> None:
        """Ask once, through the fence; end it by force where that is refused, or no step is completed any more."""
        if not self.has_asked:
            self.has_asked = True
            self._moved_at = time.monotonic()
            self._say(f"{words_of(incident)}; the training is stopped")
        if not self._command:
            what = f"{incident['severity']}: {incident['kind']}"
            try:
                fix = Fix(action=Action(action="stop", params={}), who=f"{WHO} ({what})"[:100])
                self._command = ask(self._home, self._run, fix).command
            except NoAnswerError:  # asked again at the next look
                pass
            except RefusedError as error:
                if self._is_alive() and not self._ends_by_itself():
                    self._force(str(error))
                return
        state = self._state_of_command() if self._command else ""
        if state in REFUSED:
            self._force(f"the stop was {state}")
        elif time.monotonic() - self._moved_at > STOP_SECONDS:
            self._force("no step is completed any more")

    def _ends_by_itself(self) -> bool:
        """Whether the training process is on its way out: it has said goodbye, and waits for the daemon."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self._is_alive()

    def _state_of_command(self) -> str:
        with opened_store(self._home) as store:
            row = store.execute("SELECT state FROM commands WHERE id = ?", (self._command,)).fetchone()
        return str(row[0]) if row is not None else ""

    def _force(self, why: str) -> None:
        if self._is_alive():
            self._say(f"it does not stop by itself ({why}): this process is ended")
            self._is_over = True
            self._terminate()

    def _goes_on(self) -> bool:
        """Nothing is new: wait for more, unless there will be none."""
        if not self._is_alive():
            return self._is_written_to()
        if time.monotonic() - self._looked_at >= LOOK_SECONDS:
            self.look()
        time.sleep(0.05)
        return True

    def _is_written_to(self) -> bool:
        """Whether a daemon still holds the recording; not for longer than `DRAIN_SECONDS` after the end."""
        now = time.monotonic()
        self._gone_at = now if self._gone_at is None else self._gone_at
        if now - self._gone_at > DRAIN_SECONDS:
            return False
        try:
            with self.recording.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
            return True
        except OSError:
            return False
        # Free: one more look, for it may have been written in between.
        is_first, self._is_free = not self._is_free, True
        return is_first

    def _take(self, payload: bytes) -> None:
        try:
            message = decode_record(payload)
        except ProtocolError:
            return
        if isinstance(message, ShellEvent) or message.header.rank:
            return
        now = time.monotonic()
        if isinstance(message, MetricFrame):  # steps go on: the ranks will meet at one
            self._moved_at = now
        for line in self._lines.take(message, now):
            self._say(line)
        if now - self._looked_at >= LOOK_SECONDS:
            self.look()


def words_of(incident: dict[str, Any]) -> str:
    """An incident's record in a line."""
    return f"step {incident['detected_step']}: {incident['severity']}: {incident['kind']}: {incident['message']}"

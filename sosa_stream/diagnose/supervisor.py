"""One rank of `sosa diagnose`: starts the training in a process of its own, outlives it, and writes the folder.

So there is a folder however the training ends. The process has a session of its own: what is sent to ours (Ctrl-C in
a terminal, torchrun's SIGTERM) reaches it once, through us. It dies with us.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sosa_stream.agent.repair.stopping import EXIT_STOPPED
from sosa_stream.daemon.schema import RECORDING_NAME
from sosa_stream.detect.incidents import Severity
from sosa_stream.diagnose import BEST_MODEL
from sosa_stream.diagnose.watch import Watch, words_of
from sosa_stream.errors import SosaError
from sosa_stream.visible import shown

EXIT_FOUND = 3
HOME_NAME = "sosa-runs"
GRACE_SECONDS = 10.0
"""How long the training process may take to end after SIGTERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What to run, and when to end it. ``script`` is the words behind ``--``; ``num_epochs`` 0: until it ends."""

    script: tuple[str, ...]
    out: Path
    run: str
    num_epochs: int
    stop_on: Severity
    every: int
    rank: int = 0


def diagnose(diagnosis: Diagnosis, env: Mapping[str, str]) -> int:
    """The exit code: the script's own, 3 where there was an incident that ends the training, else as it is said."""
    began = time.time()
    training = _Training(diagnosis, env)
    if diagnosis.rank:
        return training.code_of(training.wait())
    home = diagnosis.out / HOME_NAME
    watch = Watch(home, diagnosis.run, diagnosis.stop_on, training.is_alive, training.end, say)
    with training.signals_handed_on():
        watch.follow()
        code = training.code_of(training.wait())
    if watch.incident is not None and not watch.has_asked:
        say(f"{words_of(watch.incident)}; the training had ended before it could be stopped")
    if code == 0 and watch.incident is not None:
        code = EXIT_FOUND
    written = write(home / diagnosis.run / RECORDING_NAME, diagnosis.out, began)
    return code or (0 if written else 1)


def write(recording: Path, out: Path, began: float) -> bool:
    """The folder of a recording; says what is in it, and what it tells. Whether all of it could be written.

    ``began``: when the run did, in seconds since the epoch; a file that is older is of another.
    """
    if not recording.is_file():
        say("nothing was recorded: the script ended before it was watched, and there is nothing to tell")
        return False
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, after another rank has ended
    try:
        from sosa_stream.report.folder import left_from_before, write_folder
        from sosa_stream.report.telling import tell
        from sosa_stream.report.verdict import verdict

        say(f"writing {shown(out)}")
        story = tell(recording)
        written = write_folder(story, out)
        left = left_from_before(out, written)
        best = out / BEST_MODEL
        if best.is_file():
            (written if best.stat().st_mtime >= began else left).append(best)
        say(f"{shown(out)}: {', '.join(sorted(path.name for path in written))}")
        for path in left:
            say(f"left from before, and not of this run: {shown(path)}")
        say(verdict(story).sentence)
    except SosaError as error:
        say(str(error))
        return False
    except Exception as error:  # the script's own exit code is worth more than our mistake
        say(f"the folder is not whole: {type(error).__name__}: {error}; the recording is {shown(recording)}")
        return False
    finally:
        signal.signal(signal.SIGTERM, previous)
    return True


def say(text: str) -> None:
    """A line for the user, beside what the script says."""
    with contextlib.suppress(OSError):
        print(f"sosa: {text}", file=sys.stderr, flush=True)


class _Training:
    """The training process, started with the object."""

    def __init__(self, diagnosis: Diagnosis, env: Mapping[str, str]) -> None:
        notice, self._notice = os.pipe()
        words = [str(diagnosis.out), str(diagnosis.num_epochs), str(notice), str(os.getpid()), *diagnosis.script]
        self._forced = False
        self._killer: threading.Timer | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sosa_stream.diagnose", *words],
                env=_environment(diagnosis, env),
                pass_fds=[notice],
                start_new_session=True,
            )
        finally:
            os.close(notice)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> int:
        """Its exit code, negative where a signal has ended it."""
        with self.signals_handed_on():
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(0.5)  # a handler runs between two of them

    def code_of(self, code: int) -> int:
        """Ours, for its exit code."""
        if code == EXIT_STOPPED or self._forced:
            return EXIT_FOUND
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """End it, without the other ranks."""
        self._forced = True
        self._send(signal.SIGTERM)

    @contextlib.contextmanager
    def signals_handed_on(self) -> Iterator[None]:
        """SIGINT and SIGTERM are for the script."""
        before = {number: signal.signal(number, self._hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._killer is not None:
                self._killer.cancel()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._send(signal.Signals(number))

    def _send(self, number: signal.Signals) -> None:
        with contextlib.suppress(OSError):
            os.write(self._notice, b"\0")  # the best weights, first: the training thread may be beyond hearing
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        if number == signal.SIGTERM and self._killer is None:
            self._killer = threading.Timer(GRACE_SECONDS, self._process.kill)
            self._killer.daemon = True
            self._killer.start()


def _environment(diagnosis: Diagnosis, env: Mapping[str, str]) -> dict[str, str]:
    """Of the training process: watched, changed by nothing but a `stop`, recorded in a home of its own."""
    ours = {
        "SOSA_HOME": str(diagnosis.out / HOME_NAME),
        "SOSA_RUN": diagnosis.run,
        "SOSA_MODE": "suggest",  # as `observe`, but what a person asks for is done: so is our stop
        "SOSA_AGENT_DAEMON": "",
        "SOSA_AGENT_GUARD": "off",
        "SOSA_AGENT_SNAPSHOTS": "off",
        "SOSA_AGENT_CHECKPOINTS": "off",
        "SOSA_AGENT_LAYERS_EVERY": str(diagnosis.every),
        "SOSA_AGENT_FEATURES": "true",
    }
    kept = {name: value for name, value in env.items() if name != "SOSA_DAEMON"}
    unbuffered = {"PYTHONUNBUFFERED": "1"} if "TORCHELASTIC_RUN_ID" in env else {}  # as torchrun starts its scripts
    return {**kept, **unbuffered, **ours}

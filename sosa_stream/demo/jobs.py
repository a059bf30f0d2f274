"""Runs one torchrun job of the demo as a subprocess, and tells how far it has come."""

from __future__ import annotations

import collections
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sosa_stream.config import ENV_PREFIX
from sosa_stream.errors import SosaError

NUM_RANKS = 2
TIME_LIMIT_SECONDS = 240.0
_PROGRESS = re.compile(r"step (\d+)/(\d+) loss (\S+)")
# torchrun ends with some 35 lines of its own; the reason stands before them.
_TAIL_LINES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training job: `train.py` with these faults, under the agent with these settings."""

    name: str
    faults: Sequence[str]
    settings: Mapping[str, str]
    """``SOSA_*`` variables."""
    arguments: Sequence[str]
    """Of the training script."""
    log: Path
    """Where everything that the job says is kept."""

    def command(self) -> list[str]:
        script = Path(__file__).with_name("train.py")
        inject = [part for fault in self.faults for part in ("--inject", fault)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(NUM_RANKS)]
        return [sys.executable, *launcher, "-m", "sosa_stream.agent", *inject, str(script), *self.arguments]

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """``inherited`` without a setting of the user's own, who would wonder at the demo's outcome."""
        kept = {name: value for name, value in inherited.items() if not name.startswith(ENV_PREFIX)}
        # One thread a rank, and every line as soon as it is printed.
        return {**kept, **self.settings, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class JobFailedError(SosaError):
    """A training job ended otherwise than it should have."""


def run_job(job: Job, on_progress: Callable[[int, int, str], None]) -> None:
    """Run ``job`` to its end; ``on_progress`` gets the step, the number of steps and the loss as printed.

    However this is left, with Ctrl-C for example, the job's processes have ended.

    Raises:
        JobFailedError: it did not exit with 0, or took longer than ``TIME_LIMIT_SECONDS``.
    """
    tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
    too_long = threading.Event()
    process = subprocess.Popen(
        job.command(),
        env=job.environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # A Ctrl-C is for us alone: torchrun, told by us, ends its ranks in order.
        start_new_session=True,
    )

    def stop_at_limit() -> None:
        too_long.set()
        process.terminate()

    limit = threading.Timer(TIME_LIMIT_SECONDS, stop_at_limit)
    limit.start()
    try:
        assert process.stdout is not None
        with job.log.open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                if found := _PROGRESS.search(line):
                    on_progress(int(found[1]), int(found[2]), found[3])
        process.wait()
    finally:
        limit.cancel()
        _end(process)
    if process.returncode != 0:
        how = f"took longer than {TIME_LIMIT_SECONDS:g} s" if too_long.is_set() else _how_it_ended(process.returncode)
        raise JobFailedError(f"The {job.name} run {how}. Its last lines, of {job.log}:\n{''.join(tail).rstrip()}")


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"


def _end(process: subprocess.Popen[str]) -> None:
    """End torchrun, which ends its ranks when asked, and make sure of it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()

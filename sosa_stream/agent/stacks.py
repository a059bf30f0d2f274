"""Where the threads of this process stand, asked from the agent's thread; and what a silent process can still tell.

A process whose GIL is held cannot answer: its agent's thread stands as well. `faulthandler` has a handler in C that
writes all stacks without the GIL; another rank of the host sends the signal. To walk the frames of threads that run
ends a process by a segmentation fault sooner or later, so it is sent only where none can: the agent's thread is there,
wakes every 5 ms to ask for the GIL, and does not get it, which no Python code keeps from it.
`faulthandler.dump_traceback_later` needs nobody to send a signal, but writes whether or not threads run: a process
that was stopped for a while and goes on finds its time up.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from sosa_stream.processes import identity
from sosa_stream.protocol import messages
from sosa_stream.protocol.messages import Header, Inquiry, Neighbour, Phase, ProcessState

SIGNAL = getattr(signal, "SIGRTMIN", 0) + 13
"""That asks for the stacks. The script's own where it has a handler."""
TELLS_SECONDS = 0.05
"""How long whoever has asked waits for what is written."""
MAX_SIGNALS = 4
"""Ranks that are asked in one answer, whose agent does nothing else meanwhile."""
ASKS_SECONDS, MIN_ASKS = 0.05, 5
"""A thread that waits for the GIL goes to sleep so often, and others of ours less (``sys.getswitchinterval``: 5 ms)."""
MAX_FRAMES, MAX_FRAME_LENGTH, MAX_OTHERS = 48, 300, 128
MAX_FILE_BYTES = 1 << 16
MAX_GROUPS = 16
WORKS_SHARE = 0.1
"""Of the time since the last answer: a thread that waits uses next to none, and on a crowded host others get little."""
STOPPED_STATES, GONE_STATES = "Tt", "ZXx"
"""Of the third field of ``/proc/<pid>/stat``; see proc(5)."""

_HEAD = re.compile(rb"(?P<process>\S+) agent (?P<agent>\d+) training 0x(?P<ident>\w+)\n")
_C_THREAD = re.compile(r"(?:Current thread|Thread) 0x(?P<ident>[0-9a-f]+)")
_C_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


class Stacks:
    """For the agent's thread, but for `close`. ``path`` is that of a rank's file."""

    def __init__(self, rank: int, path: Callable[[int], Path]) -> None:
        self._rank = rank
        self._path = path
        self._training = threading.main_thread()
        self._head = b""
        self._used_at: tuple[float, float] | None = None
        self._file: int | None = None

    def alive(self) -> None:
        """The agent's thread runs: what is written of an earlier silence is forgotten."""
        if self._file is None:
            self._file = self._open()
        elif self._file >= 0 and os.fstat(self._file).st_size > len(self._head):
            self._begin_file(self._file)

    def answer(self, inquiry: Inquiry, tick: int, phase: Phase) -> Callable[[Header], messages.Stacks]:
        """Where everything stands now, as a message."""
        training, others = self._look()
        works = self._works()
        host = os.uname().nodename
        near = [silent for silent in inquiry.silent if silent.host == host and silent.rank != self._rank]
        untold = [silent for silent in near if not left_frames(self._path(silent.rank))]
        for silent in untold[:MAX_SIGNALS]:
            self._ask(silent.rank, silent.pid)
        neighbours = tuple(
            Neighbour(rank=silent.rank, state=process_state(silent.pid), frames=left_frames(self._path(silent.rank)))
            for silent in near
        )
        collectives = _collectives()
        return lambda header: messages.Stacks(
            header=header,
            tick=tick,
            phase=phase,
            training=training,
            others=others,
            works=works,
            neighbours=neighbours,
            collectives=collectives,
        )

    def close(self) -> None:
        """Nobody asks this process any more."""
        if self._file is not None and self._file >= 0:
            os.ftruncate(self._file, 0)  # first: whoever finds no head sends nothing
            faulthandler.unregister(SIGNAL)
            os.close(self._file)
            self._file = -1

    def _open(self) -> int:
        """The file that the handler writes into, ready; -1 where there can be none."""
        if not hasattr(signal, "SIGRTMIN") or signal.getsignal(SIGNAL) is not signal.SIG_DFL:
            return -1
        path = self._path(self._rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
            faulthandler.register(SIGNAL, file=file, all_threads=True)
        except (OSError, RuntimeError):
            return -1
        who, agent = identity(os.getpid()), threading.get_native_id()
        self._head = f"{who} agent {agent} training 0x{self._training.ident or 0:x}\n".encode()
        self._begin_file(file)
        return file

    def _ask(self, rank: int, pid: int) -> None:
        """Let a silent rank of this host write its stacks, if it waits for its GIL."""
        try:
            head = _HEAD.fullmatch(self._path(rank).read_bytes())
            if head is None or head["process"].decode() != identity(pid):
                return
            agent = int(head["agent"])
            num_sleeps = _num_sleeps(pid, agent)
            time.sleep(ASKS_SECONDS)
            if process_state(pid) is not ProcessState.RUNNING or _num_sleeps(pid, agent) - num_sleeps < MIN_ASKS:
                return
            ctypes.CDLL(None).tgkill(pid, agent, SIGNAL)  # not the training thread: what it waits in goes on
        except (OSError, AttributeError, LookupError, ValueError):
            return
        time.sleep(TELLS_SECONDS)

    def _begin_file(self, file: int) -> None:
        os.ftruncate(file, 0)
        os.write(file, self._head)

    def _look(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        frames = sys._current_frames()
        training = frames.pop(self._training.ident or 0, None)
        frames.pop(threading.get_ident(), None)
        others = itertools.chain.from_iterable(
            (f"thread {names.get(ident, ident)}", *_lines(frame)) for ident, frame in frames.items()
        )
        return _lines(training), tuple(itertools.islice(others, MAX_OTHERS))

    def _works(self) -> bool:
        """Whether the training thread computes. One that waits for a device does not rest either: nothing is said."""
        if torch.cuda.is_initialized() or self._training.ident is None:  # type: ignore[no-untyped-call]
            return False
        now = (time.monotonic(), time.clock_gettime(time.pthread_getcpuclockid(self._training.ident)))
        last, self._used_at = self._used_at, now
        return last is not None and now[1] - last[1] > WORKS_SHARE * (now[0] - last[0])


def _collectives() -> dict[str, int]:
    """How many collectives this rank has begun in each group, as far as its back end counts them (gloo and NCCL do)."""
    numbers: dict[str, int] = {}
    try:
        names = dict(dist.distributed_c10d._world.pg_names) if dist.is_initialized() else {}
        for group, name in itertools.islice(names.items(), MAX_GROUPS):
            begun = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            numbers[f"{name} {group.group_desc}"[:MAX_FRAME_LENGTH]] = int(begun)
    except Exception:  # private to torch: what it does not tell is left out
        return numbers
    return numbers


def process_state(pid: int) -> ProcessState:
    """What ``/proc`` says of a process on this host."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ProcessState.GONE if Path("/proc/self/stat").exists() else ProcessState.UNKNOWN
    except OSError:
        return ProcessState.UNKNOWN
    state = stat[stat.rindex(")") + 2]
    if state in STOPPED_STATES:
        return ProcessState.STOPPED
    return ProcessState.GONE if state in GONE_STATES else ProcessState.RUNNING


def left_frames(path: Path) -> tuple[str, ...]:
    """The training thread's frames in what a signal's handler wrote, innermost last; nothing where it wrote nothing."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES)
    except OSError:
        return ()
    head = _HEAD.match(text)
    frames: list[str] = []
    is_training = False
    for line in text[head.end() :].decode(errors="replace").splitlines() if head else ():
        if thread := _C_THREAD.match(line):
            is_training = head is not None and int(thread["ident"], 16) == int(head["ident"], 16)
            frames = [] if is_training else frames
        elif is_training and (frame := _C_FRAME.match(line)):
            frames.append(f"{frame['file']}:{frame['line']} {frame['name']}"[:MAX_FRAME_LENGTH])
    return tuple(reversed(frames[:MAX_FRAMES]))


def _num_sleeps(pid: int, thread: int) -> int:
    """How often a thread of a process has gone to sleep so far; see proc(5)."""
    status = Path(f"/proc/{pid}/task/{thread}/status").read_text(encoding="utf-8", errors="replace")
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def _lines(frame: FrameType | None) -> tuple[str, ...]:
    def told() -> Iterator[str]:
        for inner, line in itertools.islice(traceback.walk_stack(frame), MAX_FRAMES):
            yield f"{inner.f_code.co_filename}:{line} {inner.f_code.co_name}"[:MAX_FRAME_LENGTH]

    return tuple(reversed(tuple(told()))) if frame is not None else ()

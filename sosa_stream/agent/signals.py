"""SIGTERM: a checkpoint first, then whatever the script has made of the signal, as if we were not there.

Ours is the handler that Python runs; the script's own is remembered, and is what `signal.getsignal` shows it. The
checkpoint is written by a thread of its own while the main thread waits in the handler, so that the weights rest and
the wait has a bound. A signal that comes inside an optimizer step waits for its end.

A Python handler runs only once the main thread is back from C code, which may be never: a collective whose peer is
gone. So the kernel's signal is also seen on a file descriptor by a second thread. If the main thread does not move,
that thread has the checkpoint written, for the weights rest then too; and where the script leaves SIGTERM at its
default, it ends the process by it. (C code that does not let go of the interpreter's lock holds up both.)

A forked child has the script's own handler. One that is sent SIGTERM at once would lose it, for Python forgets in a new
child what came for its handlers: the signal is held back while forking.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

POLL_SECONDS = 0.05
GRACE_SECONDS = 0.5
"""How long the main thread has to come back from C code before the checkpoint is written without it."""

ENTERED = b"\0"
"""What the handler itself writes, for where an event loop has taken the kernel's bytes over."""

Handler = Any  # what `signal.signal` takes: a function, SIG_DFL or SIG_IGN


class Termination:
    """Listens for SIGTERM while the agent lives. Everything but `_watch` is for the main thread.

    Args:
        save: writes the checkpoint and says what came of it; given a function that says whether it is still wanted.
        in_step: whether an optimizer step is under way.
        seconds: how long a signal may be held up.
    """

    def __init__(
        self,
        save: Callable[[Callable[[], bool]], str],
        in_step: Callable[[], bool],
        seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self._save = save
        self._in_step = in_step
        self._seconds = seconds
        self._say = say
        self._signal, self._getsignal = signal.signal, signal.getsignal
        self._scripts: Handler = signal.SIG_DFL
        self._pipe: tuple[int, int] | None = None
        self._elsewhere = False
        """Training runs in a thread of the script's own, whose weights no handler can bring to rest."""
        self._deadline = 0.0
        self._entered = self._deferred = self._finishing = False
        self._handled = threading.Event()
        self._handled_at = -GRACE_SECONDS
        self._saver: _Saver | None = None

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._say("SIGTERM saves no checkpoint: only the main thread can listen for it")
            return
        self._signal, self._getsignal = signal.signal, signal.getsignal
        scripts = self._getsignal(signal.SIGTERM)
        if scripts is None:
            self._say("SIGTERM saves no checkpoint: its handler is not Python's")
            return
        global _listening
        _listening = self
        _hold_back_while_forking()
        self._scripts = scripts
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._signal(signal.SIGTERM, self._arrived)
        other = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        if other != -1:  # an event loop's: it needs it more
            signal.set_wakeup_fd(other)
        signal.signal, signal.getsignal = self._signal_as_seen, self._getsignal_as_seen
        threading.Thread(target=self._watch, args=(self._pipe[0],), name="sosa-sigterm", daemon=True).start()

    def remove(self) -> None:
        """Put everything back as the script has it."""
        if self._pipe is None or threading.current_thread() is not threading.main_thread():
            return
        deferred = self._deferred
        self._let_go()
        if deferred:
            os.kill(os.getpid(), signal.SIGTERM)

    def recheck(self) -> None:
        """At a tick: take note of a handler that has come past us, by a reference to `signal.signal` of before."""
        if self._pipe is None:
            return
        if threading.current_thread() is not threading.main_thread():
            self._elsewhere = True
            return
        present = self._getsignal(signal.SIGTERM)
        if present != self._arrived and present is not None:
            self._scripts = present
            self._signal(signal.SIGTERM, self._arrived)

    def at_rest(self) -> None:
        """An optimizer step has ended: a signal that came inside it is due."""
        if self._deferred and threading.current_thread() is threading.main_thread():
            self._deferred = False
            self._finish(sys._getframe())

    # -- as the script sees it -----------------------------------------------------------------------------------------

    def _signal_as_seen(self, signalnum: int, handler: Handler) -> Handler:
        before = self._signal(signalnum, handler)
        if signalnum != signal.SIGTERM:
            return before
        before, self._scripts = self._scripts, handler
        self._signal(signal.SIGTERM, self._arrived)
        return before

    def _getsignal_as_seen(self, signalnum: int) -> Handler:
        return self._scripts if signalnum == signal.SIGTERM else self._getsignal(signalnum)

    # -- a signal ------------------------------------------------------------------------------------------------------

    def _arrived(self, signum: int, frame: FrameType | None) -> None:
        if self._scripts == signal.SIG_IGN or self._finishing:
            return
        now = time.monotonic()
        if not self._entered:
            self._entered, self._deadline = True, now + self._seconds
            self._handled.clear()
            self._wake()
        if now < self._deadline and not self._elsewhere and self._in_step():
            self._deferred = True
        else:
            self._deferred = False
            self._finish(frame)

    def _finish(self, frame: FrameType | None) -> None:
        self._finishing = True
        try:
            if not self._elsewhere:
                saver = self._saver = self._saver or _Saver(self._save)
                if words := saver.wait(self._deadline - time.monotonic()):
                    self._say(words)
        finally:  # whoever presses Ctrl-C meanwhile does not want to wait; the signal is still the script's
            self._saver = None
            self._entered = self._finishing = False
            self._handled_at = time.monotonic()
            self._handled.set()
            if callable(self._scripts):
                self._scripts(signal.SIGTERM, frame)
            else:
                self._signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)

    def _wake(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                os.write(self._pipe[1], ENTERED)

    def _let_go(self) -> None:
        global _listening
        assert self._pipe is not None
        pipe, self._pipe, self._deferred = self._pipe, None, False
        _listening = None
        if signal.signal == self._signal_as_seen:
            signal.signal, signal.getsignal = self._signal, self._getsignal
        if self._getsignal(signal.SIGTERM) == self._arrived:
            self._signal(signal.SIGTERM, self._scripts)
        present = signal.set_wakeup_fd(-1)
        if present not in (-1, pipe[1]):
            signal.set_wakeup_fd(present)
        os.close(pipe[1])  # the other end is the thread's

    # -- the watching thread -------------------------------------------------------------------------------------------

    def _watch(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            if self._entered or (signal.SIGTERM in numbers and not self._is_handled()):
                self._see_it_through()
        os.close(pipe)

    def _see_it_through(self) -> None:
        """Until the signal has been handled, or the process has ended by it."""
        started = time.monotonic()
        place = _place_of_main()
        while (now := time.monotonic()) < started + self._seconds:
            if self._entered:
                if self._handled.wait(POLL_SECONDS):
                    return
                continue
            if _place_of_main() != place:  # it runs Python, so that its handler has run or soon will, and will wake us
                return
            if now > started + GRACE_SECONDS and not self._elsewhere and not self._in_step():
                saver = self._saver = self._saver or _Saver(self._save)
                if saver.is_done and self._scripts == signal.SIG_DFL:
                    if words := saver.wait(0.0):
                        self._say(words)
                    _die()
            time.sleep(POLL_SECONDS)
        if self._scripts == signal.SIG_DFL and not self._is_handled():
            _die()
        elif self._deferred:
            os.kill(os.getpid(), signal.SIGTERM)  # it is past its time, and handled at once

    def _is_handled(self) -> bool:
        """Whether the signal is ignored, or was handled before its byte was read here."""
        return self._scripts == signal.SIG_IGN or time.monotonic() < self._handled_at + GRACE_SECONDS


class _Saver:
    """A checkpoint being written in a thread of its own."""

    def __init__(self, save: Callable[[Callable[[], bool]], str]) -> None:
        self._wanted = True
        self._words = ""
        self._save = save
        self._thread = threading.Thread(target=self._run, name="sosa-checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> str:
        """What came of it; after ``seconds`` it is no longer wanted."""
        self._thread.join(max(0.0, seconds))
        self._wanted = self.is_done
        return self._words if self._wanted else "no checkpoint at SIGTERM: it takes longer than agent.sigterm_seconds"

    def _run(self) -> None:
        self._words = self._save(lambda: self._wanted)


_listening: Termination | None = None
_forking = threading.local()


@functools.cache
def _hold_back_while_forking() -> None:
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def _before_fork() -> None:
    if _listening is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    mask = _forking.__dict__.pop("mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    if _listening is not None:
        _listening._let_go()
    _after_fork()


def _place_of_main() -> tuple[int, int] | None:
    """Where the main thread stands in its Python code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return None if frame is None else (id(frame), frame.f_lasti)


def _die() -> None:
    """By SIGTERM itself, as the parent would have seen it without us; Python lets only its main thread ask for it."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGTERM, None)
    os.kill(os.getpid(), signal.SIGTERM)

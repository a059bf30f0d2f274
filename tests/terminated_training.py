"""A small training that a test ends by a signal: ``terminated_training.py HOW FOLDER``.

It leaves ``FOLDER/ready`` when the test may send the signal.
"""

from __future__ import annotations

import _signal
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

HOW, FOLDER = sys.argv[1], Path(sys.argv[2])


class SlowSGD(torch.optim.SGD):
    """A step that a signal falls into: the first half of the weights is updated, the other is not."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for i, parameter in enumerate(group["params"]):
                if i == 2 and torch.all(COUNT == 3):
                    tell_ready()
                    if HOW == "raises in step":
                        raise ValueError("in the middle")
                    until = time.monotonic() + (0.5 if HOW == "in step" else 60.0)
                    while time.monotonic() < until:
                        time.sleep(0.01)
                parameter.data.fill_(float(COUNT))
        return None


COUNT = torch.zeros(())


def tell_ready() -> None:
    (FOLDER / "ready").touch()


def handler(signum: int, frame: Any) -> None:
    written = sorted(path.name for path in FOLDER.rglob("interrupted_*") if path.is_dir())
    print("handler", signum == signal.SIGTERM, written, flush=True)
    sys.exit(3)


def set_flag(signum: int, frame: Any) -> None:
    global stop
    stop = True


stop = False


def main() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = SlowSGD(model.parameters(), lr=0.1) if "in step" in HOW else torch.optim.SGD(model.parameters(), lr=0.1)
    if HOW == "handler":
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.signal(signal.SIGTERM, handler) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is handler
    elif HOW == "handler unseen":  # past `signal.signal`
        _signal.signal(signal.SIGTERM, handler)
    elif HOW == "ignores":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif HOW == "flag":
        signal.signal(signal.SIGTERM, set_flag)
    for step in range(100_000):
        COUNT.fill_(step)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 20:
            if HOW == "forks":
                fork()
            if HOW != "in step":
                tell_ready()
            if HOW == "C call":  # a collective whose peer is gone, say: it lets go of the lock, and does not come back
                lock = ctypes.CDLL(None).pthread_mutex_lock
                mutex = ctypes.create_string_buffer(64)
                lock(mutex)
                lock(mutex)
            if HOW == "sleep":
                time.sleep(600.0)
            if HOW in ("ignores", "forks"):
                while not (FOLDER / "go").exists():
                    time.sleep(0.01)
                print("trained on", flush=True)
                return
        if stop:
            print("stopped by the flag", flush=True)
            return
        if step > 20:
            time.sleep(0.002)


def fork() -> None:
    """Children that die of SIGTERM, as they would without us, however early it comes, and their parent does not."""
    codes = set()
    for _ in range(100):
        child = os.fork()
        if not child:
            time.sleep(60.0)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        codes.add(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print("children", codes, flush=True)


main()

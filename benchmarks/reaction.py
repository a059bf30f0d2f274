"""From a bad value being known on a rank to the fix command at that rank's agent.

A real daemon process, a real channel over loopback and the agent's own courier thread; only the training is scripted:
a healthy run whose learning rate jumps by 1000 and whose loss then leaves its band. One run per trial. Clocked from
the row's entry into the outbox to the command's arrival at the fence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

from benchmarks.results_file import percentile, write
from sosa_stream.agent.fence.membership import Membership
from sosa_stream.agent.place import Identity
from sosa_stream.agent.transport.courier import Courier, Progress
from sosa_stream.agent.transport.outbox import KNOWN_COLUMNS, Outbox, Row, Wakeup
from sosa_stream.agent.watch.scalars import Scalars
from sosa_stream.config import load_settings
from sosa_stream.protocol.channels import AgentChannel
from sosa_stream.protocol.messages import Command, Phase
from sosa_stream.settings import FenceSettings, Mode, Settings

TRIALS = 100
HEALTHY_STEPS = 80
GIVE_UP_SECONDS = 10.0


class ArrivalFence:
    """Stands where the fence stands and notes when a command reaches it."""

    busy = False

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.at = 0.0

    def submit(self, command: Command, *, refuse: bool = False) -> None:
        self.at = time.perf_counter()
        self.arrived.set()

    def pump(self, now: float) -> list[Any]:
        return []


def main() -> dict[str, Any]:
    settings = load_settings(overrides={"mode": Mode.AUTO, "auto.allow": ["skip_step", "scale_lr", "rollback"]})
    with tempfile.TemporaryDirectory() as home:
        ready, write_fd = os.pipe()
        command = [sys.executable, "-m", "sosa_stream.cli", "daemon", "--home", home, "--bind", "tcp://127.0.0.1:0"]
        daemon = subprocess.Popen(
            [*command, "--http", "127.0.0.1:0", "--ready-fd", str(write_fd)],
            pass_fds=[write_fd],
            stderr=subprocess.DEVNULL,
        )
        os.close(write_fd)
        try:
            address = json.loads(os.read(ready, 4096))["address"]
            times = [trial(i, address, settings) for i in range(TRIALS)]
        finally:
            os.close(ready)
            daemon.terminate()
            daemon.wait(10)
    seen = [seconds * 1000 for seconds in times if seconds is not None]
    figures = {
        "p50_ms": percentile(seen, 0.5),
        "p99_ms": percentile(seen, 0.99),
        "max_ms": max(seen),
        "num_trials": len(times),
        "num_without_command": len(times) - len(seen),
    }
    write("reaction", figures)
    return figures


def trial(number: int, address: str, settings: Settings) -> float | None:
    """Seconds from the bad row to the command, None if none came."""
    wakeup = Wakeup()
    outbox = Outbox(settings.agent.ring_frames, wakeup)
    fence = ArrivalFence()
    assert isinstance(settings.fence, FenceSettings)
    nonce = f"{number:016x}"
    courier = Courier(
        settings=settings,
        identity=Identity(rank=0, world_size=1, host="bench", nonce=nonce),
        membership=Membership(generation=nonce, run=f"reaction-{number}", daemon=address, host="bench"),
        link=AgentChannel(address, f"reaction-{number}"),
        outbox=outbox,
        fence=fence,  # type: ignore[arg-type]
        device="cpu",
        versions={},
        parameters=(),
        progress=lambda: Progress(tick=0, step=0, phase=Phase.FORWARD),
        refusal=lambda command: "",
        say=lambda text: None,
    )
    ending = threading.Event()

    def carry() -> None:
        while not ending.is_set():
            courier.wait()
            courier.pump()

    noise = np.random.default_rng(number).normal(size=HEALTHY_STEPS + 2)
    for step in range(HEALTHY_STEPS):
        outbox.add_row(_row(step, 2.0 + 0.05 * noise[step], 1.0 + 0.1 * noise[step], 1e-3))
    thread = threading.Thread(target=carry)
    thread.start()
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while (len(outbox.ring) or outbox.ring.next_seq == 1) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(float(0.1 * np.random.default_rng(number).random()))  # no fixed place in the flush interval
    outbox.add_row(_row(HEALTHY_STEPS, 2.0, 1.0, 1.0))
    started = time.perf_counter()
    outbox.add_row(_row(HEALTHY_STEPS + 1, 80.0, 50.0, 1.0))
    came = fence.arrived.wait(GIVE_UP_SECONDS)
    ending.set()
    wakeup.set()
    thread.join()
    courier.close("trial over", 0, timeout_seconds=2.0)
    return fence.at - started if came else None


def _row(step: int, loss: float, norm: float, lr: float) -> Row:
    known = {"tick": float(step), "lr": lr, "lr_multiplier": 1.0, "step_seconds": 0.1, "model": 0.0}
    names = tuple(name for name in ("loss", "grad_norm", "lr", "skipped") if name not in KNOWN_COLUMNS)
    values = {"loss": loss, "grad_norm": norm, "lr": lr, "skipped": 0.0}
    return Row(
        step=step,
        known=tuple(known[name] for name in KNOWN_COLUMNS),  # type: ignore[arg-type]
        names=names,
        scalars=Scalars(values=tuple(values[name] for name in names)),
    )


if __name__ == "__main__":
    print(main())

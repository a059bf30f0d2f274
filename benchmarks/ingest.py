"""How fast messages come in: our ingest against a bare ``recv`` and ``unpackb`` loop on the same bytes.

A second process sends the same messages over loopback in turn to three receivers: the bare loop; our ingest stage
(receive in batches, decode and check, sequence, append to the recording on disk); and ingest with the Engine behind it,
as the daemon runs it. A short message is one rank's 100 ms at 10 steps a second and more; a long one holds 128 rows.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import zmq
import zmq.asyncio

from benchmarks.results_file import spread, write
from sosa_stream.daemon.ingest import Intake, Ledger
from sosa_stream.engine import Engine
from sosa_stream.protocol.channels import DaemonChannel
from sosa_stream.protocol.codec import decode, encode
from sosa_stream.protocol.columns import COLUMNS
from sosa_stream.protocol.messages import Command, Header, MetricFrame, Received
from sosa_stream.protocol.recording import Recorder

ROUNDS = 7
MESSAGES = {1: 20_000, 8: 20_000, 128: 8_000}
ENGINE_MESSAGES = {1: 4_000, 8: 1_000, 128: 80}
Receive = Callable[[DaemonChannel, int], Awaitable[None]]


def main() -> dict[str, Any]:
    figures = {f"{rows}_rows_a_message": asyncio.run(measure(rows)) for rows in MESSAGES}
    write("ingest", figures)
    return figures


async def measure(rows: int) -> dict[str, Any]:
    num, num_engine = MESSAGES[rows], ENGINE_MESSAGES[rows]
    bare, ours, engine = [], [], []
    for _ in range(ROUNDS):
        bare.append(num / await _timed(_bare, rows, num))
        ours.append(num / await _timed(_ingest, rows, num))
        engine.append(num_engine * rows / await _timed(_with_engine, rows, num_engine))
    return {
        "bare_messages_per_second": spread(bare),
        "ingest_messages_per_second": spread(ours),
        "ratio_to_bare": spread([o / b for o, b in zip(ours, bare, strict=True)]),
        "ingest_rows_per_second": spread([o * rows for o in ours]),
        "rows_per_second_with_engine": spread(engine),
    }


async def _timed(receive: Receive, rows: int, num: int) -> float:
    """Seconds from the first message received to the last."""
    async with DaemonChannel("tcp://127.0.0.1:0") as channel:
        sender = multiprocessing.get_context("spawn").Process(target=_send, args=(channel.address, rows, num + 1))
        sender.start()
        while not await channel.drain(1):
            continue
        started = time.perf_counter()
        await receive(channel, num)
        seconds = time.perf_counter() - started
        sender.join()
        return seconds


async def _bare(channel: DaemonChannel, num: int) -> None:
    socket = channel._pull
    for _ in range(num):
        msgpack.unpackb(socket.recv())


async def _ingest(channel: DaemonChannel, num: int) -> None:
    await _run(channel, num, None)


async def _with_engine(channel: DaemonChannel, num: int) -> None:
    await _run(channel, num, Engine("bench"))


async def _run(channel: DaemonChannel, num: int, engine: Engine | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ledger, recorder = Ledger(), Recorder(Path(folder) / "run.sosa")
        taken = 0
        while taken < num:
            for data in await channel.drain():
                message = decode(data)
                assert not isinstance(message, Command | Received)
                if ledger.take(message, 0.0) is not Intake.DUPLICATE:
                    recorder.append(0.0, data)
                taken += 1
                if engine is not None:
                    engine.handle(message, 0.0)
            recorder.flush()
        recorder.close()


def _send(address: str, rows: int, num: int) -> None:
    """In a process of its own: encode everything first, then send as fast as the receiver takes it."""
    noise = np.random.default_rng(0).normal(size=(num, rows))
    messages = []
    for seq in range(1, num + 1):
        header = Header(
            run="bench",
            generation="0123456789abcdef",
            source="fedcba9876543210",
            rank=0,
            world_size=1,
            host="node-1",
            seq=seq,
        )
        steps = np.arange((seq - 1) * rows, seq * rows)
        values = np.zeros((rows, len(COLUMNS)))
        values[:, COLUMNS.index("tick")] = steps
        values[:, COLUMNS.index("loss")] = 2.0 + 0.05 * noise[seq - 1]
        values[:, COLUMNS.index("grad_norm")] = np.exp(0.1 * noise[seq - 1])
        values[:, COLUMNS.index("lr")] = 1e-3
        values[:, COLUMNS.index("lr_multiplier")] = 1.0
        values[:, COLUMNS.index("step_seconds")] = 0.1
        messages.append(encode(MetricFrame(header=header, columns=COLUMNS, steps=steps, values=values)))
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.connect(address)
    for message in messages:
        socket.send(message)
    socket.close(linger=10_000)
    context.term()


if __name__ == "__main__":
    print(main())

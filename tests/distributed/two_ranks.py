"""Two ranks of a gloo process group that run one function after the other, so that a case costs no start-up.

    def both_agree(rank: int, factor: float) -> float:      # at the top of a module: the processes import it by name
        total = torch.ones(1) * factor
        torch.distributed.all_reduce(total)
        return total.item()

    def test_they_agree(two_ranks: TwoRanks) -> None:       # the fixture of conftest.py: one pair for all tests
        assert two_ranks.run(both_agree, 3.0) == [6.0, 6.0]

Arguments and results travel by pickle: return numbers, bytes and text rather than tensors. What a case registers with
torch it takes away again (`agent_parts.Watch.installed` does); random numbers start at seed 0 in each.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

WORLD_SIZE = 2
START_SECONDS = 120.0
CASE_SECONDS = 60.0
PEER_SECONDS = 3.0
"""How long the other rank is waited for after one has raised: it may be in a collective that never ends."""


class RankFailed(AssertionError):
    """A case raised on a rank, or ended it, or took too long."""


class TwoRanks:
    """The pair. It starts with the first case, and anew after one that left a rank behind."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> TwoRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def run(self, case: Callable[..., Any], *arguments: Any, seconds: float = CASE_SECONDS) -> list[Any]:
        """What ``case(rank, *arguments)`` returned on rank 0 and on rank 1.

        Raises:
            RankFailed: with the traceback of every rank on which it raised.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, arguments))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < WORLD_SIZE and (left := deadline - time.monotonic()) > 0:
            for pipe in wait([p for rank, p in enumerate(self._pipes) if rank not in answers], left):
                assert isinstance(pipe, Connection)
                answer = answers[self._pipes.index(pipe)] = _receive(pipe)
                if not answer[0]:
                    deadline = min(deadline, time.monotonic() + PEER_SECONDS)
        failures = [f"rank {rank}: {result}" for rank, (ok, result) in sorted(answers.items()) if not ok]
        failures += [f"rank {rank}: no answer" for rank in range(WORLD_SIZE) if rank not in answers]
        if failures:
            self.end()
            raise RankFailed("\n".join(failures))
        return [answers[rank][1] for rank in range(WORLD_SIZE)]

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
            process.close()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._pipes[1].send(_started(self._pipes[0]))
        for pipe in self._pipes:
            _started(pipe)


def _started(pipe: Connection) -> Any:
    ok, result = _receive(pipe) if pipe.poll(START_SECONDS) else (False, "a rank has not started")
    assert ok, result
    return result


def _receive(pipe: Connection) -> tuple[bool, Any]:
    try:
        ok, result = pipe.recv()
    except EOFError:
        return False, "the process has ended"
    return ok, result


def _serve(rank: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    if rank == 0:  # hosts the store on a port that the kernel chooses, as under torchrun
        store = dist.TCPStore("127.0.0.1", 0, WORLD_SIZE, is_master=True, wait_for_workers=False)
        pipe.send((True, store.port))
    else:
        store = dist.TCPStore("127.0.0.1", pipe.recv(), WORLD_SIZE, is_master=False)
    timeout = datetime.timedelta(seconds=CASE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE, timeout=timeout)
    pipe.send((True, None))
    with contextlib.suppress(EOFError):
        while True:
            case, arguments = pipe.recv()
            torch.manual_seed(0)
            try:
                answer = True, case(rank, *arguments)
            except BaseException:
                answer = False, traceback.format_exc()
            gc.collect()  # a DistributedDataParallel that is gone must not be found by the next case
            pipe.send(answer)

"""The fence between real processes, over the store of a real process group."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from sosa_stream.agent.fence.fence import Aborted, Committed, Fence, InDoubt  # noqa: E402
from sosa_stream.agent.fence.stores import MemoryStore, TorchStore  # noqa: E402
from sosa_stream.config import FenceSettings  # noqa: E402
from sosa_stream.protocol.messages import Command  # noqa: E402

NUM_COMMANDS = 50
DEADLINE_SECONDS = 60.0


def command(number: int) -> Command:
    return Command(
        id=f"c{number}",
        run="r",
        generation="g",
        seq=number,
        actions=(),
        reason="",
        incident="",
        expires_tick=10**9,
    )


class HeldCommit:
    """The real store, but nobody is told that a command may be committed: the verdict stays open."""

    def __init__(self, store: TorchStore) -> None:
        self._store = store

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def check(self, keys: tuple[str, ...]) -> bool:
        return "/promised/" not in keys[0] and self._store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        return self._store.compare_set(key, expected, desired)


def worker(rank: int, world_size: int, folder: Path, scenario: str) -> None:
    """One training process: a training thread that ticks, an agent thread that pumps."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    # The register lives in a TCPStore on a kernel-chosen port, hosted by rank 0 as under torchrun.
    if rank == 0:
        tcp = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        (folder / "port.new").write_text(str(tcp.port))
        (folder / "port.new").rename(folder / "port")
    else:
        wait_for(folder / "port")
        tcp = dist.TCPStore("127.0.0.1", int((folder / "port").read_text()), world_size, is_master=False)
    settings = FenceSettings(lead_seconds=0.1, timeout_seconds=1.0, poll_seconds=0.005)
    store = TorchStore(tcp)
    fence = Fence(
        rank=rank,
        world_size=world_size,
        generation="g",
        store=HeldCommit(store) if scenario == "doubt" else store,
        settings=settings,
    )
    dist.barrier()
    if scenario == "doubt":
        doubt(rank, fence, folder)
    else:
        applied, finals = run_commands(rank, fence, settings)
        dist.barrier()
        (folder / f"{rank}.json").write_text(json.dumps({"applied": applied, "finals": finals}))
        dist.destroy_process_group()


def run_commands(rank: int, fence: Fence, settings: FenceSettings) -> tuple[dict[str, int], dict[str, str]]:
    finals: dict[str, str] = {}
    done = threading.Event()

    def agent() -> None:
        while not done.is_set():
            number = len(finals)
            if number < NUM_COMMANDS:
                time.sleep(0.002 * ((rank + number) % 3))  # the ranks receive it at different times
                fence.submit(command(number))
            for notice in fence.pump(time.monotonic()):
                if isinstance(notice, Committed | Aborted):
                    finals[notice.command.id] = type(notice).__name__
            done.wait(settings.poll_seconds)

    thread = threading.Thread(target=agent, daemon=True)
    thread.start()
    applied: dict[str, int] = {}
    deadline = time.monotonic() + DEADLINE_SECONDS
    tick = 0
    everyone = torch.zeros(1)
    while time.monotonic() < deadline and everyone.item() == 0:
        got = fence.arrive(tick)
        if got is not None and not fence.conclude():
            applied[got.id] = tick
        # As a gradient all-reduce would: the ranks run in step, and all leave the loop at the same tick.
        everyone = torch.tensor([float(len(finals) == NUM_COMMANDS and not fence.busy)])
        dist.all_reduce(everyone, op=dist.ReduceOp.MIN)
        tick += 1
    # What is committed may still lie ahead.
    for later in range(tick, tick + 100_000):
        if len(applied) == sum(final == "Committed" for final in finals.values()):
            break
        got = fence.arrive(later)
        if got is not None and not fence.conclude():
            applied[got.id] = later
    done.set()
    thread.join()
    fence.close()
    return applied, finals


def doubt(rank: int, fence: Fence, folder: Path) -> None:
    """Promise, wait until the test has stopped rank 0, and only then walk up to the agreed tick."""
    fence.arrive(0)
    fence.arrive(1)
    fence.submit(command(0))

    def agent() -> None:
        while True:
            fence.pump(time.monotonic())
            flight = fence._flight
            if flight is not None and flight.agreement.promised:
                (folder / f"promised.{rank}").touch()
            time.sleep(0.005)

    threading.Thread(target=agent, daemon=True).start()
    wait_for(folder / "stopped")
    started = time.monotonic()
    try:
        for tick in range(2, 10**9):
            started = time.monotonic()
            fence.arrive(tick)
    except InDoubt as error:
        waited = time.monotonic() - started
        (folder / f"{rank}.json").write_text(json.dumps({"waited": waited, "error": str(error)}))
        os._exit(75)


def wait_for(path: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.005)


def start(rank: int, world_size: int, folder: Path, scenario: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, __file__, str(rank), str(world_size), str(folder), scenario]
    return subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.parametrize("world_size", [2, 4])
def test_real_processes_apply_every_command_at_the_same_tick(world_size: int, tmp_path: Path) -> None:
    processes = [start(rank, world_size, tmp_path, "commands") for rank in range(world_size)]
    try:
        codes = [process.wait(timeout=DEADLINE_SECONDS + 30) for process in processes]
    finally:
        end(processes)
    assert codes == [0] * world_size
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(result == results[0] for result in results)
    assert len(results[0]["finals"]) == NUM_COMMANDS
    committed = {name for name, final in results[0]["finals"].items() if final == "Committed"}
    assert committed == set(results[0]["applied"])
    assert len(committed) >= NUM_COMMANDS * 0.8


def test_a_rank_whose_store_stops_after_promises_is_in_doubt_within_the_timeout(tmp_path: Path) -> None:
    processes = [start(rank, 2, tmp_path, "doubt") for rank in range(2)]
    try:
        for rank in range(2):
            wait_for(tmp_path / f"promised.{rank}")
        processes[0].send_signal(signal.SIGSTOP)
        (tmp_path / "stopped").touch()
        assert processes[1].wait(timeout=30) == 75
    finally:
        end(processes)
    result = json.loads((tmp_path / "1.json").read_text())
    assert 0.9 < result["waited"] < 2.0
    assert "restart all ranks" in result["error"]


@pytest.mark.parametrize("kind", ["tcp", "file", "memory"])
def test_stores_treat_missing_keys_as_the_fence_relies_on(kind: str, tmp_path: Path) -> None:
    host = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    made = {
        "tcp": lambda: TorchStore(host),
        "file": lambda: TorchStore(dist.FileStore(str(tmp_path / "store"), 1)),
        "memory": MemoryStore,
    }
    store = made[kind]()
    assert store.compare_set("a", "?", "?") == "?"
    assert not store.check(["a"])
    assert store.compare_set("a", "", "first") == "first"
    assert store.check(["a"])
    assert not store.check(["a", "b"])
    assert store.compare_set("a", "", "second") == "first"
    assert store.compare_set("a", "?", "?") == "first"
    assert store.compare_set("a", "first", "third") == "third"


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])

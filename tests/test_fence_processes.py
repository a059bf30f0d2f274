"""The fence between real processes, over the store of a real process group: rough networks and stopped processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from fence_worker import DEADLINE_SECONDS, EXIT_IN_DOUBT, NUM_COMMANDS, wait_for  # noqa: E402
from flaky_proxy import FlakyProxy  # noqa: E402

from sosa_stream.agent.fence.stores import MemoryStore, TorchStore  # noqa: E402

WORKER = Path(__file__).parent / "fence_worker.py"
START_SECONDS = 120.0


@contextmanager
def ranks(folder: Path, scenario: str, ports: list[int]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process for each port, the rank's way to the store."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, port in enumerate(ports):
        arguments = [sys.executable, WORKER, str(rank), str(len(ports)), str(folder), scenario, str(port)]
        with (folder / f"{rank}.log").open("wb") as log:  # torch tells of each lost connection, at length
            processes.append(subprocess.Popen(arguments, env=env, stderr=log))
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def told(folder: Path, rank: int) -> dict[str, Any]:
    path = folder / f"{rank}.json"
    assert path.exists(), (folder / f"{rank}.log").read_text()[-3000:]
    answer: dict[str, Any] = json.loads(path.read_text())
    return answer


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.faults)])
def test_over_a_network_that_drops_and_delays_all_ranks_fare_alike_with_every_command(
    world_size: int, tmp_path: Path
) -> None:
    def port_of_store() -> int:
        wait_for(tmp_path / "port", START_SECONDS)
        return int((tmp_path / "port").read_text())

    proxies = [
        FlakyProxy(port_of_store, seed=rank, reset_chance=0.003, longest_delay=0.004) for rank in range(world_size)
    ]
    try:
        with ranks(tmp_path, "commands", [proxy.port for proxy in proxies]) as processes:
            for rank in range(world_size):
                wait_for(tmp_path / f"ready.{rank}", START_SECONDS)
            for proxy in proxies:
                proxy.rough = True
            codes = [process.wait(timeout=DEADLINE_SECONDS + 30) for process in processes]
    finally:
        for proxy in proxies:
            proxy.close()
    results = [told(tmp_path, rank) for rank in range(world_size)]
    assert codes == [0] * world_size
    assert all(result == results[0] for result in results)  # ticks, outcomes and digests
    states = Counter(state for _, _, state, _ in results[0]["ends"])
    assert sum(states.values()) + len(results[0]["aborted"]) == NUM_COMMANDS
    assert states["applied"] >= 50
    assert states["failed"] >= 30
    assert len({digest for *_, digest in results[0]["ends"]}) > 100  # training went on in between
    assert sum(proxy.num_resets for proxy in proxies) >= 10


def test_a_rank_whose_store_stops_after_promises_is_in_doubt_within_the_timeout(tmp_path: Path) -> None:
    with ranks(tmp_path, "mid-commit", [0, 0]) as processes:
        for rank in range(2):
            wait_for(tmp_path / f"promised.{rank}", START_SECONDS)
        processes[0].send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        assert processes[1].wait(timeout=30) == EXIT_IN_DOUBT
    assert "restart all ranks" in told(tmp_path, 1)["error"]


def test_a_rank_whose_store_stops_in_mid_outcome_is_in_doubt_and_the_stores_host_goes_on_alone(tmp_path: Path) -> None:
    with ranks(tmp_path, "mid-outcome", [0, 0]) as processes:
        for rank in range(2):
            wait_for(tmp_path / f"applied.{rank}", START_SECONDS)
        processes[0].send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        assert processes[1].wait(timeout=30) == EXIT_IN_DOUBT
        processes[0].send_signal(signal.SIGCONT)
        assert processes[0].wait(timeout=30) in (0, EXIT_IN_DOUBT)
    assert "could not learn whether all ranks" in told(tmp_path, 1)["error"]


def test_a_rank_that_stops_in_mid_outcome_is_not_waited_for_beyond_the_bound_and_does_as_the_others_did(
    tmp_path: Path,
) -> None:
    with ranks(tmp_path, "mid-outcome", [0, 0]) as processes:
        for rank in range(2):
            wait_for(tmp_path / f"applied.{rank}", START_SECONDS)
        processes[1].send_signal(signal.SIGSTOP)
        (tmp_path / "go").touch()
        wait_for(tmp_path / "0.json")
        processes[1].send_signal(signal.SIGCONT)
        assert [process.wait(timeout=30) for process in processes] == [0, 0]
    first, second = told(tmp_path, 0), told(tmp_path, 1)
    assert first == second
    ((_, _, state, _),) = first["ends"]
    assert (state, first["lr_multiplier"]) == ("failed", 1.0)


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


def test_a_write_that_was_lost_with_its_connection_is_never_taken_for_done(tmp_path: Path) -> None:
    host = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    proxy = FlakyProxy(lambda: host.port, seed=0, reset_chance=1.0, longest_delay=0.0)
    try:
        store = TorchStore(dist.TCPStore("127.0.0.1", proxy.port, 1, is_master=False))
        assert not store.check(["a"])
        proxy.rough = True
        with pytest.raises(RuntimeError):
            store.set("a", "1")
    finally:
        proxy.close()


def test_a_store_client_whose_connection_was_lost_makes_another(tmp_path: Path) -> None:
    host = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    proxy = FlakyProxy(lambda: host.port, seed=0, reset_chance=1.0, longest_delay=0.0)
    try:
        store = TorchStore(dist.TCPStore("127.0.0.1", proxy.port, 1, is_master=False))
        store.set("a", "1")
        proxy.rough = True
        with pytest.raises(RuntimeError):
            store.check(["a"])
        proxy.rough = False
        assert store.check(["a"])
    finally:
        proxy.close()

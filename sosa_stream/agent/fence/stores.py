"""The key-value stores that a fence may use, behind three operations that never wait for a key."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

CONNECT_TIMEOUT = timedelta(seconds=5)
"""For a connection that was lost: torch's five minutes would keep the agent's thread from everything else."""


class RegisterStore(Protocol):
    """Keys and values are text. Whatever an operation raises means: its fate is unknown."""

    def set(self, key: str, value: str) -> None:
        """Write ``value`` whatever is there."""

    def check(self, keys: Sequence[str]) -> bool:
        """Whether every key exists."""

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        """Write ``desired`` if the key holds ``expected``, or if it is missing and ``expected`` is "".

        Returns what the key holds then. For a missing key that stays missing it returns ``expected``, as torch does.
        """


class TorchStore:
    """A client of its own to the store that this torch.distributed job already has.

    A torch client serves one call at a time, and a call can block long after its timeout when the host of the store is
    stopped. So only the agent's thread calls this, never the training thread. A client whose connection has been lost
    never finds it again: the next call then makes another client.
    """

    def __init__(self, store: Any) -> None:
        self._lost = False
        self._connect(store)

    @classmethod
    def of_job(cls) -> TorchStore | None:
        """The job's default store; None if there is no process group, or its store cannot be cloned."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            return None
        try:
            return cls(dist.distributed_c10d._get_default_store())
        except (AttributeError, NotImplementedError, RuntimeError):
            return None

    def set(self, key: str, value: str) -> None:
        with self._connected() as store:
            store.set(key, value)  # torch sends it off and waits for nothing: on a lost connection it may be nowhere
            store.check([key])  # the answer comes by the same connection, behind it

    def check(self, keys: Sequence[str]) -> bool:
        with self._connected() as store:
            return bool(store.check(list(keys)))

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        with self._connected() as store:
            return bytes(store.compare_set(key, expected, desired)).decode("utf-8", "replace")

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        if self._lost:
            self._connect(self._store)
        try:
            yield self._store
        except Exception:
            self._lost = True
            raise

    def _connect(self, store: Any) -> None:
        self._store = store.clone()
        self._store.set_timeout(CONNECT_TIMEOUT)  # this client's alone, and the next one's
        self._lost = False


class MemoryStore:
    """A store inside this process: for training with one rank."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value

    def check(self, keys: Sequence[str]) -> bool:
        with self._lock:
            return all(key in self._values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> str:
        with self._lock:
            if self._values.get(key, "") == expected:
                self._values[key] = desired
                return desired
            return self._values.get(key, expected)

"""How the ranks of one start of the process group find each other: a generation, a run name, a daemon.

A generation is a nonce, because torch elastic's restart count differs between nodes in one round and old keys stay
alive in the store. Every process writes ``hello/<rank> = <own nonce>``; rank 0 answers under ``welcome/<that nonce>``,
which nobody but the process that made the nonce reads, until ``joined/<rank>`` says that it was heard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from sosa_stream.agent.fence.stores import RegisterStore

PREFIX = "sosa"
NO_VALUE = "?"
"""What no key of ours ever holds: comparing with it only reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What all ranks of a generation share. ``daemon`` is the address of metrics, empty where there is none."""

    generation: str
    run: str
    daemon: str
    host: str

    def encode(self) -> str:
        return json.dumps({"generation": self.generation, "run": self.run, "daemon": self.daemon, "host": self.host})

    @classmethod
    def decode(cls, text: str) -> Membership:
        return cls(**json.loads(text))


class Coordinator:
    """Rank 0: answers every rank's hello until all have joined. One round of `poll` is a handful of store calls."""

    def __init__(self, store: RegisterStore, world_size: int, membership: Membership) -> None:
        self._store = store
        self._membership = membership
        self._waiting = set(range(1, world_size))
        self._answered: dict[int, str] = {}

    def poll(self) -> bool:
        """Whether all ranks have joined."""
        generation = self._membership.generation
        for rank in sorted(self._waiting):
            if self._store.check([f"{PREFIX}/{generation}/joined/{rank}"]):
                self._waiting.discard(rank)
                continue
            nonce = read(self._store, f"{PREFIX}/hello/{rank}")
            if nonce is not None and self._answered.get(rank) != nonce:  # it may still be an older generation's
                self._store.set(f"{PREFIX}/welcome/{nonce}", self._membership.encode())
                self._answered[rank] = nonce
        return not self._waiting


class Joiner:
    """Any other rank: says hello and waits, without ever blocking, for the answer to its own nonce."""

    def __init__(self, store: RegisterStore, rank: int, nonce: str) -> None:
        self._store = store
        self._rank = rank
        self._nonce = nonce
        self._said_hello = False

    def poll(self) -> Membership | None:
        """What rank 0 has answered, if it has."""
        if not self._said_hello:
            self._store.set(f"{PREFIX}/hello/{self._rank}", self._nonce)
            self._said_hello = True
        text = read(self._store, f"{PREFIX}/welcome/{self._nonce}")
        if text is None:
            return None
        membership = Membership.decode(text)
        self._store.set(f"{PREFIX}/{membership.generation}/joined/{self._rank}", "1")
        return membership


def read(store: RegisterStore, key: str) -> str | None:
    """The value of a key, None where there is none. Never waits on a key: a compare that cannot match only reads."""
    return store.compare_set(key, NO_VALUE, NO_VALUE) if store.check([key]) else None

"""Where a training process stands: which rank it is, in which generation of which run."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass, field, replace

from sosa_stream.agent.fence.membership import Membership


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """This process among the ranks. ``nonce`` is new with every process."""

    rank: int
    world_size: int
    host: str = field(default_factory=socket.gethostname)
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))


class Place:
    """What this process calls itself. A generation of its own, until it belongs to one.

    Read in any thread, changed only in that which finds the others.
    """

    def __init__(self, identity: Identity, run: str) -> None:
        self.identity = identity
        self.run = run
        self.generation = identity.nonce

    @property
    def rank(self) -> int:
        return self.identity.rank

    @property
    def world_size(self) -> int:
        return self.identity.world_size

    def alone(self, daemon: str = "") -> Membership:
        """Of a generation that this process begins, with a ``daemon`` at that address or without one."""
        return Membership(generation=self.identity.nonce, run=self.run, daemon=daemon, host=self.identity.host)

    def enter(self, membership: Membership) -> None:
        """The run and the generation are the others'."""
        self.run, self.generation = membership.run, membership.generation

    def leave_others(self) -> None:
        """Be a run of one rank: what one job's ranks share is a process group, and without it nobody must wait."""
        if self.rank:
            self.run += f"-rank{self.rank}"
        self.identity = replace(self.identity, rank=0, world_size=1)

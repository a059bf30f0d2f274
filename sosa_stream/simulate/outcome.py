"""What a simulation comes to, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A fault, and how long after it began the daemon named its rank; None: it has not."""

    fault: str
    delay_seconds: float | None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Counts are of sequenced messages (hello, frames, answers, bye); heartbeats come on top. None: not known, because
    the daemon is not ours.

    Attributes:
        num_lost: what no daemon has: given up by its sender, never acknowledged, or missed by the daemon's own count.
        daemon_cpu_share: of one core, while ranks stepped; ``senders_cpu_share`` that of all senders together.
        other_incidents: announced, and injected by nobody, as ``kind: message``.
    """

    num_ranks: int
    num_connections: int
    seconds: float
    step_seconds: float
    num_sent: int
    num_acknowledged: int
    num_lost: int
    daemon_received: int | None
    daemon_duplicates: int | None
    daemon_lost: int | None
    daemon_cpu_share: float | None
    daemon_rss_bytes: int | None
    senders_cpu_share: float
    found: tuple[Found, ...]
    other_incidents: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        """A few lines."""
        lines = [
            f"{self.num_ranks} synthetic ranks on {self.num_connections} connections (no training process among them), "
            f"{self.seconds:.1f} s, a step every {self.step_seconds:g} s",
            f"messages: {self.num_sent} sent, {self.num_acknowledged} acknowledged, {self.num_lost} lost",
        ]
        if self.daemon_received is not None:
            lines.append(
                f"daemon: {self.daemon_received} received with heartbeats, {self.daemon_duplicates} twice, "
                f"{self.daemon_lost} lost"
            )
        if self.daemon_cpu_share is not None and self.daemon_rss_bytes is not None:
            lines.append(
                f"daemon: {self.daemon_cpu_share:.1%} of one core, {self.daemon_rss_bytes / 2**20:.0f} MiB "
                f"(senders: {self.senders_cpu_share:.1%})"
            )
        for one in self.found:
            delay = (
                "not found" if one.delay_seconds is None else f"found after {one.delay_seconds:.1f} s: {one.message}"
            )
            lines.append(f"{one.fault}: {delay}")
        lines += [f"not injected: {text}" for text in self.other_incidents]
        return "\n".join(lines)

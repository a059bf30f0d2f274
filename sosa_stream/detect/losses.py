"""Ranks that are gone without a goodbye: which was first, and who followed it.

The others follow: torch elastic ends them, or they fail in a collective. So the first is the guilty one, and who goes
later is listed with how much later. Only where all processes are asked to end at once (SIGTERM, as a scheduler does) is
that no fault: the job was cancelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from sosa_stream.detect.attendance import RankView

CANCELS = frozenset({"SIGTERM", "SIGINT", "SIGHUP"})
"""Signals by which a process is asked to end."""
TOGETHER_SECONDS = 0.03
"""Processes that are asked to end at once have ended within this; torch elastic looks for dead ones every 0.1 s."""


class Seen(StrEnum):
    """How a loss was seen."""

    ENDED = "process ended"
    GONE = "process gone"
    SILENT = "silent"
    REPLACED = "replaced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """``views`` are the ranks that went first, as they were; ``followers`` went later, by so many seconds."""

    seen: Seen
    views: tuple[RankView, ...]
    at: float
    how: str = ""
    silent_seconds: float = 0.0
    followers: Mapping[int, float] = field(default_factory=dict)
    cancelled: bool = False
    num_there: int = 0
    """Ranks that are there still."""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(view.rank for view in self.views)


def first_loss(
    views: Sequence[RankView], endings: Sequence[tuple[float, str]], at: float, num_there: int, *, missed: bool = False
) -> Loss:
    """Of processes that have ended in this order, each so many seconds after the first, and how.

    ``missed``: another rank lived on to say that it has lost its connection, so that not all were asked to end at once.
    """
    cancelled = not (num_there or missed) and all(
        how in CANCELS and after <= TOGETHER_SECONDS for after, how in endings
    )
    return Loss(
        seen=Seen.ENDED,
        views=tuple(views) if cancelled else tuple(views[:1]),
        at=at,
        how=endings[0][1],
        followers={} if cancelled else {v.rank: after for v, (after, _) in list(zip(views, endings, strict=True))[1:]},
        cancelled=cancelled,
        num_there=num_there,
    )


def followed(loss: Loss, views: Sequence[RankView], now: float, num_there: int) -> Loss:
    """More ranks are gone."""
    later = {view.rank: now - loss.at for view in views if view.rank not in loss.ranks}
    return replace(loss, followers={**later, **loss.followers}, num_there=num_there)

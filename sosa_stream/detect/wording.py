"""How findings are put into words."""

from __future__ import annotations


def name_ranks(ranks: tuple[int, ...]) -> str:
    """``rank 1`` or ``ranks 0, 1``; no more than eight are listed."""
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def on_ranks(ranks: tuple[int, ...], num_ranks: int) -> str:
    """`` on rank 1``; nothing in a run of one process, or in a log."""
    return f" on {name_ranks(ranks)}" if num_ranks > 1 else ""


def times(ratio: float) -> str:
    """``×3.16`` or ``×1000``: three digits, never an exponent for what can be read out."""
    return f"×{ratio:.3g}" if ratio < 100 or ratio >= 1e6 else f"×{ratio:.0f}"


def number(value: float | None) -> str:
    """Four digits, or ``unknown``."""
    return "unknown" if value is None else f"{value:.4g}"


def share_of(share: float) -> str:
    """``40% of``, or ``12 times``: what a share is followed by is its whole."""
    return f"{share:.0%} of" if share < 10.0 else f"{number(share)} times"

"""A curve in one line of text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BLOCKS = "▁▂▃▄▅▆▇█"
NOT_FINITE = "×"
MARK = "^"


def sparkline(values: NDArray[np.float64], marks: Iterable[int] = (), width: int = 60) -> tuple[str, str]:
    """The curve, and below it a `MARK` at each of these indices of values.

    A character stands for the median of its share of the values. Of the medians the highest twentieth is cut off, so
    that a blow-up does not flatten the rest. `NOT_FINITE` where any value of a share is NaN or infinite.
    """
    if not len(values):
        return "", ""
    shares = np.array_split(values, min(width, len(values)))
    finite = [share[np.isfinite(share)] for share in shares]
    medians = np.array([float(np.median(share)) if len(share) else np.nan for share in finite])
    known = medians[np.isfinite(medians)]
    low, high = (float(known.min()), float(np.quantile(known, 0.95))) if len(known) else (0.0, 0.0)
    height = high - low if high > low else 1.0
    curve = "".join(
        BLOCKS[int(min(max((median - low) / height, 0.0), 1.0) * (len(BLOCKS) - 1) + 0.5)]
        if len(share) == len(all_)
        else NOT_FINITE
        for median, share, all_ in zip(medians.tolist(), finite, shares, strict=True)
    )
    ends = np.cumsum([len(share) for share in shares])
    marked = {int(np.searchsorted(ends, index, side="right")) for index in marks}
    below = "".join(MARK if i in marked else " " for i in range(len(shares)))
    return curve, below.rstrip()

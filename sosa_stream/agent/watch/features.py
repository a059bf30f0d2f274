"""The features of one batch's largest input, in numbers: what a `Features` message says of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sosa_stream.protocol.messages import Features, Header

MAX_NAME = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureStatistics:
    """Arrays of shape (num_features,), as `Features` describes them."""

    means: NDArray[np.float64]
    stds: NDArray[np.float64]
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]
    num_nonfinite: NDArray[np.int64]
    z: NDArray[np.float64]

    def with_z(self, z: NDArray[np.float64]) -> FeatureStatistics:
        """The same with these scores."""
        return replace(self, z=z)

    def message(self, header: Header, step: int, name: str, shape: tuple[int, ...]) -> Features:
        """For the daemon."""
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            floats = {key: getattr(self, key).astype(np.float32) for key in ("means", "stds", "lows", "highs", "z")}
        return Features(header=header, step=step, name=name, shape=shape, num_nonfinite=self.num_nonfinite, **floats)


def statistics_of(values: NDArray[np.float64]) -> FeatureStatistics:
    """Of ``values``, shape (elements, features), over what is finite; NaN where nothing is. ``z`` is still NaN."""
    finite = np.isfinite(values)
    num = finite.sum(axis=0)
    all_are = bool(finite.all())
    known = values if all_are else np.where(finite, values, 0.0)
    divisor = np.where(num > 0, num, np.nan)
    means = known.sum(axis=0) / divisor
    apart = known - means if all_are else np.where(finite, values - means, 0.0)
    lows = known.min(axis=0) if all_are else np.where(finite, values, np.inf).min(axis=0)
    highs = known.max(axis=0) if all_are else np.where(finite, values, -np.inf).max(axis=0)
    return FeatureStatistics(
        means=means,
        stds=np.sqrt((apart * apart).sum(axis=0) / divisor),
        lows=np.where(num > 0, lows, np.nan),
        highs=np.where(num > 0, highs, np.nan),
        num_nonfinite=(len(values) - num).astype(np.int64),
        z=np.full(values.shape[1], np.nan),
    )

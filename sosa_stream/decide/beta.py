"""The Beta distribution, as far as a decision needs it. Plain arithmetic: the same in every process and replay."""

from __future__ import annotations

import math

_TINY = 1e-300
_PRECISION = 1e-12
_NUM_TERMS = 300
_NUM_HALVINGS = 32


def share_below(x: float, a: float, b: float) -> float:
    """P(X <= x) of X ~ Beta(a, b): the regularised incomplete beta function [Abramowitz and Stegun, 26.5.8]."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):  # there the fraction converges slowly
        return 1.0 - share_below(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of 26.5.8, evaluated by Lentz's method [Lentz 1976]."""
    c, d = 1.0, 1.0 / _not_zero(1.0 - (a + b) * x / (a + 1.0))
    value = d
    for m in range(1, _NUM_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = _not_zero(1.0 + term / c), 1.0 / _not_zero(1.0 + term * d)
            value *= c * d
        if abs(c * d - 1.0) < _PRECISION:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def quantile(share: float, a: float, b: float) -> float:
    """The x below which a ``share`` of Beta(a, b) lies, by halving."""
    low, high = 0.0, 1.0
    for _ in range(_NUM_HALVINGS):
        middle = 0.5 * (low + high)
        if share_below(middle, a, b) < share:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)

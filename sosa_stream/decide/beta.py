"""The Beta distribution, as far as a decision needs it. Plain arithmetic: the same in every process and replay."""

from __future__ import annotations

import math

_TINY = 1e-300
_PRECISION = 1e-12
_NUM_TERMS = 300
_NUM_ROUNDS = 60


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
    """The x below which a ``share`` of Beta(a, b) lies: by Newton, or halving where that leads astray."""
    low, high, x = 0.0, 1.0, a / (a + b)
    log_scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    for _ in range(_NUM_ROUNDS):
        excess = share_below(x, a, b) - share
        low, high = (low, x) if excess > 0.0 else (x, high)
        density = math.exp(log_scale + (a - 1.0) * math.log(x) + (b - 1.0) * math.log1p(-x))
        better = x - excess / density if density > _TINY else low
        better = better if low < better < high else 0.5 * (low + high)
        if abs(better - x) <= _PRECISION * x or better in (0.0, 1.0):
            break
        x = better
    return x

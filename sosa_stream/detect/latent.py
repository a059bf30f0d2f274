"""The detector of a variational autoencoder whose latent code says nothing."""

from __future__ import annotations

import numpy as np

from sosa_stream.detect.incidents import Finding, Severity
from sosa_stream.detect.windows import RunWindows

ACTIVE_SHARE = 0.1
KL_PER_DIM = 0.05
LOOKS_LOST, LOOKS_NEVER = 4, 48
"""Looks in a row that are enough where the code was in use before, and where it never was: training begins collapsed,
and the first code may take some hundred steps."""


def posterior_collapse(windows: RunWindows) -> Finding | None:
    """At most a tenth of the latent dimensions is active, and the KL divergence is below 0.05 nats per dimension.

    A dimension is active where Var_x(E[z|x]) > 0.01 [Burda et al., ICLR 2016, 5.1]. A few unused ones are usual and
    silent, and so is an annealed start, where the KL is large. (A low variance is the wrong sign: collapse drives it
    to 1.)
    """
    seen = windows.over_ranks("active_units")
    if not windows.looked or not np.isfinite(seen).any():
        return None
    active, dims = windows.looks["active_units"].last(), windows.looks["latent_dims"].last()
    divergence = windows.looks["kl_per_dim"].last()
    num = min(len(active), len(dims), len(divergence))
    shares = active[-num:] / np.maximum(dims[-num:], 1.0)
    collapsed = (shares <= ACTIVE_SHARE) & (divergence[-num:] < KL_PER_DIM)
    used = bool((shares >= 0.5).any())
    needed = LOOKS_LOST if used else LOOKS_NEVER
    if num < needed or not collapsed[-needed:].all():
        return None
    return Finding(
        kind="posterior_collapse",
        severity=Severity.WARNING,
        step=windows.step,
        first_step=windows.step,
        message=f"posterior collapse: {active[-1]:.0f} of {dims[-1]:.0f} latent dimensions are active,"
        f" KL {divergence[-1]:.2g} nats each",
        evidence={
            "value": float(active[-1]),
            "baseline": float(active.max()),
            "latent_dims": float(dims[-1]),
            "kl_per_dim": float(divergence[-1]),
            "window": needed,
        },
        causes=("the weight of the KL term (beta) is too high, or was not annealed", "a decoder that needs no code"),
    )

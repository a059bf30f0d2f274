"""What a VAE's checkpoint says of its latent code: how much of it is in use, and what the decoder makes of it.

A dimension is active where Var_x(E[z|x]) > 0.01 [Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*,
ICLR 2016, 5.1]. Collapsed is a code of which at most a tenth is active while the KL is below 0.05 nats per dimension.
Besides, the decoder is asked: where it gets another sample's code and reconstructs as well, it does not listen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sosa_stream.detect.latent import ACTIVE_SHARE, KL_PER_DIM
from sosa_stream.errors import UsageError

SCHEMA_VERSION = 1
ACTIVE_VARIANCE = 0.01
MOST_SAMPLES = 2000
_CHUNK = 256
FEWEST_SAMPLES = 64
"""From here on the variance over samples says something of a dimension, as for the agent."""
_MEANS, _LOG_VARIANCES = ("mu", "mean", "means", "z_mean"), ("logvar", "log_var", "log_variance", "z_logvar")
_OUTPUTS = ("recon", "reconstruction", "x_hat", "recon_x", "output")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Latent:
    """A model's latent code over samples.

    ``means`` and ``log_variances`` float64 of shape (num_samples, num_dims). ``errors`` of shape (num_samples,): mean
    squared error of the reconstruction from the sample's own mean, ``shuffled_errors`` from another sample's; None
    where the model has no decoder that can be called. ``labels`` of shape (num_samples,) where the data has some.
    """

    means: NDArray[np.float64]
    log_variances: NDArray[np.float64]
    errors: NDArray[np.float64] | None = None
    shuffled_errors: NDArray[np.float64] | None = None
    labels: NDArray[np.int64] | None = None

    @property
    def divergences(self) -> NDArray[np.float64]:
        """Mean KL divergence to the standard normal prior of each dimension, nats."""
        means, logs = self.means, self.log_variances
        found: NDArray[np.float64] = 0.5 * (means**2 + np.exp(logs) - 1.0 - logs).mean(axis=0)
        return found

    @property
    def variances_of_means(self) -> NDArray[np.float64]:
        """Var_x(E[z|x]) of each dimension."""
        found: NDArray[np.float64] = self.means.var(axis=0, ddof=1)
        return found

    @property
    def is_active(self) -> NDArray[np.bool_]:
        return self.variances_of_means > ACTIVE_VARIANCE

    @property
    def is_collapsed(self) -> bool:
        return bool(self.is_active.mean() <= ACTIVE_SHARE and self.divergences.mean() < KL_PER_DIM)

    @property
    def correlations(self) -> NDArray[np.float64]:
        """Between the means of each two dimensions; NaN where one does not vary."""
        with np.errstate(all="ignore"):
            found: NDArray[np.float64] = np.atleast_2d(np.corrcoef(self.means, rowvar=False))
        return found

    def projection(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Principal components of the means: (num_samples, 2), and the share of the variance that each explains."""
        centred = self.means - self.means.mean(axis=0)
        _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
        places = centred @ directions[:2].T
        shares = sizes**2 / max(float((sizes**2).sum()), 1e-300)
        if places.shape[1] < 2:
            places, shares = np.pad(places, ((0, 0), (0, 1))), np.pad(shares, (0, 1))
        return places, shares[:2]

    def verdict(self) -> str:
        """In a sentence."""
        num, active = len(self.divergences), int(self.is_active.sum())
        told = f"{active} of {num} latent dimensions are active, KL {self.divergences.mean():.3g} nats per dimension"
        if self.errors is not None and self.shuffled_errors is not None:
            own, other = float(self.errors.mean()), float(self.shuffled_errors.mean())
            told += (
                f"; from another sample's code the reconstruction error is {other / max(own, 1e-300):.3g} times its own"
            )
        return f"{'collapsed' if self.is_collapsed else 'not collapsed'}: {told}"

    def as_dict(self) -> dict[str, Any]:
        """The public JSON object."""
        return {
            "schema_version": SCHEMA_VERSION,
            "collapsed": self.is_collapsed,
            "verdict": self.verdict(),
            "num_samples": len(self.means),
            "latent_dims": len(self.divergences),
            "active_units": int(self.is_active.sum()),
            "kl_per_dim": float(self.divergences.mean()),
            "kl_by_dim": self.divergences.tolist(),
            "variance_of_means_by_dim": self.variances_of_means.tolist(),
            "mean_variance_by_dim": np.exp(self.log_variances).mean(axis=0).tolist(),
            "reconstruction_error": None if self.errors is None else float(self.errors.mean()),
            "reconstruction_error_of_shuffled_code": (
                None if self.shuffled_errors is None else float(self.shuffled_errors.mean())
            ),
        }


@torch.no_grad()
def encode(model: nn.Module, batches: Iterable[object], most: int = MOST_SAMPLES) -> Latent:
    """The latent code of the first ``most`` samples of ``batches``.

    ``model(x)`` gives mean and log variance, with the reconstruction before them or not, as a tuple or a dictionary;
    or ``model.encode(x)`` gives the two. A batch is a tensor, or a tuple or a dictionary with it first; labels are a
    second one of whole numbers. ``model.decode`` (or ``decoder``) is called where there is one.

    Raises:
        UsageError: no mean and log variance were found in what the model gives, or there are too few samples.
    """
    model.eval()
    inputs, means, logs, labels = [], [], [], []
    num = 0
    for batch in batches:
        x, label = _parts(batch)
        mu, logvar = _code(model, x)
        inputs.append(x)
        means.append(mu)
        logs.append(logvar)
        if label is not None and len(label) == len(mu):
            labels.append(label)
        num += len(mu)
        if num >= most:
            break
    if num < FEWEST_SAMPLES:
        raise UsageError(f"the data gave {num} samples; {FEWEST_SAMPLES} are needed to know which dimensions vary")
    mu, logvar = torch.cat(means)[:most], torch.cat(logs)[:most]
    if not (torch.isfinite(mu).all() and torch.isfinite(logvar).all()):
        raise UsageError("the model's means or log variances are not all finite: its weights, or the data, hold NaN")
    errors = _errors(model, torch.cat(inputs)[:most], mu)
    return Latent(
        means=mu.double().numpy(),
        log_variances=logvar.double().numpy(),
        errors=errors[0],
        shuffled_errors=errors[1],
        labels=torch.cat(labels)[:most].long().numpy() if len(labels) == len(means) else None,
    )


def _parts(batch: object) -> tuple[Tensor, Tensor | None]:
    """A batch's input and, if it has some, its labels."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, list | tuple):
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors:
            second = tensors[1] if len(tensors) > 1 else None
            is_label = second is not None and second.ndim == 1 and not second.is_floating_point()
            return tensors[0], second if is_label else None
    if isinstance(values, Tensor):
        return values, None
    raise UsageError(f"the data gives batches of type {type(batch).__name__}; give tensors, or tuples of them")


def _code(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of each sample, of shape (num_samples, num_dims), by whatever way the model has."""
    tried = []
    for name in ("forward", "encode", "encoder"):
        ask = getattr(model, name, None)
        if not callable(ask):
            continue
        given = model(x) if name == "forward" else ask(x)
        found = _mean_and_log_variance(given, x)
        if found is not None:
            return found
        tried.append(f"{'model' if name == 'forward' else f'model.{name}'}(x) gives {_shape(given)}")
    raise UsageError(
        f"no mean and log variance found: {'; '.join(tried)}. Give a model whose forward returns (reconstruction, mu, "
        "logvar), or whose encode returns (mu, logvar)"
    )


def _mean_and_log_variance(given: object, x: Tensor) -> tuple[Tensor, Tensor] | None:
    if isinstance(given, Mapping):
        pair: Sequence[object] = [
            next((given[key] for key in keys if key in given), None) for keys in (_MEANS, _LOG_VARIANCES)
        ]
    elif isinstance(given, tuple | list):
        pair = list(_equals(given, x))
    elif isinstance(given, torch.distributions.Normal):
        pair = [given.mean, 2.0 * given.stddev.log()]
    else:
        return None
    mu, logvar = pair if len(pair) == 2 else (None, None)
    if not (isinstance(mu, Tensor) and isinstance(logvar, Tensor)) or mu.shape != logvar.shape or len(mu) != len(x):
        return None
    return mu.detach().flatten(1).float().cpu(), logvar.detach().flatten(1).float().cpu()


def _equals(given: tuple[object, ...] | list[object], x: Tensor) -> tuple[Tensor, ...]:
    """The first two neighbours of one shape that are neither reconstruction nor input; a sampled code is third."""
    rows = [value for value in given if isinstance(value, Tensor) and value.ndim >= 2 and len(value) == len(x)]
    codes = [value for value in rows if value.numel() != x.numel()]
    if len(codes) < 2:  # the code is as long as the input
        codes = rows[-2:]
    return next((pair for pair in itertools.pairwise(codes) if pair[0].shape == pair[1].shape), ())


def _errors(
    model: nn.Module, inputs: Tensor, codes: Tensor
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Mean squared error of each sample's reconstruction, from its own mean and from its neighbour's in the data."""
    decode = next((ask for name in ("decode", "decoder") if callable(ask := getattr(model, name, None))), None)
    if decode is None:
        return None, None
    found = []
    for code in (codes, codes.roll(len(codes) // 2, dims=0)):
        parts = []
        for x, z in zip(torch.split(inputs, _CHUNK), torch.split(code, _CHUNK), strict=True):
            try:
                out = decode(z)
            except (RuntimeError, TypeError, ValueError):  # it wants something else than a code
                return None, None
            out = next((out[key] for key in _OUTPUTS if key in out), None) if isinstance(out, Mapping) else out
            out = out[0] if isinstance(out, tuple) else out
            if not isinstance(out, Tensor) or out.numel() != x.numel():
                return None, None
            parts.append((out.flatten(1) - x.flatten(1)).square().mean(1))
        found.append(torch.cat(parts).double().numpy())
    return found[0], found[1]


def _shape(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor {tuple(given.shape)}"
    if isinstance(given, Mapping):
        return f"a dictionary of {', '.join(map(str, given))}"
    if isinstance(given, tuple | list):
        return f"({', '.join(_shape(value) for value in given)})"
    return type(given).__name__

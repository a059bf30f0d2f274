"""Whether a batch in parts gives the gradient of the whole: what can be seen of a model, and a look at its loss.

The loss must be a mean over samples that do not see each other. That is checked on a few samples of the very batch: of
``n`` samples the mean is the mean of their halves' means, a sum is twice that, and a loss that compares samples with
each other (contrastive, ranking, class weights, a mean over tokens of unequal sequences) is neither.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

from sosa_stream.agent.splitting.batches import count_samples, cut
from sosa_stream.agent.splitting.memory import is_out_of_memory
from sosa_stream.agent.splitting.reduction import Reduction
from sosa_stream.errors import RefusedError

FEW = 4
NUM_LOOKS = 3
"""As many times a few samples: from the beginning, the middle and the end of the batch."""
TOLERANCE = 1e-3
"""Relative difference of two ways to the same mean: half precision on other shapes differs by less."""

Loss = Callable[[Any], torch.Tensor]


def refusal(model: nn.Module) -> str:
    """What in the model makes samples of one batch depend on each other, or nothing."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or not module.track_running_stats):
            return f"{name or 'it'} is a {type(module).__name__}: its statistics are those of the whole batch"
        if isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            return f"{name or 'it'} is a {type(module).__name__} with running statistics: parts would move them again"
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters()):
        return "a parameter has a hook that acts once its gradient is there (an optimizer in backward)"
    return ""


def check_loss(model: nn.Module, batch: Any, loss_of: Loss, reduction: Reduction) -> None:
    """Look at the loss of a few samples, as a whole and in halves: no gradients, no trace in model or random numbers.

    Raises:
        RefusedError: it is not a mean over samples, or that cannot be told.
    """
    num_samples = count_samples(batch)
    if num_samples < 2:
        raise RefusedError("the batch is one sample")
    try:
        with _no_trace(model), reduction.silence(), torch.no_grad(), no_collectives():
            try:
                _look(batch, loss_of, reduction, num_samples, min(FEW, num_samples))
            except Exception as error:
                if not is_out_of_memory(error) or num_samples < FEW:
                    raise
                _look(batch, loss_of, reduction, num_samples, 2)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"the loss of a few samples cannot be looked at: {type(error).__name__}: {error}") from None


def _look(batch: Any, loss_of: Loss, reduction: Reduction, num_samples: int, few: int) -> None:
    def loss(first: int, last: int) -> float:
        reduction.begin_pass()
        _restore(random_state)
        value = float(loss_of(cut(batch, first, last)))
        if reduction.num_passes != 1:
            raise RefusedError("the model is called more than once for a batch, or not at all")
        return value

    random_state = _random_state()
    half = few // 2
    some = False
    for first in sorted({round(i * (num_samples - few) / (NUM_LOOKS - 1)) for i in range(NUM_LOOKS)}):
        whole = loss(first, first + few)
        halves = loss(first, first + half), loss(first + half, first + few)
        mean = (half * halves[0] + (few - half) * halves[1]) / few
        if not _is_close(whole, mean):
            again = _with_other_randomness(lambda: float(loss_of(cut(batch, first, first + few))))  # noqa: B023
            if not _is_close(whole, again):
                raise RefusedError("the loss is random even in eval mode: its parts cannot be compared with it")
            what = "a sum over samples" if _is_close(whole, sum(halves)) else "not a mean over samples"
            raise RefusedError(f"the loss is {what}: {few} samples give {whole:.6g}, their halves {mean:.6g}")
        some = some or whole != 0.0
    if not some:
        raise RefusedError("the loss of a few samples is 0, which is a mean as much as a sum")


def _is_close(a: float, b: float) -> bool:
    return math.isfinite(a) and abs(a - b) <= TOLERANCE * max(abs(a), abs(b))


class _NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Nothing inside may talk to other ranks: they are not there to answer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            raise RefusedError(f"the forward talks to the other ranks ({func}), who are not there to answer")
        return func(*args, **(kwargs or {}))


def no_collectives() -> contextlib.AbstractContextManager[Any]:
    """Inside, what would talk to other ranks raises `RefusedError`."""
    return _NoCollectives()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    # Each module's own flag, and not `eval()`: some merge weights in it, or refuse to leave it.
    training = [(module, module.training) for module in model.modules()]
    random_state = _random_state()
    try:
        for module, _ in training:
            module.training = False
        yield
    finally:
        for module, flag in training:
            module.training = flag
        _restore(random_state)


def _with_other_randomness(value: Callable[[], float]) -> float:
    torch.rand(1)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.rand(1, device="cuda")
    return value()


def _random_state() -> tuple[Any, Any, Any, Any]:
    numpy = sys.modules.get("numpy")
    return (
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
        random.getstate(),
        numpy.random.get_state() if numpy is not None else None,
    )


def _restore(state: tuple[Any, Any, Any, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    random.setstate(state[2])
    if state[3] is not None:
        sys.modules["numpy"].random.set_state(state[3])

"""Where a script that knows nothing of us lets its loss and its gradient norm be seen.

A few functions of torch are wrapped, and put back by `Taps.remove`: ``torch.autograd.backward`` (which
``Tensor.backward`` calls), ``GradScaler.scale`` (to see the loss unscaled), ``GradScaler.step`` (which may leave the
optimizer out), ``GradScaler.update`` (a loss that nobody has stepped on is not the next one's), ``clip_grad_norm_``
(whose result is the gradient norm that we would otherwise compute again), and ``torch.compile`` with
``Module.compile`` (beside which no global hook may be in). What is raised is torch's own; what we cannot see is left
out.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad

from sosa_stream.agent.step.gradients import whole
from sosa_stream.agent.watch.deliveries import Deliveries
from sosa_stream.agent.watch.leftovers import Leftovers
from sosa_stream.agent.watch.local_gradients import LocalGradients
from sosa_stream.agent.watch.losses import Losses
from sosa_stream.agent.watch.own_time import OwnTime
from sosa_stream.protocol.messages import Phase

UNSCALED = "_sosa_unscaled"
BACKWARD = Phase.BACKWARD


class Taps:
    """The loss since the last step, and the last gradient norm that the script computed itself."""

    def __init__(self) -> None:
        self.losses = Losses()
        self.leftovers = Leftovers()
        self.num_backwards = 0
        """Backward passes that were seen to their end since the last row."""
        self.own_time = OwnTime()
        self.local_gradients = LocalGradients()
        self.deliveries = Deliveries(own_time=self.own_time)
        self.phase = Phase.START
        self._clip_norm: torch.Tensor | None = None
        self._clip_bound: float | None = None
        self._clipped: list[torch.Tensor] = []
        self._depth = 0
        self.around_scaler_step: Callable[[Any, Callable[[], Any]], Any] = lambda optimizer, step: step()
        """Given the optimizer of a ``GradScaler.step`` and what makes the call."""
        self.on_join: Callable[[], None] = lambda: None
        """Called when ranks begin to step by themselves (`torch.distributed.algorithms.Join`, and DDP's ``join``)."""
        self.on_compile: Callable[[], None] = lambda: None
        self._scaler: weakref.ref[GradScaler] | None = None
        self._restore: list[Callable[[], None]] = []

    def install(self) -> None:
        self._wrap(torch.autograd, "backward", self._backward)
        self._wrap(GradScaler, "scale", self._scale)
        self._wrap(GradScaler, "step", self._step)
        self._wrap(GradScaler, "update", self._update)
        for module in (torch.nn.utils, clip_grad):
            self._wrap(module, "clip_grad_norm_", self._clip_grad_norm)
        self._wrap(torch, "compile", self._compile)
        self._wrap(torch.nn.Module, "compile", self._compile)
        if torch.distributed.is_available():
            from torch.distributed.algorithms.join import Join

            self._wrap(Join, "__enter__", self._join)
        self.deliveries.install()
        self.own_time.install()

    def remove(self) -> None:
        self.own_time.remove()
        self.local_gradients.remove()
        self.deliveries.remove()
        while self._restore:
            self._restore.pop()()

    def add_loss(self, loss: torch.Tensor) -> None:
        """One backward's loss; the parts of an accumulated step add up."""
        if loss.is_cpu:
            self.losses.add(loss.item())
        else:
            self.losses.add(None if loss.is_meta else loss.detach())  # on meta there is no value to see

    @property
    def loss_scale(self) -> torch.Tensor | None:
        """The scale of the scaler that scaled the last loss; None where none did, or it is switched off."""
        scaler = self._scaler() if self._scaler is not None else None
        return getattr(scaler, "_scale", None)

    def take_norm(self, parameters: list[torch.Tensor]) -> tuple[torch.Tensor | None, float | None]:
        """The norm that the script's own clipping returned, and its bound, if it covered exactly these parameters."""
        norm, clipped = self._clip_norm, self._clipped
        self._clip_norm, self._clipped = None, []
        if norm is None or len(clipped) != len(parameters):
            return None, None
        # All against all would cost; the ends tell the networks of a GAN apart.
        same = {id(clipped[0]), id(clipped[-1])} == {id(parameters[0]), id(parameters[-1])}
        return (norm, self._clip_bound) if same else (None, None)

    def _wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(make(original)))
        self._restore.append(lambda: setattr(owner, name, original))

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
            if self._depth:  # activation checkpointing calls backward inside backward
                return self.own_time.run_backward(tensors, lambda: original(tensors, grad_tensors, *args, **kwargs))
            mark = self.losses.mark()
            self.leftovers.before_backward()
            self._see_loss(tensors, grad_tensors)
            self.phase = BACKWARD
            self._depth = 1
            self.local_gradients.begin_pass()
            try:
                result = self.own_time.run_backward(tensors, lambda: original(tensors, grad_tensors, *args, **kwargs))
            except BaseException:
                self.losses.undo(mark)
                raise
            finally:
                self._depth = 0
            self.num_backwards += 1
            self.losses.attribute(mark)
            self.leftovers.after_backward()
            return result

        return backward

    def _see_loss(self, tensors: Any, grad_tensors: Any) -> None:
        loss = tensors[0] if isinstance(tensors, list | tuple) and len(tensors) == 1 else tensors
        given = grad_tensors[0] if isinstance(grad_tensors, list | tuple) and grad_tensors else grad_tensors
        if given is None and isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self.add_loss(getattr(loss, UNSCALED, loss))
        else:
            self.losses.add(None)

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            if isinstance(outputs, torch.Tensor) and isinstance(scaled, torch.Tensor) and scaled is not outputs:
                setattr(scaled, UNSCALED, outputs.detach())
                self._scaler = weakref.ref(scaler)
            return scaled

        return scale

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(scaler: GradScaler, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            return self.around_scaler_step(optimizer, lambda: original(scaler, optimizer, *args, **kwargs))

        return step

    def _update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def update(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
            if self.losses:
                self.losses.take()
            return original(scaler, *args, **kwargs)

        return update

    def _compile(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compile(model: Any = None, *args: Any, **kwargs: Any) -> Any:
            if isinstance(model, torch.nn.Module):
                self.on_compile()
                self.own_time.give_up()
                self.local_gradients.give_up()
            return original(model, *args, **kwargs)

        return compile

    def _join(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def enter(context: Any) -> Any:
            if getattr(context, "_enable", True):
                self.on_join()
            return original(context)

        return enter

    def _clip_grad_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip_grad_norm_(parameters: Any, max_norm: Any, norm_type: Any = 2.0, *args: Any, **kwargs: Any) -> Any:
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            norm = original(parameters, max_norm, norm_type, *args, **kwargs)
            self._clip_norm = None
            if isinstance(norm, torch.Tensor) and float(norm_type) == 2.0 and not isinstance(max_norm, torch.Tensor):
                self._clip_norm, self._clip_bound = whole(norm.detach()), float(max_norm)
                self._clipped = [p for p in parameters if p.grad is not None]
            return norm

        return clip_grad_norm_

"""What is seen of a few steps of an unmodified script: batches, losses, gradients, units, times, optimizers.

Everything here only looks. It is thrown away with the process, so what it holds it keeps alive on purpose: the checks
need the script's objects after the last step.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from sosa_stream.agent.repair.models import unwrapped
from sosa_stream.agent.watch.own_time import OPTIMIZER
from sosa_stream.agent.watch.taps import Taps
from sosa_stream.doctor.seen_calls import Losses, Units
from sosa_stream.doctor.tape import Pass, Tape


class Leave(BaseException):
    """Enough was seen: out of the script, by its own ``finally`` blocks. No ``except Exception`` stops it."""


MOST_LEAVES = 20
"""As often it is raised again where the script catches even that; then the process ends at once."""
SOME = 8
"""Parameters by which it is told whether gradients are still there."""


@dataclass(slots=True)
class Reached:
    """How often a parameter's gradient was there, not all zero, not finite, after how many backward passes."""

    passes: int = 0
    there: int = 0
    nonzero: int = 0
    nonfinite: int = 0


@dataclass(slots=True, kw_only=True)
class Seen:
    """All that the checks are told.

    Attributes:
        passes: every pass from a model to a backward, oldest first.
        num_steps: of the optimizers' step-calls.
        step_seconds: wall time of each step but the first; ``parts`` the same by `OwnTime`'s columns.
        starts: a copy of each model's parameters and buffers, from before its first pass, on the host.
        names: of parameters, by identity, in the order of the models.
        gradients: by parameter, by identity.
        rates: of the first group, at each step; the schedule's peak where a group tells it.
        loaders: those that batches were taken from, in the order of their first.
        error: what ended the script, if something did.
    """

    passes: list[Pass] = field(default_factory=list)
    num_steps: int = 0
    step_seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    roots: list[nn.Module] = field(default_factory=list)
    starts: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    parameters: dict[int, torch.Tensor] = field(default_factory=dict)
    gradients: dict[int, Reached] = field(default_factory=dict)
    optimizers: list[Optimizer] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    loaders: list[DataLoader[Any]] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    units: Units = field(default_factory=Units)
    is_replicated: bool = False
    has_loaded: bool = False
    """Whether weights were loaded before the first step."""
    num_kept: int = 0
    """Updates whose gradients nobody had touched when the next backward began."""
    seed_before: int = 0
    error: BaseException | None = None

    @property
    def device(self) -> torch.device:
        """Where the first model lies."""
        for parameter in self.parameters.values():
            return parameter.device
        return torch.device("cpu")


class _Update:
    """Whether anybody but backward touches the gradients of an update before its optimizer's next one."""

    def __init__(self, optimizer: Optimizer) -> None:
        owned = (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
        self._some = list(itertools.islice(owned, SOME))
        self._left = self._state()
        self._num_backwards = 0
        self._is_touched = not self._some

    @property
    def is_kept(self) -> bool:
        return self._num_backwards > 0 and not self._is_touched

    def before_backward(self) -> None:
        now = self._state()
        self._is_touched |= any(a[0] is not b[0] or a[1] != b[1] for a, b in zip(now, self._left, strict=True))

    def after_backward(self) -> None:
        self._num_backwards += 1
        self._left = self._state()

    def _state(self) -> list[tuple[torch.Tensor | None, int]]:
        return [(p.grad, -1 if p.grad is None else p.grad._version) for p in self._some]


class Recorder:
    """Watches until ``num_steps`` steps have been taken, calls ``done`` once, and leaves the script."""

    def __init__(self, num_steps: int, done: Callable[[], None]) -> None:
        self.seen = Seen(seed_before=torch.initial_seed())
        self.tape = Tape()
        self.taps = Taps()
        self._num_steps, self._done = num_steps, done
        self._is_over = False
        self._num_left = 0
        self._depth = 0
        self._pid = os.getpid()
        self._began = 0.0
        self._backward_under_way = False
        self._updates: dict[int, _Update] = {}
        """The last update of each optimizer, by identity."""
        self._restore: list[Callable[[], None]] = []

    def install(self) -> None:
        """Look from now on. Call it before the script begins."""
        self.taps.install()
        self._wrap(torch.autograd, "backward", self._backward)
        self._wrap(GradScaler, "scale", self._scale)
        self._wrap(DataLoader, "__iter__", self._iterate)
        self._wrap(nn.Module, "load_state_dict", self._load)
        self._restore.append(register_optimizer_step_pre_hook(self._before_step).remove)
        self._restore.append(register_optimizer_step_post_hook(self._after_step).remove)
        self.tape.see, self.tape.meet = self._see, self._meet
        self.tape.install()
        self.tape.on = True

    def finish(self) -> None:
        """No more is looked at: the checks begin."""
        self._is_over = True
        self.tape.on = False
        self.tape.remove()
        self.close()
        self.taps.remove()

    def close(self) -> None:
        """Nothing of torch is wrapped by us any more."""
        while self._restore:
            self._restore.pop()()

    def keep_unfinished(self) -> None:
        """The script has ended within a pass: its batch was seen all the same."""
        found = self.tape.finish(None)
        if found is not None and found.nodes:
            found.why = "the script ended before its backward pass"
            self.seen.passes.append(found)

    def leave(self) -> None:
        """Out of the script; at once where it does not let us."""
        self._num_left += 1
        if self._num_left > MOST_LEAVES:
            os._exit(0)  # what was found has been written
        raise Leave

    def _wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(make(original)))
        self._restore.append(lambda: setattr(owner, name, original))

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if torch.is_grad_enabled() and not self._backward_under_way:
            path = self._path()
            self.seen.losses.see(func, args, kwargs, result, path)
            self.seen.units.see(func, args, result, path)

    def _path(self) -> str:
        return self.seen.names.get(id(self.tape.modules[-1]), "") if self.tape.modules else ""

    def _meet(self, root: nn.Module) -> None:
        """An outermost module is about to run with gradients."""
        if self._is_over:
            self.leave()
        self.taps.own_time.begin_forward()
        inner = unwrapped(root)
        self.seen.is_replicated |= isinstance(root, DistributedDataParallel)
        if any(inner is known for known in self.seen.roots):
            return
        self.seen.roots.append(inner)
        prefix = (
            f"{type(inner).__name__}." if len(self.seen.roots) > 1 and any(True for _ in inner.parameters()) else ""
        )
        for name, module in inner.named_modules():
            self.seen.names[id(module)] = prefix + name or type(module).__name__
        state: dict[str, torch.Tensor] = {}
        for name, tensor in [*inner.named_parameters(), *inner.named_buffers()]:
            if isinstance(tensor, nn.Parameter):
                self.seen.names.setdefault(id(tensor), prefix + name)
                self.seen.parameters.setdefault(id(tensor), tensor)
            if not is_lazy(tensor):
                state[name] = tensor.detach().to("cpu", copy=True)
        self.seen.starts[id(inner)] = state

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if self._backward_under_way or not self.tape.on:
                return original(tensors, *args, **kwargs)
            loss = tensors[0] if isinstance(tensors, list | tuple) and len(tensors) == 1 else tensors
            found = self.tape.finish(loss)
            for update in self._updates.values():
                update.before_backward()
            self._backward_under_way = True
            try:
                with self.tape.silent():
                    result = original(tensors, *args, **kwargs)
            finally:
                self._backward_under_way = False
                for update in self._updates.values():
                    update.after_backward()
            if found is not None:
                self.seen.passes.append(found)
                self._look_at_gradients()
            self.seen.losses.end_pass()
            self.seen.units.end_pass()
            return result

        return backward

    def _look_at_gradients(self) -> None:
        for key, parameter in self.seen.parameters.items():
            if parameter.requires_grad:
                reached = self.seen.gradients.setdefault(key, Reached())
                reached.passes += 1
                gradient = parameter.grad
                if gradient is not None and gradient.layout is torch.strided:
                    largest = float(gradient.detach().abs().amax()) if gradient.numel() else 0.0
                    reached.there += 1
                    reached.nonzero += largest != 0.0
                    reached.nonfinite += largest != largest or largest == float("inf")
                elif gradient is not None:
                    reached.there += 1
                    reached.nonzero += 1

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.tape.on and not self._is_over:
            return
        if self._is_over:
            self.leave()
        self._depth += 1
        if all(optimizer is not known for known in self.seen.optimizers):
            self.seen.optimizers.append(optimizer)
        if optimizer is self.seen.optimizers[0]:
            group = optimizer.param_groups[0]
            self.seen.rates.append(float(max(group.get(key, 0.0) or 0.0 for key in ("lr", "initial_lr", "max_lr"))))
        self.taps.own_time.enter(OPTIMIZER)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth or self._is_over:
            return
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        now = time.perf_counter()
        parts = self.taps.own_time.take(reduces=False, blind=True, on_device=self.seen.device.type != "cpu")
        if self._began:
            self.seen.step_seconds.append(now - self._began)
            self.seen.parts.append({name: float(value) for name, value in parts.items()})
        self._began = now
        before = self._updates.get(id(optimizer))
        self.seen.num_kept += before is not None and before.is_kept
        self._updates[id(optimizer)] = _Update(optimizer)
        self.seen.num_steps += 1
        if self.seen.num_steps >= self._num_steps:
            self.finish()
            self._done()
            self._watch_for_return()
            self.leave()

    def _watch_for_return(self) -> None:
        """A script that has caught `Leave` meets it again at its next step or batch."""
        self._restore.append(register_optimizer_step_pre_hook(self._before_step).remove)
        self._wrap(DataLoader, "__iter__", lambda original: lambda loader: self.leave())
        self._wrap(torch.autograd, "backward", lambda original: lambda *args, **kwargs: self.leave())

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            self.tape.note_scaled(outputs, scaled)
            return scaled

        return scale

    def _iterate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def __iter__(loader: DataLoader[Any]) -> Any:
            if torch.is_grad_enabled() and all(loader is not known for known in self.seen.loaders):
                self.seen.loaders.append(loader)
            return original(loader)

        return __iter__

    def _load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load_state_dict(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.seen.has_loaded |= not self.seen.num_steps
            return original(module, *args, **kwargs)

        return load_state_dict

"""Copies of parameters, buffers and optimizer state in memory, to go back to.

The schedule is a pure function of the tick and promotion depends only on what is equal on all ranks (the reduced
gradient norm), so every rank holds the same snapshots and picks the same one without talking.
"""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.gradients import to_local
from sosa_stream.config import AgentSettings
from sosa_stream.errors import SosaError


class NoSnapshotError(SosaError):
    """There is no good snapshot to go back to."""


@dataclass(slots=True)
class Snapshot:
    """State as it was before tick ``tick`` and step ``step`` were taken."""

    tick: int
    step: int
    tensors: list[torch.Tensor]
    optimizer_state: list[dict[int, dict[str, Any]]]
    num_parameters: int = 0
    size_bytes: int = 0

    def is_finite(self) -> bool:
        """Whether all parameters are; buffers may differ between ranks, and the answer must not."""
        parameters = self.tensors[: self.num_parameters]
        return all(bool(torch.isfinite(t).all()) for t in parameters if t.is_floating_point())


class TrainingState:
    """Where the state lives: the script's optimizers, and the buffers of the modules that own their parameters.

    Nothing here keeps a model alive that the script has let go.
    """

    def __init__(self) -> None:
        self._optimizers: list[weakref.ref[Optimizer]] = []
        # Owner and name of each, because a module may put a new tensor in a buffer's place.
        self._buffers: list[tuple[weakref.ref[nn.Module], str]] | None = None

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that have stepped and are still there, in the order in which they first did."""
        return [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]

    def meet(self, optimizer: Optimizer) -> bool:
        """Note an optimizer that is about to step; whether it is new."""
        for ref in self._optimizers:
            if ref() is optimizer:
                return False
        self._optimizers = [ref for ref in self._optimizers if ref() is not None] + [weakref.ref(optimizer)]
        self._buffers = None
        return True

    def tensors(self) -> list[torch.Tensor]:
        parameters = self._parameters()
        if self._buffers is None:
            self._buffers = _find_buffers(parameters)
        owners = [(module, name) for ref, name in self._buffers if (module := ref()) is not None]
        buffers = [module._buffers.get(name) for module, name in owners]
        return [*parameters, *(b for b in buffers if b is not None)]

    def _parameters(self) -> list[torch.Tensor]:
        unique = {
            id(p): p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        return list(unique.values())

    def capture(self, tick: int, step: int, reuse: Snapshot | None = None) -> Snapshot:
        """A copy of everything, into the memory of ``reuse`` where shapes fit."""
        live = self.tensors()
        old = reuse.tensors if reuse is not None and len(reuse.tensors) == len(live) else [None] * len(live)
        tensors = [_copy(tensor, into) for tensor, into in zip(live, old, strict=True)]
        state = [
            {index: {k: _copy_value(v) for k, v in values.items()} for index, values in _by_position(optimizer)}
            for optimizer in self.optimizers
        ]
        size = sum(t.numel() * t.element_size() for t in tensors)
        size += sum(
            v.numel() * v.element_size()
            for per_optimizer in state
            for values in per_optimizer.values()
            for v in values.values()
            if isinstance(v, torch.Tensor)
        )
        return Snapshot(
            tick=tick,
            step=step,
            tensors=tensors,
            optimizer_state=state,
            num_parameters=len(self._parameters()),
            size_bytes=size,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Copy a snapshot back in place: the script's own references stay valid.

        Raises:
            NoSnapshotError: the model or its optimizers have changed shape since. Nothing has been changed then.
        """
        live = self.tensors()
        if len(live) != len(snapshot.tensors) or len(self.optimizers) != len(snapshot.optimizer_state):
            raise NoSnapshotError("the parameters or optimizers are no longer those of the snapshot")
        if any(to_local(a).shape != b.shape for a, b in zip(live, snapshot.tensors, strict=True)):
            raise NoSnapshotError("a parameter has changed its shape since the snapshot")
        with torch.no_grad():
            for tensor, saved in zip(live, snapshot.tensors, strict=True):
                to_local(tensor).copy_(saved)
            for optimizer, saved_state in zip(self.optimizers, snapshot.optimizer_state, strict=True):
                _restore_optimizer(optimizer, saved_state)

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """Parameters and optimizer state as they lie in this process, in a fixed order (buffers may differ)."""
        for parameter in self._parameters():
            yield to_local(parameter)
        for optimizer in self.optimizers:
            for _, values in _by_position(optimizer):
                for _, value in sorted(values.items()):
                    if isinstance(value, torch.Tensor):
                        yield to_local(value)

    def digest(self) -> str:
        """A digest of parameters and optimizer state as they lie in this process, to be compared between replicas."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.local_tensors():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class SnapshotRing:
    """The snapshots that are kept, and which of them may be gone back to.

    Ages are spread out geometrically, so that a fault noticed late still finds one from before it.
    """

    def __init__(
        self, state: TrainingState, settings: AgentSettings, max_rollback_steps: int, say: Callable[[str], None]
    ) -> None:
        self._state = state
        self._settings = settings
        self._max_rollback_steps = max_rollback_steps
        self._say = say
        self._keep = settings.snapshot_keep
        self._snapshots: list[Snapshot] = []
        # Gradient norms of recent ticks, left on their device: they are looked at only when a rollback asks.
        self._norms: deque[tuple[int, torch.Tensor]] = deque(maxlen=max_rollback_steps + settings.quarantine_ticks)
        self._off = self._lost = False

    def observe(self, tick: int, step: int, norm: torch.Tensor | None) -> None:
        """After a step-call: remember its gradient norm, and copy the state when the schedule says so.

        Args:
            tick: the tick that the state is now *before*.
            step: the step that the state is now *before*.
            norm: the (reduced) gradient norm of the tick just done, None if there were no gradients.
        """
        if norm is not None:
            self._norms.append((tick - 1, norm.detach()))
        if tick % self._settings.snapshot_every_ticks == 0 and not self._off:
            self.take(tick, step)

    def take(self, tick: int, step: int) -> None:
        """Copy the state now, into the memory of the snapshot that it replaces."""
        reuse = self._snapshots.pop(self._victim(step)) if len(self._snapshots) >= self._keep else None
        snapshot = self._state.capture(tick, step, reuse)
        if len(self._snapshots) < 2 and reuse is None:  # the first has no optimizer state yet, the second has it all
            self._fit(snapshot)
        if not self._off:
            self._snapshots.append(snapshot)

    def choose(self, before_step: int, present_step: int) -> Snapshot:
        """The newest finite snapshot whose whole quarantine lies before ``before_step``.

        Raises:
            NoSnapshotError: none is old and healthy enough, or it would give up more than ``max_rollback_steps``: on no
                rank, for all hold the same.
            RuntimeError: this rank alone has lost its snapshots.
        """
        if self._lost:  # after this rank had promised: it alone knows, and must not pass for all
            raise RuntimeError("this rank has lost its snapshots")
        quarantine = self._settings.quarantine_ticks
        finite = {tick: bool(torch.isfinite(norm)) for tick, norm in self._norms}
        for snapshot in reversed(self._snapshots):
            healthy = all(finite.get(tick, True) for tick in range(snapshot.tick, snapshot.tick + quarantine))
            if snapshot.step + quarantine <= before_step and healthy and snapshot.is_finite():
                if present_step - snapshot.step > self._max_rollback_steps:
                    break
                return snapshot
        held = ", ".join(str(s.step) for s in self._snapshots) or "none"
        raise NoSnapshotError(f"no healthy snapshot {quarantine} steps before step {before_step} (held: {held})")

    def may_choose(self, before_step: int, present_step: int) -> bool:
        """Whether a snapshot of that age is held at all: what can be told without reading the device."""
        oldest = present_step - self._max_rollback_steps
        newest = before_step - self._settings.quarantine_ticks
        return any(oldest <= snapshot.step <= newest for snapshot in tuple(self._snapshots))

    def begin_anew(self) -> None:
        """Another model is trained from here on: what was copied is no longer of use."""
        self._snapshots.clear()
        self._norms.clear()

    def lose(self) -> None:
        """A copy has failed on this rank: keep none and take none from here on."""
        self._off = self._lost = True
        self._snapshots.clear()

    def forget_after(self, step: int) -> None:
        """After a rollback: what was copied later may be poisoned."""
        self._snapshots = [s for s in self._snapshots if s.step <= step]

    def _victim(self, step: int) -> int:
        held = [s.step for s in self._snapshots]
        if len(held) < 3 or step - held[0] > self._max_rollback_steps:
            return 0
        return min(range(1, len(held) - 1), key=lambda i: (held[i + 1] - held[i - 1]) / (step - held[i] + 1))

    def _fit(self, snapshot: Snapshot) -> None:
        size = max(1, snapshot.size_bytes)
        self._keep = min(self._settings.snapshot_keep, self._settings.snapshot_max_bytes // size)
        if self._keep < 2:
            self._off = True
            self._snapshots.clear()
            self._say(f"snapshots are off: agent.snapshot_max_bytes holds fewer than two of {_readable(size)}")
        elif self._snapshots:
            self._say(f"snapshots: {_readable(size)} each, up to {self._keep} kept in memory")


def _readable(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"


def _find_buffers(parameters: list[torch.Tensor]) -> list[tuple[weakref.ref[nn.Module], str]]:
    """The buffers of every module tree that owns one of the parameters. Done once: it looks at all live objects."""
    wanted = {id(p) for p in parameters}
    buffers: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
    for module in [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]:
        try:
            if any(id(p) in wanted for p in module.parameters()):
                for owner in module.modules():
                    named = owner._buffers.items()
                    buffers.update({id(b): (weakref.ref(owner), name) for name, b in named if b is not None})
        except Exception:  # a module that is half built is not ours to judge
            continue
    return list(buffers.values())


def _by_position(optimizer: Optimizer) -> Iterable[tuple[int, dict[str, Any]]]:
    position = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                yield position, optimizer.state[parameter]
            position += 1


def _restore_optimizer(optimizer: Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    position = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            before = saved.get(position)
            position += 1
            if before is None:
                optimizer.state.pop(parameter, None)
                continue
            now = optimizer.state[parameter]
            for name in set(now) - set(before):
                del now[name]
            for name, value in before.items():
                present = now.get(name)
                if isinstance(present, torch.Tensor) and isinstance(value, torch.Tensor):
                    to_local(present).copy_(to_local(value))
                else:
                    now[name] = _copy_value(value)


def _copy(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    local = to_local(tensor.detach())
    if into is not None and into.shape == local.shape and into.dtype == local.dtype and into.device == local.device:
        return into.copy_(local)
    return local.clone()


def _copy_value(value: Any) -> Any:
    """A copy that later steps cannot reach; LBFGS keeps lists of tensors, which it changes in place."""
    if isinstance(value, torch.Tensor):
        return _copy(value, None)
    if isinstance(value, dict):
        return {key: _copy_value(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy_value(item) for item in value)
    return value

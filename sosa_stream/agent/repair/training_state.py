"""Where the state of a training lives, and how it is copied and put back.

A snapshot holds parameters, buffers and optimizer state, schedulers and scalers, what the script has registered, and
the random number generators. A rollback puts back what may have been poisoned and leaves alone what is position:

* schedulers that follow the step count move on as the data does: a schedule with a fault would only repeat it, and the
  training would end before its schedule. Those that follow a metric have counted in the bad time and go back, with the
  rate that they have set. ``agent.rollback_schedulers`` says otherwise.
* random numbers are for a run that goes on from disk, and for repeating a step.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sosa_stream.agent.gradients import to_local
from sosa_stream.agent.repair import random_numbers
from sosa_stream.agent.repair.copies import (
    Copy,
    copies_in,
    copy_all,
    copy_tensor,
    finite_flags,
    revive,
    size_of,
    tensors_in,
)
from sosa_stream.agent.repair.models import Models
from sosa_stream.agent.repair.optimizer_state import (
    by_position,
    inner_optimizer,
    num_moments,
    restore_groups,
    restore_optimizer,
    scheduled,
)
from sosa_stream.agent.repair.registry import Registry, copy_scale, follows_metric, restore_scale
from sosa_stream.config import Switch
from sosa_stream.errors import SosaError

Owned = tuple[weakref.ref[Any], Any]


class NoSnapshotError(SosaError):
    """There is no good snapshot to go back to."""


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """State as it was before tick ``tick`` and step ``step`` were taken."""

    tick: int
    step: int
    parameters: list[Copy]
    buffers: list[Copy]
    optimizers: list[dict[int, dict[str, Any]]]
    """For each optimizer the state of its parameters, by their position in its groups."""
    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    """For each optimizer what schedulers set in its groups."""
    schedulers: list[Owned] = field(default_factory=list)
    scalers: list[Owned] = field(default_factory=list)
    registered: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    finite: list[Copy] = field(default_factory=list)
    """0-d flags of what was copied, on their way to the host as the copies are."""
    ready: torch.cuda.Event | None = None

    @property
    def copies(self) -> Iterator[Copy]:
        yield from self.parameters
        yield from self.buffers
        yield from copies_in([self.optimizers, self.registered])

    @property
    def size_bytes(self) -> int:
        return size_of(copy.host for copy in self.copies)

    @property
    def is_bad(self) -> bool:
        """Whether it is known, without waiting, that something was not finite when it was copied."""
        if self.ready is not None and not self.ready.query():  # type: ignore[no-untyped-call]
            return False
        return not all(bool(flag.host) for flag in self.finite)

    def is_finite(self) -> bool:
        """Whether it was when it was copied, and still is. Waits for the copy to be there."""
        self.wait()
        if self.is_bad:
            return False
        state = [copy.host for copy in [*self.parameters, *copies_in(self.optimizers)]]
        return all(finite_flags(state, [copy.host for copy in self.buffers]))

    def wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()
            self.ready = None


class TrainingState:
    """The script's optimizers, the models whose parameters they own, and what the registry knows.

    Nothing here keeps a model alive that the script has let go.
    """

    def __init__(self, registry: Registry | None = None, rollback_schedulers: Switch = Switch.AUTO) -> None:
        self.registry = registry or Registry()
        self._rollback_schedulers = rollback_schedulers
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._models = Models()
        self._looked = False

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that have stepped and are still there, in the order in which they first did."""
        return [optimizer for ref in self._optimizers if (optimizer := ref()) is not None]

    @property
    def schedulers(self) -> list[LRScheduler]:
        self._look()
        return self.registry.schedulers(self.optimizers)

    @property
    def scalers(self) -> list[GradScaler]:
        """Those that are switched on."""
        self._look()
        return self.registry.scalers

    @property
    def models(self) -> list[nn.Module]:
        """The outermost modules that own a parameter of an optimizer, out of what wraps them for distribution."""
        self._look()
        return self._models.unwrapped

    @property
    def parameters(self) -> list[torch.Tensor]:
        unique = {
            id(p): p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        return list(unique.values())

    @property
    def buffers(self) -> list[torch.Tensor]:
        self._look()
        return self._models.buffers

    @property
    def where(self) -> str:
        """Which ranks keep copies, in words."""
        return "on this rank"

    def meet(self, optimizer: Optimizer) -> bool:
        """Note an optimizer that is about to step; whether it is new."""
        for ref in self._optimizers:
            if ref() is optimizer:
                return False
        self._optimizers = [ref for ref in self._optimizers if ref() is not None] + [weakref.ref(optimizer)]
        self._looked = False
        return True

    def capture(self, tick: int, step: int, reuse: Snapshot | None = None) -> Snapshot:
        """A copy of everything, into the memory of ``reuse`` where shapes fit; the device is not waited for."""
        parameters, buffers = self.parameters, self.buffers
        state = [dict(by_position(optimizer)) for optimizer in self.optimizers]
        old = reuse if reuse is not None and len(reuse.optimizers) == len(state) else None
        snapshot = Snapshot(
            tick=tick,
            step=step,
            parameters=_copied(parameters, old.parameters if old else ()),
            buffers=_copied(buffers, old.buffers if old else ()),
            optimizers=[
                copy_all(its, old.optimizers[i] if old else None)  # a position keeps its memory
                for i, its in enumerate(state)
            ],
            random=random_numbers.capture(),
            finite=[copy_tensor(flag) for flag in finite_flags([*parameters, *tensors_in(state)], buffers)],
        )
        self._record(snapshot)
        return snapshot

    def complete(self, snapshot: Snapshot, reuse: Snapshot | None = None) -> None:
        """Add what the script itself brings forward between two steps: rates, schedulers, scalers, registered state.

        So the time for it is right before the next step-call; `capture` belongs right behind the last one, before a
        forward pass has touched the buffers and drawn random numbers.
        """
        snapshot.groups = [[scheduled(group) for group in its.param_groups] for its in self.optimizers]
        snapshot.schedulers = [(weakref.ref(its), copy_all(its.state_dict())) for its in self.schedulers]
        snapshot.scalers = [(weakref.ref(its), copy_scale(its)) for its in self.registry.scalers]
        snapshot.registered = self.registry.capture(reuse.registered if reuse is not None else {})
        self._record(snapshot)

    def present(self, tick: int, step: int) -> Snapshot:
        """Everything as it is now."""
        snapshot = self.capture(tick, step)
        self.complete(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot, present: Snapshot) -> None:
        """Go back to ``snapshot``, in place: the script's own references stay valid.

        Args:
            present: the state as it is now, to which all returns where something of the script's own cannot be loaded.

        Raises:
            NoSnapshotError: the model or its optimizers have changed shape since. Nothing has been changed then.
            SosaError: what the script has registered would not take its state back. Nothing has been changed then.
        """
        self.check(snapshot)
        snapshot.wait()
        try:
            self._restore_small(snapshot)
        except Exception as error:
            present.wait()
            self._restore_small(present)
            raise SosaError(f"state could not be put back: {type(error).__name__}: {error}") from error
        with torch.no_grad():
            for tensor, copy in zip(self.parameters, snapshot.parameters, strict=True):
                copy.put_back(tensor)
            for optimizer, saved in zip(self.optimizers, snapshot.optimizers, strict=True):
                restore_optimizer(optimizer, saved)

    def check(self, snapshot: Snapshot) -> None:
        """Raises NoSnapshotError unless it is one of the model and the optimizers as they are."""
        if len(self.optimizers) != len(snapshot.optimizers) or len(self.buffers) != len(snapshot.buffers):
            raise NoSnapshotError("the parameters or optimizers are no longer those of the snapshot")
        live, copies = [*self.parameters, *self.buffers], [*snapshot.parameters, *snapshot.buffers]
        if len(live) != len(copies):
            raise NoSnapshotError("the parameters or optimizers are no longer those of the snapshot")
        if not all(copy.fits(tensor) for tensor, copy in zip(live, copies, strict=True)):
            raise NoSnapshotError("a parameter has changed its shape since the snapshot")

    def estimate_bytes(self) -> tuple[int, bool]:
        """Bytes of a snapshot in this process, from shapes, and whether state that is not there yet is estimated."""
        present, expected = size_of([*self.parameters, *self.buffers]), 0
        for inner in map(inner_optimizer, self.optimizers):
            present += size_of(tensors_in([dict(values) for values in inner.state.values()]))
            if not inner.state:
                expected += sum(num_moments(group) * size_of(group["params"]) for group in inner.param_groups)
        return present + expected, expected > 0

    def restored_schedulers(self, snapshot: Snapshot) -> list[tuple[LRScheduler, Any]]:
        """Those that a rollback puts back, with their states."""
        if self._rollback_schedulers is Switch.OFF:
            return []
        alive = [(scheduler, state) for ref, state in snapshot.schedulers if (scheduler := ref()) is not None]
        return [(s, state) for s, state in alive if self._rollback_schedulers is Switch.ON or follows_metric(s)]

    def local_tensors(self) -> Iterable[torch.Tensor]:
        """Parameters and optimizer state as they lie in this process, in a fixed order (buffers may differ)."""
        for parameter in self.parameters:
            yield to_local(parameter)
        for optimizer in self.optimizers:
            for _, values in by_position(optimizer):
                for _, value in sorted(values.items()):
                    if isinstance(value, torch.Tensor):
                        yield to_local(value)

    def digest(self) -> str:
        """A digest of parameters and optimizer state as they lie in this process, to be compared between replicas."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.local_tensors():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Everything, live, in the order in which it was met: what a checkpoint on disk is made of and loaded into.

        Tensors are the script's own (DTensors where sharded), as `torch.distributed.checkpoint` wants them.
        """
        return {
            "models": [model.state_dict() for model in self.models],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "scalers": [scaler.state_dict() for scaler in self.registry.scalers],
            "registered": {name: thing.state_dict() for name, thing in self.registry.registered.items()},
            "random": random_numbers.capture(),
        }

    @staticmethod
    def _record(snapshot: Snapshot) -> None:
        if any(copy.device.type == "cuda" for copy in snapshot.copies):
            snapshot.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            snapshot.ready.record()

    def _restore_small(self, snapshot: Snapshot) -> None:
        """What is this rank's own, and what may fail because the script's own code runs: that comes first."""
        self.registry.restore(snapshot.registered)
        driven: set[int] = set()
        for scheduler, state in self.restored_schedulers(snapshot):
            scheduler.load_state_dict(revive(state))
            driven.add(id(scheduler.optimizer))
        if self._rollback_schedulers is not Switch.ON:  # beside one that follows the step, the rate is that one's
            driven -= {id(s.optimizer) for s in self.schedulers if not follows_metric(s)}
        with torch.no_grad():
            for optimizer, groups in zip(self.optimizers, snapshot.groups, strict=True):
                if id(optimizer) in driven:
                    restore_groups(optimizer, groups)
            for ref, state in snapshot.scalers:
                if (scaler := ref()) is not None:
                    restore_scale(scaler, state)
            for tensor, copy in zip(self.buffers, snapshot.buffers, strict=True):
                copy.put_back(tensor)

    def _look(self) -> None:
        """Once for every optimizer that is met, for it takes a while."""
        if not self._looked:
            self._looked = True
            self._models.find(self.parameters, self.registry.note)


def _copied(tensors: list[torch.Tensor], old: Iterable[Copy]) -> list[Copy]:
    reusable = list(old)
    if len(reusable) != len(tensors):
        reusable = [None] * len(tensors)  # type: ignore[list-item]
    return [copy_all(tensor, into) for tensor, into in zip(tensors, reusable, strict=True)]

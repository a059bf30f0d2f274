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
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sosa_stream.agent.repair import random_numbers
from sosa_stream.agent.repair.chunks import cut
from sosa_stream.agent.repair.copies import (
    copy_all,
    copy_tensor,
    fill,
    finite_flags,
    outline,
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
    room_for_state,
    scheduled,
    set_state,
)
from sosa_stream.agent.repair.own_rates import OwnRates
from sosa_stream.agent.repair.ranks import Ranks
from sosa_stream.agent.repair.registry import Registry, copy_scale, follows_metric, restore_scale
from sosa_stream.agent.repair.snapshots import NoSnapshotError, Snapshot
from sosa_stream.agent.step.gradients import is_sharded, reduced_by_ddp, to_local
from sosa_stream.errors import SosaError
from sosa_stream.settings import Switch


class TrainingState:
    """The script's optimizers, the models whose parameters they own, and what the registry knows.

    Nothing here keeps a model alive that the script has let go.
    """

    def __init__(
        self,
        registry: Registry | None = None,
        ranks: Ranks | None = None,
        rollback_schedulers: Switch = Switch.AUTO,
    ) -> None:
        self.registry = registry or Registry()
        self.ranks = ranks or Ranks()
        self.own_rates = OwnRates()
        self._rollback_schedulers = rollback_schedulers
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._models = Models()
        self._looked = False
        self._replicated: bool | None = None

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
        """Those that step our optimizers, and are switched on."""
        return self.registry.scalers(self.optimizers)

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
    def frozen_chunks(self) -> list[list[torch.Tensor]]:
        """Parameters of the models that no optimizer steps, by chunk.

        Not those that are trained and have a gradient, for the script may step them by itself, nor shards.
        """
        owned = {id(p) for p in self.parameters}
        found: dict[int, torch.Tensor] = {
            id(p): p for model in self.models for p in model.parameters() if id(p) not in owned
        }
        frozen = [p for p in found.values() if _is_here(p) and (p.grad is None or not p.requires_grad)]
        return [frozen[each] for each in cut(frozen)]

    @property
    def buffers(self) -> list[torch.Tensor]:
        self._look()
        return self._models.buffers

    @property
    def replicated(self) -> bool:
        """Whether parameters and optimizer state are those of the other ranks of this node, and kept by one of them."""
        if self._replicated is None:
            self._replicated = self.ranks.share and all(
                reduced_by_ddp(its) and not is_sharded(its) and inner_optimizer(its) is its for its in self.optimizers
            )
        return self._replicated

    @property
    def where(self) -> str:
        """Which ranks keep copies, in words."""
        return "on one rank of each node" if self.replicated else "on every rank"

    def meet(self, optimizer: Optimizer) -> bool:
        """Note an optimizer that is about to step; whether it is new."""
        for ref in self._optimizers:
            if ref() is optimizer:
                return False
        self._optimizers = [ref for ref in self._optimizers if ref() is not None] + [weakref.ref(optimizer)]
        self._looked, self._replicated = False, None
        return True

    def capture(self, tick: int, step: int, reuse: Snapshot | None = None) -> Snapshot:
        """A copy of everything, into the memory of ``reuse`` where shapes fit; the device is not waited for."""
        buffers, mine = self.buffers, not self.replicated or self.ranks.holds
        parameters = self.parameters if mine else []
        state: list[dict[int, Any]] = [dict(by_position(its)) if mine else {} for its in self.optimizers]
        snapshot = Snapshot(
            tick=tick,
            step=step,
            parameters=copy_all(parameters, reuse and reuse.parameters),
            buffers=copy_all(buffers, reuse and reuse.buffers),
            optimizers=copy_all(state, reuse and reuse.optimizers),
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
        snapshot.scalers = [(weakref.ref(its), copy_scale(its)) for its in self.scalers]
        snapshot.registered = self.registry.capture(reuse.registered if reuse is not None else {})
        self._record(snapshot)

    def present(self, tick: int, step: int) -> Snapshot:
        """Everything as it is now."""
        snapshot = self.capture(tick, step)
        self.complete(snapshot)
        return snapshot

    def restore(self, snapshot: Snapshot, present: Snapshot, *, finite: bool = False) -> None:
        """Go back to ``snapshot`` on all ranks, in place: the script's own references stay valid.

        All that can fail comes before anything large is touched, and every rank learns whether it has failed on any.

        Args:
            present: the state as it is now, to which all returns where something of the script's own cannot be loaded.
            finite: refuse a snapshot that holds a value which is not.

        Raises:
            SosaError: it cannot be done on some rank, in the same words on all. Nothing has been changed.
            HalfAppliedError: the other ranks were lost on the way.
        """
        try:
            rooms = self.ranks.all_manage(lambda: self._prepare(snapshot, finite))
        except SosaError:
            present.wait()
            self._restore_small(present)
            raise
        with torch.no_grad():
            if not self.replicated or self.ranks.holds:
                for tensor, copy in zip(self.parameters, snapshot.parameters, strict=True):
                    copy.put_back(tensor)
                for room, saved in zip(rooms, snapshot.optimizers, strict=True):
                    fill(room, saved)
            for optimizer, room in zip(self.optimizers, rooms, strict=True):
                set_state(optimizer, room)
            if self.replicated:
                self.ranks.broadcast([*self.parameters, *tensors_in(rooms)])

    def _prepare(self, snapshot: Snapshot, finite: bool) -> list[dict[int, dict[str, Any]]]:
        """All that may fail on one rank: what is its own put back, and room for the optimizers' state."""
        if finite and not snapshot.is_finite():
            raise NoSnapshotError("the state before it holds values that are not finite, which no weight may take")
        whole = self._whole(snapshot) if self.replicated else snapshot
        snapshot.wait()
        self._check(whole)
        rooms = [room_for_state(*pair) for pair in zip(self.optimizers, whole.optimizers, strict=True)]
        self._restore_small(snapshot)
        return rooms

    def _whole(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with all its parts; those that another rank of this node keeps, in outline."""
        plan = outline([snapshot.parameters, snapshot.optimizers]) if self.ranks.holds else None
        parameters, optimizers = self.ranks.spread(plan)
        return snapshot if self.ranks.holds else replace(snapshot, parameters=parameters, optimizers=optimizers)

    def _check(self, snapshot: Snapshot) -> None:
        """Raises NoSnapshotError unless it is one of the model and the optimizers as they are."""
        live, copies = [*self.parameters, *self.buffers], [*snapshot.parameters, *snapshot.buffers]
        if len(self.optimizers) != len(snapshot.optimizers) or len(live) != len(copies):
            raise NoSnapshotError("the parameters or optimizers are no longer those of the snapshot")
        if not all(copy.fits(tensor) for tensor, copy in zip(live, copies, strict=True)):
            raise NoSnapshotError("a parameter has changed its shape since the snapshot")

    def estimate_bytes(self) -> tuple[int, bool]:
        """Bytes of a snapshot where it is kept, from shapes, and whether state is estimated that is not there yet."""
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
            for _, values in by_position(optimizer) if inner_optimizer(optimizer) is optimizer else ():
                for _, value in sorted(values.items()):
                    if isinstance(value, torch.Tensor):
                        yield to_local(value)

    def digest(self) -> str:
        """A digest of parameters and optimizer state as they lie in this process, to be compared between replicas."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self.local_tensors():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def live(self) -> list[Any]:
        """The objects themselves: whoever keeps this list keeps them alive."""
        return [*self.optimizers, *self.schedulers, *self.scalers, *self._models.outermost]

    @staticmethod
    def _record(snapshot: Snapshot) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
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


def _is_here(parameter: torch.Tensor) -> bool:
    """Whether this process holds all of it."""
    is_whole = to_local(parameter) is parameter and type(parameter).__name__ != "FlatParameter"
    return is_whole and not parameter.is_meta and not is_lazy(parameter) and parameter.numel() > 0

"""``resync``: parameters and optimizer state of one rank copied to all others, where replicas have come apart."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo
from sosa_stream.agent.repair.copies import Copy, copy_all, fill, outline, room_for, tensors_in
from sosa_stream.agent.repair.optimizer_state import (
    by_position,
    inner_optimizer,
    parameters_of,
    room_for_state,
    set_state,
)
from sosa_stream.agent.repair.ranks import world_size
from sosa_stream.agent.repair.training_state import TrainingState
from sosa_stream.agent.step.gradients import is_sharded
from sosa_stream.errors import HalfAppliedError, RefusedError, SosaError


class Resync(Actuator):
    """Every rank ends with the source's bits; a copy of what each held is kept until all have managed.

    The gradients at hand belong to weights that are gone, on one rank or another: they are left out on all.
    """

    comes_first = True

    def __init__(self, in_force: InForce, state: TrainingState) -> None:
        self._in_force = in_force
        self._state = state
        self._aside: list[Any] = []
        """Of each optimizer a copy of its parameters, and of their state by position; at the end frozen parameters."""

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        num_ranks = world_size()
        if num_ranks == 1:
            return "there is one rank, and nothing to copy from"
        if params["source"] >= num_ranks:
            return f"there is no rank {params['source']}; ranks are 0 to {num_ranks - 1}"
        if any(is_sharded(each) or inner_optimizer(each) is not each for each in self._state.optimizers):
            return "the state is sharded, each rank holds what no other has"
        return ""

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        source, ranks, optimizers = params["source"], self._state.ranks, self._state.optimizers
        why = self.refusal(params, at.step)
        if not why and len(ranks.members) < world_size():  # the others would stay apart
            why = f"only {len(ranks.members)} of {world_size()} ranks step, and this needs all of them"
        if why:
            raise RefusedError(f"resync: {why}")
        live = [(list(parameters_of(optimizer)), dict(by_position(optimizer))) for optimizer in optimizers]
        frozen = self._frozen(params.get("frozen", 0))
        live.append((frozen, {}))
        plan = ranks.spread(ranks.all_manage(lambda: self._put_aside(live)), source)
        rooms = ranks.all_manage(lambda: self._prepare(live, plan, ranks.rank == source))
        was_stale, held = self._in_force.stale_gradients.copy(), self._aside

        def undo() -> None:
            if not held:
                raise RefusedError("what the ranks held before resync is gone")
            fill(frozen, held[-1][0])
            for optimizer, (copies, state) in zip(optimizers, held[:-1], strict=True):
                fill(list(parameters_of(optimizer)), copies)
                set_state(optimizer, fill(room_for_state(optimizer, state), state))
            self._in_force.stale_gradients = was_stale
            held.clear()

        try:
            ranks.broadcast(tensors_in([[parameters for parameters, _ in live], rooms]), source)
        except HalfAppliedError as error:  # a peer is gone: this rank is at least what it was
            undo()
            raise SosaError(str(error)) from error
        for optimizer, room in zip(optimizers, rooms[:-1], strict=True):
            set_state(optimizer, room)
        self._in_force.stale_gradients = WeakSet(optimizers)
        more = f", {len(frozen)} of the parameters frozen" if frozen else ""
        return undo, f"parameters and optimizer state of rank {source} copied to all ranks{more}"

    def keep(self) -> None:
        self._aside.clear()

    def _frozen(self, wanted: int) -> list[torch.Tensor]:
        """The frozen parameters of the chunks whose bits are set; those of the others may differ on purpose."""
        chunks = self._state.frozen_chunks if wanted else []
        return [parameter for i, chunk in enumerate(chunks) if wanted >> i & 1 for parameter in chunk]

    def _put_aside(self, live: list[Any]) -> bytes:
        """Keep a copy for the way back; returns its outline."""
        self._aside = copy_all(live)
        return pickle.dumps(outline(self._aside))

    def _prepare(self, live: list[Any], plan: bytes, is_source: bool) -> list[Any]:
        """Room for the state of each optimizer of the source, where that fits in the present one's memory."""
        theirs = pickle.loads(plan)
        if len(theirs) != len(live):
            raise RefusedError("the ranks do not have the same optimizers")
        for (parameters, _), (shapes, _) in zip(live, theirs, strict=True):
            if len(parameters) != len(shapes) or not all(map(Copy.fits, shapes, parameters)):
                raise RefusedError("the ranks do not have the same parameters")
        if is_source:
            return [state for _, state in live]
        return [room_for(outlined, state) for (_, outlined), (_, state) in zip(theirs, live, strict=True)]

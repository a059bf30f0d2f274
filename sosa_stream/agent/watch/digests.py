"""Digests of what replicas must have in common, chunk after chunk: parameters and optimizer state, no buffers.

Parameters that no optimizer steps have digests, and looks, of their own: ranks may have different ones.

Nothing waits for the device: a digest leaves as a 0-d tensor, with the row of its step. Which chunk is looked at
depends on the step alone, so that all ranks look at the same one after the same update.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.optim import Optimizer

from sosa_stream.agent.repair.chunks import PART, cut
from sosa_stream.agent.repair.optimizer_state import inner_optimizer, parameters_of
from sosa_stream.agent.step.gradients import reduced_at_times, to_local
from sosa_stream.protocol.columns import DIGEST_CHUNKS, DIGEST_PARTS, FROZEN_CHUNKS

FIRST_STEPS = 4
"""Looked at each, for what was never equal: replicas that somebody has promised to keep."""
ROW = 256
"""Elements that are hashed together; the order within a row is not looked at, nor equal flips within one column."""
SMALL = 1 << 16
"""Tensors up to this size are copied together before they are hashed: each call costs more than its elements."""
BITS = 53
"""What a float64 column carries exactly."""

Columns = dict[str, float | torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which parameters make up each chunk, as long as the optimizers are these and have as many."""

    of: tuple[tuple[int, int], ...]
    chunks: tuple[tuple[tuple[Optimizer, torch.Tensor], ...], ...]
    frozen: tuple[tuple[weakref.ref[torch.Tensor], ...], ...]
    is_owed: bool
    number: int


class Digests:
    """Looks every ``every`` steps at one chunk, of parameters and of optimizer state by turns.

    Half-way between two such looks there is one at frozen parameters, two in a row at the same ones.

    Args:
        optimizers: all that have stepped.
        every: steps between two looks; 0: none.
        are_shared: whether an optimizer's gradients are the same on all ranks, so that its parameters must be.
        frozen: the parameters that no optimizer steps, by chunk.
    """

    def __init__(
        self,
        optimizers: Callable[[], Sequence[Optimizer]],
        every: int,
        are_shared: Callable[[Optimizer], bool] = lambda optimizer: False,
        frozen: Callable[[], Sequence[Sequence[torch.Tensor]]] = tuple,
    ) -> None:
        self._optimizers = optimizers
        self._every = every if hasattr(torch, "hash_tensor") else 0
        self._are_shared = are_shared
        self._frozen = frozen
        self._plan: _Plan | None = None
        self._weights: dict[torch.device, torch.Tensor] = {}

    def take(self, step: int) -> Columns:
        """The columns of ``step``, after its update; none where it is not due, or parameters are sharded."""
        if not self._every:
            return {}
        is_first, phase = step < FIRST_STEPS, step % self._every
        if not is_first and phase and phase != self._every // 2:
            return {}
        found: Columns = {}
        with torch.no_grad():
            if is_first or not phase:
                try:
                    found |= self._look(step if is_first else FIRST_STEPS - 1 + step // self._every)
                except NotImplementedError:  # a dtype that cannot be hashed: blind
                    self._every = 0
                    return {}
            if self._every and (is_first or phase == self._every // 2):
                try:
                    found |= self._look_at_frozen(step if is_first else FIRST_STEPS + step // self._every)
                except Exception:  # of any type and make, as they came from elsewhere: blind for them alone
                    self._frozen = tuple
                    self._plan = None if self._plan is None else replace(self._plan, frozen=())
        return found

    def _look(self, look: int) -> Columns:
        plan = self._planned()
        if plan is None or not plan.chunks:
            return {}
        turn, chunk = divmod(look, 2 * len(plan.chunks))
        members = plan.chunks[chunk // 2]
        if chunk % 2:
            tensors = [tensor for optimizer, parameter in members for tensor in _state(optimizer, parameter)]
        else:
            tensors = [parameter.detach() for _, parameter in members]
        if not tensors:
            return {}
        part = _part_of(tensors, turn // 2)  # each twice, so that it is known to move
        place = chunk + DIGEST_CHUNKS * plan.number + DIGEST_PARTS * part
        return {
            "digest": self._digest(tensors, part),
            "digest_chunk": float(place),
            "digest_owed": float(plan.is_owed),
        }

    def _look_at_frozen(self, look: int) -> Columns:
        plan = self._plan  # of the look before
        if plan is None or not plan.frozen:
            return {}
        turn, chunk = divmod(look // 2, len(plan.frozen))
        tensors = [tensor.detach() for ref in plan.frozen[chunk] if (tensor := ref()) is not None]
        if len(tensors) < len(plan.frozen[chunk]):  # others have come in their place
            self._plan = replace(plan, frozen=self._frozen_now())
            return {}
        part = _part_of(tensors, turn)
        place = chunk + FROZEN_CHUNKS * plan.number + DIGEST_PARTS * part
        return {"frozen_digest": self._digest(tensors, part), "frozen_place": float(place)}

    def _digest(self, tensors: Sequence[torch.Tensor], part: int) -> torch.Tensor:
        total: torch.Tensor | None = None
        for flat in _joined([_part(tensor, part) for tensor in tensors]):
            one = self._hash(flat)
            total = one if total is None else total * 31 + one.to(total.device, non_blocking=True)
        assert total is not None
        return ((total ^ (total << 40)) >> (64 - BITS)) & ((1 << BITS) - 1)

    def _planned(self) -> _Plan | None:
        """The plan for the optimizers of now; None, and no more looks, with sharded parameters or local SGD."""
        optimizers = [inner_optimizer(optimizer) for optimizer in self._optimizers()]
        of = tuple((id(o), sum(len(group["params"]) for group in o.param_groups)) for o in optimizers)
        if self._plan is None or self._plan.of != of:
            members = [(o, parameter) for o in optimizers for parameter in parameters_of(o)]
            sharded = any(to_local(p) is not p or type(p).__name__ == "FlatParameter" for _, p in members)
            if sharded or reduced_at_times():
                self._every, self._plan = 0, None
                return None
            number = 0 if self._plan is None else self._plan.number + 1
            chunks = tuple(tuple(members[each]) for each in cut([parameter for _, parameter in members]))
            self._plan = _Plan(of, chunks, self._frozen_now(), all(map(self._are_shared, self._optimizers())), number)
        return self._plan

    def _frozen_now(self) -> tuple[tuple[weakref.ref[torch.Tensor], ...], ...]:
        try:
            return tuple(tuple(map(weakref.ref, chunk)) for chunk in self._frozen())
        except Exception:  # the models are the script's own
            return ()

    def _hash(self, flat: torch.Tensor) -> torch.Tensor:
        rows = len(flat) // ROW
        rest = flat[rows * ROW :]
        total = (torch.hash_tensor(rest) if len(rest) else flat.new_zeros((), dtype=torch.uint64)).view(torch.int64)
        if rows:
            hashes = torch.hash_tensor(flat[: rows * ROW].view(rows, ROW), dim=1).view(torch.int64)
            weights = self._weights.get(flat.device)
            if weights is None or len(weights) < rows:
                odd = 2 * torch.arange(max(rows, PART // ROW), device=flat.device) + 3
                weights = self._weights[flat.device] = odd
            total = total + (hashes * weights[:rows]).sum()
        return total


def _part_of(tensors: Sequence[torch.Tensor], turn: int) -> int:
    """The part of the largest tensors whose turn it is; smaller ones begin again."""
    return turn % max(map(_num_parts, tensors))


def _part(tensor: torch.Tensor, part: int) -> torch.Tensor:
    """A tensor in a row, or of a large one this part."""
    flat = torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)
    if flat.dtype.itemsize == 1:  # eight-bit floats cannot be hashed as they are
        flat = flat.view(torch.uint8)
    num_parts = _num_parts(tensor)
    return flat if num_parts <= 1 else flat[part % num_parts * PART :][:PART]


def _num_parts(tensor: torch.Tensor) -> int:
    return max(1, -(-tensor.numel() * (1 + tensor.is_complex()) // PART))


def _joined(parts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Large tensors as they are, and small ones together with those of their kind."""
    small: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for part in parts:
        if len(part) > SMALL:
            yield part
        else:
            small.setdefault((part.device, part.dtype), []).append(part)
    for alike in small.values():
        yield torch.cat(alike) if len(alike) > 1 else alike[0]


def _state(optimizer: Optimizer, parameter: torch.Tensor) -> list[torch.Tensor]:
    """What an optimizer keeps for a parameter beside it.

    No counters: they move alike where nothing else does, and on another device would have to be waited for.
    """
    state = [value for _, value in sorted(optimizer.state.get(parameter, {}).items())]
    tensors = [value for value in state if isinstance(value, torch.Tensor) and value.device == parameter.device]
    return [tensor for tensor in tensors if tensor.dim() or parameter.dim() == 0]

"""Digests of what replicas must have in common, chunk after chunk: parameters and optimizer state, no buffers.

Nothing waits for the device: a digest leaves as a 0-d tensor, with the row of its step. Which chunk is looked at
depends on the step alone, so that all ranks look at the same one after the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from sosa_stream.agent.repair.optimizer_state import inner_optimizer, parameters_of
from sosa_stream.agent.step.gradients import reduced_at_times, to_local
from sosa_stream.protocol.columns import DIGEST_CHUNKS

FIRST_STEPS = 4
"""Looked at each, for what was never equal: replicas that somebody has promised to keep."""
ROW = 256
"""Elements that are hashed together; the order within a row is not looked at, nor equal flips within one column."""
MAX_TENSORS, MAX_ELEMENTS = 32, 1 << 16
"""Parameters of one chunk, and their elements, unless that made more than half of `DIGEST_CHUNKS`."""
PART = 1 << 18
"""Of a larger tensor one part is looked at, the next one in the next round: 0.5 ns an element on a CPU."""
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
    is_owed: bool
    number: int


class Digests:
    """Looks every ``every`` steps at one chunk, of parameters and of optimizer state by turns.

    Args:
        optimizers: all that have stepped.
        every: steps between two looks; 0: none.
        are_shared: whether an optimizer's gradients are the same on all ranks, so that its parameters must be.
    """

    def __init__(
        self,
        optimizers: Callable[[], Sequence[Optimizer]],
        every: int,
        are_shared: Callable[[Optimizer], bool] = lambda optimizer: False,
    ) -> None:
        self._optimizers = optimizers
        self._every = every if hasattr(torch, "hash_tensor") else 0
        self._are_shared = are_shared
        self._plan: _Plan | None = None
        self._weights: dict[torch.device, torch.Tensor] = {}

    def take(self, step: int) -> Columns:
        """The columns of ``step``, after its update; none where it is not due, or parameters are sharded."""
        if not self._every or (step % self._every and step >= FIRST_STEPS):
            return {}
        look = step if step < FIRST_STEPS else FIRST_STEPS - 1 + step // self._every
        try:
            with torch.no_grad():
                return self._look(look)
        except NotImplementedError:  # a dtype that cannot be hashed: blind
            self._every = 0
            return {}

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
        total: torch.Tensor | None = None
        for part in _joined([_part(tensor, turn) for tensor in tensors]):
            one = self._hash(part)
            total = one if total is None else total * 31 + one.to(total.device, non_blocking=True)
        assert total is not None
        digest = ((total ^ (total << 40)) >> (64 - BITS)) & ((1 << BITS) - 1)
        chunk += DIGEST_CHUNKS * plan.number
        return {"digest": digest, "digest_chunk": float(chunk), "digest_owed": float(plan.is_owed)}

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
            self._plan = _Plan(of, _chunks(members), all(map(self._are_shared, self._optimizers())), number)
        return self._plan

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


def _chunks(
    members: Sequence[tuple[Optimizer, torch.Tensor]],
) -> tuple[tuple[tuple[Optimizer, torch.Tensor], ...], ...]:
    """The parameters in their order, cut where a chunk is full."""
    sizes = [min(parameter.numel(), PART) for _, parameter in members]
    most = DIGEST_CHUNKS // 4  # a chunk may be left half empty before a large tensor
    max_tensors, max_elements = max(MAX_TENSORS, -(-len(sizes) // most)), max(MAX_ELEMENTS, -(-sum(sizes) // most))
    while True:
        chunks: list[list[tuple[Optimizer, torch.Tensor]]] = []
        elements = 0
        for member, size in zip(members, sizes, strict=True):
            if not chunks or len(chunks[-1]) >= max_tensors or elements + size > max_elements:
                chunks.append([])
                elements = 0
            chunks[-1].append(member)
            elements += size
        if len(chunks) <= DIGEST_CHUNKS // 2:
            return tuple(map(tuple, chunks))
        max_tensors, max_elements = 2 * max_tensors, 2 * max_elements


def _part(tensor: torch.Tensor, turn: int) -> torch.Tensor:
    """A tensor in a row, or of a large one the part whose turn it is."""
    flat = torch.view_as_real(tensor).reshape(-1) if tensor.is_complex() else tensor.reshape(-1)
    num_parts = -(-len(flat) // PART)
    return flat if num_parts <= 1 else flat[turn % num_parts * PART :][:PART]


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
    """What an optimizer keeps for a parameter beside it: counters on another device would have to be waited for."""
    state = sorted(optimizer.state.get(parameter, {}).items())
    return [value for _, value in state if isinstance(value, torch.Tensor) and value.device == parameter.device]

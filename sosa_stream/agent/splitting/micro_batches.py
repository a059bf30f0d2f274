"""``split_batch``: a batch that does not fit into memory, run as micro-batches with the same gradient.

A pass that has run out of memory, in forward or before any gradient is reduced, is tried again in 2, 4, 8… parts: the
loss of each weighted by its share of the samples, all but the last without reduction, so that peers under DDP meet the
collectives of an ordinary step. What was needed is remembered for the batches that follow, and halved again once things
have gone well for a while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.repair.actuator import Actuator, InForce, Moment, Undo, leave
from sosa_stream.agent.splitting import splittable
from sosa_stream.agent.splitting.batches import ForwardFunction, count_samples, loss_of, split
from sosa_stream.agent.splitting.memory import is_out_of_memory, release
from sosa_stream.agent.splitting.reduction import Reduction
from sosa_stream.errors import RefusedError

if TYPE_CHECKING:
    from sosa_stream.agent.core import Agent

RELAX_STEPS = 50
"""Steps that go well before half as many parts are tried; doubled each time that this was too early."""

Parts = list[tuple[Any, float]]


class SplitBatches(Actuator):
    """The number of parts that the ranks have agreed on: the latest is in force. A rank may need more by itself."""

    def __init__(self, in_force: InForce) -> None:
        self._in_force = in_force
        self._agreed: dict[object, int] = {}

    def refusal(self, params: Mapping[str, Any], step: int) -> str:
        return "" if self._in_force.can_split else "only the batches of training_step (wrap_training) can be split"

    def apply(self, params: Mapping[str, Any], at: Moment) -> tuple[Undo, str]:
        token = object()
        self._agreed[token] = params["num_parts"]
        self._reckon()

        return lambda: leave(self._agreed, token, self._reckon), f"batches in {params['num_parts']} part(s)"

    def begin_anew(self) -> None:
        self._agreed.clear()
        self._reckon()

    def _reckon(self) -> None:
        self._in_force.num_parts = next(reversed(self._agreed.values()), 1)


class Need:
    """In how many parts this rank's batches fit, as far as it knows."""

    def __init__(self) -> None:
        self.num_parts = 1
        self._num_well = 0
        self._patience = RELAX_STEPS
        self._relaxed = False

    def ran_out(self, num_parts: int) -> None:
        """Fewer than ``num_parts`` were too few."""
        self._patience *= 2 if self._relaxed else 1
        self.num_parts, self._num_well, self._relaxed = num_parts, 0, False

    def went_well(self) -> None:
        """A step is done; after enough of them half as many parts are tried."""
        self._num_well += self.num_parts > 1
        if self._num_well >= self._patience:
            self.num_parts, self._num_well, self._relaxed = (self.num_parts + 1) // 2, 0, True


class MicroBatches:
    """Forward and backward of `training_step`, whole or in parts."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, agent: Agent | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._agent = agent
        self._in_force = agent.actuators.in_force if agent is not None else InForce()
        self._in_force.can_split = agent is not None
        self._need = Need()
        self._reduction = Reduction(model)
        if agent is not None:
            self._reduction.install()
        self._verified: dict[object, str] = {}
        """Why a forward function's batches must not be split, by its code; nothing where they may."""
        self._watch_buffers = False

    def remove(self) -> None:
        self._in_force.can_split = False
        self._reduction.remove()

    def backward(self, batch: Any, forward_fn: ForwardFunction | None) -> torch.Tensor:
        """The loss of ``batch``, detached, with its gradient in place of the last step's.

        Raises:
            UsageError: the forward gave no scalar loss.
            Exception: the script's own; out of memory that splitting did not mend has a note that says why.
        """
        parts = self._plan(batch, forward_fn)
        first: Exception | None = None
        while True:
            mark = self._agent.taps.losses.mark() if self._agent is not None and len(parts) > 1 else None
            try:
                loss, error = self._run(parts, forward_fn)
            except _StatefulError as stateful:
                self._verified[_code(forward_fn)] = str(stateful)
                if first is not None:
                    self._give_up(first, str(stateful))
                loss, error, parts = None, None, self._plan(batch, forward_fn)
            except Exception as other:
                if first is None:
                    raise
                first.add_note(f"sosa: in {len(parts)} parts it went on, then: {type(other).__name__}: {other}")
                raise first from other
            if mark is not None and self._agent is not None and loss is None:
                self._agent.taps.losses.undo(mark)
            if error is not None:
                first = first or error
                parts = self._finer(error, first, parts, batch, forward_fn)
            if loss is not None:
                break
        if first is None:
            self._need.went_well()
        else:
            self._need.ran_out(len(parts))
            self._report(first, len(parts))
        self._in_force.ran_in_parts = len(parts)
        return loss

    def _plan(self, batch: Any, forward_fn: ForwardFunction | None) -> Parts:
        num_parts = max(self._need.num_parts, self._in_force.num_parts)
        if num_parts == 1:
            return [(batch, 1.0)]
        try:
            self._verify(batch, forward_fn)
            return split(batch, min(num_parts, count_samples(batch)))
        except RefusedError as why:
            self._say(f"a batch is run whole, not in {num_parts} parts: {why}")
            return [(batch, 1.0)]

    def _run(self, parts: Parts, forward_fn: ForwardFunction | None) -> tuple[torch.Tensor | None, Exception | None]:
        """The loss of all parts, or what ran out of memory in one before its gradients could be under way to peers."""
        total: torch.Tensor | None = None
        for i, (part, share) in enumerate(parts):
            is_last = i == len(parts) - 1
            with contextlib.nullcontext() if is_last else self._reduction.hold():
                self._reduction.begin_pass()
                buffers = _versions(self._model) if i == 1 and self._watch_buffers else []
                try:
                    loss = loss_of(self._model, part, forward_fn)
                except Exception as error:
                    if not (self._may_split and is_out_of_memory(error)):
                        raise
                    return None, error
                if buffers and buffers != _versions(self._model):
                    raise _StatefulError("a pass changes buffers of the model: parts would change them again")
                if len(parts) > 1:
                    loss = loss * share
                if total is None:
                    self._optimizer.zero_grad(set_to_none=True)
                total = loss.detach() if total is None else total + loss.detach()
                if is_last and self._agent is not None and not self._agent.watches_everything:
                    self._agent.taps.add_loss(total)
                try:
                    self._reduction.backward(loss, is_last=is_last)
                except Exception as error:
                    if not (self._may_split and is_out_of_memory(error)):
                        raise
                    if is_last and not self._reduction.is_alone:
                        error.add_note(
                            "sosa: the batch was not split: in backward, gradients were on their way to peers"
                        )
                        raise
                    return None, error
        return total, None

    def _finer(
        self, error: Exception, first: Exception, parts: Parts, batch: Any, forward_fn: ForwardFunction | None
    ) -> Parts:
        """Twice as many parts.

        Raises:
            Exception: ``first``, with a note why it is not tried again.
        """
        assert self._agent is not None
        self._agent.measure_memory()
        why = self._reduction.failed(error)
        release(error)
        try:
            if why:
                raise RefusedError(why)
            self._verified.clear()
            self._verify(batch, forward_fn)
            num_samples = count_samples(batch)
            if len(parts) >= num_samples:
                raise RefusedError("one sample at a time is too much")
            finer = split(batch, min(2 * len(parts), num_samples))
        except RefusedError as refused:
            self._give_up(first, str(refused))
        self._say(
            f"step {self._agent.probe.step}: out of memory with {num_samples // len(parts)} samples at a time; "
            f"batches run in {len(finer)} parts from here on, with the same gradient"
        )
        return finer

    def _verify(self, batch: Any, forward_fn: ForwardFunction | None) -> None:
        code = _code(forward_fn)
        if code not in self._verified:
            why = self._reduction.refusal() or splittable.refusal(self._model)
            try:
                if not why:
                    splittable.check_loss(
                        self._model, batch, lambda part: loss_of(self._model, part, forward_fn), self._reduction
                    )
            except RefusedError as refused:
                why = str(refused)
            self._verified[code] = why
            self._watch_buffers = True
        if self._verified[code]:
            raise RefusedError(self._verified[code])

    @property
    def _may_split(self) -> bool:
        """Whether this run lets a rank split its batches by itself."""
        return self._agent is not None and self._agent.may_by_itself("split_batch")

    def _say(self, text: str) -> None:
        if self._agent is not None:
            self._agent.say(text, every_rank=True)

    def _report(self, error: Exception, num_parts: int) -> None:
        assert self._agent is not None
        with contextlib.suppress(Exception):
            self._agent.report_exception(error, num_parts=num_parts)

    def _give_up(self, error: Exception, why: str) -> NoReturn:
        self._reduction.give_up()
        error.add_note(f"sosa: the batch was not split: {why}")
        raise error from None


class _StatefulError(RefusedError):
    """A pass leaves something behind that a second one changes."""


def _code(forward_fn: ForwardFunction | None) -> object:
    """What tells forward functions apart; a lambda in a loop is another object each time."""
    return getattr(forward_fn, "__code__", forward_fn)


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    return [(id(buffer), buffer._version) for buffer in model.buffers()]

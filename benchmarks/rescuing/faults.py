"""What goes wrong in a script: each fault is built in, and strikes from its step ``onset`` on.

What is changed is the program (its data, schedule, weights, loss, memory), never a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.rescuing.programs import Batch, Program


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Nothing is wrong; every fault changes one or two of these."""

    onset: int = 0
    size: float = 1.0
    length: int = 1
    """Steps that it lasts, or its period; what else it means says the fault."""

    def plant(self, program: Program) -> None:
        """When the program is made."""

    def rate(self, step: int) -> float:
        """By what the script's learning rate is multiplied."""
        return 1.0

    def strike(self, program: Program, step: int) -> None:
        """Before a step."""

    def spoil(self, program: Program, step: int, batch: Batch) -> Batch:
        """The batch as it is trained on."""
        return batch

    def admit(self, step: int, batch: Batch) -> None:
        """At the beginning of a forward."""

    def bend(self, program: Program, step: int, loss: Tensor) -> Tensor:
        """The loss as it is differentiated."""
        return loss

    def lasts(self, step: int) -> bool:
        return self.onset <= step < self.onset + self.length


# -- learning rate -----------------------------------------------------------------------------------------------------


class Jump(Fault):
    """The rate is ``size`` times what it should be from here on."""

    def rate(self, step: int) -> float:
        return self.size if step >= self.onset else 1.0


class Glitch(Fault):
    """The same for ``length`` steps only."""

    def rate(self, step: int) -> float:
        return self.size if self.lasts(step) else 1.0


class Ramp(Fault):
    """The rate grows geometrically to ``size`` times, within ``length`` steps, and stays there."""

    def rate(self, step: int) -> float:
        return self.size ** min(max(step - self.onset, 0) / self.length, 1.0)


class Swing(Fault):
    """A cyclic schedule whose top is ``size`` times too high, half a period of ``length``."""

    def rate(self, step: int) -> float:
        return self.size if step >= self.onset and (step - self.onset) // self.length % 2 == 0 else 1.0


# -- data --------------------------------------------------------------------------------------------------------------


class NanBatches(Fault):
    """``length`` batches of rank 1 hold NaN; of text, whose tokens cannot, the loss's mask sums to zero."""

    def spoil(self, program: Program, step: int, batch: Batch) -> Batch:
        if not self.lasts(step) or program.rank != 1 or not batch[0].is_floating_point():
            return batch
        batch[0][0].fill_(math.nan)
        return batch

    def bend(self, program: Program, step: int, loss: Tensor) -> Tensor:
        return loss * math.nan if self.lasts(step) and program.rank == 1 else loss


class Outliers(Fault):
    """``length`` batches whose inputs are ``size`` times too large; of text, whose sample weights are."""

    def spoil(self, program: Program, step: int, batch: Batch) -> Batch:
        if not self.lasts(step) or not batch[0].is_floating_point():
            return batch
        return (batch[0] * self.size, *batch[1:])

    def bend(self, program: Program, step: int, loss: Tensor) -> Tensor:
        return loss if program.has_float_inputs or not self.lasts(step) else loss * self.size


NUM_KICKS = 4


class Recurring(Fault):
    """Late instability as tr8-104B told of it: `NUM_KICKS` kicks to the weights, each half as large as the last again.

    They come ``length`` steps apart; the first is noise of ``size`` times each tensor's deviation.
    """

    @torch.no_grad()
    def strike(self, program: Program, step: int) -> None:
        kicks, rest = divmod(step - self.onset, self.length)
        if rest or not 0 <= kicks < NUM_KICKS:
            return
        noise = torch.Generator().manual_seed(step)
        for parameter in program.model.parameters():
            if parameter.ndim > 1:
                kick = torch.randn(parameter.shape, generator=noise)
                parameter.add_(kick * parameter.std() * (self.size * 1.5**kicks))


class WrongLabels(Fault):
    """``length`` batches with the targets of other samples."""

    def spoil(self, program: Program, step: int, batch: Batch) -> Batch:
        if not self.lasts(step):
            return batch
        targets = batch[-1].flatten()
        order = torch.randperm(len(targets), generator=program.data)
        return (*batch[:-1], targets[order].view(batch[-1].shape))


class WrongScale(Fault):
    """Inputs are normalised with another data set's mean and deviation from here on."""

    def spoil(self, program: Program, step: int, batch: Batch) -> Batch:
        return batch if step < self.onset else (batch[0] * self.size + self.size, *batch[1:])


# -- weights and optimizer ---------------------------------------------------------------------------------------------


class Once(Fault):
    """Something that happens to the weights or the optimizer once, alike on all ranks."""

    @torch.no_grad()
    def strike(self, program: Program, step: int) -> None:
        if step == self.onset:
            self.happen(program)

    def happen(self, program: Program) -> None:
        raise NotImplementedError


class DeadUnits(Once):
    """Every bias before a ReLU is ``size`` lower: what one huge step leaves."""

    def happen(self, program: Program) -> None:
        before: nn.Module | None = None
        for module in program.model.modules():
            if isinstance(module, nn.ReLU) and before is not None:
                assert isinstance(before.bias, Tensor)
                before.bias.sub_(self.size)
            if isinstance(module, nn.Linear | nn.BatchNorm2d | nn.Conv2d):
                before = module


class ScaledWeights(Once):
    """All matrices are ``size`` times too large: a shard read in with the wrong scale."""

    def happen(self, program: Program) -> None:
        for parameter in program.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(self.size)


class BitFlip(Once):
    """One weight of each of three matrices becomes ``size``, on every rank alike."""

    def happen(self, program: Program) -> None:
        matrices = [parameter for parameter in program.model.parameters() if parameter.ndim > 1]
        for parameter in matrices[-3:]:
            parameter.view(-1)[parameter.numel() // 2] = self.size


class Moments(Once):
    """The optimizer's state comes back wrong: first moments ``size`` times too large, second ones zero."""

    def happen(self, program: Program) -> None:
        for optimizer in program.optimizers:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if name in ("exp_avg", "momentum_buffer") and value is not None:
                        value.mul_(self.size)
                    elif name == "exp_avg_sq":
                        value.zero_()


class ScaledInit(Fault):
    """Weights begin ``size`` times as large as they should: AutoTrainer's vanishing and exploding gradients."""

    @torch.no_grad()
    def plant(self, program: Program) -> None:
        for parameter in program.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(self.size)


# -- loss and memory ---------------------------------------------------------------------------------------------------


class LossScale(Fault):
    """The loss is ``size`` times too large from here on: a sum where a mean was meant."""

    def bend(self, program: Program, step: int, loss: Tensor) -> Tensor:
        return loss * self.size if step >= self.onset else loss


class StuckScale(Fault):
    """Half precision under a GradScaler that comes back with a scale of ``size`` and hardly backs off from it.

    Gradients pass through half precision: above 65,504 they are infinite, small ones are zero.
    """

    def plant(self, program: Program) -> None:
        program.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000, backoff_factor=0.999)
        for parameter in program.model.parameters():
            parameter.register_hook(lambda gradient: gradient.half().float())

    def strike(self, program: Program, step: int) -> None:
        if step == self.onset:
            assert program.scaler is not None
            scale = program.scaler._scale
            if scale is not None:
                scale.fill_(self.size)


class Annealing(Fault):
    """The weight of a VAE's KL term is annealed to ``size`` in place of 1; the script lets it be turned."""

    def strike(self, program: Program, step: int) -> None:
        if step == self.onset:
            program.beta = self.size


class Memory(Fault):
    """From here on a forward of more than ``length`` samples runs out of memory."""

    def admit(self, step: int, batch: Batch) -> None:
        if step >= self.onset and len(batch[0]) > self.length:
            raise torch.OutOfMemoryError(f"out of memory: {len(batch[0])} samples in one forward")


class NoFault(Fault):
    """The clean run."""


FAULTS: Mapping[str, type[Fault]] = {
    kind.__name__: kind
    for kind in (
        *(Jump, Glitch, Ramp, Swing),
        *(NanBatches, Outliers, Recurring, WrongLabels, WrongScale),
        *(DeadUnits, ScaledWeights, BitFlip, Moments, ScaledInit),
        *(LossScale, StuckScale, Annealing, Memory, NoFault),
    )
}

"""What is looked at beside loss and norm, on which steps, and under which column it leaves.

Nothing here synchronises host and device: every look ends in 0-d tensors, which leave with the step's row. A schedule
is a function of the step alone. A column is sent where there is a value for it: what was never seen
makes its detectors blind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from sosa_stream.agent import gradients
from sosa_stream.agent.forward import Forward
from sosa_stream.agent.inputs import Inputs
from sosa_stream.agent.posterior import Posterior
from sosa_stream.agent.weights import Weights, num_stale, orphans

LAYERS_EVERY = 8
"""Steps between two looks at the ends of the network, and at the posterior."""
WEIGHTS_EVERY = 32
"""Steps between two looks at an update, and, halfway between these, at the activations."""
OWNERS_EVERY = 64
"""Steps between two looks at which parameters belong to nobody."""

Columns = dict[str, float | torch.Tensor]


class Looks:
    """The sampled columns and the inputs of the primary optimizer's steps."""

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self.forward = Forward(on_error)
        self.posterior = Posterior()
        self.sees_inputs = False
        """Whether inputs are looked for by hooks; False where somebody hands them over."""
        self.orphans: tuple[str, ...] = ()
        """Names of the parameters that belonged to nobody at the last look."""
        self._weights = Weights()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._columns: Columns = {}

    def meet(self, optimizer: Optimizer) -> None:
        """An optimizer that owns its parameters, whether or not its steps are looked at."""
        self._optimizers.add(optimizer)

    def begin(self, step: int) -> None:
        """After a step and before the forward pass of ``step``."""
        self.forward.arm(inputs=self.sees_inputs, activations=step % WEIGHTS_EVERY == WEIGHTS_EVERY // 2)

    def before_update(
        self,
        step: int,
        optimizer: Optimizer,
        parameters: list[torch.Tensor],
        local: list[torch.Tensor],
        norms: list[torch.Tensor] | None,
    ) -> None:
        """With the step's gradients at hand, of whole (not sharded) parameters; ``norms`` where they are known."""
        if step % LAYERS_EVERY == 0:
            self._columns |= _ends(optimizer, parameters, local, norms)
        if step % WEIGHTS_EVERY == 0:
            self._columns |= self._weights.before(optimizer, self.forward.roots)
        if step % OWNERS_EVERY == OWNERS_EVERY // 2:
            found = orphans(self.forward.roots, self._optimizers)
            self.orphans = tuple(name for name, _ in found)
            if self.forward.roots:
                self._columns |= {"orphan_parameters": len(found), "stale_parameters": num_stale(optimizer)}

    def forget_update(self) -> None:
        """The update is kept from the weights: nothing to compare."""
        self._weights.forget()

    def after_update(self, step: int) -> None:
        self._columns |= self._weights.after()
        self._columns |= self.forward.take_activations()
        if step % LAYERS_EVERY == 0:
            self._columns |= self.posterior.take()

    def take(self) -> tuple[Columns, Inputs | None]:
        """The columns of the step that ends, and its inputs."""
        columns, inputs = self._columns, self.forward.inputs
        self._columns = {}
        self.forward.inputs = None
        return columns, inputs

    def remove(self) -> None:
        """Take every hook away."""
        self.forward.remove()
        self._weights.forget()


def _ends(
    optimizer: Optimizer,
    parameters: list[torch.Tensor],
    local: list[torch.Tensor],
    norms: list[torch.Tensor] | None,
) -> Columns:
    """First to last layer's gradient norm, and the first's, unscaled."""
    ends = gradients.end_layers(parameters)
    if ends is None:
        return {}
    first, last = [norms[i] for i in ends] if norms else gradients.tensor_norms([local[i] for i in ends])
    grad_scale = getattr(optimizer, "grad_scale", None)
    unscaled = first / grad_scale.to(first.device) if isinstance(grad_scale, torch.Tensor) else first
    return {"layer_ratio": first / last.to(first.device), "first_norm": unscaled}

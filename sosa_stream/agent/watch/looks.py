"""What is looked at beside loss and norm, on which steps, and under which column it leaves.

Nothing here synchronises host and device: every look ends in 0-d tensors, or in copies that the thread which encodes
frames reckons with, and these leave with the step's row. A schedule is a function of the step alone. A column is sent
where there is a value for it: what was never seen makes its detectors blind.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from sosa_stream.agent.step import gradients
from sosa_stream.agent.watch.forward import Forward
from sosa_stream.agent.watch.inputs import Inputs
from sosa_stream.agent.watch.layers import MAX_LAYERS, LayersLook, is_due
from sosa_stream.agent.watch.posterior import Posterior
from sosa_stream.agent.watch.scalars import Scalars, fetch
from sosa_stream.agent.watch.weights import Update, Weights, census, num_stale, spread_over

LAYERS_EVERY = 8
"""Steps between two looks at the ends of the network, and at the posterior."""
WEIGHTS_EVERY = 32
"""Steps between two looks at an update, and, halfway between these, at the activations."""
OWNERS_EVERY = 64
"""Steps between two looks at every parameter by name, and which belong to nobody."""
LAYERS_SENT_EVERY = 512
"""Steps between two `Layers` messages while there is no news in them."""
FEATURES_EVERY = 8
"""Steps between two `Features` messages where ``agent.layers_every`` says nothing else."""
MAX_EXTRA_LOOKS = 64
"""Steps that are looked at besides those of ``agent.layers_every``, for their gradient is not finite."""

Columns = dict[str, float | torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What a `Layers` message says; ``norms`` are NaN for parameters without a gradient."""

    step: int
    names: tuple[str, ...]
    norms: Scalars
    orphans: tuple[str, ...]


class Looks:
    """The sampled columns and the inputs of the primary optimizer's steps."""

    def __init__(
        self,
        on_error: Callable[[Exception], None],
        models: Callable[[], Iterable[nn.Module]] = lambda: (),
        *,
        layers_every: int = 0,
        features: bool = False,
    ) -> None:
        self.forward = Forward(on_error, names_inputs=features)
        self.posterior = Posterior()
        self.sees_inputs = False
        """Whether inputs are looked for by hooks; False where somebody hands them over."""
        self.tell_layers: Callable[[Census], None] | None = None
        """Where every parameter's gradient goes once in a while; None on ranks that need not tell of parameters."""
        self._models = models
        self._layers_every = layers_every
        self._extra_left = MAX_EXTRA_LOOKS
        self._look_is_due = False
        self._look: LayersLook | None = None
        self._on_error = on_error
        self._owners: Columns = {}
        self._census: Census | None = None
        self._news: object = None
        self._weights = Weights()
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._columns: Columns = {}

    def meet(self, optimizer: Optimizer) -> None:
        """An optimizer that owns its parameters, whether or not its steps are looked at."""
        self._optimizers.add(optimizer)

    def begin(self, step: int) -> None:
        """After a step and before the forward pass of ``step``."""
        self.forward.arm(inputs=self.sees_inputs, activations=step % WEIGHTS_EVERY == WEIGHTS_EVERY // 2)

    def are_due(self, step: int, norm: torch.Tensor | None = None) -> bool:
        """Whether `before_update` is for this step, whose gradient norm is ``norm``."""
        self._look_is_due = self._wants_look(step, norm)
        return self._look_is_due or _is_regular(step)

    def _wants_look(self, step: int, norm: torch.Tensor | None) -> bool:
        if not self._layers_every or self.tell_layers is None:
            return False
        if is_due(step, self._layers_every):
            return True
        # A norm on a device would have to be waited for.
        extra = norm is not None and norm.is_cpu and not math.isfinite(norm.item()) and self._extra_left > 0
        self._extra_left -= extra
        return extra

    def before_update(
        self,
        step: int,
        optimizer: Optimizer,
        parameters: list[torch.Tensor],
        local: list[torch.Tensor],
        norms: list[torch.Tensor] | None,
    ) -> None:
        """With the step's gradients at hand, of whole (not sharded) parameters; ``norms`` where they are known."""
        if self._look_is_due:
            self._look_at_layers(step, optimizer)
        if not _is_regular(step):
            return
        self._columns |= _ends(optimizer, parameters, local, norms)
        if step % WEIGHTS_EVERY == 0:
            self._weights.before(optimizer, self.forward.roots)
        if step % OWNERS_EVERY == OWNERS_EVERY // 2 - LAYERS_EVERY and self.forward.roots:
            self._take_census(step, optimizer)
        if step % OWNERS_EVERY == OWNERS_EVERY // 2:  # their names are there by now
            self._columns |= self._owners
            self._owners = {}

    def _look_at_layers(self, step: int, optimizer: Optimizer) -> None:
        self._look_is_due = False
        try:
            self._look = LayersLook(step, census(self._models(), self._optimizers), optimizer)
        except Exception as error:  # the rest goes on without it
            self._layers_every = 0
            self._on_error(error)

    def _take_census(self, step: int, optimizer: Optimizer) -> None:
        everyone = census(self.forward.roots, self._optimizers)
        orphans = tuple(each.name for each in everyone if each.is_orphan)[:MAX_LAYERS]
        without = [each.parameter.grad is None for each in everyone]
        self._owners = {"orphan_parameters": len(orphans), "stale_parameters": num_stale(optimizer)}
        if self._layers_every or self.tell_layers is None:
            return
        if self._news == (orphans, without) and step % LAYERS_SENT_EVERY >= OWNERS_EVERY:
            return
        self._news = orphans, without
        shown = spread_over(everyone, MAX_LAYERS)
        norms = gradients.tensor_norms(
            [gradients.to_local(g) for each in shown if (g := each.parameter.grad) is not None]
        )
        known = iter(norms)
        values = [math.nan if each.parameter.grad is None else next(known) for each in shown]
        self._census = Census(step=step, names=tuple(e.name for e in shown), norms=fetch(values), orphans=orphans)

    def skip_update(self) -> None:
        """The update is kept from the weights: nothing to compare."""
        self._weights.skip()
        if self._look is not None:
            self._look.skip()

    def take(self, step: int) -> tuple[Columns, Inputs | None, Update | None, LayersLook | None]:
        """After the update of ``step``: its columns, its inputs, what it did to the weights, and all its layers."""
        if self._census is not None and self._census.norms.ready() and self.tell_layers is not None:
            self.tell_layers(self._census)
            self._census = None
        layers, self._look = self._end_look(), None
        update = None
        if _is_regular(step):
            update = self._weights.after()
            self._columns |= self.forward.take_activations() | self.posterior.take()
        columns, self._columns = self._columns, {}
        inputs, self.forward.inputs = self.forward.inputs, None
        if inputs is not None and inputs.origin is not None:
            inputs.is_told = is_due(step, self._layers_every or FEATURES_EVERY)
        return columns, inputs, update, layers

    def _end_look(self) -> LayersLook | None:
        try:
            if self._look is not None:
                self._look.after()
        except Exception as error:
            self._layers_every = 0
            self._on_error(error)
            return None
        return self._look

    def remove(self) -> None:
        """Take every hook away."""
        self._look = None
        self.forward.remove()
        self._weights.forget()


def _is_regular(step: int) -> bool:
    """Whether the sampled columns are for this step: all their periods are multiples of the shortest one."""
    return step % LAYERS_EVERY == 0


def _ends(
    optimizer: Optimizer,
    parameters: list[torch.Tensor],
    local: list[torch.Tensor],
    norms: list[torch.Tensor] | None,
) -> Columns:
    """First to last layer's gradient norm, and the first's, unscaled; both 0 where only the first gets none."""
    if parameters and gradients.first_is_cut_off(optimizer):
        return {"layer_ratio": 0.0, "first_norm": 0.0}
    ends = gradients.end_layers(parameters)
    if ends is None:
        return {}
    first, last = [norms[i] for i in ends] if norms else gradients.tensor_norms([local[i] for i in ends])
    grad_scale = getattr(optimizer, "grad_scale", None)
    unscaled = first / grad_scale.to(first.device) if isinstance(grad_scale, torch.Tensor) else first
    return {"layer_ratio": first / last.to(first.device), "first_norm": unscaled}

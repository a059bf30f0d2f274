"""Units that are always zero and values at the flat ends of tanh and sigmoid, seen by hooks in sampled steps only.

An activation is recognised by autograd's own name of the function that made it, so that ``F.relu`` counts like
``nn.ReLU``. Only what goes into a module is looked at. What enters the outermost one is data, even where another
network made it: a generator's tanh is no hidden layer of the discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from sosa_stream.agent.watch.inputs import is_plain

MIN_SAMPLES = 32
"""A unit that is silent for fewer samples than this may be a selective one."""
MOST_ELEMENTS = 1 << 16
"""Of a larger activation on the CPU, every k-th sample is looked at."""
FLAT = 0.01
"""Share of its range at either end in which tanh or sigmoid is flat: the slope there is below 4% of its largest."""

RELU = frozenset({"ReluBackward0", "ThresholdBackward0"})
# What leaves the zeros of a ReLU in their units.
TRANSPARENT = frozenset(
    {
        *("ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0", "CloneBackward0", "ToCopyBackward0"),
        *("MaxPool2DWithIndicesBackward0", "MaxPool2DBackward0", "AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0"),
        *("MeanBackward1", "NativeDropoutBackward0", "SqueezeBackward1", "UnsqueezeBackward0"),
    }
)
MAX_CHAIN = 4


class Activations:
    """Collects the worst shares while its hooks are in; keeps numbers only, no activation."""

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._handles: list[Any] = []
        self._depth = 0
        self._outside: set[int] = set()
        self._seen: set[int] = set()
        self._dead: list[torch.Tensor] = []
        self._saturated: list[torch.Tensor] = []

    def install(self) -> None:
        self.remove()
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._depth = 0
        for cache in (self._outside, self._seen, self._dead, self._saturated):
            cache.clear()

    def take(self) -> dict[str, torch.Tensor]:
        """What was seen, as 0-d tensors; the hooks are taken out."""
        found = {"dead_share": self._dead, "saturated_share": self._saturated}
        worst = {
            name: torch.stack([share.to(shares[0].device) for share in shares]).amax()
            for name, shares in found.items()
            if shares
        }
        self.remove()
        return worst

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth += 1
        try:
            self._see(module, args)
        except Exception as error:  # never into the script's forward pass
            self.remove()
            self._on_error(error)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._depth -= 1

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        tensors = [t for t in args if isinstance(t, torch.Tensor) and t.grad_fn is not None and is_plain(t)]
        if self._depth == 1:
            self._outside.update(tensor.data_ptr() for tensor in tensors)
        if module.training and not isinstance(module, _Loss):
            for tensor in tensors:
                self._look(tensor)

    def _look(self, tensor: torch.Tensor) -> None:
        place = tensor.data_ptr()
        if place in self._seen or tensor.dim() < 2:
            return
        maker = _maker(tensor)
        name = maker.name() if maker is not None else ""
        low, high = _ends(maker, name)
        if math.isnan(low):
            return
        self._seen.add(place)  # not before: a ReLU in place makes it an activation only now
        values = tensor.detach()
        if values.is_cpu and values.numel() > MOST_ELEMENTS:
            values = values[:: -(-values.numel() // MOST_ELEMENTS)]
        if low == 0.0 and name != "SigmoidBackward0":
            units, dims = (values.flatten(2), (0, 2)) if values.dim() > 3 else (values.flatten(0, -2), (0,))
            if values.numel() // units.shape[1] >= MIN_SAMPLES:
                self._dead.append((units.amax(dims) == 0).float().mean())
        elif high > low and maker is tensor.grad_fn and place not in self._outside:
            middle, reach = 0.5 * (high + low), (0.5 - FLAT) * (high - low)
            self._saturated.append(((values - middle).abs() > reach).float().mean())


def _ends(maker: Any, name: str) -> tuple[float, float]:
    """Between which values the function that made a tensor lies, NaN where it is flat on neither side."""
    if name in RELU:
        return 0.0, math.inf
    if name == "HardtanhBackward0":  # ReLU6 is one, from 0 to 6
        return float(maker._saved_min_val), float(maker._saved_max_val)
    return {"TanhBackward0": (-1.0, 1.0), "SigmoidBackward0": (0.0, 1.0)}.get(name, (math.nan, math.nan))


def _maker(tensor: torch.Tensor) -> Any:
    """The function that made a tensor's values, behind those that only hand them on."""
    function: Any = tensor.grad_fn
    for _ in range(MAX_CHAIN):
        if function is None or function.name() not in TRANSPARENT:
            break
        function = function.next_functions[0][0]
    return function

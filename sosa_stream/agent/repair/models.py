"""The modules whose parameters the optimizers own, found among all live objects: a script does not hand them over."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Models:
    """The outermost modules, and their buffers. Keeps none of them alive."""

    def __init__(self) -> None:
        self._roots: list[weakref.ref[nn.Module]] = []
        # Owner and name of each, because a module may put a new tensor in a buffer's place.
        self._buffers: list[tuple[weakref.ref[nn.Module], str]] = []

    @property
    def outermost(self) -> list[nn.Module]:
        return [model for ref in self._roots if (model := ref()) is not None]

    @property
    def unwrapped(self) -> list[nn.Module]:
        """The script's own, out of `DistributedDataParallel` and `torch.compile`."""
        return [unwrapped(model) for model in self.outermost]

    @property
    def buffers(self) -> list[torch.Tensor]:
        owners = [(module, name) for ref, name in self._buffers if (module := ref()) is not None]
        return [buffer for module, name in owners if (buffer := module._buffers.get(name)) is not None]

    def find(self, parameters: Iterable[torch.Tensor], others: Callable[[Any], None]) -> None:
        """Look for the modules that own one of ``parameters``; whatever is no module is shown to ``others``."""
        wanted = {id(p): i for i, p in enumerate(parameters)}
        trees: list[tuple[nn.Module, list[nn.Module]]] = []
        for thing in gc.get_objects():
            if not issubclass(type(thing), nn.Module):
                others(thing)
                continue
            try:
                if any(id(p) in wanted for p in thing.parameters()):
                    trees.append((thing, list(thing.modules())))
            except Exception:  # a module that is half built is not ours to judge
                continue
        inside = {id(module) for root, tree in trees for module in tree if module is not root}
        outermost = [(root, tree) for root, tree in trees if id(root) not in inside]
        # Live objects come in no order of their own; that of the parameters is the same in every process.
        outermost.sort(key=lambda found: min(wanted.get(id(p), len(wanted)) for p in found[0].parameters()))
        self._roots = [weakref.ref(root) for root, _ in outermost]
        buffers: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        for owner in (owner for _, tree in outermost for owner in tree):
            named = owner._buffers.items()
            buffers.update({id(b): (weakref.ref(owner), name) for name, b in named if b is not None})
        self._buffers = list(buffers.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """The script's own module, out of what wraps it."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model

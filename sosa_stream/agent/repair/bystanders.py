"""Models beside the one that is trained which a rollback leaves as they are: an EMA that nobody has registered."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from sosa_stream.agent.repair.training_state import TrainingState

WRAPPINGS = ("module.", "_orig_mod.")

PARTS = 3
"""A direct child of this share of the model is looked for too: a network and its average may have one root. A single
layer is not: any other of its size would pass for a copy."""

Signature = frozenset[tuple[str, tuple[int, ...]]]


def unregistered(state: TrainingState) -> list[str]:
    """In words, the averaged models and copies of the model that are alive, own nothing that an optimizer steps, and
    were not registered. Looks at all live objects: for the moment of a rollback only.
    """
    trained = {id(p) for p in state.parameters}
    copied: set[Signature] = set()
    for model in state.models:
        whole = _signature(model)
        copied.add(whole)
        networks = [child for child in model.children() if any(True for _ in child.children())]
        parts = [network for network in networks if any(id(p) in trained for p in network.parameters())]
        copied.update(part for part in map(_signature, parts) if len(part) * PARTS >= len(whole))
    known = {id(module) for thing in state.registry.registered.values() for module in _modules_of(thing)}
    found = []
    for thing in gc.get_objects():
        if not issubclass(type(thing), nn.Module) or id(thing) in known:
            continue
        try:
            mine = list(thing.parameters())
            averaged = isinstance(thing, AveragedModel)
            if mine and not any(id(p) in trained for p in mine) and (averaged or _signature(thing) in copied):
                found.append(thing)
        except Exception:  # a module that is half built is not ours to judge
            continue
    inside = {id(module) for thing in found for module in thing.modules() if module is not thing}
    names = sorted({type(thing).__name__ for thing in found if id(thing) not in inside})
    return [f"a copy of the model ({name}) that was not registered" for name in names]


def _signature(model: nn.Module) -> Signature:
    """Names and shapes of its parameters, whatever wraps it."""
    named = []
    for name, parameter in model.named_parameters():
        for wrapping in WRAPPINGS:
            name = name.replace(wrapping, "")
        named.append((name, tuple(parameter.shape)))
    return frozenset(named)


def _modules_of(thing: Any) -> Iterator[nn.Module]:
    """The modules in a registered object: itself, or those that it holds."""
    held = [thing] if isinstance(thing, nn.Module) else list(getattr(thing, "__dict__", {}).values())
    for module in held:
        if isinstance(module, nn.Module):
            yield from module.modules()

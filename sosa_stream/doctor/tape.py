"""How a loss was computed, written down so that it can be computed again with other weights.

Outside the model every torch function is seen by a `TorchFunctionMode`, and every call of an outermost module by
``Module.__call__``. What depends on a weight becomes a `Node`; what does not (batch, labels, masks) is a constant. A
forward pass itself is not taken apart: it is called again, with other tensors in place of its parameters.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sosa_stream.agent.repair import random_numbers
from sosa_stream.agent.repair.models import unwrapped

MOST_NODES = 20_000
"""Of one pass; with more, it is not computed again."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor that an earlier node gave: by its place among the tensors in that node's result."""

    node: int
    place: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter that is used outside any module."""

    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that depends on no weight."""

    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One call: of a torch function, or of an outermost module."""

    call: Callable[..., Any] | nn.Module
    args: Any
    kwargs: Any
    autocast: tuple[tuple[str, torch.dtype], ...]


@dataclass(slots=True, kw_only=True)
class Pass:
    """From the first call of a model to the backward of its loss.

    ``constants`` are copies. ``loss`` is the node and place of the loss; None where it cannot be followed, and ``why``.
    """

    random: dict[str, Any]
    nodes: list[Node] = field(default_factory=list)
    constants: list[torch.Tensor] = field(default_factory=list)
    roots: list[nn.Module] = field(default_factory=list)
    loss: Ref | None = None
    loss_value: float = float("nan")
    why: str = "no backward pass was seen"

    @property
    def batch_size(self) -> int:
        """The first dimension of the model's first input; 0 where it has none."""
        for node in self.nodes:
            for index in constants_in((node.args, node.kwargs)):
                if self.constants[index].ndim:
                    return len(self.constants[index])
        return 0


class Tape(TorchFunctionMode):
    """Writes the pass under way. ``see`` is given every torch function before and after it runs, in the model too."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.see: Callable[[Callable[..., Any], Any, Any, Any], None] = lambda func, args, kwargs, result: None
        self.meet: Callable[[nn.Module], None] = lambda root: None
        """Called with an outermost module before it runs with gradients."""
        self.modules: list[nn.Module] = []
        """Those under way, the outermost first."""
        self._pid, self._thread = os.getpid(), threading.get_ident()
        self._pass: Pass | None = None
        self._known: dict[int, tuple[torch.Tensor, Ref]] = {}
        """By identity, with the tensor itself so that the number stays its own."""
        self._constants: dict[int, tuple[torch.Tensor, Constant]] = {}
        self._unscaled: dict[int, torch.Tensor] = {}
        self._original: Callable[..., Any] | None = None

    def install(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]
        original: Callable[..., Any] = nn.Module.__call__
        self._original = original

        def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._is_mine():
                return original(module, *args, **kwargs)
            return self._call(original, module, args, kwargs)

        nn.Module.__call__ = __call__  # type: ignore[method-assign]

    def remove(self) -> None:
        if self._original is not None:
            nn.Module.__call__ = self._original  # type: ignore[method-assign]
            self._original = None
            # Where it lies under a mode of the script's, it stays.
            if torch.overrides._get_current_function_mode() is self:  # type: ignore[no-untyped-call]
                self.__exit__(None, None, None)

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing inside is written down."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def note_scaled(self, loss: Any, scaled: Any) -> None:
        """A `GradScaler` has scaled the loss: what is computed again is the loss itself."""
        if isinstance(loss, torch.Tensor) and isinstance(scaled, torch.Tensor):
            self._unscaled[id(scaled)] = loss
            if id(loss) in self._known:
                self._known[id(scaled)] = (scaled, self._known[id(loss)][1])

    def finish(self, loss: Any) -> Pass | None:
        """The backward of ``loss`` begins: the pass is complete. None where no model has run since the last."""
        found, self._pass = self._pass, None
        if found is not None and isinstance(loss, torch.Tensor):
            loss = self._unscaled.get(id(loss), loss)
            known = self._known.get(id(loss))
            if loss.numel() != 1:
                found.why = f"what backward was called on is no single number (shape {tuple(loss.shape)})"
            elif len(found.nodes) >= MOST_NODES:
                found.why = f"it takes more than {MOST_NODES} calls"
            elif known is None:
                found.why = "it comes out of something that is no torch function, as a custom autograd Function"
            else:
                found.loss, found.loss_value = known[1], float(loss.detach())
        self._known.clear()
        self._constants.clear()
        self._unscaled.clear()
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_mine():
            return func(*args, **kwargs)
        self.see(func, args, kwargs, None)
        result = func(*args, **kwargs)
        self.see(func, args, kwargs, result)
        if self._pass is not None or not self.modules:
            self._note(func, args, kwargs, result)
        return result

    def _is_mine(self) -> bool:
        return self.on and os.getpid() == self._pid and threading.get_ident() == self._thread

    def _call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        is_root = not self.modules and torch.is_grad_enabled()
        prepared: tuple[Any, Any] = ((), {})
        if is_root:
            self.meet(module)
            self._begin()
            prepared = self._template(args), self._template(kwargs)  # now: the model may change its inputs in place
        self.modules.append(module)
        try:
            result = original(module, *args, **kwargs)
        finally:
            self.modules.pop()
        if is_root:
            inner = unwrapped(module)
            if self._pass is not None and all(inner is not root for root in self._pass.roots):
                self._pass.roots.append(inner)
            self._add(inner, *prepared, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """A function outside the model."""
        if self.modules or not torch.is_grad_enabled():
            return
        outcome = list(tensors(result))
        if func is torch.Tensor.__setitem__:
            outcome = [args[0]]
        if not any(each.requires_grad and not each.is_leaf for each in outcome):
            return
        inputs = list(tensors((args, kwargs)))
        if all(each.is_leaf or id(each) in self._known for each in inputs if each.requires_grad):
            self._begin()
            self._add(func, self._template(args), self._template(kwargs), result)

    def _begin(self) -> None:
        if self._pass is None:
            self._pass = Pass(random=random_numbers.capture())

    def _add(self, call: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self._pass is None or len(self._pass.nodes) >= MOST_NODES:
            return
        self._pass.nodes.append(Node(call=call, args=args, kwargs=kwargs, autocast=autocasts()))
        for place, tensor in enumerate(tensors(result)):
            if tensor.requires_grad or id(tensor) not in self._constants:
                self._known[id(tensor)] = (tensor, Ref(len(self._pass.nodes) - 1, place))

    def _template(self, value: Any) -> Any:
        def leaf(tensor: torch.Tensor) -> Any:
            if (known := self._known.get(id(tensor))) is not None:
                return known[1]
            if tensor.requires_grad and tensor.is_leaf:
                return Weight(tensor)
            if id(tensor) not in self._constants:
                assert self._pass is not None
                self._pass.constants.append(tensor.detach().clone())
                self._constants[id(tensor)] = (tensor, Constant(len(self._pass.constants) - 1))
            return self._constants[id(tensor)][1]

        return mapped(value, leaf, torch.Tensor)


def autocasts() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices on which autocast is on, with its dtype."""
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, slice):
        yield from tensors((value.start, value.stop, value.step))


def constants_in(template: Any) -> Iterator[int]:
    """The indices of the constants in arguments that are written down."""
    if isinstance(template, Constant):
        yield template.index
    elif isinstance(template, tuple | list):
        for item in template:
            yield from constants_in(item)
    elif isinstance(template, Mapping):
        for item in template.values():
            yield from constants_in(item)


def mapped(value: Any, leaf: Callable[[Any], Any], kinds: Any) -> Any:
    """The same nesting with every instance of ``kinds`` replaced by what ``leaf`` makes of it."""
    if isinstance(value, kinds):
        return leaf(value)
    if isinstance(value, tuple):
        items = [mapped(item, leaf, kinds) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [mapped(item, leaf, kinds) for item in value]
    if isinstance(value, dict):
        return {key: mapped(item, leaf, kinds) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(item, leaf, kinds) for item in (value.start, value.stop, value.step)))
    return value

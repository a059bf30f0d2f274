"""Where a forward pass can be seen: the outermost module's arguments at each step, activations in sampled steps.

A global hook makes every module call slower and cannot be had beside ``torch.compile``, which warns of it. So the one
for the arguments stays until the first module call in training mode only, and a job that compiles gets none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from sosa_stream.agent.watch.activations import Activations
from sosa_stream.agent.watch.inputs import Inputs, look


class Forward:
    """One step's inputs and activations; ``roots`` are the outermost modules seen so far."""

    def __init__(self, on_error: Callable[[Exception], None], *, names_inputs: bool = False) -> None:
        self.inputs: Inputs | None = None
        self.roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.compiles = False
        """Set once the script has asked for a compiled module."""
        self.before: Callable[[nn.Module], None] = lambda root: None
        """Called before the first forward pass of a step, where a hook sees it."""
        self.failed = False
        self._on_error = on_error
        self._names_inputs = names_inputs
        self._activations = Activations(self._fail)
        self._looking = False
        self._outermost: Any = None
        self._hooks: dict[int, Any] = {}
        """Torch's own, of all modules."""
        self._keywords: Any = None
        self._last_root: Callable[[], nn.Module | None] = lambda: None

    def arm(self, *, inputs: bool, activations: bool) -> None:
        """For the coming step: look at the outermost call's arguments, and at activations."""
        self.inputs = None
        if self._keywords is not None:
            self._keywords.remove()
            self._keywords = None
        if self.compiles or self.failed:
            return
        if inputs and self._outermost is None:
            self._outermost = register_module_forward_pre_hook(self._see_outermost)
            self._hooks = self._outermost.hooks_dict_ref()
        elif inputs:  # put back under the handle that there is: a new one at every step costs more than the hook does
            self._hooks[self._outermost.id] = self._see_outermost
        if activations and not any(_is_compiled(root) for root in self.roots):
            self._activations.install()
            self._looking = True

    def take_activations(self) -> dict[str, torch.Tensor]:
        """The sampled columns of the step that ends, if it was one that is looked at."""
        if not self._looking:
            return {}
        self._looking = False
        return self._activations.take()

    def see(self, module: nn.Module, *arguments: Any) -> None:
        """What goes into ``module``, the outermost one, where the caller knows it."""
        if self._last_root() is not module:
            self.roots.add(module)
            self._last_root = weakref.ref(module)
        if not self.failed:
            try:
                self.inputs = look(module, *arguments, named=self._names_inputs)
            except Exception as error:
                self._fail(error)

    def give_up(self) -> None:
        """The script compiles: no global hook may be in any more."""
        self.compiles = True
        self.remove()

    def _fail(self, error: Exception) -> None:
        """Something of ours does not get on with this model: the rest goes on without it."""
        self.failed = True
        self.remove()
        self._on_error(error)

    def remove(self) -> None:
        """Take every hook away."""
        for handle in (self._outermost, self._keywords):
            if handle is not None:
                handle.remove()
        self._keywords = None
        self._looking = False
        self._activations.remove()

    def _see_outermost(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not module.training or not torch.is_grad_enabled():
            return
        self._hooks.pop(self._outermost.id, None)
        self.before(module)
        self.see(module, args)
        if self.inputs is None:  # a global hook is not shown keywords; one of the module's own, after the call, is
            self._keywords = module.register_forward_hook(self._see_keywords, with_kwargs=True)

    def _see_keywords(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if self._keywords is not None:
            self._keywords.remove()
            self._keywords = None
            self.see(module, kwargs)


def _is_compiled(root: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in root.modules()
    )

"""The way that an exception took: the modules whose forward it passed, the script's own line, the tensors at hand.

All of it comes from the frames of the traceback, after the fact. Nothing is recorded while training runs.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import site
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

MAX_TENSORS = 8
MAX_FRAMES = 500
"""Frames looked at, the innermost: an endless recursion has a thousand."""
MAX_MODULES = 50_000
"""Modules looked through for the name of one."""
MAX_SOURCE = 160
WRAPPERS = frozenset({"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"})
"""Classes that hold the model as ``module``, which is no part of the path that a person knows."""
WRAPPED = frozenset({"_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod"})

_WORD = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_NN = os.path.join(os.path.dirname(torch.__file__), "nn", "")
"""Below it torch's frames have names that a person knows; further in they are those of kernels."""
_OURS = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One frame of a traceback and the line at which it stood."""

    frame: FrameType
    line: int

    @property
    def is_own(self) -> bool:
        """Whether the code is the user's: not Python's, an installed package's or ours."""
        return not is_library(self.frame.f_code.co_filename)

    @property
    def source(self) -> str:
        file, there = self.frame.f_code.co_filename, self.frame.f_globals
        return linecache.getline(file, self.line, there).strip()[:MAX_SOURCE]


def steps_of(trace: TracebackType | None) -> list[Step]:
    """The frames of a traceback, innermost last."""
    found = []
    while trace is not None:
        found.append(Step(frame=trace.tb_frame, line=trace.tb_lineno))
        trace = trace.tb_next
    return found[-MAX_FRAMES:]


def own_line(steps: list[Step]) -> str:
    """The innermost line of the user's own code, ``file:line in function: source``; empty where there is none."""
    own = [step for step in steps if step.is_own]
    if not own:
        return ""
    code, source = own[-1].frame.f_code, own[-1].source
    function = "" if code.co_name == "<module>" else f" in {code.co_name}"
    return f"{code.co_filename}:{own[-1].line}{function}" + (f": {source}" if source else "")


def modules_of(steps: list[Step]) -> list[nn.Module]:
    """Modules whose methods were entered, innermost last, each once."""
    entered: list[nn.Module] = []
    for step in steps:
        owner = step.frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not any(owner is other for other in entered):
            entered.append(owner)
    return entered


def path_of(module: nn.Module, entered: list[nn.Module], steps: list[Step]) -> str:
    """Its name in the largest module around it: among those entered, and those that the user's frames can see.

    The class of the module where none holds it, or it is that largest one itself.
    """
    longest = ""
    for root in [*entered, *_seen(steps)]:
        name = _name_in(root, module)
        if name.count(".") + bool(name) > longest.count(".") + bool(longest):
            longest = name
    return longest or type(module).__name__


def tensors_of(steps: list[Step], module: nn.Module | None) -> dict[str, torch.Tensor]:
    """Tensors at hand where it was raised, by name, at most `MAX_TENSORS`.

    From the innermost module's frames on, or where no module was entered from the user's innermost line on. In the
    user's code only those that the line names; in a library's all locals, and the parameters of the module.
    """
    start = next((i for i, step in enumerate(steps) if step.frame.f_locals.get("self") is module), None)
    if module is None or start is None:
        start = max((i for i, step in enumerate(steps) if step.is_own), default=0)
    near = [step for step in steps[start:] if step.is_own or step.frame.f_code.co_filename.startswith(_NN)]
    found = _tensors_in(near) or _tensors_in(steps[start:])
    if module is not None and not any(step.is_own for step in steps[start:]):
        for name, parameter in module.named_parameters(recurse=False):
            if not any(parameter is other for other in found.values()):
                found.setdefault(name, parameter)
    return dict(list(found.items())[:MAX_TENSORS])


def described(tensors: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """``name dtype shape``, with devices where one is not the CPU."""
    told = []
    anywhere = any(not tensor.is_cpu for tensor in tensors.values())
    for name, tensor in tensors.items():
        with contextlib.suppress(Exception):  # subclasses need not know their shape
            dtype = str(tensor.dtype).removeprefix("torch.")
            told.append(f"{name} {dtype} {tuple(tensor.shape)}" + (f" on {tensor.device}" if anywhere else ""))
    return tuple(told)


def _tensors_in(steps: list[Step]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for step in steps:
        for name, value in _named_on(step) if step.is_own else _locals(step.frame):
            if isinstance(value, torch.Tensor) and not any(value is other for other in found.values()):
                found.setdefault(name, value)
    return found


def _locals(frame: FrameType) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in list(frame.f_locals.items()) if name != "self")


def _named_on(step: Step) -> Iterator[tuple[str, Any]]:
    """What the line of the frame names, with attributes: ``x``, ``self.scale``."""
    places = {**step.frame.f_globals, **step.frame.f_locals}
    for match in _WORD.finditer(step.source):
        first, *rest = match.group().split(".")
        value = places.get(first)
        for attribute in rest:
            held = value.__dict__ if hasattr(value, "__dict__") else {}
            inside = held.get("_parameters", {}) | held.get("_buffers", {}) | held.get("_modules", {}) | held
            following = inside.get(attribute)  # never a property: that would run the script's code
            if following is None:
                break
            value = following
            first = f"{first}.{attribute}"
        yield first, value


def _seen(steps: list[Step]) -> list[nn.Module]:
    """Modules that lie in the locals of the user's frames, or in globals that their code names, outermost first."""
    found: list[nn.Module] = []
    for step in steps:
        if step.is_own:
            there = step.frame.f_globals
            values = [*step.frame.f_locals.values(), *(there.get(name) for name in step.frame.f_code.co_names)]
            found += [value for value in values if isinstance(value, nn.Module)]
    return list({id(module): module for module in found}.values())


def _name_in(root: nn.Module, module: nn.Module) -> str:
    """The path of ``module`` below ``root``, without the names that wrappers add; empty where it is not below it."""
    for i, (name, each) in enumerate(root.named_modules()):
        if each is module:
            return _without_wrappers(root, name)
        if i > MAX_MODULES:
            break
    return ""


def _without_wrappers(root: nn.Module, name: str) -> str:
    kept, at = [], root
    for part in name.split(".") if name else ():
        wrapped = part in WRAPPED or (part == "module" and type(at).__name__ in WRAPPERS)
        at = at.get_submodule(part)
        if not wrapped:
            kept.append(part)
    return ".".join(kept)


def is_library(file: str) -> bool:
    if (
        file.startswith("<frozen")
        or f"{os.sep}site-packages{os.sep}" in file
        or f"{os.sep}dist-packages{os.sep}" in file
    ):
        return True
    return os.path.abspath(file).startswith(_libraries())


def _libraries() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders |= {os.path.dirname(torch.__file__), *site.getsitepackages()}
    folders |= {
        os.path.join(_OURS, name) for name in ("agent", "faults")
    }  # our demo's script is a script like any other
    return tuple(folder + os.sep for folder in folders)

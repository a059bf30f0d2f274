"""Exceptions explained: the module by its path, the shapes, the likely line of the script, and what to do.

Read from the exception and its traceback, after the fact; the exception itself stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from sosa_stream.agent.explain.explanation import Explanation, Kind, Meaning
from sosa_stream.agent.explain.mishaps import out_of_memory, raised_in_worker, timed_out, worker_lost
from sosa_stream.agent.explain.trail import Step, described, modules_of, own_line, path_of, steps_of, tensors_of
from sosa_stream.agent.explain.words import meaning_of
from sosa_stream.agent.splitting.memory import is_out_of_memory

__all__ = ["Explanation", "Kind", "explain"]


def explain(error: BaseException, memory: Mapping[str, int] | None = None) -> Explanation | None:
    """What ``error`` means; None where it is none of the kinds that are known.

    Args:
        error: as it was caught, with its traceback.
        memory: what lay in memory when it was raised, in bytes by name.
    """
    chain = list(_chain(error))
    messages = [str(each) for each in chain]
    in_worker = raised_in_worker(messages[0])
    if in_worker is not None:
        advice = ("run once with num_workers=0, where a debugger and print reach it",)
        return Explanation(kind=Kind.DATASET, what=in_worker.error, line=in_worker.line, advice=advice)
    steps = [step for each in reversed(chain) for step in steps_of(each.__traceback__)]
    path = steps_of(error.__traceback__)
    entered = modules_of(path)
    module = entered[-1] if entered else None
    module_class = type(module).__name__ if module is not None else ""
    meaning = _meaning(error, messages, steps, module_class, memory or {})
    if meaning is None:
        return None
    if meaning.kind in (Kind.TIMEOUT, Kind.WORKER):  # where the script happened to wait
        return Explanation(kind=meaning.kind, what=meaning.what, line=own_line(path), advice=meaning.advice)
    tensors = tensors_of(path, module)
    return Explanation(
        kind=meaning.kind,
        what=meaning.what + (_range_of(tensors, module) if meaning.kind is Kind.INDEX else ""),
        module=path_of(module, entered, path) if module is not None else "",
        module_class=module_class,
        tensors=described(tensors),
        line=own_line(path),
        advice=meaning.advice,
    )


def _meaning(
    error: BaseException, messages: list[str], steps: list[Step], module_class: str, memory: Mapping[str, int]
) -> Meaning | None:
    if is_out_of_memory(error) or isinstance(error, MemoryError):
        return out_of_memory(messages[0], memory)
    found = worker_lost(messages, steps)
    if found is None and isinstance(error, RuntimeError):
        found = timed_out(messages[0])
    if found is None and isinstance(error, RuntimeError | ValueError | IndexError | TypeError | NotImplementedError):
        found = meaning_of(messages[0], module_class)
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that led to it, as its traceback shows them."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _range_of(tensors: Mapping[str, torch.Tensor], module: torch.nn.Module | None) -> str:
    """The least and the greatest of what is an index, where it lies in the host's memory; and how many there may be."""
    for name, tensor in tensors.items():
        if tensor.is_cpu and tensor.numel() and tensor.dtype in (torch.int64, torch.int32):
            low, high = (int(value) for value in torch.aminmax(tensor))
            allowed = getattr(module, "num_embeddings", None)
            bound = f", and there are {allowed}" if isinstance(allowed, int) else ""
            return f" ({name} runs from {low} to {high}{bound})"
    return ""

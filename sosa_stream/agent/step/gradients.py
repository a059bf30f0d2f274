"""Gradients as the optimizer is about to use them: whose they are, their norm, and clipping them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import torch
from torch.distributed import get_world_size
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def with_gradients(optimizer: Optimizer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters that have a gradient, and these gradients: one pass, for it is made at every step."""
    parameters: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                parameters.append(parameter)
                gradients.append(gradient)
    return parameters, gradients


def is_sharded(optimizer: Optimizer) -> bool:
    """Whether any of its parameters is. A parameter stays what it is, so this is asked once for each optimizer."""
    sharded = _dtensor_class()
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return sharded is not None and any(isinstance(p, sharded) for p in parameters)


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that lies in this process; any other tensor as it is."""
    sharded = _dtensor_class()
    return tensor.to_local() if sharded is not None and isinstance(tensor, sharded) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor | None:
    """A 0-d tensor as this process holds it; None for a sharded one whose parts nobody has added up yet."""
    sharded = _dtensor_class()
    if sharded is None or not isinstance(tensor, sharded):
        return tensor
    replicated = all(placement.is_replicate() for placement in tensor.placements)  # type: ignore[attr-defined]
    return to_local(tensor) if replicated else None


def _dtensor_class() -> type[torch.Tensor] | None:
    """`DTensor` if anybody has imported it: by ourselves it would make every script start a second later."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def tensor_norms(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each gradient, in order, without a synchronisation."""
    if _are_alike(gradients):
        return _norms(gradients)
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    norms: dict[int, torch.Tensor] = {}
    for indices in _by_device(dense):
        norms.update(zip(indices, _norms([dense[i] for i in indices]), strict=True))
    return [norms[i] for i in range(len(dense))]


def _are_alike(tensors: list[torch.Tensor]) -> bool:
    """Whether all are dense, of one type and on one device."""
    first = tensors[0] if tensors else None
    if first is None or first.is_sparse:
        return False
    dtype, device, layout = first.dtype, first.get_device(), first.layout
    for tensor in tensors:
        if tensor.dtype is not dtype or tensor.get_device() != device or tensor.layout is not layout:
            return False
    return True


def _norms(alike: list[torch.Tensor]) -> list[torch.Tensor]:
    # In float32, for a half-precision norm is infinite above 65504 although every element is finite.
    low = alike[0].dtype in (torch.float16, torch.bfloat16)
    return list(torch._foreach_norm(alike, 2, torch.float32) if low else torch._foreach_norm(alike, 2))


def total_norm(norms: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all gradients, from theirs, as a 0-d tensor."""
    if len({norm.get_device() for norm in norms}) > 1:
        first = norms[0].device
        norms = [norm.to(first, non_blocking=first.type != "cpu") for norm in norms]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def end_layers(parameters: list[torch.Tensor]) -> tuple[int, int] | None:
    """The places of the first and the last weight matrix; None where there are not two."""
    matrices = [i for i, parameter in enumerate(parameters) if parameter.dim() > 1]
    return (matrices[0], matrices[-1]) if len(matrices) > 1 else None


def first_is_cut_off(optimizer: Optimizer) -> bool:
    """Whether the first weight matrix that is to be trained has no gradient; a frozen one is not to be trained."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and parameter.dim() > 1:
                return parameter.grad is None
    return False


def reduced_by_ddp(optimizer: Optimizer) -> bool:
    """Whether every parameter belongs to a `DistributedDataParallel` over all ranks, so that gradients are equal.

    Looks at all live objects, so it is asked once for each optimizer. FSDP1's flat shards, and tensor or pipeline
    parallelism, look like ordinary parameters and are different on each rank. With a hook for local SGD gradients are
    reduced among some ranks, or not at all.
    """
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    reduced = {
        id(p)
        for wrapper in wrappers
        if wrapper.process_group.size() == get_world_size() and not _steps_alone(wrapper)
        for name, p in wrapper.module.named_parameters()
        if name not in wrapper.parameters_to_ignore
    }
    return all(id(p) in reduced for group in optimizer.param_groups for p in group["params"] if p.requires_grad)


def reduced_at_times() -> bool:
    """Whether a `DistributedDataParallel` of this process has a hook for local SGD: its replicas part on purpose."""
    return any(_steps_alone(o) for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel))


def _steps_alone(wrapper: DistributedDataParallel) -> bool:
    hooks = getattr(wrapper, "_comm_hooks", ())
    return any(type(state).__name__ == "PostLocalSGDState" for _, state in hooks)


def clip(gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale gradients in place so that their total norm is at most ``max_norm``; a non-finite norm scales nothing."""
    coefficient = torch.where(torch.isfinite(norm), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
    for indices in _by_device(gradients):
        same = [gradients[i] for i in indices]
        torch._foreach_mul_(same, coefficient.to(same[0].device, non_blocking=True))


def norm_after_clip(norm: torch.Tensor, clipped_to: float | torch.Tensor | None) -> torch.Tensor:
    """What is left of ``norm``, which `clip_grad_norm_` returned, after its own clipping at ``clipped_to``."""
    return norm if clipped_to is None else norm * (clipped_to / (norm + 1e-6)).clamp(max=1.0)


def _by_device(tensors: list[torch.Tensor]) -> Iterator[list[int]]:
    """The places of tensors that lie on one device in one dtype: what `_foreach` functions take together."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(i)
    yield from groups.values()

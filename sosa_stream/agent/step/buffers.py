"""Buffers that forward passes change, such as BatchNorm's statistics: kept, and put back when a step is left out.

A batch with a NaN poisons them before any gradient is there, and evaluation, averages of the model and checkpoints
would carry it for ever. Version counters tell what has changed, so that a constant costs a comparison; but
``batch_norm`` changes its running statistics without counting (torch 2.13), so that BatchNorm's count of batches speaks
for them, and where there is none they are taken as changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from sosa_stream.agent.repair.models import Models

RUNNING = frozenset({"running_mean", "running_var"})
UNKNOWN = -1
COUNT = "num_batches_tracked"
SMALL_BYTES = 1 << 20
"""Up to this size a buffer is copied when it is met; a larger one, which may be constant, once it has changed."""


@dataclass(slots=True, eq=False)
class _Buffer:
    """A module's buffer by the dictionary it stands in: a module may put a new tensor in its place."""

    owner: dict[str, torch.Tensor | None]
    name: str
    witness: str
    """The buffer beside it, often itself, whose version is another whenever this one's values are; empty: none is."""
    seen: torch.Tensor
    version: int = UNKNOWN
    copy: torch.Tensor | None = None


class Buffers:
    """The buffers of the module trees that are trained, and their copies as of the last `keep`.

    Never keeps a module alive. Writes past the version counters: a graph whose backward is yet to come, a generator's
    say, has BatchNorm's statistics among what it saved, and would refuse them although it does not read their values.
    """

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []
        self._covered: set[int] = set()

    def meet(self, parameters: list[torch.Tensor]) -> None:
        """These are trained: find what lies beside them. Looks at all live objects, unless it knows them all."""
        if any(id(parameter) not in self._covered for parameter in parameters):
            self._covered.clear()
            models = Models()
            models.find(parameters, lambda thing: None)
            self._buffers = self._beside(models.unwrapped)

    def meet_root(self, root: nn.Module) -> None:
        """A module is about to be called in training, perhaps before any optimizer is known."""
        first = next(root.parameters(), None)
        if first is not None and id(first) not in self._covered:
            found = self._beside([root])
            self._buffers = list(dict.fromkeys(self._buffers + found))

    def keep_all(self) -> None:
        """Copy every one: a fix has written past the version counter."""
        for buffer in self._buffers:
            buffer.version = UNKNOWN
        self.keep()

    def keep(self) -> None:
        """Copy what has changed since it was last copied."""
        pairs = []
        for buffer, live, replaced in self._changed():
            if buffer.copy is None or replaced:
                buffer.copy = live.detach().clone()
            else:
                pairs.append((buffer.copy, live))
        _copy(pairs)

    def put_back(self) -> None:
        """All as it was at `keep`, but for what had never been copied."""
        pairs = []
        for buffer, live, replaced in self._changed():
            if buffer.copy is not None and replaced:
                buffer.owner[buffer.name] = buffer.seen = buffer.copy.clone()
                buffer.version = UNKNOWN
            elif buffer.copy is not None:
                pairs.append((live.data, buffer.copy))
        _copy(pairs)

    def settle(self, bad: torch.Tensor) -> None:
        """Put back where ``bad`` (0-d, 0 or 1) is set on the device, else keep: the host reads nothing."""
        alike: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for buffer, live, replaced in self._changed():
            if buffer.copy is None or (replaced and not _alike(buffer.copy, live)):
                buffer.copy = live.detach().clone()
            else:
                alike.setdefault((live.device, live.dtype), []).append((live.data, buffer.copy))
        for (device, _), pairs in alike.items():  # a few kernels for all of them, not a few for each
            lives, copies = [live for live, _ in pairs], [copy for _, copy in pairs]
            is_bad = bad.to(device, non_blocking=True) > 0
            settled = torch.where(is_bad, _flatten_dense_tensors(copies), _flatten_dense_tensors(lives))  # type: ignore[no-untyped-call]
            values = _unflatten_dense_tensors(settled, lives)  # type: ignore[no-untyped-call]
            torch._foreach_copy_(lives + copies, [*values, *values])

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """All as at `keep` for a while, and then again as it is now."""
        now = [(buffer, live.detach().clone()) for buffer, live, _ in self._changed()]
        for buffer, _ in now:
            buffer.version = UNKNOWN
        self.put_back()
        try:
            yield
        finally:
            self.put_back()  # what the while has changed, too
            for buffer, value in now:
                live = buffer.owner.get(buffer.name)
                if live is not None and _alike(live, value):
                    live.data.copy_(value)
                else:
                    buffer.owner[buffer.name] = value
                buffer.version = UNKNOWN

    def _beside(self, roots: list[nn.Module]) -> list[_Buffer]:
        """The buffers in these trees, each once: those that are known already as they are, others from now on."""
        known = {(id(buffer.owner), buffer.name): buffer for buffer in self._buffers}
        found: dict[tuple[int, str], _Buffer] = {}
        for root in roots:
            self._covered.update(id(parameter) for parameter in root.parameters())
            for module in root.modules():
                for name, live in module._buffers.items():
                    key = id(module._buffers), name
                    if live is not None and key not in found and _can_be_copied(live):
                        found[key] = known.get(key) or _first_seen(module, name, live)
        return list(found.values())

    def _changed(self) -> list[tuple[_Buffer, torch.Tensor, bool]]:
        """Those that are not as when this was last asked, which is now, and whether each is another tensor."""
        changed = []
        for buffer in self._buffers:
            live = buffer.owner.get(buffer.name)
            if live is None:
                continue
            replaced, version = live is not buffer.seen, _version(buffer, live)
            if replaced or version != buffer.version or version == UNKNOWN:
                buffer.seen, buffer.version = live, version
                changed.append((buffer, live, replaced))
        return changed


def _can_be_copied(live: torch.Tensor) -> bool:
    odd = live.is_meta or live.is_quantized or live.is_inference() or is_lazy(live)
    return live.layout is torch.strided and not odd


def _first_seen(module: nn.Module, name: str, live: torch.Tensor) -> _Buffer:
    counts = isinstance(module, _BatchNorm) and module.num_batches_tracked is not None
    witness = name if name not in RUNNING else COUNT if counts else ""
    is_small = live.numel() * live.element_size() <= SMALL_BYTES
    buffer = _Buffer(module._buffers, name, witness, live, copy=live.detach().clone() if is_small else None)
    buffer.version = _version(buffer, live)
    return buffer


def _version(buffer: _Buffer, live: torch.Tensor) -> int:
    """A number that was another while the values were others, or `UNKNOWN`."""
    witness = buffer.owner.get(buffer.witness)
    return UNKNOWN if witness is None else live._version + witness._version


def _alike(copy: torch.Tensor, live: torch.Tensor) -> bool:
    return (copy.shape, copy.dtype, copy.device) == (live.shape, live.dtype, live.device)


def _copy(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    if not pairs:
        return
    with torch.no_grad():
        torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])

"""How parameters are cut into the chunks that are looked at, and repaired, together: on all ranks alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sosa_stream.protocol.columns import DIGEST_CHUNKS

MAX_TENSORS, MAX_ELEMENTS = 32, 1 << 16
"""Parameters of one chunk, and their elements, unless that made more than half of `DIGEST_CHUNKS`."""
PART = 1 << 18
"""Of a larger tensor one part is looked at, the next one in the next round: 0.5 ns an element on a CPU."""


def cut(tensors: Sequence[torch.Tensor]) -> tuple[slice, ...]:
    """The tensors in their order, cut where a chunk is full: at most half of `DIGEST_CHUNKS`."""
    sizes = [min(tensor.numel(), PART) for tensor in tensors]
    most = DIGEST_CHUNKS // 4  # a chunk may be left half empty before a large tensor
    max_tensors, max_elements = max(MAX_TENSORS, -(-len(sizes) // most)), max(MAX_ELEMENTS, -(-sum(sizes) // most))
    while True:
        starts: list[int] = []
        elements = 0
        for i, size in enumerate(sizes):
            if not starts or i - starts[-1] >= max_tensors or elements + size > max_elements:
                starts.append(i)
                elements = 0
            elements += size
        if len(starts) <= DIGEST_CHUNKS // 2:
            return tuple(map(slice, starts, [*starts[1:], len(sizes)]))
        max_tensors, max_elements = 2 * max_tensors, 2 * max_elements

"""Does the same batch with the same seed give the same bits, and is there a seed at all?"""

from __future__ import annotations

from typing import Any

import torch

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, named, number
from sosa_stream.doctor.replay import CannotReplayError, Copies, alone, first_pass


def check(context: Context) -> Finding:
    """Two passes with gradients, from the same weights, batch and random numbers, compared bit by bit."""
    seen = context.seen
    is_seeded = torch.initial_seed() != seen.seed_before
    evidence: dict[str, Any] = {
        "torch_seed": torch.initial_seed() if is_seeded else None,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
    copies = Copies(seen)
    recorded = first_pass(seen)
    start = copies.values()
    results = []
    with alone():
        if context.seen.error is not None and seen.device.type == "cuda":
            raise CannotReplayError("the script failed, after which a GPU is not trusted")
        for _ in range(2):
            copies.put(start)
            results.append((copies.step(recorded), _gradients(copies)))
    (first, gradients), (second, again) = results
    different = [
        seen.names.get(key, "?")
        for key, gradient in gradients.items()
        if not torch.equal(gradient.nan_to_num(), again[key].nan_to_num())
    ]
    is_same = first == second or (first != first and second != second)
    evidence |= {"losses": [first, second], "different_gradients": different}
    no_seed = "the script sets no seed of torch: every start has other weights and batches"
    if not is_same or different:
        largest = max((float((gradient - again[key]).abs().max()) for key, gradient in gradients.items()), default=0.0)
        evidence["largest_difference"] = largest
        says = f"two passes over one batch from one seed give losses {first:.9g} and {second:.9g}"
        if different:
            says += f", and other gradients in {len(different)} parameters ({named(different, 3)})"
        return Finding(
            status=Status.PROBLEM if not is_same else Status.WARNING,
            says=says,
            evidence=evidence,
            advice=(
                "something draws from a generator that no seed reaches (one of its own, time, os.urandom)"
                if not is_same
                else "some kernel adds up in another order each time: use_deterministic_algorithms(True) names it",
                *(("torch.manual_seed at the start",) if not is_seeded else ()),
            ),
        )
    says = f"two passes over one batch from one seed are equal to the bit (loss {number(first)})"
    if not is_seeded and not seen.has_loaded:
        return Finding(
            status=Status.WARNING,
            says=f"{no_seed}. {says[0].upper()}{says[1:]}",
            evidence=evidence,
            advice=("torch.manual_seed at the start, or a run cannot be repeated",),
        )
    return Finding(status=Status.OK, says=says, evidence=evidence)


def _gradients(copies: Copies) -> dict[int, torch.Tensor]:
    return {key: copy.grad.clone() for key, copy in copies.by_original.items() if copy.grad is not None}

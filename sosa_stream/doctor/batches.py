"""Do batches load, do they come again, and does every rank get others?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from sosa_stream.doctor.context import Context
from sosa_stream.doctor.findings import Finding, Status, named, unknown
from sosa_stream.doctor.tape import Pass

MOST_SAMPLES, MOST_BYTES = 512, 1 << 26
"""Of one pass, for which digests are made."""
MANY = 0.5
"""Share of samples that two ranks have in common, or that come again, from which it is no chance."""


def digests(recorded: Pass) -> list[str]:
    """One of each sample of a pass, over all that goes in with the batch's size."""
    batch_size = recorded.batch_size
    whole = [each for each in recorded.constants if each.ndim and len(each) == batch_size]
    num_bytes = sum(each.numel() * each.element_size() for each in whole)
    most = min(batch_size, MOST_SAMPLES, max(1, MOST_BYTES * batch_size // max(1, num_bytes)))
    rows = [each[:most].detach().cpu().contiguous() for each in whole]
    found = []
    for i in range(most):
        digest = hashlib.blake2b(digest_size=8)
        for row in rows:
            digest.update(row[i].reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def facts(passes: list[Pass], is_replicated: bool) -> dict[str, Any]:
    """What other ranks are told: digests of samples, pass by pass."""
    return {"digests": [digests(each) for each in passes], "is_replicated": is_replicated}


def check(context: Context) -> Finding:
    """By digests of samples: of later batches against earlier ones, and of this rank against all others."""
    passes = context.seen.passes
    if not passes:
        return unknown("no batch has gone through a model and a backward pass")
    mine = [digests(each) for each in passes]
    sizes = [each.batch_size for each in passes]
    evidence: dict[str, Any] = {
        "num_passes": len(passes),
        "batch_sizes": sizes,
        "shapes": [list(each.shape) for each in passes[0].constants[:8]],
        "loaders": [_of_loader(loader) for loader in context.seen.loaders],
    }
    says = f"{len(passes)} batch{'es' if len(passes) > 1 else ''} of {_sizes(sizes)} samples"
    problems: list[str] = []
    warnings: list[str] = []
    advice: list[str] = []
    whole = [tuple(each) for each in mine if each]
    num_repeated = len(whole) - len(set(whole))
    evidence["num_repeated_batches"] = num_repeated
    if num_repeated and len(set(whole)) == 1 and len(whole) > 1:
        if _is_whole_data(context, sizes[0]):
            says += ", the same each time, which is all of the data"
        else:
            problems.append(f"all {len(whole)} batches are the same, sample by sample")
            advice.append("shuffle, or draw the next batch inside the loop: one batch is trained on again and again")
    elif num_repeated:
        warnings.append(f"{num_repeated} of {len(whole)} batches were there before, sample by sample")
    inside = [num for each in mine if (num := len(each) - len(set(each)))]
    evidence["num_repeated_samples"] = sum(inside)
    if inside and sum(inside) > MANY * sum(map(len, mine)):
        warnings.append(f"{sum(inside)} of {sum(map(len, mine))} samples stand twice or more in their own batch")
    if context.rank == 0 and len(context.others) > 1:
        shared = _shared(context.others)
        evidence["shared_with_rank"] = {str(rank): share for rank, share in shared.items()}
        same = [rank for rank, share in shared.items() if share > MANY]
        if same:
            ranks = ", ".join(map(str, same))
            text = f"rank {ranks} trains on samples of rank 0: {max(shared.values()):.0%} of them are the same"
            (problems if context.seen.is_replicated else warnings).append(text)
            advice.append("give the DataLoader a DistributedSampler, or shard the data or seed its order by rank")
        else:
            says += f"; the {len(context.others)} ranks have different ones"
    status = Status.PROBLEM if problems else Status.WARNING if warnings else Status.OK
    if status is Status.OK and not num_repeated:
        says += ", none of them twice" if len(passes) > 1 else ""
    return Finding(
        status=status,
        says=". ".join([*problems, *warnings, says]),
        evidence=evidence,
        advice=tuple(advice),
    )


def _sizes(sizes: list[int]) -> str:
    return named([str(size) for size in Counter(sizes)], 3)


def _of_loader(loader: Any) -> dict[str, Any]:
    return {
        "dataset": type(loader.dataset).__name__,
        "batch_size": loader.batch_size,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "sampler": type(getattr(loader, "sampler", None)).__name__,
    }


def _is_whole_data(context: Context, batch_size: int) -> bool:
    """Whether one batch is the whole dataset, so that each step must have the same."""
    for loader in context.seen.loaders:
        try:
            if len(loader) <= 1 or len(loader.dataset) <= batch_size:  # type: ignore[arg-type]
                return True
        except Exception:  # it need have no length
            continue
    return False


def _shared(others: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """Of each rank but 0, the share of its samples that rank 0 has too."""
    first = {digest for each in others[0]["digests"] for digest in each} if 0 in others else set()
    shared = {}
    for rank, told in others.items():
        its = [digest for each in told["digests"] for digest in each]
        if rank and its:
            shared[rank] = round(sum(digest in first for digest in its) / len(its), 4)
    return shared

"""What ranks tell each other, by the job's own store: no collective, for one rank may be gone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PREFIX = "sosa_doctor"


def exchange(what: str, mine: Any, *, seconds: float, wait_for: tuple[int, ...] | None = None) -> Mapping[int, Any]:
    """Tell the others JSON values, and take theirs; those who have not spoken in time are missing.

    Args:
        wait_for: these ranks only; None: all. Without a process group there is this one alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {0: mine}
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found = {rank: mine}
    with contextlib.suppress(Exception):  # a store that is gone is a rank that is gone
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{PREFIX}/{what}/{rank}", json.dumps(mine))
        others = [other for other in (wait_for if wait_for is not None else range(num_ranks)) if other != rank]
        for other in others:
            key = f"{PREFIX}/{what}/{other}"
            store.wait([key], timedelta(seconds=seconds))
            found[other] = json.loads(store.get(key))
    return dict(sorted(found.items()))

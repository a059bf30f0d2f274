"""The pair of ranks that other tests here stand on: a case that fails says where, and leaves nothing to the next."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from two_ranks import RankFailed, TwoRanks


def total(rank: int, factor: float) -> float:
    tensor = torch.tensor([(rank + 1) * factor])
    dist.all_reduce(tensor)
    return tensor.item()


def raises_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def pid(rank: int) -> int:
    return os.getpid()


def test_a_case_runs_on_both_ranks_and_starts_no_new_processes(two_ranks: TwoRanks) -> None:
    before = two_ranks.run(pid)
    assert two_ranks.run(total, 2.0) == [6.0, 6.0]
    assert two_ranks.run(pid) == before


def test_a_rank_that_raises_is_named_and_the_one_that_waits_for_it_does_not_hold_up_the_next_case() -> None:
    with TwoRanks() as pair:
        with pytest.raises(RankFailed, match=r"(?s)rank 1: Traceback.*only here.*rank 0: no answer"):
            pair.run(raises_on_one)
        assert pair.run(total, 1.0) == [3.0, 3.0]

"""Errors of several ranks explained: a collective that one rank does not come to, and a model inside DDP."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import TwoRanks

from sosa_stream.agent.explain import explain


def rank_1_stays_away(rank: int) -> str:
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=1))
    said = ""
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(3), group=group)
        except RuntimeError as error:
            said = str(explain(error))
    dist.barrier()
    dist.destroy_process_group(group)
    return said


def test_a_collective_that_timed_out_says_for_how_long_and_at_which_line(two_ranks: TwoRanks) -> None:
    said, _ = two_ranks.run(rank_1_stays_away)
    first, *rest = said.splitlines()
    assert first == "collective timed out: another rank did not come to the same collective within 1 s"
    assert rest[0].endswith("in rank_1_stays_away: dist.all_reduce(torch.ones(3), group=group)")


def wrong_input(rank: int) -> str:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(9, 2))))
    try:
        model(torch.randn(3, 4))
    except RuntimeError as error:
        return str(explain(error))
    return ""


def test_the_path_is_that_of_the_model_and_not_of_ddp(two_ranks: TwoRanks) -> None:
    for said in two_ranks.run(wrong_input):
        assert said.startswith("shape mismatch in 1.0 (Linear): a linear layer made for 9 input features was given 8")

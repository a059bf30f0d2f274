"""Ranks that take different numbers of steps on purpose: nothing is compared, and no fix is held."""

from __future__ import annotations

import torch
from agent_parts import Watch, command
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from two_ranks import TwoRanks

from sosa_stream.protocol.actions import Action


def joins(rank: int) -> tuple[int, int, str, str]:
    model = DistributedDataParallel(nn.Linear(4, 1))
    optimizer = SGD(model.parameters(), lr=0.01)
    fix = command(Action(action="scale_lr", params={"factor": 0.5}))
    with Watch(guard=False, alone=False, digest_every=1).installed() as watch:
        before = watch.actuators.refusal(fix, 0)
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        num_before = sum("digest" in row for row in watch.rows)
        with model.join():
            for _ in range(6 + 2 * rank):
                model(torch.randn(2, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        after = watch.actuators.refusal(fix, 0)
        num_after = sum("digest" in row for row in watch.rows) - num_before
    assert not watch.errors, watch.errors
    return num_before, num_after, before, after


def test_with_join_no_digest_is_sent_and_no_fix_is_held(two_ranks: TwoRanks) -> None:
    for num_before, num_after, before, after in two_ranks.run(joins):
        assert (num_before > 0, num_after, before) == (True, 0, "")
        assert "different numbers of steps" in after
